"""Trainer jobs as containers beside a scorer's.

All that is known of a job is in the engine (its container, its labels) and in its folders: RUNS/NAME, which
the job writes, and RUNS/.jobs/NAME, which holds its key. So any command line on the machine sees the same.
"""

import difflib
import os
import re
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from trainer.config import ConfigError
from trainer.jobs.docker import (
    KEYS,
    KILLED,
    ROLE,
    SCORER_PORT,
    find_scorer,
    network_of,
    new_key,
    rejoin,
    remove_key,
)
from trainer.jobs.submit import CONFIGS, RUNS, SECRET, Asking, Command
from trainer.runtime.errors import ContainerError

if TYPE_CHECKING:  # the SDK is loaded where a command needs an engine
    from docker import DockerClient
    from docker.models.containers import Container

JOB, SCORER, COMMAND, WEIGHT, SUBMISSION = (
    f"karlo-reward-lab.{name}" for name in ("job", "scorer", "command", "weight", "submission")
)
FOLDER = "karlo-reward-lab.runs"
IMAGE = "karlo-reward-lab/trainer"
GRACE_S = 300
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_SOMEBODY = 1000  # who jobs are where root submits them: the images' own user
_STOPPED = (129, 130, 143)

# The same container, started again, goes on with the run that it began.
_GO_ON = f'test -e {RUNS}/"$0"/config.yaml && exec reward-trainer "$@" --resume; exec reward-trainer "$@"'


@dataclass(frozen=True)
class Limits:
    """What a job may take; None: as much as there is.

    Args:
        gpus: `all`, how many, or `device=0,1`
        cpus: cores
        memory: such as 8g
    """

    gpus: str | None = None
    cpus: float | None = None
    memory: str | None = None
    shared_memory: str = "1g"

    def options(self) -> dict[str, Any]:
        """For the engine. Raises ConfigError."""
        options: dict[str, Any] = {"shm_size": _bytes("--shm-size", self.shared_memory)}
        if self.cpus is not None:
            options["nano_cpus"] = round(self.cpus * 1e9)
        if self.memory is not None:
            options |= dict.fromkeys(("mem_limit", "memswap_limit"), _bytes("--memory", self.memory))
        if self.gpus is not None:
            options["device_requests"] = [_gpus(self.gpus)]
        return options


@dataclass(frozen=True)
class Submission:
    """A job to be.

    Args:
        runs: folder on this machine, below which the job has its own
        mounts: further ones, as the engine wants them
        scorer: its container's name; None for the only one
        url: of a scorer elsewhere, in place of a container; `network` is then the job's
        key_file: the key for it
        go_on: with the run or the experiment that its folder holds
    """

    name: str
    command: Command
    runs: Path
    image: str = IMAGE
    limits: Limits = Limits()
    environment: dict[str, str] | None = None
    mounts: Sequence[str] = ()
    scorer: str | None = None
    url: str | None = None
    network: str | None = None
    key_file: Path | None = None
    weight: float = 1.0
    go_on: bool = False


@dataclass(frozen=True)
class Job:
    """What the engine knows of a job."""

    name: str
    state: str
    exit_code: int | None
    command: str
    started: str
    ended: str

    @property
    def over(self) -> bool:
        """Whether it does not run."""
        return self.exit_code is not None


def submit(client: "DockerClient", wanted: Submission) -> None:
    """Start a job. Raises ConfigError or ContainerError; then nothing of it is left."""
    _check_name(client, wanted)
    scorer = None if wanted.url else find_scorer(client, wanted.scorer)
    owner = os.getuid() or _SOMEBODY, os.getgid() or _SOMEBODY
    ours = token_hex(8)
    run, secrets = wanted.runs / wanted.name, _secrets(wanted.runs, wanted.name)
    container: Container | None = None
    try:
        # First, because the engine gives a name once only: nobody else's key and folders are touched below.
        container = client.containers.create(wanted.image, **_options(wanted, scorer, owner, ours))
        for folder in (run, secrets):
            _make(folder, owner)
        key = _key(wanted, scorer)
        if key is not None:
            _write_key(secrets / "key", key, owner)
        container.start()
    except BaseException:
        with _undisturbed():
            # By its label: a signal may have come between the engine's work and its answer.
            for made in client.containers.list(all=True, filters={"label": f"{SUBMISSION}={ours}"}):
                made.remove(force=True)
            if container is not None:
                _forget(scorer, wanted.name, secrets)
                with suppress(OSError):  # it holds a run to go on with
                    run.rmdir()
        raise


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Heed no signal: what has been made is being taken away."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def jobs(client: "DockerClient", names: Sequence[str] = ()) -> list[Job]:
    """The jobs of these names, or all, the oldest first. Raises ContainerError for a name that is none."""
    return [_job(container) for container in job_containers(client, names)]


def stop(client: "DockerClient", name: str, grace_s: int = GRACE_S) -> Job:
    """Have a job save what it has and end."""
    container = _container(client, name)
    if not container.attrs["State"]["Running"]:
        raise ContainerError(f"{name} does not run: it is {_job(container).state}")
    # The engine's answer may take as long as the job.
    client.api.timeout = grace_s + 60
    container.stop(timeout=grace_s)
    container.reload()
    return _job(container)


def resume(client: "DockerClient", name: str) -> None:
    """Let a job go on that ended before it was done, in the scorer's network of now, with a new key."""
    container = _container(client, name)
    job = _job(container)
    if not job.over and job.state != "created":
        raise ContainerError(f"{name} runs already")
    if job.exit_code == 0:
        raise ContainerError(f"{name} is done; submit another job for more")
    for bind in container.attrs["HostConfig"]["Binds"]:
        source = bind.partition(":")[0]
        if source.startswith("/") and not Path(source).exists():  # else the engine would make a folder of it
            raise ContainerError(f"{source} is gone, which {name} needs; put it back, or submit another job")
    if scorer := _scorer_of(client, container):
        rejoin(client, container, scorer)
        _renew_key(container, scorer)
    container.start()


def remove(client: "DockerClient", name: str) -> str:
    """Remove a job's container and its key; what stays, and where."""
    container = _container(client, name)
    if container.attrs["State"]["Running"]:
        raise ContainerError(f"{name} runs; stop it first: reward-trainer jobs stop {name}")
    runs, scorer = Path(container.labels[FOLDER]), _scorer_of(client, container)
    container.remove()
    stays = f"its run stays in {runs / name}"
    if _forget(scorer, name, _secrets(runs, name)) or SCORER not in container.labels:
        return stays
    late = f"reward-service keys remove job-{name} --file /keys/keys.yaml"
    return f"{stays}; its key still counts: once the scorer runs, docker compose exec reward {late}"


def logs(client: "DockerClient", name: str, *, follow: bool, tail: int | None) -> Iterator[bytes]:
    """What a job has printed, and, following it, prints until it ends."""
    container = _container(client, name)
    yield from container.logs(stream=True, follow=follow, tail="all" if tail is None else tail)


# ------------------------------------------------------------------------------------------- parts


def _check_name(client: "DockerClient", wanted: Submission) -> None:
    if not _NAME.fullmatch(wanted.name):
        rule = "lower-case letters, digits, dots, dashes and underscores, 40 at most"
        raise ConfigError(f"--name {wanted.name!r}: a job's name has {rule}")
    if any(job.name == wanted.name for job in jobs(client)):
        raise ContainerError(
            f"there is a job {wanted.name!r}; choose another --name, let it go on with "
            f"`reward-trainer jobs resume {wanted.name}`, or remove it with `jobs remove {wanted.name}`"
        )
    run = wanted.runs / wanted.name
    if ":" in str(run):
        raise ConfigError(f"--runs {wanted.runs}: the engine takes no path with a colon; name another")
    new = wanted.command.has_folder and not (wanted.go_on or wanted.command.resumes)
    if new and run.is_dir() and any(not file.name.startswith(".") for file in run.iterdir()):
        raise ContainerError(f"{run} holds a run; choose another --name, or go on with it: submit --go-on")


def next_name(client: "DockerClient", runs: Path, command: str) -> str:
    """The first of `train`, `train-2` … that is free."""
    taken = {job.name for job in jobs(client)}
    names = (command if n == 1 else f"{command}-{n}" for n in range(1, 10_000))
    return next(name for name in names if name not in taken and not (runs / name).exists())


def _secrets(runs: Path, name: str) -> Path:
    return runs / ".jobs" / name


def _make(folder: Path, owner: tuple[int, int]) -> None:
    """A folder with those above it, each its owner's where root makes it. Raises ConfigError for a link."""
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link, which may lead anywhere; remove it, or choose another --name")
    if folder.is_dir():
        return
    _make(folder.parent, owner)
    folder.mkdir(exist_ok=True)
    if os.getuid() == 0:
        os.chown(folder, *owner, follow_symlinks=False)


def _key(wanted: Submission, scorer: "Container | None") -> str | None:
    if wanted.key_file is not None:
        return read_key(wanted.key_file)
    return new_key(scorer, f"job-{wanted.name}", wanted.weight) if scorer else None


def read_key(path: Path) -> str:
    """The one line of a key file. Raises ConfigError."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        key = ""
    if not key or "\n" in key:
        raise ConfigError(f"--key-file {path}: it must be a file of one line, the key")
    return key


def _scorer_of(client: "DockerClient", container: "Container") -> "Container | None":
    """The scorer that a job was submitted to, if it runs."""
    if SCORER not in container.labels:
        return None
    with suppress(ContainerError):
        return find_scorer(client, container.labels[SCORER])
    return None


def _renew_key(container: "Container", scorer: "Container") -> None:
    """Another key in the job's file: the scorer may have lost the earlier one, with its volume."""
    path = _secrets(Path(container.labels[FOLDER]), container.labels[JOB]) / "key"
    if path.exists():
        owner = path.stat().st_uid, path.stat().st_gid
        key = new_key(scorer, f"job-{container.labels[JOB]}", float(container.labels[WEIGHT]))
        if key is not None:
            # In place: the container has this very file.
            path.write_text(f"{key}\n", encoding="utf-8")
            os.chown(path, *owner)


def _write_key(path: Path, key: str, owner: tuple[int, int]) -> None:
    path.unlink(missing_ok=True)
    # The job's user alone may read it, from the first moment.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{key}\n")
    if os.getuid() == 0:
        os.chown(path, *owner)


def _forget(scorer: "Container | None", name: str, secrets: Path) -> bool:
    """Remove a job's key, at the scorer and here, as far as it can be; whether the scorer's is gone."""
    shutil.rmtree(secrets, ignore_errors=True)
    if scorer is None:
        return False
    try:
        remove_key(scorer, f"job-{name}")
    except ContainerError as error:
        return "no key is named" in str(error)
    return True


def _options(
    wanted: Submission, scorer: "Container | None", owner: tuple[int, int], ours: str
) -> dict[str, Any]:
    name, runs = wanted.name, wanted.runs.resolve()
    with_key = wanted.key_file is not None or (scorer is not None and KEYS in scorer.labels)
    url = wanted.url or f"http://{scorer.name if scorer else ''}:{SCORER_PORT}"
    volumes = [f"{runs / name}:{RUNS}/{name}:rw", f"{_models(scorer)}:/models:rw", *wanted.mounts]
    if with_key:
        volumes.append(f"{_secrets(runs, name) / 'key'}:{SECRET}:ro")
    if config := wanted.command.config:
        volumes.append(f"{config}:{CONFIGS}/{config.name}:ro")
    labels = {ROLE: "job", JOB: name, FOLDER: str(runs), COMMAND: shlex.join(wanted.command.words)}
    labels |= {WEIGHT: str(wanted.weight), SUBMISSION: ours}
    if scorer is not None:
        labels[SCORER] = scorer.name or ""
    network = network_of(scorer) if scorer else wanted.network
    return {
        "name": f"karlo-reward-lab-job-{name}",
        "command": wanted.command.inside(name, Asking(url, with_key)),
        **({"entrypoint": ["sh", "-c", _GO_ON, name]} if wanted.command.resumable else {}),
        "user": f"{owner[0]}:{owner[1]}",
        "working_dir": f"{RUNS}/{name}",
        "labels": labels,
        "environment": wanted.environment or {},
        "volumes": volumes,
        "init": True,
        "read_only": True,
        "tmpfs": {"/tmp": ""},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "log_config": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}},
        **({"network": network} if network else {}),
        **wanted.limits.options(),
    }


def _models(scorer: "Container | None") -> str:
    """The cache of models that the scorer uses, so that nothing is downloaded twice."""
    for mount in scorer.attrs["Mounts"] if scorer else ():
        if mount["Destination"] == "/models":
            return str(mount.get("Name") or mount["Source"])
    return "karlo-reward-lab-models"


def _bytes(option: str, size: str) -> int:
    from docker.errors import DockerException
    from docker.utils import parse_bytes

    try:
        found = int(parse_bytes(size))
    except DockerException:
        found = 0
    if found <= 0:
        raise ConfigError(f"{option} {size}: write a number with b, k, m or g, such as 8g")
    return found


def _gpus(given: str) -> Any:
    from docker.types import DeviceRequest

    if given == "all" or (given.isdecimal() and int(given) > 0):
        return DeviceRequest(count=-1 if given == "all" else int(given), capabilities=[["gpu"]])
    kind, _, devices = given.partition("=")
    if kind != "device" or not all(devices.split(",")):
        raise ConfigError(f"--gpus {given}: write all, how many, or device=0,1")
    return DeviceRequest(device_ids=devices.split(","), capabilities=[["gpu"]])


def job_containers(client: "DockerClient", names: Sequence[str]) -> "list[Container]":
    """The containers of these jobs, or of all, the oldest first. Raises ContainerError."""
    found = client.containers.list(all=True, filters={"label": f"{ROLE}=job"}, ignore_removed=True)
    by_name = {container.labels[JOB]: container for container in reversed(found)}
    for name in names:
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {close[0]}?" if close else "see `reward-trainer jobs list`"
            raise ContainerError(f"there is no job {name!r}; {hint}")
    return [container for name, container in by_name.items() if not names or name in names]


def _container(client: "DockerClient", name: str) -> "Container":
    return job_containers(client, [name])[0]


def _job(container: "Container") -> Job:
    state = container.attrs["State"]
    over = state["Status"] in ("exited", "dead")
    code = state["ExitCode"] if over else None
    return Job(
        container.labels[JOB],
        _outcome(code, out_of_memory=state["OOMKilled"]) if over else state["Status"],
        code,
        container.labels.get(COMMAND, ""),
        _moment(state["StartedAt"]),
        _moment(state["FinishedAt"]) if over else "",
    )


def _outcome(code: int | None, *, out_of_memory: bool) -> str:
    if out_of_memory:
        return "out of memory"
    known: dict[int | None, str] = {0: "done", 3: "guard tripped", KILLED: "killed"}
    known |= dict.fromkeys(_STOPPED, "stopped")
    return known.get(code, f"failed ({code})")


def _moment(stamp: str) -> str:
    """RFC 3339 with nanoseconds, or year 1 for never, to local seconds."""
    if stamp.startswith("0001"):
        return ""
    return datetime.fromisoformat(stamp[:19]).replace(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
