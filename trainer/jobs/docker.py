"""Container engine: connection, error messages, and the scorer (the reward service's container)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias, cast

from trainer.runtime.errors import ContainerError, reason

if TYPE_CHECKING:  # the SDK is imported by the commands that need an engine
    from docker import DockerClient
    from docker.models.containers import Container

ROLE = "karlo-reward-lab.role"
KEYS = "karlo-reward-lab.keys"  # on the scorer: path of its keys file, for `reward-service keys`
SCORER_PORT = 8000
KILLED = 137

_TIMEOUT_S = 60
_Streams: TypeAlias = "tuple[bytes | None, bytes | None]"  # stdout and stderr

# Part of an error message of the engine, in lower case; its cause and the remedy.
_REMEDIES = (
    (
        "no space left on device",
        "the disk is full; `docker system df` shows its use, `docker image prune` frees some",
    ),
    (
        "could not select device driver",
        "the engine has no GPU; install NVIDIA's driver and container toolkit, or leave --gpus out",
    ),
    ("unknown device", "there is no such GPU; `nvidia-smi -L` lists those there are"),
    ("nvidia-container-cli", "the GPU cannot be used; check that `nvidia-smi` works on this machine"),
    (
        "no such image",
        "there is no such image; build it with `docker compose build`, or name another with --image",
    ),
    ("is already in use by container", "a container of this name exists; choose another --name"),
    ("range of cpus", "--cpus is more than this machine has, or too little"),
    ("memory limit", "--memory is too little for a container"),
    ("no such container", "the container is gone; see `reward-trainer jobs list`"),
    (
        "network",
        "there is no such network; start the scorer: docker compose up -d reward, or set --network",
    ),
)


@contextmanager
def engine() -> "Iterator[DockerClient]":
    """Yield a client of the engine in DOCKER_HOST, or of the machine's own.

    Raises:
        ContainerError: The engine cannot be reached, or an operation in this block fails.
    """
    import docker
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        client = docker.from_env(timeout=_TIMEOUT_S)
    except (DockerException, RequestException) as error:
        raise ContainerError(_connection_message(error)) from error
    try:
        yield client
    except (DockerException, RequestException) as error:
        raise ContainerError(error_message(error)) from error
    finally:
        client.close()


def hosts_without_proxy() -> str:
    """Return `noProxy` of the engine's client configuration, from which containers get their proxies."""
    from docker.utils.config import load_general_config

    proxies = load_general_config().get("proxies") or {}
    return str((proxies.get("default") or {}).get("noProxy") or "")


def _connection_message(error: Exception) -> str:
    if "permission denied" in str(error).lower():
        return "permission denied for the container engine; add this user to the group docker, or use sudo"
    cause = f"cannot connect to a container engine ({reason(error)})"
    return f"{cause}; install Docker, start it, or set DOCKER_HOST"


def error_message(error: Exception) -> str:
    """Return an error of the engine as one line, with cause and remedy if they are known."""
    message = str(getattr(error, "explanation", None) or error)
    for part, remedy in _REMEDIES:
        if part in message.lower():
            return f"{remedy} ({reason(Exception(message))})"
    return f"error of the container engine: {reason(Exception(message))}"


def find_scorer(client: "DockerClient", name: str | None) -> "Container":
    """Return the running scorer of this name; without a name, the only one.

    Raises:
        ContainerError: There is none, or more than one.
    """
    running = client.containers.list(filters={"label": f"{ROLE}=scorer"})
    if name is not None:
        running = [container for container in running if container.name == name]
    if len(running) == 1:
        return running[0]
    if running:
        names = ", ".join(sorted(container.name or "" for container in running))
        raise ContainerError(f"several scorers are running here; choose one with --scorer: {names}")
    missing = "no scorer is running here" if name is None else f"no scorer {name!r} is running here"
    raise ContainerError(
        f"{missing}; start one with `docker compose up -d reward`, or name one elsewhere with --url"
    )


def network_of(scorer: "Container") -> str:
    """Return the network in which other containers reach the scorer by its name."""
    networks = scorer.attrs["NetworkSettings"]["Networks"]
    own: list[str] = sorted(set(networks) - {"bridge", "host", "none"})
    if not own:
        raise ContainerError(
            f"{scorer.name} is in no network that resolves names; start it with docker compose"
        )
    return own[0]


def run_inside(container: "Container", command: Sequence[str]) -> str:
    """Run a command in a container and return its output, or raise a ContainerError."""
    code, (out, err) = cast("tuple[int, _Streams]", container.exec_run(list(command), demux=True))
    if code:
        lines = (err or out or b"").decode(errors="replace").strip().splitlines()
        raise ContainerError(f"{container.name}: {lines[-1] if lines else f'exit code {code}'}")
    return (out or b"").decode()


def new_key(scorer: "Container", name: str, weight: float) -> str | None:
    """Create an API key at the scorer, in place of any earlier one of the name; None if it needs no keys."""
    file = scorer.labels.get(KEYS)
    if file is None:
        return None
    with suppress(ContainerError):  # usually there is none
        remove_key(scorer, name)
    command = ["reward-service", "keys", "new", name, "--weight", str(weight), "--file", file]
    return run_inside(scorer, command).strip()


def remove_key(scorer: "Container", name: str) -> None:
    """Revoke the API keys of a name at the scorer."""
    file = scorer.labels.get(KEYS)
    if file is not None:
        run_inside(scorer, ["reward-service", "keys", "remove", name, "--file", file])


def rejoin(client: "DockerClient", container: "Container", scorer: "Container") -> None:
    """Move a stopped container into the scorer's current network: `down` and `up` create a new one."""
    from docker.errors import NotFound

    network = client.networks.get(network_of(scorer))
    joined = container.attrs["NetworkSettings"]["Networks"]
    if joined.get(network.name, {}).get("NetworkID") == network.id:
        return
    for name in joined:
        with suppress(NotFound):
            client.api.disconnect_container_from_network(container.name or "", name, force=True)
    network.connect(container)


def restart_if_killed(client: "DockerClient", name: str) -> bool:
    """Start a scorer again if it was killed; return whether it was.

    The engine restarts a container that fails, but takes `docker kill` for a request to stop. A scorer that
    was stopped in order, or ran out of memory, is not started.
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
