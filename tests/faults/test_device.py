"""Faults of device and models: their documented status, right answers for everybody else, and on it goes."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import pytest

from reward_service.config import ServiceConfig
from tests.faults.conftest import Service
from tests.support.faults.bystander import Bystander, Truth, undisturbed
from tests.support.faults.calling import OK, encoded, post, request_of, sample_image, told
from tests.support.faults.device import faulty_engine
from tests.support.service.serving import serving, wait_until

pytestmark = pytest.mark.usefixtures("bystander")
EVALUATORS = {"aesthetic", "clip", "pickscore", "hpsv2"}


@pytest.mark.parametrize("pairs", [1, 3, 15])
def test_memory_for_n_pairs(service: Service, pairs: int) -> None:
    """Nobody notices: a batch that does not fit is halved, down to a single pair."""
    service.device.memory_pairs, before = pairs, service.service.metrics.oom_retries._value.get()
    answer = post(service.url, request_of(*(f"pair {index}" for index in range(16))))
    assert told(answer) == OK
    assert len(answer.json()["results"]) == 16
    assert service.service.metrics.oom_retries._value.get() > before


@pytest.mark.parametrize("prompt", ["poison", "nan"])
@pytest.mark.parametrize("place", [0, 7, 15])
def test_an_item_that_cannot_be_scored(service: Service, prompt: str, place: int) -> None:
    """Its request is told which item it is, never given a number for it."""
    prompts = [f"pair {index}" for index in range(16)]
    prompts[place] = prompt
    answer = post(service.url, request_of(*prompts))
    assert told(answer) == (500, "scoring_failed")
    assert [error["index"] for error in answer.json()["errors"]] == [place]
    assert answer.json()["retryable"] is False


def test_poison_of_many_at_once(service: Service) -> None:
    """Requests with and without it, all at once: each gets its own answer."""
    answers: dict[int, Any] = {}

    def ask(index: int) -> None:
        prompts = ["fine", "poison" if index % 2 else "fine too"]
        answers[index] = told(post(service.url, request_of(*prompts)))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {index: (500, "scoring_failed") if index % 2 else OK for index in range(12)}
    assert answers == expected


def test_a_batch_held_up(service: Service, bystander: Bystander) -> None:
    """A device that stalls for less than the watchdog's time costs time only."""
    service.device.free.clear()
    time.sleep(0.5)
    service.device.free.set()
    bystander.again()


@pytest.fixture
def down(service: Service) -> str:
    """One evaluator that fails on everything."""
    service.device.broken = {"hpsv2"}
    return "hpsv2"


class TestOneEvaluatorDown:
    """Its own callers are told; whoever does not ask for it never notices."""

    @pytest.fixture
    def bystander(self) -> Any:
        """Those who ask for all four would notice: the others are looked at below."""

    def test_strict_callers_are_told(self, service: Service, down: str) -> None:
        """503 with a time to come back at; partial answers are marked; it returns once it works."""
        answer = post(service.url, request_of("x"))
        assert told(answer) == (503, "evaluator_down")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["retryable"] is True
        partial = post(service.url, request_of("x", allow_partial=True)).json()
        assert partial["failed"] == {down: "evaluator_down"}
        assert (set(partial["results"][0]["scores"]), partial["results"][0]["reward"]) == (
            EVALUATORS - {down},
            None,
        )
        service.device.mend()
        wait_until(lambda: told(post(service.url, request_of("x"))) == OK, "its return")

    def test_who_does_not_ask_for_it(self, service: Service, down: str, truth: Truth) -> None:
        """Right scores of the rest all the while, in the same seconds and batches."""
        rest = sorted(EVALUATORS - {down})
        with_rest = Truth(truth.pairs, [{name: raw[name] for name in rest} for raw in truth.raw])
        caller = _Choosy(service.url, with_rest, rest)
        caller.start()
        caller.again()
        assert told(post(service.url, request_of("x"))) == (503, "evaluator_down")
        caller.again()
        caller.stop()
        assert not caller.wrong
        service.device.mend()
        wait_until(lambda: told(post(service.url, request_of("x"))) == OK, "its return")


class _Choosy(Bystander):
    """A bystander who asks for some evaluators only."""

    def __init__(self, url: str, truth: Truth, names: list[str]) -> None:
        super().__init__(url, truth)
        score = self._judge.score
        self._judge.score = lambda *pairs: score(*pairs, evaluators=names)  # type: ignore[method-assign]


class TestADeviceThatBreaksForGood:
    """The one fault that everybody notices: a new start is the cure."""

    @pytest.fixture
    def bystander(self) -> Any:
        """Theirs is looked at below."""

    def test_a_fatal_error(self, config: ServiceConfig, truth: Truth) -> None:
        """Everybody is told to come back and nobody gets a number; a new start serves."""
        with serving(config, faulty_engine(config)) as (server, port):
            url = f"http://127.0.0.1:{port}"
            service = server.config.app.state.service  # type: ignore[union-attr]
            other = Bystander(url, truth)
            other.start()
            other.again()
            assert told(post(url, request_of("fine", "fatal"))) == (503, "not_ready")
            assert told(post(url, request_of("x"))) == (503, "not_ready")
            other.stop()
            assert all("503 not_ready" in line for line in other.wrong)
            assert service.health.status == "failed"
            assert httpx.get(f"{url}/health/ready").status_code == 503
            assert httpx.get(f"{url}/health/live").status_code == 200
        with serving(config, faulty_engine(config)) as (_, port):
            restarted = f"http://127.0.0.1:{port}"
            with undisturbed(restarted, truth):
                assert told(post(restarted, request_of("x"))) == OK


def test_the_clock_goes_backwards(
    service: Service, bystander: Bystander, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waits, deadlines and watchdogs go by a clock that cannot; only time stamps show it."""
    real, real_ns, begun = time.time, time.time_ns, time.monotonic()

    def jump() -> float:
        return 3600.0 + 100.0 * (time.monotonic() - begun)

    monkeypatch.setattr(time, "time", lambda: real() - jump())
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() - round(jump() * 1e9))
    body = request_of("x", image=encoded(sample_image("JPEG")))
    assert told(post(service.url, body, X_Deadline_Ms="20000")) == OK
    bystander.again()
