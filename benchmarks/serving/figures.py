"""Statistics of measurements and their targets. Pure functions, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.clients import Outcome
from benchmarks.serving.host import Batch

_OK = 200


@dataclass(frozen=True)
class Verdict:
    """Figure and its target; `at_most` if it should be no larger."""

    part: str
    what: str
    found: float
    asked: float
    at_most: bool = False

    @property
    def ok(self) -> bool:
        """True if the target is met; False for NaN."""
        return self.found <= self.asked if self.at_most else self.found >= self.asked

    def __str__(self) -> str:
        bound = "at most " if self.at_most else ""
        end = "ok" if self.ok else "falls short"
        return f"({self.part}) {self.what}: {self.found:.4g} of {bound}{self.asked:.4g} asked: {end}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent of them do not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def latencies_ms(outcomes: Sequence[Outcome]) -> list[float]:
    """Of those answered with scores, from when they were due."""
    return [1000 * (each.ended_s - each.due_s) for each in outcomes if each.status == _OK]


def goodput(outcomes: Sequence[Outcome], pairs: int, start_s: float, stop_s: float) -> float:
    """Pairs a second that were answered with scores from `start_s` to `stop_s`."""
    answered = sum(each.status == _OK and start_s <= each.ended_s < stop_s for each in outcomes)
    return answered * pairs / (stop_s - start_s)


def heavy_rate(batches: Sequence[Batch], start_s: float, stop_s: float) -> float:
    """Pairs a second of all but the light caller; of a batch that lies partly within, that part."""
    return sum((batch.pairs - batch.light) * _share(batch, start_s, stop_s) for batch in batches) / (
        stop_s - start_s
    )


def _share(batch: Batch, start_s: float, stop_s: float) -> float:
    within = min(batch.end_s, stop_s) - max(batch.start_s, start_s)
    return max(0.0, within) / (batch.end_s - batch.start_s)


def busy(batches: Sequence[Batch], start_s: float, stop_s: float) -> float:
    """Share of the time in which the engine ran."""
    within = (min(batch.end_s, stop_s) - max(batch.start_s, start_s) for batch in batches)
    return sum(max(0.0, seconds) for seconds in within) / (stop_s - start_s)
