"""Scheduler in front of the device: threads, timing and failures. Imports neither torch nor a web framework.

The device thread runs the batches. Whenever it is free it takes a batch of what is queued, in fair order
(`reward_service.scheduler.fair_queue`), without waiting for a timer. The callback thread settles futures,
enforces deadlines and watches for a hung device, so that neither a slow callback nor a hung device delays the
other. docs/scheduling.md states the guarantees.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic

from reward_service.scheduler.batching import BatchSize, BatchTime, Prefetcher, Prepare, run_isolated
from reward_service.scheduler.requests import (
    ClosedError,
    Completed,
    DeadlineMissedError,
    FinishedRequest,
    Input,
    NullObserver,
    Observer,
    OpenRequests,
    PairFailedError,
    QueuedRequest,
    QueueFullError,
    RequestPair,
    Result,
    StuckError,
)

__all__ = [
    "ClosedError",
    "Completed",
    "DeadlineMissedError",
    "Observer",
    "PairFailedError",
    "Prepare",
    "QueueFullError",
    "Scheduler",
    "StuckError",
]

_INITIAL_S_PER_PAIR = 0.01
_FINAL_CALLBACKS_S = 5.0
_QUANTA_PER_BATCH = 8
_MAX_RETRY_AFTER_S = 600
_logger = logging.getLogger(__name__)


class Scheduler(Generic[Input, Result]):
    """Runs the pairs of requests in batches on one thread.

    Args:
        run: scores a batch of one lane and returns results in order; gets what `prepare` returned, or the
            inputs themselves; called on one thread only. After an OutOfMemoryError
            (`reward_service.engine.types`) smaller batches are tried, a FatalDeviceError ends the scheduler,
            and after any other exception the failing pair is isolated
        batch_pairs: most pairs of a batch
        max_queued_pairs: most pairs that are admitted and not dispatched
        quantum_pairs: pairs of one client before the next client's turn; None for an eighth of a batch
        prepare: prepares inputs for `run`, each independently, on the CPU while another batch runs
        hang_s: seconds after which a run counts as hung; None for no limit
        on_stuck: called once when nothing more can be scored, after all futures are settled
        observer: receives the events
        clock: returns seconds, at the speed of real time
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any], Hashable], Sequence[Result]],
        *,
        batch_pairs: int,
        max_queued_pairs: int,
        quantum_pairs: int | None = None,
        prepare: Prepare[Input] | None = None,
        hang_s: float | None = None,
        on_stuck: Callable[[StuckError], None] = lambda _: None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._clock, self._observer = run, clock, observer or NullObserver()
        self._hang_s, self._on_stuck = hang_s, on_stuck
        quantum = quantum_pairs or max(1, batch_pairs // _QUANTA_PER_BATCH)
        self._requests: OpenRequests[Input, Result] = OpenRequests(batch_pairs, quantum, max_queued_pairs)
        self._sizes, self._times = BatchSize(batch_pairs), BatchTime(_INITIAL_S_PER_PAIR)
        # The guess is 0: no deadline is refused before the lane has been measured.
        self._lane_times: defaultdict[Hashable, BatchTime] = defaultdict(lambda: BatchTime(0.0))
        self._lock = threading.Lock()
        self._device_wake = threading.Condition(self._lock)
        self._callback_wake = threading.Condition(self._lock)
        self._callbacks: list[Callable[[], object]] = []
        self._running_pairs = 0
        self._run_started_s: float | None = None
        self._next_wake_s = math.inf
        self._make_refusal: Callable[[], Exception] | None = None  # error for every new request, if set
        self._aborted = self._device_loop_ended = False
        self._prefetcher = Prefetcher(prepare, self._next_batch_forecast) if prepare else None
        self._callback_thread = threading.Thread(target=self._callback_loop, name="scheduler", daemon=True)
        self._callback_thread.start()
        threading.Thread(target=self._device_loop, name="device", daemon=True).start()

    @property
    def queued_pairs(self) -> int:
        """Pairs that are admitted and not dispatched."""
        return self._requests.queued_pairs

    @property
    def batch_pairs(self) -> int:
        """Most pairs of a batch at present: fewer than configured after memory ran out."""
        return self._sizes.current

    def submit(
        self,
        inputs: Sequence[Input],
        lane: Hashable = None,
        *,
        client: str = "",
        weight: float = 1.0,
        deadline_s: float | None = None,
        pair_cost: int = 1,
    ) -> Future[Completed[Result]]:
        """Admit a request as a whole. Cancel the future to withdraw it.

        Args:
            inputs: one per pair
            lane: only requests of equal lanes share a batch
            client: clients share the device in proportion to their `weight`
            weight: a finite number above 0
            deadline_s: on the scheduler's clock; the future is settled by then
            pair_cost: how many ordinary pairs each of these pairs takes as long as

        Returns:
            the future result; its exception is a `PairFailedError` if a pair cannot be scored, a
            `DeadlineMissedError`, a `ClosedError` or a `StuckError`

        Raises:
            QueueFullError: the queue has no room for all pairs
            DeadlineMissedError: the deadline has passed, or the busy device cannot meet it
            ClosedError: the scheduler is closing
            StuckError: nothing more can be scored
            ValueError: no inputs, or an invalid weight
        """
        now, deadline = self._clock(), math.inf if deadline_s is None else deadline_s
        request = QueuedRequest[Input, Result](inputs, lane, client, weight, deadline, now, pair_cost)
        with self._lock:
            if self._make_refusal:
                raise self._make_refusal()
            if not self._requests.has_room(request.pairs):
                raise QueueFullError(self._retry_after_s())
            self._refuse_if_late(request)
            next_batch_full = self._requests.queued_pairs >= self._sizes.current
            future = self._requests.add(request)
            self._device_wake.notify()
            if deadline < self._next_wake_s:
                self._callback_wake.notify()
            if self._prefetcher and self._running_pairs and not next_batch_full:
                self._prefetcher.start_next()
        future.add_done_callback(lambda done: self._cancel(request) if done.cancelled() else None)
        return future

    def retry_after_s(self) -> int:
        """Return the estimated seconds, at least 1, until everything admitted now is scored."""
        with self._lock:
            return self._retry_after_s()

    def close(self, timeout_s: float) -> bool:
        """Refuse new requests and finish the admitted ones.

        Returns:
            whether all were finished in time; the others fail with `ClosedError`
        """
        with self._lock:
            self._make_refusal = self._make_refusal or _closing
            self._device_wake.notify()
        self._callback_thread.join(timeout_s)
        in_time = not self._callback_thread.is_alive() and not self._aborted
        if self._callback_thread.is_alive():
            with self._lock:
                self._abort(lambda: ClosedError("the service shut down before this was scored"))
            self._callback_thread.join(_FINAL_CALLBACKS_S)
        if self._prefetcher:
            self._prefetcher.stop()
        return in_time

    # Private methods whose docstring says "Lock held" are called with the lock held, all others without it:
    # callbacks of a future are foreign code that may call the scheduler again.

    def _refuse_if_late(self, request: QueuedRequest[Input, Result]) -> None:
        """Lock held. Raise DeadlineMissedError if the device is busy and the request cannot be done in time.

        An idle device tries in any case: only a run can correct a wrong estimate.
        """
        left_s = request.deadline_s - request.submitted_s
        busy = self._running_pairs > 0 or self._requests.queued_pairs > 0
        if left_s <= 0 or (busy and left_s < self._lane_s(request.lane, request.pairs)):
            self._post(partial(self._observer.on_expired, request.pairs))
            raise DeadlineMissedError("the deadline is too early for this many pairs")

    def _retry_after_s(self) -> int:
        """Lock held."""
        pairs = self._requests.queued_pairs + self._running_pairs
        return min(_MAX_RETRY_AFTER_S, max(1, math.ceil(self._times.seconds(pairs, self._sizes.current))))

    def _lane_s(self, lane: Hashable, pairs: int) -> float:
        """Lock held. Return the estimated seconds of `pairs` in a lane."""
        return self._lane_times[lane].seconds(pairs, self._sizes.current)

    def _cancel(self, request: QueuedRequest[Input, Result]) -> None:
        with self._lock:
            if dropped := self._requests.cancel(request):
                self._post(partial(self._observer.on_cancelled, dropped))

    def _post(self, callback: Callable[[], object]) -> None:
        """Lock held. Have the callback thread call it."""
        self._callbacks.append(callback)
        self._callback_wake.notify()

    def _post_finished(self, finished: Iterable[FinishedRequest[Result]]) -> None:
        """Lock held."""
        for request in finished:
            self._post(request.settle)
            if request.dropped and isinstance(request.outcome, DeadlineMissedError):
                self._post(partial(self._observer.on_expired, request.dropped))

    def _abort(self, make_error: Callable[[], Exception]) -> None:
        """Lock held. Run nothing more and fail all open requests."""
        self._aborted = True
        self._make_refusal = self._make_refusal or make_error
        self._post_finished(self._requests.fail_all(make_error))
        self._device_wake.notify()
        self._callback_wake.notify()

    def _abort_stuck(self, reason: str, cause: BaseException | None = None) -> None:
        """Lock held. Abort because the device hangs or has failed."""
        if self._aborted:
            return

        def make_error() -> StuckError:
            error = StuckError(reason)
            error.__cause__ = cause
            return error

        self._make_refusal = make_error
        self._abort(make_error)
        self._post(partial(self._on_stuck, make_error()))

    # Device thread ------------------------------------------------------------------------------------

    def _device_loop(self) -> None:
        try:
            while batch := self._next_batch():
                self._run_batch(batch)
        except BaseException as error:  # without a device thread no request may stay open
            _logger.exception("the device has failed")
            with self._lock:
                self._abort_stuck(f"the device has failed: {type(error).__name__}", error)
        finally:
            with self._lock:
                self._device_loop_ended = True
                self._callback_wake.notify()

    def _next_batch(self) -> list[RequestPair[Input, Result]]:
        """Wait for requests and dispatch a batch; return an empty one once closed and empty, or aborted."""
        with self._lock:
            self._running_pairs = 0
            while not self._aborted:
                now = self._clock()
                self._drop_overdue(now)
                if batch := self._requests.take(self._sizes.current, now):
                    self._running_pairs = len(batch)
                    if self._prefetcher:
                        self._prefetcher.start_next()
                    return batch
                if self._make_refusal:
                    break
                self._device_wake.wait()
            return []

    def _drop_overdue(self, now: float) -> None:
        """Lock held."""
        self._post_finished(self._requests.expire(now))
        pairs = min(self._sizes.current, self._requests.queued_pairs)
        self._post_finished(self._requests.drop_late(now, partial(self._lane_s, pairs=pairs)))

    def _run_batch(self, batch: Sequence[RequestPair[Input, Result]]) -> None:
        started, capacity = self._clock(), self._sizes.current
        queue_s = [started - request.submitted_s for request, position in batch if position == 0]
        for part, outcome in run_isolated(batch, self._call, self._is_open, self._sizes, self._post_oom):
            with self._lock:
                if isinstance(outcome, Exception):
                    self._post_finished(self._requests.fail(part[0], outcome))
                else:
                    self._post_finished(self._requests.complete(part, outcome, self._clock()))
            # An error's traceback leads back to this frame: a cycle that would keep the inputs.
            del part, outcome
        with self._lock:
            elapsed = self._clock() - started
            self._post(partial(self._observer.on_batch, len(batch), capacity, queue_s, elapsed))

    def _is_open(self, pair: RequestPair[Input, Result]) -> bool:
        return pair.request in self._requests

    def _post_oom(self, pairs: int) -> None:
        with self._lock:
            self._post(partial(self._observer.on_oom, pairs))

    def _call(self, part: Sequence[RequestPair[Input, Result]]) -> Sequence[Result]:
        lane = part[0].request.lane
        started = self._run_started_s = self._clock()
        try:
            inputs = (
                self._prefetcher.prepared_inputs(part) if self._prefetcher else [pair.input for pair in part]
            )
            results = self._run(inputs, lane)
        finally:
            self._run_started_s = None
        with self._lock:
            for times in (self._times, self._lane_times[lane]):
                times.add(len(part), self._clock() - started)
        return results

    def _next_batch_forecast(self) -> Sequence[RequestPair[Input, Result]]:
        """Return the next batch as it would be now; called on the prefetch thread."""
        with self._lock:
            return self._requests.peek(self._sizes.current) if self._running_pairs else []

    # Callback thread ----------------------------------------------------------------------------------

    def _callback_loop(self) -> None:
        while callbacks := self._wait_for_callbacks():
            for callback in callbacks:
                try:
                    callback()
                except Exception:  # an observer's fault must not affect the requests
                    _logger.exception("an observer of the scheduler failed")

    def _wait_for_callbacks(self) -> list[Callable[[], object]]:
        """Return the callbacks to call; an empty list once there will be no more."""
        with self._lock:
            while True:
                now = self._clock()
                self._post_finished(self._requests.expire(now))
                self._check_hang(now)
                if self._callbacks or self._aborted or self._device_loop_ended:
                    callbacks, self._callbacks = self._callbacks, []
                    return callbacks
                self._next_wake_s = min(self._requests.next_deadline_s, self._next_hang_check_s(now))
                timeout_s = None if self._next_wake_s == math.inf else max(0.0, self._next_wake_s - now)
                self._callback_wake.wait(timeout_s)

    def _check_hang(self, now: float) -> None:
        """Lock held."""
        started = self._run_started_s
        if self._hang_s is not None and started is not None and now - started > self._hang_s:
            self._abort_stuck(f"the device has not responded for {self._hang_s:g} s")

    def _next_hang_check_s(self, now: float) -> float:
        """Lock held."""
        return math.inf if self._hang_s is None else now + self._hang_s / 4


def _closing() -> Exception:
    return ClosedError("the service is shutting down")
