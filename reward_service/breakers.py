"""One evaluator's circuit breaker: when it is out of service, and when it may be tried again. Pure.

closed ── fails on several different pairs in a row, or on the canary ──► open
open ── the pause is over ──► half open ── works ──► closed
                                        └─ fails ──► open, for twice as long
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """A breaker of one evaluator. Written by one thread, read by any.

    :param failures: different pairs in a row that trip it
    :param pause_s: how long it is open the first time
    :param longest_pause_s: what doubling the pause ends at
    :param clock: seconds, never going back
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

        :returns: whether that tripped the breaker; the same pair again never does
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
