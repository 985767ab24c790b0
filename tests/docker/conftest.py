"""The engine, the images of this checkout, and what every container of ours must be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
import pytest

from reward_service.client import RewardClient
from tests.docker.composing import Composition


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> None:
    """karlo-reward-lab/setup, /reward and /trainer, built of this checkout."""
    built = composition_of(tmp_path_factory.mktemp("unused"), "build")("build")
    assert built.returncode == 0, built.stdout[-4000:]


def composition_of(runs: Path, name: str, **environment: str) -> Composition:
    """A composition that no other run of the tests knows."""
    return Composition(f"lab-test-{name}-{os.getpid()}", runs, environment)


@contextmanager
def serving(runs: Path, name: str) -> Iterator[Composition]:
    """A composition whose scorer is ready, and afterwards none."""
    composition = composition_of(runs, name)
    try:
        up = composition("up", "-d", "reward")
        assert up.returncode == 0, up.stdout
        with RewardClient(composition.url) as client:
            client.wait_until_ready(timeout_s=120)
        yield composition
    finally:
        composition.down()
