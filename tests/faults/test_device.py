"""Faults of device and models: documented status, correct scores for other clients, and recovery."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from reward_service.config import ServiceConfig
from tests.faults.conftest import RunningService
from tests.support.faults.bystander import Bystander, ExpectedScores, undisturbed
from tests.support.faults.device import faulty_engine
from tests.support.faults.requests import OK, encoded, outcome, post, request_of, sample_image
from tests.support.service.serving import running_server, wait_until

pytestmark = pytest.mark.usefixtures("bystander")
EVALUATORS = {"aesthetic", "clip", "pickscore", "hpsv2"}


@pytest.mark.parametrize("pairs", [1, 3, 15])
def test_batch_out_of_memory(service: RunningService, pairs: int) -> None:
    """A batch that does not fit is halved, down to a single pair; no client notices."""
    service.device.memory_pairs, before = pairs, service.service.metrics.oom_retries._value.get()
    response = post(service.url, request_of(*(f"pair {index}" for index in range(16))))
    assert outcome(response) == OK
    assert len(response.json()["results"]) == 16
    assert service.service.metrics.oom_retries._value.get() > before


@pytest.mark.parametrize("prompt", ["poison", "nan"])
@pytest.mark.parametrize("place", [0, 7, 15])
def test_unscorable_item(service: RunningService, prompt: str, place: int) -> None:
    """The problem names the item; the item never gets a score."""
    prompts = [f"pair {index}" for index in range(16)]
    prompts[place] = prompt
    response = post(service.url, request_of(*prompts))
    assert outcome(response) == (500, "scoring_failed")
    assert [error["index"] for error in response.json()["errors"]] == [place]
    assert response.json()["retryable"] is False


def test_unscorable_items_of_many_requests(service: RunningService) -> None:
    """Simultaneous requests with and without such an item each get their own response."""
    outcomes: dict[int, Any] = {}

    def send(index: int) -> None:
        prompts = ["fine", "poison" if index % 2 else "fine too"]
        outcomes[index] = outcome(post(service.url, request_of(*prompts)))

    threads = [threading.Thread(target=send, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {index: (500, "scoring_failed") if index % 2 else OK for index in range(12)}
    assert outcomes == expected


def test_stalled_device(service: RunningService, bystander: Bystander) -> None:
    """A stall shorter than the watchdog's timeout costs time only."""
    service.device.free.clear()
    time.sleep(0.5)
    service.device.free.set()
    bystander.wait_for_scores()


@pytest.fixture
def down(service: RunningService) -> str:
    """Name of an evaluator that fails on every batch."""
    service.device.broken = {"hpsv2"}
    return "hpsv2"


class TestOneEvaluatorDown:
    """Requests for the evaluator get a problem; other requests are not affected."""

    @pytest.fixture
    def bystander(self) -> Any:
        """None: a client that requests all four evaluators would notice."""

    def test_evaluator_down(self, service: RunningService, down: str) -> None:
        """A 503 with Retry-After, or a marked partial response; the evaluator recovers once it works."""
        response = post(service.url, request_of("x"))
        assert outcome(response) == (503, "evaluator_down")
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["retryable"] is True
        partial = post(service.url, request_of("x", allow_partial=True)).json()
        assert partial["failed"] == {down: "evaluator_down"}
        assert (set(partial["results"][0]["scores"]), partial["results"][0]["reward"]) == (
            EVALUATORS - {down},
            None,
        )
        service.device.reset()
        wait_until(lambda: outcome(post(service.url, request_of("x"))) == OK, "its return")

    def test_other_evaluators_while_one_is_down(
        self, service: RunningService, down: str, expected_scores: ExpectedScores
    ) -> None:
        """Requests for the other evaluators get correct scores all the time, in the same batches."""
        rest = sorted(EVALUATORS - {down})
        with_rest = ExpectedScores(
            expected_scores.pairs, [{name: raw[name] for name in rest} for raw in expected_scores.raw]
        )
        client = _SelectiveBystander(service.url, with_rest, rest)
        client.start()
        client.wait_for_scores()
        assert outcome(post(service.url, request_of("x"))) == (503, "evaluator_down")
        client.wait_for_scores()
        client.stop()
        assert not client.mistakes
        service.device.reset()
        wait_until(lambda: outcome(post(service.url, request_of("x"))) == OK, "its return")


class _SelectiveBystander(Bystander):
    """Bystander that requests some evaluators only."""

    def __init__(self, url: str, expected_scores: ExpectedScores, names: list[str]) -> None:
        super().__init__(url, expected_scores)
        score = self._client.score
        self._client.score = lambda *pairs: score(*pairs, evaluators=names)  # type: ignore[method-assign]


class TestADeviceThatBreaksForGood:
    """A fault that every client notices and only a restart fixes."""

    @pytest.fixture
    def bystander(self) -> Any:
        """None: every client notices."""

    def test_fatal_device_error(self, config: ServiceConfig, expected_scores: ExpectedScores) -> None:
        """Every request gets a retryable 503 and no score; a restarted service works."""
        with running_server(config, faulty_engine(config)) as (server, port):
            url = f"http://127.0.0.1:{port}"
            service = server.config.app.state.service  # type: ignore[union-attr]
            other = Bystander(url, expected_scores)
            other.start()
            other.wait_for_scores()
            assert outcome(post(url, request_of("fine", "fatal"))) == (503, "not_ready")
            assert outcome(post(url, request_of("x"))) == (503, "not_ready")
            other.stop()
            assert all("503 not_ready" in line for line in other.mistakes)
            assert service.health.status == "failed"
            assert httpx.get(f"{url}/health/ready").status_code == 503
            assert httpx.get(f"{url}/health/live").status_code == 200
        with running_server(config, faulty_engine(config)) as (_, port):
            restarted = f"http://127.0.0.1:{port}"
            with undisturbed(restarted, expected_scores):
                assert outcome(post(restarted, request_of("x"))) == OK


def test_clock_goes_backwards(
    service: RunningService, bystander: Bystander, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timeouts, deadlines and watchdogs use a monotonic clock; only time stamps are affected."""
    real, real_ns, begun = time.time, time.time_ns, time.monotonic()

    def jump() -> float:
        return 3600.0 + 100.0 * (time.monotonic() - begun)

    monkeypatch.setattr(time, "time", lambda: real() - jump())
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() - round(jump() * 1e9))
    body = request_of("x", image=encoded(sample_image("JPEG")))
    assert outcome(post(service.url, body, X_Deadline_Ms="20000")) == OK
    bystander.wait_for_scores()
