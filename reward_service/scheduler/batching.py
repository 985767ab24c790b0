"""What batches take, learnt from those that ran: their seconds, and how many pairs fit into memory.

Running a batch so that what is wrong with one pair stays with it. No threads, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from reward_service.engine.types import FatalDeviceError, OutOfMemoryError

_FORGETTING = 0.9  # per batch: the last ten or so count
_ANCHOR = 0.1


class BatchTime:
    """Least squares for seconds = fixed + per_pair · pairs, with exponential forgetting.

    An empty batch that took no time is always among the observations, with a small weight: batches of
    only one size, which cannot tell the two coefficients apart, then count as proportional.

    Args:
        guess_s: per pair, before the first batch has run
    """

    def __init__(self, guess_s: float) -> None:
        self._guess_s = guess_s
        self._weight = self._n = self._s = self._nn = self._ns = 0.0

    def add(self, pairs: int, seconds: float) -> None:
        """A batch has run."""
        self._weight = self._weight * _FORGETTING + 1
        self._n = self._n * _FORGETTING + pairs
        self._s = self._s * _FORGETTING + seconds
        self._nn = self._nn * _FORGETTING + pairs * pairs
        self._ns = self._ns * _FORGETTING + pairs * seconds

    @property
    def coefficients(self) -> tuple[float, float]:
        """Seconds a batch and seconds a pair, neither below 0; a guess before the first batch."""
        if not self._weight:
            return 0.0, self._guess_s
        weight = self._weight + _ANCHOR
        n, s = self._n / weight, self._s / weight
        per_pair = (self._ns / weight - n * s) / (self._nn / weight - n * n)
        if per_pair < 0:
            return s, 0.0
        if s < per_pair * n:
            return 0.0, self._ns / self._nn
        return s - per_pair * n, per_pair

    def seconds(self, pairs: int, batch_pairs: int) -> float:
        """Of `pairs` in full batches of `batch_pairs`."""
        fixed, per_pair = self.coefficients
        return fixed * math.ceil(pairs / batch_pairs) + per_pair * pairs


_PATIENCE = 16
_MOST_PATIENCE = 1024


class BatchSize:
    """How many pairs a batch may have: halved when memory runs out, raised again by a quarter at a time.

    It is raised after 16 batches that were full and fitted. Raised too far, it goes back to what is known to
    fit, and the number of batches before the next attempt doubles, up to 1,024.
    """

    def __init__(self, most: int) -> None:
        self.now = self._most = most
        self._known = 0
        self._patience, self._full = _PATIENCE, 0

    def fits(self, pairs: int) -> None:
        """A batch of `pairs` has run."""
        if pairs < self.now:  # says nothing about larger ones
            return
        self._known = self.now
        self._full += 1
        if self._full >= self._patience and self.now < self._most:
            self.now = min(self._most, self.now + max(1, self.now // 4))
            self._full = 0

    def overflows(self, pairs: int) -> None:
        """There was no memory for a batch of `pairs`."""
        self._full = 0
        if 0 < self._known < pairs:
            self._patience = min(_MOST_PATIENCE, 2 * self._patience)
            self.now = min(self.now, max(self._known, pairs // 2))
        else:
            self._known, self._patience = 0, _PATIENCE
            self.now = min(self.now, max(1, pairs // 2))

    def blame_pair(self, before: int) -> None:
        """A pair did not fit even alone: it, not the size, was the cause, so `before` holds again."""
        self.now = before


Unit = TypeVar("Unit")
Result = TypeVar("Result")


def run_isolated(
    units: Sequence[Unit],
    run: Callable[[Sequence[Unit]], Sequence[Result]],
    wanted: Callable[[Unit], bool],
    sizes: BatchSize,
    on_oom: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[Sequence[Unit], Sequence[Result] | Exception]]:
    """Run a batch; halve what fails until the units at fault are alone.

    One bad unit among n costs at most 2·log2(n) further runs. When memory runs out, `sizes` is told and
    later parts keep to it.

    Args:
        wanted: asked before each run; what is no longer wanted is left out

    Returns:
        parts with their results, and single units with their errors, as they come

    Raises:
        FatalDeviceError: as `run` raised it
    """
    before, fitted, alone = sizes.now, False, False
    parts = [units]
    while parts:
        part = [unit for unit in parts.pop() if wanted(unit)]
        if not part:
            continue
        if len(part) > sizes.now:
            parts += _halves(part)
            continue
        try:
            results = _checked(part, run(part))
        except FatalDeviceError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises belongs to a unit, not to us
            memory = isinstance(error, OutOfMemoryError)
            if memory:
                on_oom(len(part))
                sizes.overflows(len(part))
            if len(part) > 1:
                parts += _halves(part)
                continue
            if memory:
                alone = True
                sizes.blame_pair(before)
            yield part, error
            continue
        fitted = True
        sizes.fits(len(part))
        yield part, results
    if alone and not fitted:  # no pair fits: the device's memory, not the pairs
        sizes.blame_pair(max(1, before // 2))


def _halves(part: Sequence[Unit]) -> list[Sequence[Unit]]:
    """The later half first: parts are taken from the end."""
    middle = (len(part) + 1) // 2
    return [part[middle:], part[:middle]]


def _checked(part: Sequence[Unit], results: Sequence[Result]) -> Sequence[Result]:
    if len(results) != len(part):
        raise RuntimeError(f"{len(results)} results for {len(part)} pairs")
    return results
