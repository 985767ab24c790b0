"""The queue before the device. No torch, no web.

One thread runs the device. Whenever it is free it takes what is waiting, up to a batch, from as many
requests as fit: there is no timer to wait out. A batch that fails is halved until the pair at fault is
found; only its request fails. The queue is bounded; a request is admitted whole or not at all.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")

_SMOOTHING = 0.2
_FIRST_GUESS_S_PER_PAIR = 0.01


class QueueFullError(Exception):
    """No room now; ``retry_after_s`` is when there will probably be some."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The scheduler takes no more work."""


class PairFailedError(Exception):
    """The pair at ``index`` of its request cannot be scored; ``__cause__`` says why."""

    def __init__(self, index: int) -> None:
        super().__init__(f"pair {index} cannot be scored")
        self.index = index


@dataclass(frozen=True)
class Completed(Generic[Result]):
    """A request's results in its own order, and the seconds it waited and was worked on."""

    results: list[Result]
    queued_s: float
    run_s: float


@dataclass(eq=False)
class _Request(Generic[Work, Result]):
    works: Sequence[Work]
    lane: Hashable
    future: Future[Completed[Result]]
    submitted_s: float
    started_s: float | None = None
    taken: int = 0
    left: int = 0
    results: dict[int, Result] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Unit(Generic[Work, Result]):
    """One pair of a request."""

    request: _Request[Work, Result]
    index: int

    @property
    def work(self) -> Work:
        return self.request.works[self.index]


class Scheduler(Generic[Work, Result]):
    """Runs requests' pairs in batches on one thread.

    :param run: scores a batch of one lane, results in order; called on the scheduler's thread only
    :param batch_pairs: most pairs of a batch
    :param max_queued_pairs: most pairs admitted and not yet begun
    """

    def __init__(
        self,
        run: Callable[[Sequence[Work], Hashable], Sequence[Result]],
        *,
        batch_pairs: int,
        max_queued_pairs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._clock = run, clock
        self._batch_pairs, self._max_queued = batch_pairs, max_queued_pairs
        self._waiting: deque[_Request[Work, Result]] = deque()
        self._changed = threading.Condition()
        self._queued_pairs = 0
        self._s_per_pair = _FIRST_GUESS_S_PER_PAIR
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def queued_pairs(self) -> int:
        """Pairs admitted and not yet begun."""
        return self._queued_pairs

    def submit(self, works: Sequence[Work], lane: Hashable = None) -> Future[Completed[Result]]:
        """Admit a request.

        :param lane: only requests of equal lanes share a batch
        :returns: fails with :class:`PairFailedError` if a pair cannot be scored
        :raises QueueFullError: there is no room for all of its pairs
        :raises ClosedError: shutting down
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the service is shutting down")
            self.check_room(len(works))
            future: Future[Completed[Result]] = Future()
            self._waiting.append(_Request(works, lane, future, self._clock(), left=len(works)))
            self._queued_pairs += len(works)
            self._changed.notify_all()
        return future

    def check_room(self, pairs: int = 1) -> None:
        """Nothing if ``pairs`` more may queue. An idle queue takes any request, however large.

        :raises QueueFullError: they may not
        """
        if self._queued_pairs and self._queued_pairs + pairs > self._max_queued:
            raise QueueFullError(max(1, math.ceil(self._queued_pairs * self._s_per_pair)))

    def close(self, timeout_s: float) -> bool:
        """Take nothing more and finish what was admitted.

        :returns: whether it was all finished in time; what was not fails with :class:`ClosedError`
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            left, self._waiting = list(self._waiting), deque()
            self._queued_pairs = 0
        for request in left:
            _settle(request, ClosedError("the service shut down before this was scored"))
        return not left and not self._thread.is_alive()

    def _loop(self) -> None:
        while (units := self._take()) is not None:
            started = self._clock()
            for unit in units:
                unit.request.started_s = unit.request.started_s or started
            self._run_or_bisect(units)
            elapsed = (self._clock() - started) / len(units)
            self._s_per_pair += _SMOOTHING * (elapsed - self._s_per_pair)

    def _take(self) -> list[_Unit[Work, Result]] | None:
        """Wait for work and take a batch of the first request's lane; None once closed and empty."""
        with self._changed:
            while True:
                self._drop_settled()
                if self._waiting:
                    return self._batch(self._waiting[0].lane)
                if self._closed:
                    return None
                self._changed.wait()

    def _batch(self, lane: Hashable) -> list[_Unit[Work, Result]]:
        units: list[_Unit[Work, Result]] = []
        for request in list(self._waiting):
            if request.lane != lane:
                continue
            end = min(len(request.works), request.taken + self._batch_pairs - len(units))
            units += [_Unit(request, index) for index in range(request.taken, end)]
            self._queued_pairs -= end - request.taken
            request.taken = end
            if end == len(request.works):
                self._waiting.remove(request)
            if len(units) == self._batch_pairs:
                break
        return units

    def _drop_settled(self) -> None:
        """Forget what waits of requests that failed or whose caller left."""
        for request in list(self._waiting):
            if request.future.done():
                self._queued_pairs -= len(request.works) - request.taken
                self._waiting.remove(request)

    def _run_or_bisect(self, units: Sequence[_Unit[Work, Result]]) -> None:
        units = [unit for unit in units if not unit.request.future.done()]
        if not units:
            return
        try:
            results = self._run([unit.work for unit in units], units[0].request.lane)
            if len(results) != len(units):
                raise RuntimeError(f"{len(results)} results for {len(units)} pairs")
        except Exception as error:  # noqa: BLE001 - whatever a model raises belongs to one request, not to us
            self._isolate(units, error)
            return
        for unit, result in zip(units, results, strict=True):
            self._finish(unit, result)

    def _isolate(self, units: Sequence[_Unit[Work, Result]], error: Exception) -> None:
        if len(units) > 1:
            middle = len(units) // 2
            self._run_or_bisect(units[:middle])
            self._run_or_bisect(units[middle:])
            return
        failure = PairFailedError(units[0].index)
        failure.__cause__ = error
        _settle(units[0].request, failure)

    def _finish(self, unit: _Unit[Work, Result], result: Result) -> None:
        request = unit.request
        request.results[unit.index] = result
        request.left -= 1
        if request.left or not request.future.set_running_or_notify_cancel():
            return
        now, started = self._clock(), request.started_s or request.submitted_s
        ordered = [request.results[index] for index in range(len(request.works))]
        request.future.set_result(Completed(ordered, started - request.submitted_s, now - started))


def _settle(request: _Request[Work, Result], error: Exception) -> None:
    if not request.future.done() and request.future.set_running_or_notify_cancel():
        request.future.set_exception(error)
