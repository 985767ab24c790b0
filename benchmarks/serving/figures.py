"""Statistics of measurements and their targets. Pure functions, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.clients import RequestResult
from benchmarks.serving.host import Batch

_OK = 200


@dataclass(frozen=True)
class Verdict:
    """Measured figure and its target; the target is an upper bound if `at_most`, else a lower one."""

    part: str
    name: str
    value: float
    target: float
    at_most: bool = False

    @property
    def ok(self) -> bool:
        """True if the target is met; False for NaN."""
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        end = "met" if self.ok else "missed"
        return f"({self.part}) {self.name}: {self.value:.4g}, target {bound} {self.target:.4g}: {end}"


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile, always one of the values; NaN without values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def latencies_ms(results: Sequence[RequestResult]) -> list[float]:
    """Return the latencies of the requests that got scores, counted from when they were due."""
    return [1000 * (each.ended_s - each.due_s) for each in results if each.status == _OK]


def goodput(results: Sequence[RequestResult], pairs: int, start_s: float, stop_s: float) -> float:
    """Return the pairs a second that got scores from `start_s` to `stop_s`."""
    scored = sum(each.status == _OK and start_s <= each.ended_s < stop_s for each in results)
    return scored * pairs / (stop_s - start_s)


def heavy_pairs_per_s(batches: Sequence[Batch], start_s: float, stop_s: float) -> float:
    """Return the pairs a second of all but the light client; a batch partly within counts in proportion."""
    return sum((batch.pairs - batch.light) * _share(batch, start_s, stop_s) for batch in batches) / (
        stop_s - start_s
    )


def _share(batch: Batch, start_s: float, stop_s: float) -> float:
    within = min(batch.end_s, stop_s) - max(batch.start_s, start_s)
    return max(0.0, within) / (batch.end_s - batch.start_s)


def busy_share(batches: Sequence[Batch], start_s: float, stop_s: float) -> float:
    """Return the share of the time in which the engine ran."""
    within = (min(batch.end_s, stop_s) - max(batch.start_s, start_s) for batch in batches)
    return sum(max(0.0, seconds) for seconds in within) / (stop_s - start_s)
