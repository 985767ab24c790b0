"""The composition serves the miniature and leaves a trained LoRA on the host."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import docker
import pytest
from docker.models.containers import Container
from PIL import Image

from reward_service.client import RewardClient

ROOT = Path(__file__).resolve().parents[2]
PROJECT = f"karlo-reward-lab-test-{os.getpid()}"
UID, GID = 12345, 12346  # neither root, nor the images' own user, nor anybody on the host

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2400)]


class Composition(NamedTuple):
    """What one `up --exit-code-from trainer` left."""

    exit_code: int
    output: str
    runs: Path
    port: int
    containers: dict[str, Container]


def compose(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the composition's command in the repository, output captured."""
    classic = shutil.which("docker-compose")
    command = [classic] if classic else ["docker", "compose"]
    return subprocess.run(
        [*command, "-p", PROJECT, *arguments],
        cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def composition(tmp_path_factory) -> Iterator[Composition]:
    """Build both images, run the composition to the end with a short training, take it down afterwards."""
    runs, port = tmp_path_factory.mktemp("runs"), free_port()
    environment = {
        "RUNS_DIR": str(runs),
        "REWARD_PORT": str(port),
        "RUN_UID": str(UID),
        "RUN_GID": str(GID),
        "TRAINER_ARGS": "--set iterations=2 --set prompts.validation_limit=4",
    }
    built = compose("build", **environment)
    assert built.returncode == 0, built.stdout[-4000:]
    engine = docker.from_env()
    try:
        done = compose("up", "--exit-code-from", "trainer", **environment)
        found = engine.containers.list(all=True, filters={"label": f"com.docker.compose.project={PROJECT}"})
        containers = {c.labels["com.docker.compose.service"]: c for c in found}
        yield Composition(done.returncode, done.stdout, runs, port, containers)
    finally:
        compose("down", "--volumes", "--timeout", "5", **environment)
        engine.close()


def test_the_training_ends_well(composition):
    """`docker-compose up --exit-code-from trainer` answers with the trainer's own exit code, 0."""
    assert composition.exit_code == 0, composition.output[-6000:]


def test_lora_and_pictures_lie_on_the_host(composition):
    """What was trained in a container outlives it, as files of the user who asked."""
    weights = list(composition.runs.glob("compose/**/*.safetensors"))
    pictures = list(composition.runs.glob("compose/**/*.png"))
    assert weights
    assert pictures
    assert {(p.stat().st_uid, p.stat().st_gid) for p in weights + pictures} == {(UID, GID)}


@pytest.mark.parametrize("service", ["reward", "trainer"])
def test_no_program_of_ours_runs_as_root(composition, service):
    """A hole in the judge or the learner opens no root shell."""
    user = composition.containers[service].attrs["Config"]["User"]
    assert user.partition(":")[0] not in {"", "0", "root"}


def test_the_judge_is_published_on_loopback_only(composition):
    """Without keys the judge answers this machine and nobody else."""
    bindings = composition.containers["reward"].attrs["HostConfig"]["PortBindings"]
    assert {b["HostIp"] for ports in bindings.values() for b in ports} == {"127.0.0.1"}


def test_the_host_can_ask_the_judge(composition):
    """The published port answers the light client with four scores."""
    judge = composition.containers["reward"]
    judge.start()
    try:
        with RewardClient(f"http://127.0.0.1:{composition.port}") as client:
            client.wait_until_ready(timeout_s=120)
            answer = client.score(["a red circle"], [Image.new("RGB", (48, 40), "red")])
    finally:
        judge.stop(timeout=10)
    assert set(answer.results[0].scores) == {"aesthetic", "clip", "pickscore", "hpsv2"}
