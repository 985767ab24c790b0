"""Batches: estimated duration, size limit, preparation ahead of the run, and isolation of failing pairs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from reward_service.engine.types import FatalDeviceError, OutOfMemoryError
from reward_service.scheduler.requests import Input, RequestPair, Result

_DECAY = 0.9  # of an observation's weight per batch: about the last ten count
_ANCHOR_WEIGHT = 0.1

_FULL_BATCHES_BEFORE_GROWTH = 16
_MAX_FULL_BATCHES = 1024


class BatchTime:
    """Least-squares estimate of seconds = fixed + per_pair · pairs, with exponential forgetting.

    An empty batch that took no time is always among the observations, with a small weight: batches of a
    single size, which cannot separate the two coefficients, then count as proportional.

    Args:
        guess_s: seconds per pair before the first batch has run
    """

    def __init__(self, guess_s: float) -> None:
        self._guess_s = guess_s
        # Sums over the batches: weight, n = pairs, s = seconds, and their products.
        self._weight = self._n = self._s = self._nn = self._ns = 0.0

    def add(self, pairs: int, seconds: float) -> None:
        """Add the observation of a batch that has run."""
        self._weight = self._weight * _DECAY + 1
        self._n = self._n * _DECAY + pairs
        self._s = self._s * _DECAY + seconds
        self._nn = self._nn * _DECAY + pairs * pairs
        self._ns = self._ns * _DECAY + pairs * seconds

    @property
    def coefficients(self) -> tuple[float, float]:
        """Seconds per batch and seconds per pair, neither below 0; the guess before the first batch."""
        if not self._weight:
            return 0.0, self._guess_s
        weight = self._weight + _ANCHOR_WEIGHT
        n, s = self._n / weight, self._s / weight
        per_pair = (self._ns / weight - n * s) / (self._nn / weight - n * n)
        if per_pair < 0:
            return s, 0.0
        if s < per_pair * n:
            return 0.0, self._ns / self._nn
        return s - per_pair * n, per_pair

    def seconds(self, pairs: int, batch_pairs: int) -> float:
        """Return the estimated seconds of `pairs` in full batches of `batch_pairs`."""
        fixed, per_pair = self.coefficients
        return fixed * math.ceil(pairs / batch_pairs) + per_pair * pairs


class BatchSize:
    """Limit of a batch in pairs: halved when memory runs out, raised again by a quarter at a time.

    It is raised after 16 full batches that fitted. If that was too much, it returns to the size that is known
    to fit, and the number of batches before the next attempt doubles, up to 1,024.

    Args:
        max_pairs: the configured limit
    """

    def __init__(self, max_pairs: int) -> None:
        self.current = self._max_pairs = max_pairs
        self._largest_fitting = 0
        self._required_full_batches, self._full_batches = _FULL_BATCHES_BEFORE_GROWTH, 0

    def record_success(self, pairs: int) -> None:
        """Record that a batch of `pairs` has run."""
        if pairs < self.current:  # says nothing about larger ones
            return
        self._largest_fitting = self.current
        self._full_batches += 1
        if self._full_batches >= self._required_full_batches and self.current < self._max_pairs:
            self.current = min(self._max_pairs, self.current + max(1, self.current // 4))
            self._full_batches = 0

    def record_oom(self, pairs: int) -> None:
        """Record that the memory did not suffice for a batch of `pairs`."""
        self._full_batches = 0
        if 0 < self._largest_fitting < pairs:
            self._required_full_batches = min(_MAX_FULL_BATCHES, 2 * self._required_full_batches)
            self.current = min(self.current, max(self._largest_fitting, pairs // 2))
        else:
            self._largest_fitting, self._required_full_batches = 0, _FULL_BATCHES_BEFORE_GROWTH
            self.current = min(self.current, max(1, pairs // 2))

    def restore(self, pairs: int) -> None:
        """Set the limit back to `pairs`: a single pair was too large, so the batch size was not the cause."""
        self.current = pairs


# Preparation ------------------------------------------------------------------------------------------

Prepare = Callable[[Sequence[Input], Hashable], Sequence[Any]]


class Prefetcher(Generic[Input, Result]):
    """Thread that prepares the inputs of the next batch while the device runs the current one.

    The prefetched batch is a forecast. When the device is free, the batch is formed anew in fair order from
    what is queued then, and `prepared_inputs` prepares what is missing: a request that arrives during a run
    never has to wait for another batch because that one was already prepared.

    Args:
        prepare: prepares inputs of one lane, each independently, in order; never called concurrently
        next_batch: returns the pairs of the next batch as it would be now, all of one lane
    """

    def __init__(
        self, prepare: Prepare[Input], next_batch: Callable[[], Sequence[RequestPair[Input, Result]]]
    ) -> None:
        self._prepare, self._next_batch = prepare, next_batch
        self._prepare_lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = False
        threading.Thread(target=self._loop, name="prefetch", daemon=True).start()

    def start_next(self) -> None:
        """Start to prepare the next batch on the prefetch thread; return at once."""
        self._wake.set()

    def stop(self) -> None:
        """Stop the prefetch thread."""
        self._stopped = True
        self._wake.set()

    def prepared_inputs(self, batch: Sequence[RequestPair[Input, Result]]) -> list[Any]:
        """Return the prepared inputs of a batch, in order; prepare those that are missing.

        Raises:
            Exception: raised by `prepare`
        """
        with self._prepare_lock:
            self._prepare_missing(batch)
        return [request.prepared[position] for request, position in batch]

    def _loop(self) -> None:
        while self._wake.wait() and not self._stopped:
            self._wake.clear()
            # An error here is raised again, and then handled, when the batch runs.
            with self._prepare_lock, suppress(Exception):
                self._prepare_missing(self._next_batch())

    def _prepare_missing(self, batch: Sequence[RequestPair[Input, Result]]) -> None:
        missing = [pair for pair in batch if pair.position not in pair.request.prepared]
        if not missing:
            return
        prepared = self._prepare([pair.input for pair in missing], missing[0].request.lane)
        for (request, position), ready in zip(missing, prepared, strict=True):
            request.prepared[position] = ready


# Running ----------------------------------------------------------------------------------------------

Item = TypeVar("Item")


def run_isolated(
    batch: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Result]],
    is_open: Callable[[Item], bool],
    size: BatchSize,
    on_oom: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[Sequence[Item], Sequence[Result] | Exception]]:
    """Run a batch, and halve what fails until the failing items are alone.

    One failing item among n costs at most 2·log2(n) further runs. Every success and every lack of memory is
    recorded in `size`, and later parts keep to its limit.

    Args:
        batch: items to run
        run: returns one result per item, in order
        is_open: evaluated before each run; items for which it is false are left out
        size: limit of a part
        on_oom: called with the size of each part that did not fit into memory

    Returns:
        parts with their results, and single items with their errors, as they are finished

    Raises:
        FatalDeviceError: raised by `run`
    """
    limit_before, any_fitted, single_pair_oom = size.current, False, False
    parts = [batch]
    while parts:
        part = [item for item in parts.pop() if is_open(item)]
        if not part:
            continue
        if len(part) > size.current:
            parts += _halves(part)
            continue
        try:
            results = _checked(part, run(part))
        except FatalDeviceError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises is attributed to an item
            out_of_memory = isinstance(error, OutOfMemoryError)
            if out_of_memory:
                on_oom(len(part))
                size.record_oom(len(part))
            if len(part) > 1:
                parts += _halves(part)
                continue
            if out_of_memory:
                single_pair_oom = True
                size.restore(limit_before)
            yield part, error
            continue
        any_fitted = True
        size.record_success(len(part))
        yield part, results
    if single_pair_oom and not any_fitted:  # no pair fits: the device's memory is the cause, not the pairs
        size.restore(max(1, limit_before // 2))


def _halves(part: Sequence[Item]) -> list[Sequence[Item]]:
    """Return the halves, the later one first: parts are taken from the end."""
    middle = (len(part) + 1) // 2
    return [part[middle:], part[:middle]]


def _checked(part: Sequence[Item], results: Sequence[Result]) -> Sequence[Result]:
    if len(results) != len(part):
        raise RuntimeError(f"{len(results)} results for {len(part)} pairs")
    return results
