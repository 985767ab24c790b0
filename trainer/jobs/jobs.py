"""Trainer jobs as containers beside a scorer (the reward service's container).

The state of a job is in the engine (its container and labels) and in its folders: RUNS/NAME, which the job
writes, and RUNS/.jobs/NAME, which holds its API key. Every command on the machine sees the same jobs.
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
from urllib.parse import urlsplit

from trainer.config import ConfigError
from trainer.jobs.docker import (
    KEYS,
    KILLED,
    ROLE,
    SCORER_PORT,
    find_scorer,
    hosts_without_proxy,
    network_of,
    new_key,
    rejoin,
    remove_key,
)
from trainer.jobs.submit import CONFIGS, RUNS, SECRET, Command, ServiceAccess, without_proxy
from trainer.runtime.errors import ContainerError

if TYPE_CHECKING:  # the SDK is imported by the commands that need an engine
    from docker import DockerClient
    from docker.models.containers import Container

JOB, SCORER, COMMAND, WEIGHT, SUBMISSION = (
    f"karlo-reward-lab.{name}" for name in ("job", "scorer", "command", "weight", "submission")
)
FOLDER = "karlo-reward-lab.runs"
IMAGE = "karlo-reward-lab/trainer"
GRACE_S = 300  # seconds for a job to save its checkpoint before it is killed
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_DEFAULT_USER = 1000  # user of jobs that root submits: the images' own user
_STOPPED = (129, 130, 143)  # exit codes after SIGHUP, SIGINT and SIGTERM

# A container that is started again resumes its run.
_ENTRYPOINT = (
    f'test -e {RUNS}/"$0"/config.yaml && exec reward-trainer "$@" --resume; exec reward-trainer "$@"'
)


@dataclass(frozen=True)
class Limits:
    """Resource limits of a job; None: no limit."""

    gpus: str | None = None  # `all`, a number, or `device=0,1`; None: no GPU
    cpus: float | None = None  # cores
    memory: str | None = None  # such as 8g
    shared_memory: str = "1g"

    def options(self) -> dict[str, Any]:
        """Return the limits as options of the engine; raise a ConfigError if one is invalid."""
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
    """A job to submit."""

    name: str
    command: Command
    runs: Path  # folder on this machine in which the job has its own
    image: str = IMAGE
    limits: Limits = Limits()
    environment: dict[str, str] | None = None
    mounts: Sequence[str] = ()  # further mounts, in the engine's form
    scorer: str | None = None  # name of the scorer's container; None: the only one
    url: str | None = None  # of a reward service elsewhere, instead of a scorer
    network: str | None = None  # of the job, with `url`
    key_file: Path | None = None  # file with the API key for `url`
    weight: float = 1.0  # share of the scorer among jobs
    go_on: bool = False  # resume the run or experiment in the job's folder


@dataclass(frozen=True)
class Job:
    """A job as the engine reports it."""

    name: str
    state: str
    exit_code: int | None  # None before it has ended
    command: str
    started: str  # local time; empty: not yet
    ended: str

    @property
    def has_ended(self) -> bool:
        """True if the job has an exit code."""
        return self.exit_code is not None


# ------------------------------------------------------------------------------------------- submit


def submit(client: "DockerClient", submission: Submission) -> None:
    """Start a job; if that fails, remove everything that was created for it.

    Raises:
        ConfigError: The submission is invalid.
        ContainerError: The name is taken, or there is no scorer.
    """
    _check_name(client, submission)
    scorer = None if submission.url else find_scorer(client, submission.scorer)
    owner = os.getuid() or _DEFAULT_USER, os.getgid() or _DEFAULT_USER
    token = token_hex(8)
    run, secrets = submission.runs / submission.name, _secrets(submission.runs, submission.name)
    container: Container | None = None
    try:
        # First, because the engine gives a name only once: key and folders of another job stay untouched.
        container = client.containers.create(submission.image, **_options(submission, scorer, owner, token))
        for folder in (run, secrets):
            _make_folder(folder, owner)
        key = _key(submission, scorer)
        if key is not None:
            _write_key(secrets / "key", key, owner)
        container.start()
    except BaseException:
        with _ignored_signals():
            # By the label: a signal may have come between the engine's work and its response.
            for created in client.containers.list(all=True, filters={"label": f"{SUBMISSION}={token}"}):
                created.remove(force=True)
            if container is not None:
                _remove_key(scorer, submission.name, secrets)
                with suppress(OSError):  # not empty: it holds a run to resume
                    run.rmdir()
        raise


@contextmanager
def _ignored_signals() -> Iterator[None]:
    """Ignore termination signals during cleanup."""
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


def next_name(client: "DockerClient", runs: Path, command: str) -> str:
    """Return the first free name of `train`, `train-2`, ..."""
    taken = {job.name for job in jobs(client)}
    names = (command if n == 1 else f"{command}-{n}" for n in range(1, 10_000))
    return next(name for name in names if name not in taken and not (runs / name).exists())


def _check_name(client: "DockerClient", submission: Submission) -> None:
    if not _NAME.fullmatch(submission.name):
        rule = "lower-case letters, digits, dots, dashes and underscores, 40 at most"
        raise ConfigError(f"--name {submission.name!r}: invalid name of a job; use {rule}")
    if any(job.name == submission.name for job in jobs(client)):
        raise ContainerError(
            f"a job {submission.name!r} exists; choose another --name, resume it with "
            f"`reward-trainer jobs resume {submission.name}`, or remove it with "
            f"`jobs remove {submission.name}`"
        )
    run = submission.runs / submission.name
    if ":" in str(run):
        raise ConfigError(f"--runs {submission.runs}: the engine accepts no path with a colon; name another")
    new = submission.command.has_folder and not (submission.go_on or submission.command.resumes)
    if new and run.is_dir() and any(not file.name.startswith(".") for file in run.iterdir()):
        raise ContainerError(f"{run} contains a run; choose another --name, or resume it: submit --go-on")


def _make_folder(folder: Path, owner: tuple[int, int]) -> None:
    """Create a folder and its parents, owned by the job's user; raise a ConfigError for a symbolic link."""
    if folder.is_symlink():
        raise ConfigError(
            f"{folder} is a symbolic link, which may point anywhere; remove it, or choose another --name"
        )
    if folder.is_dir():
        return
    _make_folder(folder.parent, owner)
    folder.mkdir(exist_ok=True)
    if os.getuid() == 0:
        os.chown(folder, *owner, follow_symlinks=False)


def _options(
    submission: Submission, scorer: "Container | None", owner: tuple[int, int], token: str
) -> dict[str, Any]:
    """Return the engine's options for the job's container."""
    name, runs = submission.name, submission.runs.resolve()
    with_key = submission.key_file is not None or (scorer is not None and KEYS in scorer.labels)
    url = submission.url or f"http://{scorer.name if scorer else ''}:{SCORER_PORT}"
    volumes = [f"{runs / name}:{RUNS}/{name}:rw", f"{_models(scorer)}:/models:rw", *submission.mounts]
    if with_key:
        volumes.append(f"{_secrets(runs, name) / 'key'}:{SECRET}:ro")
    if config := submission.command.config:
        volumes.append(f"{config}:{CONFIGS}/{config.name}:ro")
    labels = {ROLE: "job", JOB: name, FOLDER: str(runs), COMMAND: shlex.join(submission.command.words)}
    labels |= {WEIGHT: str(submission.weight), SUBMISSION: token}
    if scorer is not None:
        labels[SCORER] = scorer.name or ""
    network = network_of(scorer) if scorer else submission.network
    return {
        "name": f"karlo-reward-lab-job-{name}",
        "command": submission.command.in_container(name, ServiceAccess(url, with_key)),
        **({"entrypoint": ["sh", "-c", _ENTRYPOINT, name]} if submission.command.resumable else {}),
        "user": f"{owner[0]}:{owner[1]}",
        "working_dir": f"{RUNS}/{name}",
        "labels": labels,
        "environment": _environment(submission, scorer),
        "volumes": volumes,
        "init": True,
        "read_only": True,
        "tmpfs": {"/tmp": ""},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "log_config": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}},
        **({"network": network} if network else {}),
        **submission.limits.options(),
    }


def _environment(submission: Submission, scorer: "Container | None") -> dict[str, str]:
    """Return the job's environment; a reward service in its own network is reached without a proxy."""
    variables = submission.environment or {}
    in_network = scorer.name if scorer else submission.network and urlsplit(submission.url or "").hostname
    return without_proxy(in_network, variables, hosts_without_proxy()) if in_network else variables


def _models(scorer: "Container | None") -> str:
    """Return the volume or path of the scorer's model cache, so that nothing is downloaded twice."""
    for mount in scorer.attrs["Mounts"] if scorer else ():
        if mount["Destination"] == "/models":
            return str(mount.get("Name") or mount["Source"])
    return "karlo-reward-lab-models"


def _bytes(option: str, size: str) -> int:
    from docker.errors import DockerException
    from docker.utils import parse_bytes

    try:
        number = int(parse_bytes(size))
    except DockerException:
        number = 0
    if number <= 0:
        raise ConfigError(f"{option} {size}: use a number with b, k, m or g, such as 8g")
    return number


def _gpus(gpus: str) -> Any:
    from docker.types import DeviceRequest

    if gpus == "all" or (gpus.isdecimal() and int(gpus) > 0):
        return DeviceRequest(count=-1 if gpus == "all" else int(gpus), capabilities=[["gpu"]])
    kind, _, devices = gpus.partition("=")
    if kind != "device" or not all(devices.split(",")):
        raise ConfigError(f"--gpus {gpus}: use all, a number, or device=0,1")
    return DeviceRequest(device_ids=devices.split(","), capabilities=[["gpu"]])


# ------------------------------------------------------------------------------------------ manage


def jobs(client: "DockerClient", names: Sequence[str] = ()) -> list[Job]:
    """Return the jobs of these names, or all, the oldest first; raise a ContainerError for unknown names."""
    return [_job(container) for container in job_containers(client, names)]


def stop(client: "DockerClient", name: str, grace_s: int = GRACE_S) -> Job:
    """Terminate a job, which saves a checkpoint, and return its state."""
    container = _container(client, name)
    if not container.attrs["State"]["Running"]:
        raise ContainerError(f"{name} is not running: it is {_job(container).state}")
    # The engine responds when the job has ended.
    client.api.timeout = grace_s + 60
    container.stop(timeout=grace_s)
    container.reload()
    return _job(container)


def resume(client: "DockerClient", name: str) -> None:
    """Resume a job that ended before it was done, in the scorer's current network, with a new API key."""
    container = _container(client, name)
    job = _job(container)
    if not job.has_ended and job.state != "created":
        raise ContainerError(f"{name} is running already")
    if job.exit_code == 0:
        raise ContainerError(f"{name} is done; submit another job to train more")
    for bind in container.attrs["HostConfig"]["Binds"]:
        source = bind.partition(":")[0]
        if source.startswith("/") and not Path(source).exists():  # the engine would create a folder there
            raise ContainerError(
                f"{source}, which {name} needs, does not exist; restore it, or submit another job"
            )
    if scorer := _scorer_of(client, container):
        rejoin(client, container, scorer)
        _renew_key(container, scorer)
    container.start()


def remove(client: "DockerClient", name: str) -> str:
    """Remove a job's container and its API key; return a message about what is left."""
    container = _container(client, name)
    if container.attrs["State"]["Running"]:
        raise ContainerError(f"{name} is running; stop it first: reward-trainer jobs stop {name}")
    runs, scorer = Path(container.labels[FOLDER]), _scorer_of(client, container)
    container.remove()
    message = f"its run stays in {runs / name}"
    if _remove_key(scorer, name, _secrets(runs, name)) or SCORER not in container.labels:
        return message
    revoke = f"reward-service keys remove job-{name} --file /keys/keys.yaml"
    return f"{message}; its API key is still valid: once the scorer runs, docker compose exec reward {revoke}"


def logs(client: "DockerClient", name: str, *, follow: bool, tail: int | None) -> Iterator[bytes]:
    """Yield the output of a job; with `follow`, until it ends."""
    container = _container(client, name)
    yield from container.logs(stream=True, follow=follow, tail="all" if tail is None else tail)


def _scorer_of(client: "DockerClient", container: "Container") -> "Container | None":
    """Return the scorer that a job was submitted to, if it is running."""
    if SCORER not in container.labels:
        return None
    with suppress(ContainerError):
        return find_scorer(client, container.labels[SCORER])
    return None


# ------------------------------------------------------------------------------------------- keys


def _secrets(runs: Path, name: str) -> Path:
    return runs / ".jobs" / name


def _key(submission: Submission, scorer: "Container | None") -> str | None:
    if submission.key_file is not None:
        return read_key(submission.key_file)
    return new_key(scorer, f"job-{submission.name}", submission.weight) if scorer else None


def read_key(path: Path) -> str:
    """Return the API key in a file of one line; raise a ConfigError if it is not one."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        key = ""
    if not key or "\n" in key:
        raise ConfigError(f"--key-file {path}: expected a file of one line, the key")
    return key


def _write_key(path: Path, key: str, owner: tuple[int, int]) -> None:
    path.unlink(missing_ok=True)
    # Readable by the job's user only, from its creation on.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{key}\n")
    if os.getuid() == 0:
        os.chown(path, *owner)


def _renew_key(container: "Container", scorer: "Container") -> None:
    """Write a new API key to the job's file: the scorer may have lost the old one with its volume."""
    path = _secrets(Path(container.labels[FOLDER]), container.labels[JOB]) / "key"
    if path.exists():
        owner = path.stat().st_uid, path.stat().st_gid
        key = new_key(scorer, f"job-{container.labels[JOB]}", float(container.labels[WEIGHT]))
        if key is not None:
            # In place: this file is mounted in the container.
            path.write_text(f"{key}\n", encoding="utf-8")
            os.chown(path, *owner)


def _remove_key(scorer: "Container | None", name: str, secrets: Path) -> bool:
    """Remove a job's API key here and, if possible, at the scorer; return whether the scorer has none."""
    shutil.rmtree(secrets, ignore_errors=True)
    if scorer is None:
        return False
    try:
        remove_key(scorer, f"job-{name}")
    except ContainerError as error:
        return "no key is named" in str(error)
    return True


# -------------------------------------------------------------------------------------- containers


def job_containers(client: "DockerClient", names: Sequence[str]) -> "list[Container]":
    """Return the containers of these jobs, or of all, the oldest first.

    Raises:
        ContainerError: A name is unknown.
    """
    listed = client.containers.list(all=True, filters={"label": f"{ROLE}=job"}, ignore_removed=True)
    by_name = {container.labels[JOB]: container for container in reversed(listed)}
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
    ended = state["Status"] in ("exited", "dead")
    code = state["ExitCode"] if ended else None
    return Job(
        container.labels[JOB],
        _outcome(code, out_of_memory=state["OOMKilled"]) if ended else state["Status"],
        code,
        container.labels.get(COMMAND, ""),
        _local_time(state["StartedAt"]),
        _local_time(state["FinishedAt"]) if ended else "",
    )


def _outcome(code: int | None, *, out_of_memory: bool) -> str:
    if out_of_memory:
        return "out of memory"
    outcomes: dict[int | None, str] = {0: "done", 3: "guard tripped", KILLED: "killed"}
    outcomes |= dict.fromkeys(_STOPPED, "stopped")
    return outcomes.get(code, f"failed ({code})")


def _local_time(stamp: str) -> str:
    """Return an RFC 3339 time as local time to the second; empty for year 1, which means never."""
    if stamp.startswith("0001"):
        return ""
    return datetime.fromisoformat(stamp[:19]).replace(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
