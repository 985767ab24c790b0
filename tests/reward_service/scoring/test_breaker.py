"""An evaluator that fails is taken out of service, alone, and comes back."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from reward_service.config import Watch
from reward_service.engine.types import FatalDeviceError, OutOfMemoryError, Pair, PairScores, ScoringError
from reward_service.scoring.breaker import CircuitBreaker, EvaluatorBreakers

ALL = ("aesthetic", "clip", "hpsv2")
LANE = (ALL, False)
SETTINGS = Watch(breaker_failures=3, breaker_pause_s=10, breaker_longest_pause_s=35)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Engine:
    """Scores every pair 1; `broken` evaluators always fail, `poison` prompts fail in one of them."""

    def __init__(self) -> None:
        self.evaluators: dict[str, Any] = {
            name: SimpleNamespace(kind=name, fingerprint=f"print of {name}") for name in ALL
        }
        self.device, self.dtype = SimpleNamespace(type="cpu"), "torch.float32"
        self.broken: set[str] = set()
        self.poison: dict[str, str] = {}
        self.error: Exception | None = None
        self.number = 1.0
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
        return [PairScores(dict.fromkeys(names, self.number), truncated_prompt=False) for _ in pairs]

    def forget(self, prompt: str) -> None:
        pass


def pair(prompt: str) -> Pair:
    return Pair(prompt, np.zeros((2, 2, 3), np.uint8))


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[tuple[str, bool]]:
    return []


@pytest.fixture
def breakers(engine: Engine, clock: Clock, changes: list[tuple[str, bool]]) -> EvaluatorBreakers:
    breakers = EvaluatorBreakers(
        engine, None, SETTINGS, clock, on_change=lambda name, up, _: changes.append((name, up))
    )
    assert breakers.prove() == []
    return breakers


def test_a_breaker_opens_after_different_pairs_and_closes_when_tried(clock: Clock) -> None:
    """One bad pair, however often it comes, does not open it; several do, for a time that doubles."""
    breaker = CircuitBreaker(3, 10, 35, clock)
    assert not any(breaker.fail("a", "it failed") for _ in range(10))
    assert not breaker.fail("b", "it failed")
    breaker.succeed()
    assert not breaker.fail("c", "it failed")
    assert not breaker.fail("a", "it failed")
    assert breaker.fail("b", "it failed")
    pauses = []
    for _ in range(4):
        assert (breaker.state, breaker.reason) == ("open", "it failed")
        pauses.append(breaker.wait_s)
        clock.now += breaker.wait_s
        assert (breaker.state, breaker.wait_s) == ("half_open", 0.0)
        breaker.trip("it failed")
    assert pauses == [10, 20, 35, 35]
    breaker.succeed()
    assert (breaker.state, breaker.wait_s) == ("closed", 0.0)
    breaker.trip("again")
    assert breaker.wait_s == 10


def test_a_broken_evaluator_leaves_the_batch_at_once(
    engine: Engine, breakers: EvaluatorBreakers, changes: list[tuple[str, bool]]
) -> None:
    """It fails on the canary too, so no pair is sought: everybody gets the rest, with the reason."""
    engine.broken = {"clip"}
    results = breakers([pair(str(number)) for number in range(8)], LANE)
    assert [set(result.raw) for result in results] == [{"aesthetic", "hpsv2"}] * 8
    assert all(result.failed == {"clip": "evaluator clip failed"} for result in results)
    assert breakers.down(ALL) == {"clip": 10.0}
    assert breakers.reason("clip") == "evaluator clip failed"
    assert changes == [("clip", False)]
    engine.calls.clear()
    assert set(breakers([pair("x")], LANE)[0].raw) == {"aesthetic", "hpsv2"}
    assert engine.calls == [(["x"], ("aesthetic", "hpsv2"))]
    assert breakers([pair("x")], (("hpsv2",), False))[0].failed == {}


def test_a_bad_pair_is_not_the_evaluators_fault(engine: Engine, breakers: EvaluatorBreakers) -> None:
    """The evaluator scores the canary, so the error is the pair's, and stays so however often it comes."""
    engine.poison = {"clip": "bad"}
    for _ in range(20):
        with pytest.raises(ScoringError):
            breakers([pair("good"), pair("bad")], LANE)
        with pytest.raises(ScoringError):
            breakers([pair("bad")], LANE)
        assert breakers.down(ALL) == {}
    assert breakers([pair("good")], LANE)[0].failed == {}


def test_several_different_pairs_are(engine: Engine, breakers: EvaluatorBreakers) -> None:
    """An evaluator that only the canary still gets scores of is out of service after some pairs."""
    for prompt in ("a", "b"):
        engine.poison = {"clip": prompt}
        with pytest.raises(ScoringError):
            breakers([pair(prompt)], LANE)
    engine.poison = {"clip": "c"}
    assert set(breakers([pair("c")], LANE)[0].failed) == {"clip"}
    assert set(breakers.down(ALL)) == {"clip"}


def test_an_evaluator_that_works_again_comes_back(
    engine: Engine, breakers: EvaluatorBreakers, clock: Clock, changes: list[tuple[str, bool]]
) -> None:
    """After the pause the canary is tried, alone; if it is scored everybody is, else the pause is longer."""
    engine.broken = {"clip"}
    breakers([pair("x")], LANE)
    clock.now += 10
    assert breakers.down(ALL) == {}
    assert set(breakers([pair("x")], LANE)[0].failed) == {"clip"}
    assert breakers.down(ALL) == {"clip": 20.0}
    engine.broken = set()
    clock.now += 19
    assert set(breakers([pair("x")], LANE)[0].failed) == {"clip"}
    clock.now += 1
    assert breakers([pair("x")], LANE)[0].failed == {}
    assert changes == [("clip", False), ("clip", True)]


def test_a_shared_tower_takes_all_its_evaluators_with_it(engine: Engine, breakers: EvaluatorBreakers) -> None:
    """With every evaluator out of service there are no scores, but there is an answer."""
    engine.broken = set(ALL)
    (result,) = breakers([pair("x")], LANE)
    assert (result.raw, set(result.failed)) == ({}, set(ALL))
    assert set(breakers.down(ALL)) == set(ALL)


def test_wrong_numbers_are_fatal(engine: Engine, breakers: EvaluatorBreakers) -> None:
    """An evaluator that fails on a pair and then scores the canary otherwise cannot be trusted."""
    engine.poison, engine.number = {"clip": "bad"}, 1.5
    with pytest.raises(FatalDeviceError, match=r"clip.* 1\.5.*expected.* 1 "):
        breakers([pair("bad")], LANE)


@pytest.mark.parametrize("error", [OutOfMemoryError("full"), FatalDeviceError("gone")])
def test_the_devices_faults_are_nobodys(
    engine: Engine, breakers: EvaluatorBreakers, error: Exception
) -> None:
    """They go on to the scheduler as they are and trip nothing."""
    engine.error = error
    with pytest.raises(type(error)):
        breakers([pair("x")], LANE)
    assert breakers.down(ALL) == {}
