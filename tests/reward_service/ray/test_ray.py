"""Ray Serve application with two replicas: same API, same scores, no lost requests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.client import OverloadedError, RewardClient
from reward_service.engine.engine import RewardEngine
from reward_service.engine.types import Pair
from reward_service.images import Pixels
from reward_service.protocol import ScoreResponse
from reward_service.scoring.auth import new_key
from tests.reward_service.conftest import PROMPTS
from tests.support.service import over_http
from tests.support.service.checkpoints import Checkpoints

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: the extra `ray`")

from tests.support.service.ray_cluster import Cluster, cluster
from tests.support.service.ray_faults import FATAL, HOLD

TWO = {"num_replicas": 2}
#: Both replicas as soon as any pair is in progress.
SCALING = {
    "autoscaling_config": {
        "min_replicas": 1,
        "max_replicas": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 3,
        "look_back_period_s": 2,
        "policy": {
            "policy_function": "reward_service.ray_scaling:PairsPerReplica",
            "policy_kwargs": {"target_pairs": 0.1},
        },
    }
}
REAL_APP, BREAKABLE_APP = "reward_service.ray_app:app", "tests.support.service.ray_faults:app"
#: A new replica imports and loads everything, possibly on a machine under load.
WAIT_S = 600.0
_CLIENTS = 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("ray") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Keys file, and the key in it."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    return path, new_key(path, "trainer")[0]


@pytest.fixture(scope="module")
def deploy_replicas(
    running: Cluster, checkpoints: Checkpoints, key: tuple[Path, str]
) -> Callable[..., Cluster]:
    """Function that deploys replicas of the application at an import path."""

    def deploy(import_path: str = REAL_APP, options: Mapping[str, Any] = TWO) -> Cluster:
        overrides = ["threads=1", "auth.allow_anonymous=true", f"auth.keys={key[0]}"]
        running.deploy(
            import_path=import_path,
            args={"config": str(checkpoints.config), "set": overrides},
            deployments=[{"name": "judge", **options}],
        )
        return running

    return deploy


@pytest.fixture
def app(deploy_replicas: Callable[..., Cluster]) -> str:
    return deploy_replicas().url


globals().update(over_http.tests())


class Load:
    """Clients that verify every score. They pause between requests: a new replica shares the cores."""

    def __init__(
        self, url: str, engine: RewardEngine, images: list[Pixels], retry_budget_s: float = WAIT_S
    ) -> None:
        self._url, self._retry_budget_s, self._stopped = url, retry_budget_s, threading.Event()
        self._prompts, self._images = list(PROMPTS), images
        pairs = [Pair(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]
        self._expected = [scores.raw for scores in engine.score(pairs, deterministic=True)]
        self._pool = ThreadPoolExecutor(_CLIENTS)
        self._calls = [self._pool.submit(self._send_requests) for _ in range(_CLIENTS)]
        self.responses = 0

    def __enter__(self) -> Load:
        self.wait_for(8)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown()
        for call in self._calls:
            call.result()

    def wait_for(self, responses: int) -> None:
        """Wait for this many more responses."""
        goal, deadline = self.responses + responses, time.monotonic() + WAIT_S
        while self.responses < goal:
            assert time.monotonic() < deadline, "no responses arrive"
            assert not any(call.done() for call in self._calls)
            time.sleep(0.01)

    def _send_requests(self) -> None:
        with RewardClient(
            self._url, retry_budget_s=self._retry_budget_s, chunk_pairs=4, pin="first"
        ) as service:
            while not self._stopped.is_set():
                response = service.score(self._prompts, self._images, deterministic=True)
                assert raw_scores(response) == self._expected
                self.responses += 1
                self._stopped.wait(0.05)


def raw_scores(response: ScoreResponse) -> list[dict[str, float]]:
    return [{name: score.raw for name, score in result.scores.items()} for result in response.results]


def wait_until(condition: Callable[[], object], event: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{event} did not happen"
        time.sleep(0.1)


def replaced(running: Cluster, old_pids: Collection[int]) -> bool:
    """Return whether two replicas run, and none of the old processes."""
    pids = running.pids()
    return running.status()["replicas"] == {"RUNNING": 2} and len(pids) == 2 and not set(pids) & set(old_pids)


def scored_by_replica(url: str) -> dict[str, float]:
    """Return the number of scored pairs by replica."""
    lines = httpx.get(f"{url}/metrics", timeout=20).text.splitlines()
    found = [line for line in lines if line.startswith("reward_pairs_total{")]
    return {line.split('"')[1]: float(line.split()[1]) for line in found}


def test_all_replicas_return_the_same_scores(app: str, engine: RewardEngine, images: list[Pixels]) -> None:
    """Both replicas score according to the metrics, and the scores equal the engine's bit for bit."""
    before = scored_by_replica(app)
    assert len(before) == 2
    with Load(app, engine, images) as load:
        load.wait_for(20)
    after = scored_by_replica(app)
    assert all(after[name] > before[name] for name in before)
    submitted_pairs = 4 * len(PROMPTS)
    with RewardClient(app) as service:
        service.score(list(PROMPTS) * 4, images * 4)
    assert sum(scored_by_replica(app).values()) == sum(after.values()) + submitted_pairs


def test_all_replicas_check_keys(app: str, key: tuple[Path, str]) -> None:
    """A valid key is accepted and a wrong one refused, whichever replica responds."""
    statuses = {
        given: {
            httpx.get(f"{app}/v1/evaluators", headers={"Authorization": f"Bearer {given}"}).status_code
            for _ in range(12)
        }
        for given in (key[1], key[1][:-1] + "!")
    }
    assert list(statuses.values()) == [{200}, {401}]


def test_invalid_deployment_is_reported_and_changes_nothing(
    running: Cluster, deploy_replicas: Callable[..., Cluster]
) -> None:
    """Ray's status contains the one-line error, and the previous version continues."""
    deploy_replicas()
    before = running.pids()
    running.deploy(wait=False, import_path=REAL_APP, args={"config": "/no/such.yaml"})
    wait_until(lambda: running.status()["status"] == "DEPLOY_FAILED", "the refusal")
    message = running.status()["message"].strip()
    assert message.splitlines()[-1] == "/no/such.yaml: no such configuration file; name one with --config"
    assert "Traceback" not in message
    assert httpx.get(f"{running.url}/health/ready").status_code == 200
    assert running.pids() == before


def test_killed_replica_loses_no_request(
    deploy_replicas: Callable[..., Cluster], engine: RewardEngine, images: list[Pixels]
) -> None:
    """After kill -9 under load, clients that retry get all scores, and two replicas run again."""
    running = deploy_replicas()
    before = running.pids()
    assert len(before) == 2
    with Load(running.url, engine, images) as load:
        os.kill(before[0], signal.SIGKILL)
        load.wait_for(20)
        wait_until(lambda: replaced(running, before[:1]), "a new replica")
        load.wait_for(20)


def test_rolling_update_loses_no_request(
    deploy_replicas: Callable[..., Cluster], engine: RewardEngine, images: list[Pixels]
) -> None:
    """Replicas are replaced one by one under load; clients without retries get every response."""
    running = deploy_replicas()
    before = running.pids()
    with Load(running.url, engine, images, retry_budget_s=0.0) as load:
        deploy_replicas(BREAKABLE_APP, SCALING)
        wait_until(lambda: replaced(running, before), "new replicas")
        load.wait_for(20)


def test_failed_replica_is_replaced(
    deploy_replicas: Callable[..., Cluster], engine: RewardEngine, images: list[Pixels]
) -> None:
    """If a device fails permanently, its client gets an error and its process exits; others see no error."""
    running = deploy_replicas(BREAKABLE_APP, SCALING)
    before = running.pids()
    with Load(running.url, engine, images) as load:
        with RewardClient(running.url, retry_budget_s=0.0) as service, pytest.raises(OverloadedError):
            service.score([FATAL], images[:1])
        wait_until(lambda: len(set(before) - set(running.pids())) == 1, "the exit of the failed process")
        wait_until(lambda: replaced(running, set(before) - set(running.pids())), "a new replica")
        load.wait_for(20)


def test_autoscaling_follows_the_pairs_in_progress(
    deploy_replicas: Callable[..., Cluster], engine: RewardEngine, images: list[Pixels]
) -> None:
    """An idle service keeps one replica; more pairs than the target start a second one."""
    running = deploy_replicas(BREAKABLE_APP, SCALING)
    wait_until(lambda: running.status()["replicas"] == {"RUNNING": 1}, "the end of the second replica")
    with Load(running.url, engine, images):
        wait_until(lambda: running.status()["replicas"] == {"RUNNING": 2}, "a second replica")


def test_shutdown_finishes_admitted_requests(
    deploy_replicas: Callable[..., Cluster], images: list[Pixels], tmp_path: Path
) -> None:
    """A request that is in progress when the application is deleted still gets its response."""
    running = deploy_replicas(BREAKABLE_APP, TWO)
    with RewardClient(running.url, retry_budget_s=0.0) as service, ThreadPoolExecutor(2) as pool:
        call = pool.submit(service.score, [f"{HOLD}{tmp_path}"], images[:1])
        wait_until(lambda: call.done() or (tmp_path / "started").exists(), "the start of the request")
        deletion = pool.submit(running.delete)
        wait_until(lambda: httpx.get(f"{running.url}/v1/evaluators").status_code == 404, "the deletion")
        assert not call.done()
        assert not deletion.done()
        (tmp_path / "released").touch()
        assert len(call.result().results) == 1
        deletion.result()
