"""Circuit breakers of the evaluators, and the periodic canary check.

A breaker takes an evaluator that keeps failing out of service, while the others go on:

    closed ── fails on a pair and on the canary ──► open
    open ── the pause is over ──► half open ── scores the canary ──► closed
                                            └─ fails ──► open, for twice as long

When an evaluator fails, the canary pair shows the cause. If the evaluator scores the canary, the pair is at
fault, and the error goes to the scheduler, which isolates the pair: however many such pairs a client sends,
they take the evaluator from nobody. If it does not, its breaker opens and the batch is scored without it. A
canary score that has changed is fatal: wrong scores are worse than none.

This module imports neither torch nor a web framework.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal, Protocol, cast

from reward_service.config import Watch
from reward_service.engine.types import FatalDeviceError, Pair, PairScores, ScoringError
from reward_service.scoring.canary import ExpectedScore, GoldenScores, canary_pair, tolerance
from reward_service.settings import one_line

State = Literal["closed", "open", "half_open"]
Lane = tuple[tuple[str, ...], bool]  # names of the evaluators, deterministic


class CircuitBreaker:
    """Circuit breaker of one evaluator: changed by one thread, read by any.

    Args:
        pause_s: how long it stays open the first time
        longest_pause_s: limit of the pause, which doubles each time
        clock: returns monotonic seconds
    """

    def __init__(
        self,
        pause_s: float,
        longest_pause_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._first_pause_s, self._longest_pause_s = pause_s, longest_pause_s
        self._pause_s = pause_s
        self._open_until_s: float | None = None
        self.reason = ""

    @property
    def state(self) -> State:
        """State of the diagram above."""
        if self._open_until_s is None:
            return "closed"
        return "open" if self._clock() < self._open_until_s else "half_open"

    @property
    def wait_s(self) -> float:
        """Seconds until the evaluator may be retried; 0 if it may be now."""
        return 0.0 if self._open_until_s is None else max(0.0, self._open_until_s - self._clock())

    def trip(self, reason: str) -> None:
        """Open it; if it was open or half open, for twice as long as before."""
        if self._open_until_s is not None:
            self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
        self._open_until_s, self.reason = self._clock() + self._pause_s, reason

    def reset(self) -> None:
        """Close it and reset the pause."""
        self._open_until_s, self._pause_s, self.reason = None, self._first_pause_s, ""


class Scorer(Protocol):
    """Interface of the engine."""

    device: Any
    dtype: Any

    @property
    def evaluators(self) -> Mapping[str, Any]:
        """Evaluators by name, each with its kind and fingerprint."""

    def score(
        self, pairs: Sequence[Pair], names: Sequence[str] | None = None, *, deterministic: bool = False
    ) -> list[PairScores]:
        """Return the raw scores in the order of the pairs."""

    def evict_prompt(self, prompt: str) -> None:
        """Remove the cached embedding of a prompt."""


class EvaluatorBreakers:
    """Engine with a circuit breaker per evaluator: scores on one thread, can be queried from any.

    Args:
        engine: scores the pairs
        golden: expected scores of the canary; for an evaluator without one, its first score is expected
        settings: thresholds and pauses of the breakers
        clock: returns monotonic seconds
        on_change: called with an evaluator's name, whether it is in service, and the reason if not
    """

    def __init__(
        self,
        engine: Scorer,
        golden: GoldenScores | None = None,
        settings: Watch | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[str, bool, str], None] = lambda *_: None,
    ) -> None:
        settings = settings or Watch()
        self._engine, self._golden, self._on_change = engine, golden, on_change
        self.canary = canary_pair()
        self._expected: dict[str, ExpectedScore] = {}
        self._breakers = {
            name: CircuitBreaker(settings.breaker_pause_s, settings.breaker_longest_pause_s, clock)
            for name in engine.evaluators
        }

    def self_test(self) -> list[str]:
        """Score the canary for the first time.

        Returns:
            one line for each evaluator whose score differs from its golden score

        Raises:
            ScoringError: an evaluator cannot score the canary
        """
        raw = self._engine.score([self.canary], deterministic=True)[0].raw
        for name, score in raw.items():
            self._expected[name] = self._expected_score(name, score)
        return self.mismatches(raw)

    def without_golden_score(self) -> list[str]:
        """Return the evaluators that have no golden score."""
        return [name for name, expected in self._expected.items() if not expected.golden]

    def mismatches(self, raw: Mapping[str, float]) -> list[str]:
        """Return one line for each evaluator whose canary score differs from the expected one."""
        lines = [
            expected.mismatch(name, raw[name]) for name, expected in self._expected.items() if name in raw
        ]
        return [line for line in lines if line]

    def out_of_service(self, names: Sequence[str]) -> dict[str, float]:
        """Return those evaluators that are out of service, with the seconds until they are retried.

        An evaluator whose pause is over is not among them: the next batch retries it.
        """
        return {name: self._breakers[name].wait_s for name in names if self._breakers[name].state == "open"}

    def __call__(self, pairs: Sequence[Pair], lane: Hashable) -> list[PairScores]:
        """Score a batch with the working evaluators of its lane; the others are listed in `failed`.

        Raises:
            ScoringError: a pair is at fault
            OutOfMemoryError: the batch is too large
            FatalDeviceError: the device has failed, or an evaluator's scores are wrong
        """
        names, deterministic = cast("Lane", lane)
        if any(pair.prompt == self.canary.prompt for pair in pairs):
            # A cached embedding would not test the text towers.
            self._engine.evict_prompt(self.canary.prompt)
        self._retry_half_open(names)
        while True:
            failed = {n: self._breakers[n].reason for n in names if self._breakers[n].state != "closed"}
            working = [name for name in names if name not in failed]
            if not working:
                return [PairScores({}, truncated_prompt=False, failed=failed) for _ in pairs]
            try:
                scored = self._engine.score(pairs, working, deterministic=deterministic)
            except ScoringError as error:
                if not self._take_out_of_service(error):
                    raise
                continue
            for name in working:
                self._breakers[name].reset()
            return [replace(pair, failed=failed) for pair in scored] if failed else scored

    def _expected_score(self, name: str, first: float) -> ExpectedScore:
        engine, evaluator = self._engine, self._engine.evaluators[name]
        margin = tolerance(evaluator.kind, str(engine.dtype).removeprefix("torch."), engine.device.type)
        golden = self._golden.raw_score(engine.device.type, evaluator.fingerprint) if self._golden else None
        return ExpectedScore(first if golden is None else golden, margin, golden=golden is not None)

    def _retry_half_open(self, names: Sequence[str]) -> None:
        """Close the half-open breakers whose evaluators score the canary; open the others for longer."""
        for name in names:
            breaker = self._breakers[name]
            if breaker.state != "half_open":
                continue
            if (reason := self._canary_error(name)) is not None:
                breaker.trip(reason)
                continue
            breaker.reset()
            self._on_change(name, True, "")

    def _take_out_of_service(self, error: ScoringError) -> bool:
        """Open the failing evaluator's breaker if it is at fault, and return whether it is."""
        breaker = self._breakers.get(error.evaluator or "")
        if breaker is None or error.evaluator is None:
            return False
        if (reason := self._canary_error(error.evaluator)) is None:
            return False
        breaker.trip(reason)
        self._on_change(error.evaluator, False, breaker.reason)
        return True

    def _canary_error(self, name: str) -> str | None:
        """Return the error of an evaluator on the canary; None if it scores it.

        Raises:
            FatalDeviceError: the score is not the expected one
        """
        self._engine.evict_prompt(self.canary.prompt)
        try:
            raw = self._engine.score([self.canary], [name], deterministic=True)[0].raw
        except ScoringError as error:
            return one_line(error)
        if lines := self.mismatches(raw):
            raise FatalDeviceError(lines[0])
        return None


class CanaryLoop:
    """Thread that scores the canary periodically, through the queue like any other pair.

    Args:
        breakers: hold the expected scores
        submit: queues a pair for all evaluators, in deterministic mode
        every_s: interval
        on_mismatch: called once, with one line, if a score has changed
    """

    def __init__(
        self,
        breakers: EvaluatorBreakers,
        submit: Callable[[Pair], Future[PairScores]],
        every_s: float,
        on_mismatch: Callable[[str], None],
    ) -> None:
        self._breakers, self._submit = breakers, submit
        self._every_s, self._on_mismatch = every_s, on_mismatch
        self._stopped = threading.Event()
        threading.Thread(target=self._loop, name="canary", daemon=True).start()

    def stop(self) -> None:
        """Score the canary no more."""
        self._stopped.set()

    def _loop(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                scores = self._submit(self._breakers.canary).result()
            except Exception:  # noqa: BLE001 - full, closing or stuck: reported by the scheduler
                continue
            if lines := self._breakers.mismatches(scores.raw):
                self._on_mismatch("; ".join(lines))
                return
