"""The queue before the device: threads, timing and what goes wrong. No torch, no web.

One thread drives the device. Whenever it is free it takes a batch of what is waiting, in fair order
(`reward_service.scheduler.fair_queue`): there is no timer to wait out. A second thread attends to
callers: answers, deadlines and the watchdog, so that neither a slow callback nor a hung device holds up the
other. docs/scheduling.md says what is promised.

The next batch gets ready while one runs: pairs are prepared ahead on a thread of their own.

What is staged is a forecast, not a promise. When the device is free the batch is formed anew, in fair order,
from what is waiting then; whatever of it has not been prepared is prepared on the spot. So nobody who comes
while a batch runs waits for another one to pass because it had been staged.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

from reward_service.scheduler.batching import BatchSize, BatchTime, run_isolated
from reward_service.scheduler.requests import (
    Backlog,
    ClosedError,
    Completed,
    DeadlineError,
    Ending,
    Observer,
    PairFailedError,
    QueueFullError,
    Request,
    StuckError,
    Unit,
    Unobserved,
)

Work = TypeVar("Work")
Result = TypeVar("Result")

Prepare = Callable[[Sequence[Work], Hashable], Sequence[Any]]


class Stage(Generic[Work, Result]):
    """Prepares what will probably be run next.

    Args:
        prepare: makes works of one lane ready, each for itself, in order; never called twice at once
        upcoming: the pairs of the next batch as it would be now, all of one lane
    """

    def __init__(self, prepare: Prepare[Work], upcoming: Callable[[], Sequence[Unit[Work, Result]]]) -> None:
        self._prepare, self._upcoming = prepare, upcoming
        self._preparing = threading.Lock()
        self._due = threading.Event()
        self._stopped = False
        threading.Thread(target=self._loop, name="stage", daemon=True).start()

    def look_ahead(self) -> None:
        """There may be something to prepare; returns at once."""
        self._due.set()

    def stop(self) -> None:
        """Prepare no more ahead."""
        self._stopped = True
        self._due.set()

    def ready(self, units: Sequence[Unit[Work, Result]]) -> list[Any]:
        """The prepared works of a batch, in order.

        Raises:
            Exception: whatever `prepare` raised
        """
        with self._preparing:
            self._make_ready(units)
        return [request.prepared[place] for request, place in units]

    def _loop(self) -> None:
        while self._due.wait() and not self._stopped:
            self._due.clear()
            # What goes wrong here goes wrong again, and is told, when the batch runs.
            with self._preparing, suppress(Exception):
                self._make_ready(self._upcoming())

    def _make_ready(self, units: Sequence[Unit[Work, Result]]) -> None:
        missing = [unit for unit in units if unit.place not in unit.request.prepared]
        if not missing:
            return
        prepared = self._prepare([unit.work for unit in missing], missing[0].request.lane)
        for (request, place), ready in zip(missing, prepared, strict=True):
            request.prepared[place] = ready


__all__ = [
    "ClosedError",
    "Completed",
    "DeadlineError",
    "Observer",
    "PairFailedError",
    "QueueFullError",
    "Scheduler",
    "StuckError",
]

_FIRST_GUESS_S_PER_PAIR = 0.01
_LAST_ANSWERS_S = 5.0
_QUANTA_PER_BATCH = 8
_LONGEST_RETRY_S = 600
_logger = logging.getLogger(__name__)


class Scheduler(Generic[Work, Result]):
    """Runs requests' pairs in batches on one thread.

    Args:
        run: scores a batch of one lane, results in order; gets what `prepare` made, or the works themselves;
            called on one thread only. An OutOfMemoryError of it (`reward_service.engine.types`) has a smaller
            batch tried, a FatalDeviceError ends it all, anything else has the pair at fault sought
        batch_pairs: most pairs of a batch
        max_queued_pairs: most pairs admitted and not yet dispatched
        quantum_pairs: pairs of one client before the next one's turn; None for an eighth of a batch
        prepare: makes works ready for `run`, each for itself, on the CPU while another batch runs
        hang_s: a run that takes longer has hung; None to wait for ever
        on_stuck: called once when nothing more can be scored, after everybody has been told
        clock: seconds, running at the speed of real time
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any], Hashable], Sequence[Result]],
        *,
        batch_pairs: int,
        max_queued_pairs: int,
        quantum_pairs: int | None = None,
        prepare: Prepare[Work] | None = None,
        hang_s: float | None = None,
        on_stuck: Callable[[StuckError], None] = lambda _: None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._clock, self._observer = run, clock, observer or Unobserved()
        self._hang_s, self._on_stuck = hang_s, on_stuck
        quantum = quantum_pairs or max(1, batch_pairs // _QUANTA_PER_BATCH)
        self._backlog: Backlog[Work, Result] = Backlog(batch_pairs, quantum, max_queued_pairs)
        self._sizes, self._times = BatchSize(batch_pairs), BatchTime(_FIRST_GUESS_S_PER_PAIR)
        # Nothing is refused for its deadline on a guess.
        self._lane_times: defaultdict[Hashable, BatchTime] = defaultdict(lambda: BatchTime(0.0))
        self._lock = threading.Lock()
        self._work, self._news = threading.Condition(self._lock), threading.Condition(self._lock)
        self._post: list[Callable[[], object]] = []
        self._running_pairs = 0
        self._run_since: float | None = None
        self._wake_s = math.inf
        self._refusal: Callable[[], Exception] | None = None  # of new work
        self._given_up = self._driver_gone = False
        self._stage = Stage(prepare, self._upcoming) if prepare else None
        self._attendant = threading.Thread(target=self._attend, name="scheduler", daemon=True)
        self._attendant.start()
        threading.Thread(target=self._drive, name="device", daemon=True).start()

    @property
    def queued_pairs(self) -> int:
        """Pairs admitted and not yet dispatched."""
        return self._backlog.queued_pairs

    @property
    def batch_pairs(self) -> int:
        """Most pairs of a batch at present: fewer than configured after memory ran out."""
        return self._sizes.now

    def submit(
        self,
        works: Sequence[Work],
        lane: Hashable = None,
        *,
        client: str = "",
        weight: float = 1.0,
        deadline_s: float | None = None,
    ) -> Future[Completed[Result]]:
        """Admit a request, whole or not at all. To leave, cancel its future.

        Args:
            lane: only requests of equal lanes share a batch
            client: among whom the device is shared, in proportion to `weight`
            deadline_s: on the scheduler's clock; the future is settled by then

        Returns:
            fails with `PairFailedError` if a pair cannot be scored, `DeadlineError`, `ClosedError` or
            `StuckError`

        Raises:
            QueueFullError: there is no room for all of its pairs
            DeadlineError: the deadline has passed, or the device is busy and needs longer for this alone
            ClosedError: shutting down
            StuckError: nothing more can be scored
            ValueError: no works, or a weight that is not a finite number above 0
        """
        now, deadline = self._clock(), math.inf if deadline_s is None else deadline_s
        request = Request[Work, Result](works, lane, client, weight, deadline, now)
        with self._lock:
            if self._refusal:
                raise self._refusal()
            self._refuse_if_full(len(works))
            self._refuse_if_late(request)
            forecast_full = self._backlog.queued_pairs >= self._sizes.now
            future = self._backlog.add(request)
            self._work.notify()
            if deadline < self._wake_s:
                self._news.notify()
            if self._stage and self._running_pairs and not forecast_full:
                self._stage.look_ahead()
        future.add_done_callback(lambda done: self._leave(request) if done.cancelled() else None)
        return future

    def check_room(self, pairs: int = 1) -> None:
        """Nothing if `pairs` more may queue. An empty queue takes any request, however large.

        Raises:
            QueueFullError: they may not
        """
        with self._lock:
            self._refuse_if_full(pairs)

    def retry_after_s(self) -> int:
        """Seconds, at least 1, until what is admitted now will probably be done."""
        with self._lock:
            return self._retry_after_s()

    def close(self, timeout_s: float) -> bool:
        """Take nothing more and finish what was admitted.

        Returns:
            whether it was all finished in time; what was not fails with `ClosedError`
        """
        with self._lock:
            self._refusal = self._refusal or _closing
            self._work.notify()
        self._attendant.join(timeout_s)
        in_time = not self._attendant.is_alive() and not self._given_up
        if self._attendant.is_alive():
            with self._lock:
                self._give_up(lambda: ClosedError("the service shut down before this was scored"))
            self._attendant.join(_LAST_ANSWERS_S)
        if self._stage:
            self._stage.stop()
        return in_time

    # Everything with a leading underscore and "lock held" is called with the lock held, and the
    # rest without it: a future's callbacks are the callers' code and may come back in.

    def _refuse_if_full(self, pairs: int) -> None:
        """Lock held."""
        if not self._backlog.has_room(pairs):
            raise QueueFullError(self._retry_after_s())

    def _refuse_if_late(self, request: Request[Work, Result]) -> None:
        """Lock held. An idle device tries in any case: only a run can correct a wrong estimate."""
        left_s = request.deadline_s - request.submitted_s
        busy = self._running_pairs > 0 or self._backlog.queued_pairs > 0
        if left_s <= 0 or (busy and left_s < self._lane_s(request.lane, request.pairs)):
            self._send(partial(self._observer.on_expired, request.pairs))
            raise DeadlineError("the deadline is too early for this many pairs")

    def _retry_after_s(self) -> int:
        """Lock held."""
        pairs = self._backlog.queued_pairs + self._running_pairs
        return min(_LONGEST_RETRY_S, max(1, math.ceil(self._times.seconds(pairs, self._sizes.now))))

    def _lane_s(self, lane: Hashable, pairs: int) -> float:
        """Lock held."""
        return self._lane_times[lane].seconds(pairs, self._sizes.now)

    def _leave(self, request: Request[Work, Result]) -> None:
        with self._lock:
            if dropped := self._backlog.leave(request):
                self._send(partial(self._observer.on_cancelled, dropped))

    def _send(self, message: Callable[[], object]) -> None:
        """Lock held. To be called by the attendant."""
        self._post.append(message)
        self._news.notify()

    def _end(self, endings: Iterable[Ending[Result]]) -> None:
        """Lock held."""
        for ending in endings:
            self._send(ending.deliver)
            if ending.dropped and isinstance(ending.outcome, DeadlineError):
                self._send(partial(self._observer.on_expired, ending.dropped))

    def _give_up(self, error: Callable[[], Exception]) -> None:
        """Lock held. Nothing more is run, and everybody is told."""
        self._given_up = True
        self._refusal = self._refusal or error
        self._end(self._backlog.end_all(error))
        self._work.notify()
        self._news.notify()

    def _get_stuck(self, reason: str, cause: BaseException | None = None) -> None:
        """Lock held."""
        if self._given_up:
            return

        def stuck() -> StuckError:
            error = StuckError(reason)
            error.__cause__ = cause
            return error

        self._refusal = stuck
        self._give_up(stuck)
        self._send(partial(self._on_stuck, stuck()))

    # The device's thread.

    def _drive(self) -> None:
        try:
            while units := self._next_batch():
                self._run_batch(units)
        except BaseException as error:  # a driver that is gone must not leave anybody waiting
            _logger.exception("the device has failed")
            with self._lock:
                self._get_stuck(f"the device has failed: {type(error).__name__}", error)
        finally:
            with self._lock:
                self._driver_gone = True
                self._news.notify()

    def _next_batch(self) -> list[Unit[Work, Result]]:
        """Wait for work and dispatch a batch; nothing once closed and empty, or given up."""
        with self._lock:
            self._running_pairs = 0
            while not self._given_up:
                now = self._clock()
                self._drop_overdue(now)
                if units := self._backlog.take(self._sizes.now, now):
                    self._running_pairs = len(units)
                    if self._stage:
                        self._stage.look_ahead()
                    return units
                if self._refusal:
                    break
                self._work.wait()
            return []

    def _drop_overdue(self, now: float) -> None:
        """Lock held."""
        self._end(self._backlog.expire(now))
        pairs = min(self._sizes.now, self._backlog.queued_pairs)
        self._end(self._backlog.drop_late(now, partial(self._lane_s, pairs=pairs)))

    def _run_batch(self, units: Sequence[Unit[Work, Result]]) -> None:
        started, capacity = self._clock(), self._sizes.now
        waits = [started - request.submitted_s for request, place in units if place == 0]
        for part, outcome in run_isolated(units, self._call, self._wanted, self._sizes, self._tell_oom):
            with self._lock:
                if isinstance(outcome, Exception):
                    self._end(self._backlog.fail(part[0], outcome))
                else:
                    self._end(self._backlog.finish(part, outcome, self._clock()))
        with self._lock:
            elapsed = self._clock() - started
            self._send(partial(self._observer.on_batch, len(units), capacity, waits, elapsed))

    def _wanted(self, unit: Unit[Work, Result]) -> bool:
        return unit.request in self._backlog

    def _tell_oom(self, pairs: int) -> None:
        with self._lock:
            self._send(partial(self._observer.on_oom, pairs))

    def _call(self, part: Sequence[Unit[Work, Result]]) -> Sequence[Result]:
        lane = part[0].request.lane
        started = self._run_since = self._clock()
        try:
            ready = self._stage.ready(part) if self._stage else [unit.work for unit in part]
            results = self._run(ready, lane)
        finally:
            self._run_since = None
        with self._lock:
            for times in (self._times, self._lane_times[lane]):
                times.add(len(part), self._clock() - started)
        return results

    def _upcoming(self) -> Sequence[Unit[Work, Result]]:
        with self._lock:
            return self._backlog.upcoming(self._sizes.now) if self._running_pairs else []

    # The attendant's thread.

    def _attend(self) -> None:
        while messages := self._await_news():
            for message in messages:
                try:
                    message()
                except Exception:  # an observer's fault is not the callers'
                    _logger.exception("an observer of the scheduler failed")

    def _await_news(self) -> list[Callable[[], object]]:
        """What to tell whom; nothing once there will be no more."""
        with self._lock:
            while True:
                now = self._clock()
                self._end(self._backlog.expire(now))
                self._watch(now)
                if self._post or self._given_up or self._driver_gone:
                    messages, self._post = self._post, []
                    return messages
                self._wake_s = min(self._backlog.next_deadline_s, self._next_look_s(now))
                self._news.wait(None if self._wake_s == math.inf else max(0.0, self._wake_s - now))

    def _watch(self, now: float) -> None:
        """Lock held."""
        since = self._run_since
        if self._hang_s is not None and since is not None and now - since > self._hang_s:
            self._get_stuck(f"the device has not answered for {self._hang_s:g} s")

    def _next_look_s(self, now: float) -> float:
        """Lock held. When to look at the device again."""
        return math.inf if self._hang_s is None else now + self._hang_s / 4


def _closing() -> Exception:
    return ClosedError("the service is shutting down")
