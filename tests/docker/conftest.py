"""Fixtures: the container engine, the images of this checkout, and a running reward service."""

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
    """Build karlo-reward-lab/setup, /reward and /trainer from this checkout."""
    built = composition_of(tmp_path_factory.mktemp("unused"), "build")("build")
    assert built.returncode == 0, built.stdout[-4000:]


def composition_of(runs: Path, name: str, **environment: str) -> Composition:
    """Return a composition with a name that no other test run uses."""
    return Composition(f"lab-test-{name}-{os.getpid()}", runs, environment)


@contextmanager
def serving(runs: Path, name: str) -> Iterator[Composition]:
    """Yield a composition whose reward service is ready, and remove it afterwards."""
    composition = composition_of(runs, name)
    try:
        up = composition("up", "-d", "reward")
        assert up.returncode == 0, up.stdout
        with RewardClient(composition.url) as client:
            client.wait_until_ready(timeout_s=120)
        yield composition
    finally:
        composition.down()
