"""The repository's composition under a project name of its own."""

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import docker
from docker.models.containers import Container

ROOT = Path(__file__).resolve().parents[2]
BASE_IMAGE = os.environ.get("BASE_IMAGE", "python:3.11-slim")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Composition:
    """One composition: its containers, volumes and networks, apart from others of this repository.

    Args:
        environment: what a file .env would hold
    """

    project: str
    runs: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`docker compose ARGUMENTS` in the repository, output captured."""
        classic = shutil.which("docker-compose")
        command = [classic] if classic else ["docker", "compose"]
        own = {"RUNS_DIR": str(self.runs), "REWARD_PORT": str(self.port)} | self.environment
        return subprocess.run(
            [*command, "-p", self.project, *arguments],
            cwd=ROOT,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    @property
    def url(self) -> str:
        """The service's published address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def container(self) -> str:
        """The service's container's name."""
        engine = docker.from_env()
        try:
            return str(self.containers(engine)["reward"].name)
        finally:
            engine.close()

    @property
    def network(self) -> str:
        """The network of its containers."""
        return f"{self.project}_default"

    def containers(self, engine: docker.DockerClient) -> dict[str, Container]:
        """The containers by their services' names, ended ones too."""
        label = f"com.docker.compose.project={self.project}"
        found = engine.containers.list(all=True, filters={"label": label})
        return {container.labels["com.docker.compose.service"]: container for container in found}

    def key(self, name: str) -> str:
        """A new key of the service."""
        made = self(
            "exec", "-T", "reward", "sh", "-c", f"reward-service keys new {name} --file /keys/keys.yaml 2>&1"
        )
        assert made.returncode == 0, made.stdout
        return next(line for line in made.stdout.splitlines() if line.startswith("rk_"))

    def down(self) -> None:
        """Remove everything but images and the runs."""
        self("down", "--volumes", "--timeout", "5")
