"""The application on Ray Serve with two replicas: the same API, the same scores, and nothing lost."""

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
from tests.support.service.ray_faults import FATAL

TWO = {"num_replicas": 2}
#: With any pair under way, both of them.
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
REAL, BREAKABLE = "reward_service.ray_app:app", "tests.support.service.ray_faults:app"
#: A new replica imports and loads everything, perhaps on a busy machine.
WAIT_S = 150.0
_CALLERS = 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("ray") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of keys, and the key in it."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    return path, new_key(path, "trainer")[0]


@pytest.fixture(scope="module")
def judges(running: Cluster, checkpoints: Checkpoints, key: tuple[Path, str]) -> Callable[..., Cluster]:
    """Has judges run, of the application at an import path."""

    def deploy(import_path: str = REAL, options: Mapping[str, Any] = TWO) -> Cluster:
        overrides = ["threads=1", "auth.allow_anonymous=true", f"auth.keys={key[0]}"]
        running.deploy(
            import_path=import_path,
            args={"config": str(checkpoints.config), "set": overrides},
            deployments=[{"name": "judge", **options}],
        )
        return running

    return deploy


@pytest.fixture
def app(judges: Callable[..., Cluster]) -> str:
    return judges().url


globals().update(over_http.tests())


class Load:
    """Callers who check every score that they get. They rest in between: a new replica shares the cores."""

    def __init__(
        self, url: str, engine: RewardEngine, images: list[Pixels], retry_budget_s: float = WAIT_S
    ) -> None:
        self._url, self._retry_budget_s, self._ended = url, retry_budget_s, threading.Event()
        self._prompts, self._images = list(PROMPTS), images
        pairs = [Pair(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]
        self._expected = [scores.raw for scores in engine.score(pairs, deterministic=True)]
        self._pool = ThreadPoolExecutor(_CALLERS)
        self._calls = [self._pool.submit(self._ask) for _ in range(_CALLERS)]
        self.answered = 0

    def __enter__(self) -> Load:
        self.wait_for(8)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        for call in self._calls:
            call.result()

    def wait_for(self, answers: int) -> None:
        """Until there are so many more."""
        goal, deadline = self.answered + answers, time.monotonic() + WAIT_S
        while self.answered < goal:
            assert time.monotonic() < deadline, "no answers come"
            assert not any(call.done() for call in self._calls)
            time.sleep(0.01)

    def _ask(self) -> None:
        with RewardClient(
            self._url, retry_budget_s=self._retry_budget_s, chunk_pairs=4, pin="first"
        ) as service:
            while not self._ended.is_set():
                assert raw(service.score(self._prompts, self._images, deterministic=True)) == self._expected
                self.answered += 1
                self._ended.wait(0.05)


def raw(answer: ScoreResponse) -> list[dict[str, float]]:
    return [{name: score.raw for name, score in result.scores.items()} for result in answer.results]


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.1)


def replaced(running: Cluster, gone: Collection[int]) -> bool:
    """Whether two replicas run, and some processes do not any more."""
    pids = running.pids()
    return running.status()["replicas"] == {"RUNNING": 2} and len(pids) == 2 and not set(pids) & set(gone)


def scored_by_replica(url: str) -> dict[str, float]:
    """Pairs scored, by replica."""
    lines = httpx.get(f"{url}/metrics", timeout=20).text.splitlines()
    found = [line for line in lines if line.startswith("reward_pairs_total{")]
    return {line.split('"')[1]: float(line.split()[1]) for line in found}


def test_every_replica_gives_the_same_scores(app: str, engine: RewardEngine, images: list[Pixels]) -> None:
    """Both score, as the page of metrics tells, and whoever does, the numbers are the engine's to the bit."""
    before = scored_by_replica(app)
    assert len(before) == 2
    with Load(app, engine, images) as load:
        load.wait_for(20)
    after = scored_by_replica(app)
    assert all(after[name] > before[name] for name in before)
    asked = 4 * len(PROMPTS)
    with RewardClient(app) as service:
        service.score(list(PROMPTS) * 4, images * 4)
    assert sum(scored_by_replica(app).values()) == sum(after.values()) + asked


def test_keys_are_checked_by_every_replica(app: str, key: tuple[Path, str]) -> None:
    """A key is let in and a wrong one is not, whichever replica answers."""
    statuses = {
        given: {
            httpx.get(f"{app}/v1/evaluators", headers={"Authorization": f"Bearer {given}"}).status_code
            for _ in range(12)
        }
        for given in (key[1], key[1][:-1] + "!")
    }
    assert list(statuses.values()) == [{200}, {401}]


def test_what_cannot_be_deployed_is_told_and_changes_nothing(
    running: Cluster, judges: Callable[..., Cluster]
) -> None:
    """Ray's status has our one line, and the version before goes on."""
    judges()
    before = running.pids()
    running.deploy(wait=False, import_path=REAL, args={"config": "/no/such.yaml"})
    wait_until(lambda: running.status()["status"] == "DEPLOY_FAILED", "the refusal")
    message = running.status()["message"].strip()
    assert message.splitlines()[-1] == "/no/such.yaml: no such configuration file; name one with --config"
    assert "Traceback" not in message
    assert httpx.get(f"{running.url}/health/ready").status_code == 200
    assert running.pids() == before


def test_a_killed_replica_loses_no_request(
    judges: Callable[..., Cluster], engine: RewardEngine, images: list[Pixels]
) -> None:
    """kill -9 under load: callers who retry get every score, all right, and two replicas run again."""
    running = judges()
    before = running.pids()
    assert len(before) == 2
    with Load(running.url, engine, images) as load:
        os.kill(before[0], signal.SIGKILL)
        load.wait_for(20)
        wait_until(lambda: replaced(running, before[:1]), "a new replica")
        load.wait_for(20)


def test_another_version_is_deployed_without_losing_a_request(
    judges: Callable[..., Cluster], engine: RewardEngine, images: list[Pixels]
) -> None:
    """Replicas are replaced one after the other under load; who asks without retries gets every answer."""
    running = judges()
    before = running.pids()
    with Load(running.url, engine, images, retry_budget_s=0.0) as load:
        judges(BREAKABLE, SCALING)
        wait_until(lambda: replaced(running, before), "new replicas")
        load.wait_for(20)


def test_a_judge_that_fails_is_replaced(
    judges: Callable[..., Cluster], engine: RewardEngine, images: list[Pixels]
) -> None:
    """A device that fails for good is told to its caller, its process ends, and others notice nothing."""
    running = judges(BREAKABLE, SCALING)
    before = running.pids()
    with Load(running.url, engine, images) as load:
        with RewardClient(running.url, retry_budget_s=0.0) as service, pytest.raises(OverloadedError):
            service.score([FATAL], images[:1])
        wait_until(lambda: len(set(before) - set(running.pids())) == 1, "the failed process's end")
        wait_until(lambda: replaced(running, set(before) - set(running.pids())), "a new replica")
        load.wait_for(20)


def test_replicas_follow_the_pairs_that_wait(
    judges: Callable[..., Cluster], engine: RewardEngine, images: list[Pixels]
) -> None:
    """With nothing to do one replica is left; with more pairs than it should have, a second one comes."""
    running = judges(BREAKABLE, SCALING)
    wait_until(lambda: running.status()["replicas"] == {"RUNNING": 1}, "the end of the second replica")
    with Load(running.url, engine, images):
        wait_until(lambda: running.status()["replicas"] == {"RUNNING": 2}, "a second replica")


def test_what_was_admitted_is_answered_at_the_end(
    running: Cluster, judges: Callable[..., Cluster], images: list[Pixels]
) -> None:
    """The application is taken down while a long request is under way, which is answered all the same."""
    if not running.pids():
        judges()
    url, asked = running.url, 1000
    with RewardClient(url, chunk_pairs=asked, retry_budget_s=0.0) as service, ThreadPoolExecutor(1) as pool:
        call = pool.submit(service.score, ["x"] * asked, images[1:2] * asked, deterministic=True)
        wait_until(lambda: over_http._metric(url, "reward_inflight_bytes") > 0, "its arrival")
        running.delete()
        assert len(call.result().results) == asked
    assert httpx.get(f"{url}/v1/evaluators").status_code == 404
