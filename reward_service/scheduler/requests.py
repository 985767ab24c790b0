"""Requests that were admitted and not answered yet. No threads, no clock: the time is an argument.

Every request ends once: it leaves the table of open ones with an `Ending`, which whoever holds the
lock delivers after letting go of it.

How a request can end, and who may watch. No torch, no web, no threads.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from reward_service.scheduler.fair_queue import FairQueue, Share

Result = TypeVar("Result")


@dataclass(frozen=True)
class Completed(Generic[Result]):
    """A request's results in its own order, and the seconds it waited and was worked on."""

    results: list[Result]
    queued_s: float
    run_s: float


class QueueFullError(Exception):
    """No room now; `retry_after_s` is when there will probably be some."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The scheduler takes no more work, or was closed before this was done."""


class DeadlineError(Exception):
    """The deadline has passed, or would have before the work was done."""


class StuckError(Exception):
    """The device hangs or has failed for good; nothing more will be scored. `__cause__` may say why."""


class PairFailedError(Exception):
    """The pair at `index` of its request cannot be scored; `__cause__` says why."""

    def __init__(self, index: int) -> None:
        super().__init__(f"pair {index} cannot be scored")
        self.index = index


class Observer(Protocol):
    """Is told what happens; called on the scheduler's own thread, never while it holds a lock."""

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        """A batch has run.

        Args:
            capacity: most pairs it could have had
            queue_s: seconds in the queue of each request whose first pairs were in it
        """

    def on_cancelled(self, pairs: int) -> None:
        """A caller left while so many of its pairs had not been dispatched."""

    def on_expired(self, pairs: int) -> None:
        """A deadline passed while so many of its request's pairs had not been dispatched."""

    def on_oom(self, size: int) -> None:
        """A batch of `size` pairs did not fit into the device's memory."""


class Unobserved:
    """The observer that looks away."""

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        """Nothing."""

    def on_cancelled(self, pairs: int) -> None:
        """Nothing."""

    def on_expired(self, pairs: int) -> None:
        """Nothing."""

    def on_oom(self, size: int) -> None:
        """Nothing."""


Work = TypeVar("Work")

_SPARE = 64


@dataclass(eq=False, repr=False)  # images don't belong into messages
class Request(Generic[Work, Result]):
    """Pairs that are answered together. Times are seconds on the scheduler's clock; no deadline is inf.

    It doesn't know its future: an exception's traceback leads back here, and a ring of references would
    keep images in memory until the collector comes round.
    """

    works: Sequence[Work]
    lane: Hashable
    client: str
    weight: float
    deadline_s: float
    submitted_s: float
    started_s: float | None = None
    results: dict[int, Result] = field(default_factory=dict)
    prepared: dict[int, Any] = field(default_factory=dict)
    pairs: int = field(init=False)

    def __post_init__(self) -> None:
        self.pairs = len(self.works)
        if not self.pairs:
            raise ValueError("a request has at least one pair")
        if not 0 < self.weight < math.inf:
            raise ValueError("a weight is a finite number above 0")


class Unit(NamedTuple, Generic[Work, Result]):
    """One pair of a request, at its place there."""

    request: Request[Work, Result]
    place: int

    @property
    def work(self) -> Work:
        """What is to be scored."""
        return self.request.works[self.place]


class Ending(NamedTuple, Generic[Result]):
    """How a request ended; `dropped` of its pairs had not been dispatched."""

    future: Future[Completed[Result]]
    outcome: Completed[Result] | Exception
    dropped: int

    def deliver(self) -> None:
        """Settle the future, unless its caller has left."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(self.outcome, Exception):
            self.future.set_exception(self.outcome)
        else:
            self.future.set_result(self.outcome)


class Backlog(Generic[Work, Result]):
    """The open requests and what of them is queued.

    Args:
        quantum: pairs of one client before the next one's turn
        max_queued_pairs: most pairs that wait
    """

    def __init__(self, batch_pairs: int, quantum: int, max_queued_pairs: int) -> None:
        self._max_queued = max_queued_pairs
        self._queue: FairQueue[Request[Work, Result]] = FairQueue(quantum, batch_pairs)
        self._open: dict[Request[Work, Result], Future[Completed[Result]]] = {}
        self._deadlines: list[tuple[float, int, Request[Work, Result]]] = []
        self._added = 0

    @property
    def queued_pairs(self) -> int:
        """Pairs that have not been dispatched."""
        return self._queue.pairs

    @property
    def next_deadline_s(self) -> float:
        """The earliest one of an open request; inf if there is none."""
        while self._deadlines and self._deadlines[0][2] not in self._open:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def __contains__(self, request: Request[Work, Result]) -> bool:
        return request in self._open

    def has_room(self, pairs: int) -> bool:
        """Whether so many more may wait. An empty queue takes any request, however large."""
        return not self._queue.pairs or self._queue.pairs + pairs <= self._max_queued

    def add(self, request: Request[Work, Result]) -> Future[Completed[Result]]:
        """Admit a request."""
        future: Future[Completed[Result]] = Future()
        self._open[request] = future
        self._queue.add(request)
        if request.deadline_s < math.inf:
            self._added += 1
            heapq.heappush(self._deadlines, (request.deadline_s, self._added, request))
        if len(self._deadlines) > 2 * len(self._open) + _SPARE:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._open]
            heapq.heapify(self._deadlines)
        return future

    def take(self, most: int, now_s: float) -> list[Unit[Work, Result]]:
        """Dispatch the next batch, at most `most` pairs of one lane, in fair order."""
        units = list(_units(self._queue.take(most)))
        for request, _ in units:
            if request.started_s is None:
                request.started_s = now_s
        return units

    def upcoming(self, most: int) -> list[Unit[Work, Result]]:
        """What `take` would give now; dispatches nothing."""
        return list(_units(self._queue.peek(most)))

    def finish(
        self, units: Iterable[Unit[Work, Result]], results: Iterable[Result], now_s: float
    ) -> list[Ending[Result]]:
        """Note results; requests that have all of theirs end."""
        endings = []
        for (request, place), result in zip(units, results, strict=True):
            request.prepared.pop(place, None)
            if request not in self._open:
                continue
            request.results[place] = result
            if len(request.results) == request.pairs:
                started = request.submitted_s if request.started_s is None else request.started_s
                ordered = [request.results[at] for at in range(request.pairs)]
                completed = Completed(ordered, started - request.submitted_s, now_s - started)
                endings.append(Ending(self._open.pop(request), completed, 0))
        return endings

    def fail(self, unit: Unit[Work, Result], cause: Exception) -> list[Ending[Result]]:
        """The request of a pair that cannot be scored ends."""
        error = PairFailedError(unit.place)
        error.__cause__ = cause
        return self._end([unit.request], lambda: error)

    def leave(self, request: Request[Work, Result]) -> int:
        """The caller has cancelled its future.

        Returns:
            how many of its pairs will not be run for that
        """
        self._open.pop(request, None)
        return self._queue.remove(request)

    def expire(self, now_s: float) -> list[Ending[Result]]:
        """Requests whose deadline has passed end, also those whose pairs are being run."""
        over = []
        while self.next_deadline_s <= now_s:
            over.append(heapq.heappop(self._deadlines)[2])
        return self._end(over, lambda: DeadlineError("the deadline passed before this was scored"))

    def drop_late(self, now_s: float, batch_s: Callable[[Hashable], float]) -> list[Ending[Result]]:
        """Queued requests that would miss their deadline even if run now end: they would make others late.

        Not if that would leave nothing to run: the estimate may be wrong, and only a run can correct it.

        Args:
            batch_s: how long the next batch will probably take if it is of this lane
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
        if sum(map(self._queue.left, late)) >= self._queue.pairs:
            return []
        return self._end(late, lambda: DeadlineError("the deadline would pass before this was scored"))

    def end_all(self, error: Callable[[], Exception]) -> list[Ending[Result]]:
        """Every open request ends, each with an error of its own making."""
        return self._end(list(self._open), error)

    def _end(
        self, requests: Iterable[Request[Work, Result]], error: Callable[[], Exception]
    ) -> list[Ending[Result]]:
        return [
            Ending(self._open.pop(request), error(), self._queue.remove(request))
            for request in requests
            if request in self._open
        ]


def _units(shares: Iterable[Share[Request[Work, Result]]]) -> Iterator[Unit[Work, Result]]:
    for request, start, stop in shares:
        for place in range(start, stop):
            yield Unit(request, place)
