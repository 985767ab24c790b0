"""Between scheduler and engine: which evaluators are fit to score. No torch, no web.

When an evaluator fails, the canary decides whose fault it is. If the evaluator scores the canary, the pair
is to blame, and the error goes on to the scheduler, which finds the pair. If it doesn't, its breaker trips,
and the batch goes on without it. Numbers that are wrong are worse than none: a canary score that has changed
is fatal.

One evaluator's circuit breaker: when it is out of service, and when it may be tried again. Pure.

closed ── fails on several different pairs in a row, or on the canary ──► open
open ── the pause is over ──► half open ── works ──► closed
                                        └─ fails ──► open, for twice as long
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal, Protocol, cast

from reward_service.config import Watch
from reward_service.engine.types import FatalDeviceError, Pair, PairScores, ScoringError
from reward_service.scoring.canary import Expected, GoldenScores, canary_pair, tolerance
from reward_service.settings import one_line

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """A breaker of one evaluator. Written by one thread, read by any.

    Args:
        failures: different pairs in a row that trip it
        pause_s: how long it is open the first time
        longest_pause_s: what doubling the pause ends at
        clock: seconds, never going back
    """

    def __init__(
        self,
        failures: int,
        pause_s: float,
        longest_pause_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures, self._clock = failures, clock
        self._first_pause_s, self._longest_pause_s = pause_s, longest_pause_s
        self._pause_s = pause_s
        self._failed: set[Hashable] = set()
        self._until_s: float | None = None
        self.reason = ""

    @property
    def state(self) -> State:
        """Where in the drawing above it is."""
        if self._until_s is None:
            return "closed"
        return "open" if self._clock() < self._until_s else "half_open"

    @property
    def wait_s(self) -> float:
        """Seconds until it may be tried; 0 if that is now."""
        return 0.0 if self._until_s is None else max(0.0, self._until_s - self._clock())

    def fail(self, pair: Hashable, reason: str) -> bool:
        """Count a pair that the evaluator failed on alone.

        Returns:
            whether that tripped the breaker; the same pair again never does
        """
        self._failed.add(pair)
        if len(self._failed) >= self._failures:
            self.trip(reason)
        return self._until_s is not None

    def trip(self, reason: str) -> None:
        """Open it; once more, for twice as long."""
        if self._until_s is not None:
            self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
        self._until_s, self.reason = self._clock() + self._pause_s, reason
        self._failed.clear()

    def succeed(self) -> None:
        """Close it and forget what was."""
        self._failed.clear()
        self._until_s, self._pause_s, self.reason = None, self._first_pause_s, ""


Lane = tuple[tuple[str, ...], bool]


class Scorer(Protocol):
    """What is asked of the engine."""

    device: Any
    dtype: Any

    @property
    def evaluators(self) -> Mapping[str, Any]:
        """By name, each with its kind and fingerprint."""

    def score(
        self, pairs: Sequence[Pair], names: Sequence[str] | None = None, *, deterministic: bool = False
    ) -> list[PairScores]:
        """Raw scores in the order of the pairs."""

    def forget(self, prompt: str) -> None:
        """Compute a prompt anew the next time."""


class EvaluatorBreakers:
    """An engine whose evaluators can fail one by one. Score with it on one thread; ask it from any.

    Args:
        golden: the scores that the canary has to get; where they aren't known, its first ones are
        on_change: told an evaluator's name, whether it is up, and why not
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
        self._expected: dict[str, Expected] = {}
        self._breakers = {
            name: CircuitBreaker(
                settings.breaker_failures, settings.breaker_pause_s, settings.breaker_longest_pause_s, clock
            )
            for name in engine.evaluators
        }

    def prove(self) -> list[str]:
        """Score the canary for the first time.

        Returns:
            one line for each evaluator that gives another score than its golden one

        Raises:
            ScoringError: an evaluator gives none
        """
        raw = self._engine.score([self.canary], deterministic=True)[0].raw
        for name, score in raw.items():
            self._expected[name] = self._expectation(name, score)
        return self.mismatches(raw)

    def unproven(self) -> list[str]:
        """The evaluators whose golden score isn't known."""
        return [name for name, expected in self._expected.items() if not expected.golden]

    def mismatches(self, raw: Mapping[str, float]) -> list[str]:
        """One line for each evaluator whose score of the canary isn't the expected one."""
        lines = [
            expected.mismatch(name, raw[name]) for name, expected in self._expected.items() if name in raw
        ]
        return [line for line in lines if line]

    def down(self, names: Sequence[str]) -> dict[str, float]:
        """Those of the evaluators that are out of service, with the seconds until they are tried again.

        One whose pause is over isn't among them: the next batch tries it.
        """
        return {name: self._breakers[name].wait_s for name in names if self._breakers[name].state == "open"}

    def reason(self, name: str) -> str:
        """Why an evaluator is out of service."""
        return self._breakers[name].reason

    def __call__(self, pairs: Sequence[Pair], lane: Hashable) -> list[PairScores]:
        """Score a batch with those evaluators of its lane that work; the others are in `failed`.

        Raises:
            ScoringError: a pair is at fault
            OutOfMemoryError: the batch is too large
            FatalDeviceError: the device is broken, or an evaluator's numbers are wrong
        """
        names, deterministic = cast("Lane", lane)
        if any(pair.prompt == self.canary.prompt for pair in pairs):
            # A remembered embedding would say nothing about the text towers of today.
            self._engine.forget(self.canary.prompt)
        self._try_again(names)
        while True:
            failed = {n: self._breakers[n].reason for n in names if self._breakers[n].state != "closed"}
            working = [name for name in names if name not in failed]
            if not working:
                return [PairScores({}, truncated_prompt=False, failed=failed) for _ in pairs]
            try:
                scored = self._engine.score(pairs, working, deterministic=deterministic)
            except ScoringError as error:
                if not self._trips(error, pairs):
                    raise
                continue
            for name in working:
                self._breakers[name].succeed()
            return [replace(pair, failed=failed) for pair in scored] if failed else scored

    def _expectation(self, name: str, first: float) -> Expected:
        engine, evaluator = self._engine, self._engine.evaluators[name]
        margin = tolerance(evaluator.kind, str(engine.dtype).removeprefix("torch."), engine.device.type)
        known = self._golden.of(engine.device.type, evaluator.fingerprint) if self._golden else None
        return Expected(first if known is None else known, margin, golden=known is not None)

    def _try_again(self, names: Sequence[str]) -> None:
        """Close the breakers that are half open and whose evaluators work, open the others for longer."""
        for name in names:
            breaker = self._breakers[name]
            if breaker.state != "half_open":
                continue
            if (reason := self._unfit(name)) is not None:
                breaker.trip(reason)
                continue
            breaker.succeed()
            self._on_change(name, True, "")

    def _trips(self, error: ScoringError, pairs: Sequence[Pair]) -> bool:
        """Whether an evaluator's failure, after a look at the canary, takes it out of service."""
        breaker = self._breakers.get(error.evaluator or "")
        if breaker is None or error.evaluator is None:
            return False
        if (reason := self._unfit(error.evaluator)) is not None:
            breaker.trip(reason)
        elif len(pairs) > 1 or not breaker.fail(_key(pairs[0]), one_line(error)):
            return False
        self._on_change(error.evaluator, False, breaker.reason)
        return True

    def _unfit(self, name: str) -> str | None:
        """Why an evaluator cannot score the canary; None if it can.

        Raises:
            FatalDeviceError: it can, but otherwise than it should
        """
        self._engine.forget(self.canary.prompt)
        try:
            raw = self._engine.score([self.canary], [name], deterministic=True)[0].raw
        except ScoringError as error:
            return one_line(error)
        if lines := self.mismatches(raw):
            raise FatalDeviceError(lines[0])
        return None


class CanaryLoop:
    """Has the canary scored from time to time, in the queue like everybody's pair.

    Args:
        submit: queues a pair for all evaluators, deterministically
        on_mismatch: told once, in one line, that a score has changed
    """

    def __init__(
        self,
        breakers: EvaluatorBreakers,
        submit: Callable[[Pair], Future[PairScores]],
        every_s: float,
        on_mismatch: Callable[[str], None],
    ) -> None:
        self._breakers, self._submit, self._every_s, self._on_mismatch = (
            breakers,
            submit,
            every_s,
            on_mismatch,
        )
        self._over = threading.Event()
        threading.Thread(target=self._walk, name="canary", daemon=True).start()

    def stop(self) -> None:
        """No further round."""
        self._over.set()

    def _walk(self) -> None:
        while not self._over.wait(self._every_s):
            try:
                scores = self._submit(self._breakers.canary).result()
            except Exception:  # noqa: BLE001 - full, closing or stuck: the queue has told who needs to know
                continue
            if lines := self._breakers.mismatches(scores.raw):
                self._on_mismatch("; ".join(lines))
                return


def _key(pair: Pair) -> bytes:
    return hashlib.sha256(pair.prompt.encode(errors="replace") + b"\0" + pair.image.tobytes()).digest()
