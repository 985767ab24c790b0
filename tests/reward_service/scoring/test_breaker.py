"""Circuit breakers: a failing evaluator is taken out of service, alone, and returns when it works again."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reward_service.config import Watch
from reward_service.engine.types import (
    FatalDeviceError,
    OutOfMemoryError,
    Pair,
    PairScores,
    PromptError,
    ScoringError,
)
from reward_service.scoring.breaker import CircuitBreaker, EvaluatorBreakers

ALL = ("aesthetic", "clip", "hpsv2")
LANE = (ALL, False)
SETTINGS = Watch(breaker_pause_s=10, breaker_longest_pause_s=35)


class Clock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeEngine:
    """Scores every pair 1; `broken` evaluators always fail, `poison` prompts fail in one evaluator."""

    def __init__(self) -> None:
        self.evaluators: dict[str, Any] = {
            name: SimpleNamespace(kind=name, fingerprint=f"fingerprint of {name}") for name in ALL
        }
        self.device, self.dtype = SimpleNamespace(type="cpu"), "torch.float32"
        self.broken: set[str] = set()
        self.poison: dict[str, str] = {}
        self.error: Exception | None = None
        self.raw_score = 1.0
        self.calls: list[tuple[list[str], tuple[str, ...]]] = []

    def score(
        self, pairs: Sequence[Pair], names: Sequence[str] | None = None, *, deterministic: bool = False
    ) -> list[PairScores]:
        names = tuple(names or ALL)
        prompts = [pair.prompt for pair in pairs]
        self.calls.append((prompts, names))
        if self.error:
            raise self.error
        for name in names:
            if name in self.broken or self.poison.get(name) in prompts:
                raise ScoringError(f"evaluator {name} failed", name)
        return [PairScores(dict.fromkeys(names, self.raw_score), truncated_prompt=False) for _ in pairs]

    def evict_prompt(self, prompt: str) -> None:
        pass


def pair(prompt: str) -> Pair:
    return Pair(prompt, np.zeros((2, 2, 3), np.uint8))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[tuple[str, bool]]:
    return []


@pytest.fixture
def breakers(engine: FakeEngine, clock: Clock, changes: list[tuple[str, bool]]) -> EvaluatorBreakers:
    breakers = EvaluatorBreakers(
        engine, None, SETTINGS, clock, on_change=lambda name, up, _: changes.append((name, up))
    )
    assert breakers.self_test() == []
    return breakers


def test_pause_of_a_breaker_doubles_up_to_its_limit(clock: Clock) -> None:
    """Each time that the evaluator fails again; a reset starts with the first pause."""
    breaker = CircuitBreaker(10, 35, clock)
    breaker.trip("it failed")
    pauses = []
    for _ in range(4):
        assert (breaker.state, breaker.reason) == ("open", "it failed")
        pauses.append(breaker.wait_s)
        clock.now += breaker.wait_s
        assert (breaker.state, breaker.wait_s) == ("half_open", 0.0)
        breaker.trip("it failed")
    assert pauses == [10, 20, 35, 35]
    breaker.reset()
    assert (breaker.state, breaker.wait_s) == ("closed", 0.0)
    breaker.trip("it failed again")
    assert breaker.wait_s == 10


def test_evaluator_that_fails_on_the_canary_is_left_out_at_once(
    engine: FakeEngine, breakers: EvaluatorBreakers, changes: list[tuple[str, bool]]
) -> None:
    """The batch is scored by the other evaluators, with the reason, and no pair is isolated."""
    engine.broken = {"clip"}
    results = breakers([pair(str(number)) for number in range(8)], LANE)
    assert [set(result.raw) for result in results] == [{"aesthetic", "hpsv2"}] * 8
    assert all(result.failed == {"clip": "evaluator clip failed"} for result in results)
    assert breakers.out_of_service(ALL) == {"clip": 10.0}
    assert changes == [("clip", False)]
    engine.calls.clear()
    assert set(breakers([pair("x")], LANE)[0].raw) == {"aesthetic", "hpsv2"}
    assert engine.calls == [(["x"], ("aesthetic", "hpsv2"))]
    assert breakers([pair("x")], (("hpsv2",), False))[0].failed == {}


def test_failing_pair_does_not_open_the_breaker(engine: FakeEngine, breakers: EvaluatorBreakers) -> None:
    """The evaluator scores the canary, so the error is attributed to the pair, however often it is sent."""
    engine.poison = {"clip": "bad"}
    for _ in range(20):
        with pytest.raises(ScoringError):
            breakers([pair("good"), pair("bad")], LANE)
        with pytest.raises(ScoringError):
            breakers([pair("bad")], LANE)
        assert breakers.out_of_service(ALL) == {}
    assert breakers([pair("good")], LANE)[0].failed == {}


def test_many_failing_pairs_open_no_breaker(engine: FakeEngine, breakers: EvaluatorBreakers) -> None:
    """One client's pairs, however many and however different, take an evaluator that works from nobody."""
    for number in range(20):
        engine.poison = {"clip": f"bad {number}"}
        with pytest.raises(ScoringError):
            breakers([pair(f"bad {number}")], LANE)
    assert breakers.out_of_service(ALL) == {}
    assert breakers([pair("good")], LANE)[0].failed == {}


def test_prompt_that_cannot_be_tokenized_is_no_failure_of_an_evaluator(
    engine: FakeEngine, breakers: EvaluatorBreakers
) -> None:
    """The error goes to the scheduler, and not even the canary is scored."""
    engine.error = PromptError("the prompt cannot be tokenized (ValueError); send another")
    engine.calls.clear()
    with pytest.raises(PromptError):
        breakers([pair("x")], LANE)
    assert len(engine.calls) == 1
    assert breakers.out_of_service(ALL) == {}


def test_recovered_evaluator_returns_after_the_pause(
    engine: FakeEngine, breakers: EvaluatorBreakers, clock: Clock, changes: list[tuple[str, bool]]
) -> None:
    """After the pause the canary is scored first; if that fails, the next pause is longer."""
    engine.broken = {"clip"}
    breakers([pair("x")], LANE)
    clock.now += 10
    assert breakers.out_of_service(ALL) == {}
    assert set(breakers([pair("x")], LANE)[0].failed) == {"clip"}
    assert breakers.out_of_service(ALL) == {"clip": 20.0}
    engine.broken = set()
    clock.now += 19
    assert set(breakers([pair("x")], LANE)[0].failed) == {"clip"}
    clock.now += 1
    assert breakers([pair("x")], LANE)[0].failed == {}
    assert changes == [("clip", False), ("clip", True)]


def test_all_evaluators_can_be_out_of_service(engine: FakeEngine, breakers: EvaluatorBreakers) -> None:
    """If a shared tower fails for all evaluators, the batch still returns, without scores."""
    engine.broken = set(ALL)
    (result,) = breakers([pair("x")], LANE)
    assert (result.raw, set(result.failed)) == ({}, set(ALL))
    assert set(breakers.out_of_service(ALL)) == set(ALL)


def test_changed_canary_score_is_fatal(engine: FakeEngine, breakers: EvaluatorBreakers) -> None:
    """An evaluator that fails on a pair and then gives the canary another score cannot be trusted."""
    engine.poison, engine.raw_score = {"clip": "bad"}, 1.5
    with pytest.raises(FatalDeviceError, match=r"clip.* 1\.5.*expected.* 1 "):
        breakers([pair("bad")], LANE)


@pytest.mark.parametrize("error", [OutOfMemoryError("full"), FatalDeviceError("gone")])
def test_device_errors_open_no_breaker(
    engine: FakeEngine, breakers: EvaluatorBreakers, error: Exception
) -> None:
    """They are passed on to the scheduler unchanged."""
    engine.error = error
    with pytest.raises(type(error)):
        breakers([pair("x")], LANE)
    assert breakers.out_of_service(ALL) == {}
