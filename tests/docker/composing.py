"""The repository's Docker Compose project under a name of its own."""

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
    """One Compose project: containers, volumes and networks, separate from others of this repository."""

    project: str
    runs: Path
    environment: dict[str, str] = field(default_factory=dict)  # content of a file .env
    port: int = field(default_factory=free_port)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `docker compose ARGUMENTS` in the repository and capture its output."""
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
        """Published address of the reward service."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def container(self) -> str:
        """Name of the reward service's container."""
        engine = docker.from_env()
        try:
            return str(self.containers(engine)["reward"].name)
        finally:
            engine.close()

    @property
    def network(self) -> str:
        """Network of the containers."""
        return f"{self.project}_default"

    def containers(self, engine: docker.DockerClient) -> dict[str, Container]:
        """Return the containers by the names of their services, ended ones included."""
        label = f"com.docker.compose.project={self.project}"
        listed = engine.containers.list(all=True, filters={"label": label})
        return {container.labels["com.docker.compose.service"]: container for container in listed}

    def key(self, name: str) -> str:
        """Create an API key of the reward service."""
        created = self(
            "exec", "-T", "reward", "sh", "-c", f"reward-service keys new {name} --file /keys/keys.yaml 2>&1"
        )
        assert created.returncode == 0, created.stdout
        return next(line for line in created.stdout.splitlines() if line.startswith("rk_"))

    def down(self) -> None:
        """Remove containers, volumes and networks."""
        self("down", "--volumes", "--timeout", "5")
