"""Requests that are admitted and not finished, and the ways in which a request can end.

Plain data structures without threads or clocks: the current time is an argument. Every request ends exactly
once, as a `FinishedRequest`; the scheduler settles its future after it has released its lock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from reward_service.scheduler.fair_queue import FairQueue, JobSlice

Input = TypeVar("Input")
Result = TypeVar("Result")

_STALE_ENTRIES = 64  # tolerated in the heap of deadlines before it is rebuilt


# Errors -----------------------------------------------------------------------------------------------


class QueueFullError(Exception):
    """The queue has no room now; `retry_after_s` estimates when it will have."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The scheduler accepts no more requests, or was closed before this one was scored."""


class DeadlineMissedError(Exception):
    """The deadline has passed, or would pass before the request is scored."""


class StuckError(Exception):
    """The device hangs or has failed permanently; nothing more can be scored. `__cause__` is the reason."""


class PairFailedError(Exception):
    """The pair at `index` of its request cannot be scored; `__cause__` is the reason."""

    def __init__(self, index: int) -> None:
        super().__init__(f"pair {index} cannot be scored")
        self.index = index


# Observers --------------------------------------------------------------------------------------------


class Observer(Protocol):
    """Receiver of the scheduler's events, called on its callback thread and never under its lock."""

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        """Record a batch that has run.

        Args:
            pairs: pairs in the batch
            capacity: most pairs it could have had
            queue_s: seconds in the queue, of each request whose first pair was in the batch
            run_s: seconds that the batch took
        """

    def on_cancelled(self, pairs: int) -> None:
        """Record a cancelled request, `pairs` of which had not been dispatched."""

    def on_expired(self, pairs: int) -> None:
        """Record a request whose deadline passed, `pairs` of which had not been dispatched."""

    def on_oom(self, size: int) -> None:
        """Record a batch of `size` pairs that did not fit into the device's memory."""


class NullObserver:
    """Observer that ignores every event."""

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        """Ignore the event."""

    def on_cancelled(self, pairs: int) -> None:
        """Ignore the event."""

    def on_expired(self, pairs: int) -> None:
        """Ignore the event."""

    def on_oom(self, size: int) -> None:
        """Ignore the event."""


# Requests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completed(Generic[Result]):
    """Results of a request in its own order, and the seconds that it was queued and run."""

    results: list[Result]
    queued_s: float
    run_s: float


@dataclass(eq=False, repr=False)  # no repr: images do not belong into messages
class QueuedRequest(Generic[Input, Result]):
    """Pairs that are finished together. Times are seconds on the scheduler's clock; inf is no deadline.

    It holds no reference to its future: an exception's traceback leads back here, and a reference cycle
    would keep images in memory until the next garbage collection.
    """

    inputs: Sequence[Input]
    lane: Hashable
    client: str
    weight: float
    deadline_s: float
    submitted_s: float
    pair_cost: int = 1
    started_s: float | None = None
    results: dict[int, Result] = field(default_factory=dict)
    prepared: dict[int, Any] = field(default_factory=dict)
    pairs: int = field(init=False)

    def __post_init__(self) -> None:
        self.pairs = len(self.inputs)
        if not self.pairs:
            raise ValueError("a request has at least one pair")
        if not 0 < self.weight < math.inf:
            raise ValueError("a weight is a finite number above 0")


class RequestPair(NamedTuple, Generic[Input, Result]):
    """One pair of a request, by its position there."""

    request: QueuedRequest[Input, Result]
    position: int

    @property
    def input(self) -> Input:
        """Prompt and image, or whatever is scored."""
        return self.request.inputs[self.position]


class FinishedRequest(NamedTuple, Generic[Result]):
    """Outcome of a request; `dropped` of its pairs had not been dispatched."""

    future: Future[Completed[Result]]
    outcome: Completed[Result] | Exception
    dropped: int

    def settle(self) -> None:
        """Set the future's result or exception, unless it was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(self.outcome, Exception):
            self.future.set_exception(self.outcome)
        else:
            self.future.set_result(self.outcome)


class OpenRequests(Generic[Input, Result]):
    """Requests that are not finished, and the queue of their pairs that are not dispatched.

    Args:
        batch_pairs: most pairs of a batch
        quantum: pairs of one client before the next client's turn
        max_queued_pairs: most pairs in the queue
    """

    def __init__(self, batch_pairs: int, quantum: int, max_queued_pairs: int) -> None:
        self._max_queued = max_queued_pairs
        self._queue: FairQueue[QueuedRequest[Input, Result]] = FairQueue(quantum, batch_pairs)
        self._open: dict[QueuedRequest[Input, Result], Future[Completed[Result]]] = {}
        self._deadlines: list[tuple[float, int, QueuedRequest[Input, Result]]] = []
        self._deadlines_added = 0

    @property
    def queued_pairs(self) -> int:
        """Pairs that have not been dispatched."""
        return self._queue.pairs

    @property
    def next_deadline_s(self) -> float:
        """Earliest deadline of an open request; inf if there is none."""
        while self._deadlines and self._deadlines[0][2] not in self._open:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def __contains__(self, request: QueuedRequest[Input, Result]) -> bool:
        return request in self._open

    def has_room(self, pairs: int) -> bool:
        """Return whether `pairs` more fit into the queue; an empty queue takes any request."""
        return not self._queue.pairs or self._queue.pairs + pairs <= self._max_queued

    def add(self, request: QueuedRequest[Input, Result]) -> Future[Completed[Result]]:
        """Admit a request and return its future."""
        future: Future[Completed[Result]] = Future()
        self._open[request] = future
        self._queue.add(request)
        if request.deadline_s < math.inf:
            self._deadlines_added += 1
            heapq.heappush(self._deadlines, (request.deadline_s, self._deadlines_added, request))
        if len(self._deadlines) > 2 * len(self._open) + _STALE_ENTRIES:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._open]
            heapq.heapify(self._deadlines)
        return future

    def take(self, max_pairs: int, now_s: float) -> list[RequestPair[Input, Result]]:
        """Dispatch the next batch: at most `max_pairs` pairs of one lane, in fair order."""
        batch = list(_request_pairs(self._queue.take(max_pairs)))
        for request, _ in batch:
            if request.started_s is None:
                request.started_s = now_s
        return batch

    def peek(self, max_pairs: int) -> list[RequestPair[Input, Result]]:
        """Return the batch that `take` would dispatch now, without dispatching it."""
        return list(_request_pairs(self._queue.peek(max_pairs)))

    def complete(
        self, batch: Iterable[RequestPair[Input, Result]], results: Iterable[Result], now_s: float
    ) -> list[FinishedRequest[Result]]:
        """Store the results of a batch and return the requests that have all of theirs."""
        finished = []
        for (request, position), result in zip(batch, results, strict=True):
            request.prepared.pop(position, None)
            if request not in self._open:
                continue
            request.results[position] = result
            if len(request.results) == request.pairs:
                started = request.submitted_s if request.started_s is None else request.started_s
                ordered = [request.results[at] for at in range(request.pairs)]
                completed = Completed(ordered, started - request.submitted_s, now_s - started)
                finished.append(FinishedRequest(self._open.pop(request), completed, 0))
        return finished

    def fail(self, pair: RequestPair[Input, Result], cause: Exception) -> list[FinishedRequest[Result]]:
        """Finish the request of a pair that cannot be scored."""
        error = PairFailedError(pair.position)
        error.__cause__ = cause
        return self._finish([pair.request], lambda: error)

    def cancel(self, request: QueuedRequest[Input, Result]) -> int:
        """Remove a request whose future was cancelled.

        Returns:
            how many of its pairs had not been dispatched
        """
        self._open.pop(request, None)
        return self._queue.remove(request)

    def expire(self, now_s: float) -> list[FinishedRequest[Result]]:
        """Finish the requests whose deadline has passed, also those whose pairs are running."""
        overdue = []
        while self.next_deadline_s <= now_s:
            overdue.append(heapq.heappop(self._deadlines)[2])
        return self._finish(overdue, partial(DeadlineMissedError, "the deadline passed before scoring"))

    def drop_late(self, now_s: float, batch_s: Callable[[Hashable], float]) -> list[FinishedRequest[Result]]:
        """Finish queued requests that would miss their deadline even if they ran now.

        Running them would delay others for nothing. None is dropped if nothing else is queued: the estimate
        may be wrong, and only a run can correct it.

        Args:
            now_s: current time
            batch_s: estimated seconds of the next batch if it is of this lane
        """
        if self.next_deadline_s == math.inf:
            return []
        durations = {lane: batch_s(lane) for lane in {request.lane for _, _, request in self._deadlines}}
        if self.next_deadline_s >= now_s + max(durations.values()):
            return []
        late = [
            request
            for deadline_s, _, request in self._deadlines
            if deadline_s < now_s + durations[request.lane] and request in self._queue
        ]
        if sum(map(self._queue.remaining_pairs, late)) >= self._queue.pairs:
            return []
        return self._finish(late, partial(DeadlineMissedError, "the deadline would pass before scoring"))

    def fail_all(self, make_error: Callable[[], Exception]) -> list[FinishedRequest[Result]]:
        """Finish every open request, each with an exception object of its own."""
        return self._finish(list(self._open), make_error)

    def _finish(
        self, requests: Iterable[QueuedRequest[Input, Result]], make_error: Callable[[], Exception]
    ) -> list[FinishedRequest[Result]]:
        return [
            FinishedRequest(self._open.pop(request), make_error(), self._queue.remove(request))
            for request in requests
            if request in self._open
        ]


def _request_pairs(
    slices: Iterable[JobSlice[QueuedRequest[Input, Result]]],
) -> Iterator[RequestPair[Input, Result]]:
    for request, start, stop in slices:
        for position in range(start, stop):
            yield RequestPair(request, position)
