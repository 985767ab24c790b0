"""The container engine: how it is reached, what its errors mean, and the scorer's container in it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias, cast

from trainer.runtime.errors import ContainerError, reason

if TYPE_CHECKING:  # the SDK is loaded where a command needs an engine
    from docker import DockerClient
    from docker.models.containers import Container

ROLE = "karlo-reward-lab.role"
KEYS = "karlo-reward-lab.keys"  # on the scorer: where its file of keys is, for `reward-service keys`
SCORER_PORT = 8000
KILLED = 137

_TIMEOUT_S = 60
_Streams: TypeAlias = "tuple[bytes | None, bytes | None]"  # what was printed, and on stderr

# A part of what the engine says, in lower case; what it means, and what helps.
_MEANINGS = (
    (
        "no space left on device",
        "the disk is full; `docker system df` shows what takes it, `docker image prune` frees some",
    ),
    (
        "could not select device driver",
        "the engine has no GPU; install NVIDIA's driver and container toolkit, or leave --gpus out",
    ),
    ("unknown device", "there is no such GPU; `nvidia-smi -L` lists those there are"),
    ("nvidia-container-cli", "the GPU cannot be used; see whether `nvidia-smi` works on this machine"),
    (
        "no such image",
        "there is no such image; make it with `docker compose build`, or name another with --image",
    ),
    ("is already in use by container", "a container of this name is there; choose another --name"),
    ("range of cpus", "--cpus is more than this machine has, or too little"),
    ("memory limit", "--memory is too little for a container"),
    ("no such container", "the container is gone; see `reward-trainer jobs list`"),
    (
        "network",
        "there is no such network; start the scorer: docker compose up -d reward, or see --network",
    ),
)


@contextmanager
def engine() -> "Iterator[DockerClient]":
    """The engine that DOCKER_HOST names, or the machine's own.

    Raises ContainerError: it cannot be reached, or what is done within fails.
    """
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        client = docker.from_env(timeout=_TIMEOUT_S)
    except (DockerException, RequestException) as error:
        raise ContainerError(_unreachable(error)) from error
    try:
        yield client
    except (DockerException, RequestException) as error:
        raise ContainerError(meaning(error)) from error
    finally:
        client.close()


def _unreachable(error: Exception) -> str:
    told = str(error).lower()
    if "permission denied" in told:
        return "this user may not use the container engine; add it to the group docker, or run this with sudo"
    return f"no container engine answers ({reason(error)}); install Docker, start it, or set DOCKER_HOST"


def meaning(error: Exception) -> str:
    """One line: what an engine's error means and what helps, or else what the engine says."""
    told = str(getattr(error, "explanation", None) or error)
    for part, meant in _MEANINGS:
        if part in told.lower():
            return f"{meant} ({reason(Exception(told))})"
    return f"the container engine says: {reason(Exception(told))}"


def find_scorer(client: "DockerClient", name: str | None) -> "Container":
    """The scorer's container: the one of this name, or the only one that runs.

    Raises ContainerError: there is none, or more than one.
    """
    running = client.containers.list(filters={"label": f"{ROLE}=scorer"})
    if name is not None:
        running = [container for container in running if container.name == name]
    if len(running) == 1:
        return running[0]
    if running:
        names = ", ".join(sorted(container.name or "" for container in running))
        raise ContainerError(f"several scorers run here; choose one with --scorer: {names}")
    wanted = "no scorer runs here" if name is None else f"no scorer {name!r} runs here"
    raise ContainerError(
        f"{wanted}; start one with `docker compose up -d reward`, or name one elsewhere with --url"
    )


def network_of(scorer: "Container") -> str:
    """The network in which others reach the scorer by its name."""
    networks = scorer.attrs["NetworkSettings"]["Networks"]
    own: list[str] = sorted(set(networks) - {"bridge", "host", "none"})
    if not own:
        raise ContainerError(
            f"{scorer.name} is in no network of its own, where names are known; start it with docker compose"
        )
    return own[0]


def run_inside(container: "Container", command: Sequence[str]) -> str:
    """What a command in a container prints. Raises ContainerError with its last line where it fails."""
    code, (out, err) = cast("tuple[int, _Streams]", container.exec_run(list(command), demux=True))
    if code:
        lines = (err or out or b"").decode(errors="replace").strip().splitlines()
        raise ContainerError(f"{container.name}: {lines[-1] if lines else f'exit code {code}'}")
    return (out or b"").decode()


def new_key(scorer: "Container", name: str, weight: float) -> str | None:
    """A new key, by the scorer's own command, in place of any that the name had; None if it needs none."""
    file = scorer.labels.get(KEYS)
    if file is None:
        return None
    with suppress(ContainerError):  # mostly there is none
        remove_key(scorer, name)
    command = ["reward-service", "keys", "new", name, "--weight", str(weight), "--file", file]
    return run_inside(scorer, command).strip()


def remove_key(scorer: "Container", name: str) -> None:
    """Let the keys of a name in no more."""
    file = scorer.labels.get(KEYS)
    if file is not None:
        run_inside(scorer, ["reward-service", "keys", "remove", name, "--file", file])


def rejoin(client: "DockerClient", container: "Container", scorer: "Container") -> None:
    """Put a container that does not run into the scorer's network of now: `down` and `up` make another."""
    from docker.errors import NotFound

    network = client.networks.get(network_of(scorer))
    joined = container.attrs["NetworkSettings"]["Networks"]
    if joined.get(network.name, {}).get("NetworkID") == network.id:
        return
    for name in joined:
        with suppress(NotFound):
            client.api.disconnect_container_from_network(container.name or "", name, force=True)
    network.connect(container)


def revive(client: "DockerClient", name: str) -> bool:
    """Start a scorer again that was ended by force; whether it was.

    The engine restarts one that fails, but counts `docker kill` as somebody's wish. An orderly stop is one.
    """
    from docker.errors import NotFound

    try:
        scorer = client.containers.get(name)
    except NotFound:
        return False
    state = scorer.attrs["State"]
    if state["Status"] != "exited" or state["ExitCode"] != KILLED or state["OOMKilled"]:
        return False
    scorer.start()
    return True
