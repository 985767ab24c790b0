"""Light client in a plain Python image, as other projects install it."""

from collections.abc import Iterator

import docker
import pytest
from docker.models.containers import Container

from benchmarks.images import light_container, measure_light
from tests.docker.composing import BASE_IMAGE, Composition
from tests.docker.conftest import serving

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1200)]

REQUEST = """
import sys
from PIL import Image
from reward_service.client import RewardClient
with RewardClient("http://reward:8000", api_key=sys.stdin.readline().strip()) as client:
    print(client.score(["a red circle"], [Image.new("RGB", (40, 40), "red")]).results[0].reward)
print(sorted({"torch", "fastapi", "uvicorn", "transformers"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def service(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    with serving(tmp_path_factory.mktemp("light"), "light") as composition:
        yield composition


@pytest.fixture(scope="module")
def neighbour(service: Composition, engine: docker.DockerClient) -> Iterator[Container]:
    container = light_container(engine, BASE_IMAGE, service.network)
    yield container
    container.remove(force=True)


def test_light_client_scores_without_torch(service: Composition, neighbour: Container) -> None:
    """From another container with the plain install: it gets a reward, and imports no torch."""
    command = f"echo {service.key('light')} | /tmp/light/bin/python -c '{REQUEST}'"
    done = neighbour.exec_run(["sh", "-c", command])
    assert done.exit_code == 0, done.output.decode()
    reward, heavy = done.output.decode().splitlines()
    assert 0 < float(reward) < 1
    assert heavy == "[]"


def test_light_client_installs_less_than_200_mb(neighbour: Container) -> None:
    """Megabytes, not gigabytes, and its import loads no heavy package."""
    measured = measure_light(neighbour)
    assert measured["size_mb"] < 200  # type: ignore[operator]
    assert measured["heavy"] == []
