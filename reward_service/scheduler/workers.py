"""Worker threads that share their time fairly among clients. Imports neither torch nor a web framework.

Start-time fair queueing as in `reward_service.scheduler.fair_queue`, for work that cannot be divided and
whose cost is only estimated beforehand: a client is charged the estimate when its work starts, and the
difference to the elapsed time when it ends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

Result = TypeVar("Result")

_MIN_COST_S = 1e-6


@dataclass(eq=False)
class _Work:
    future: Future[Any]
    run: Callable[[], Any]
    cost_s: float


@dataclass(eq=False)
class _Backlog:
    """Work of one client; `start` is the start tag of its next piece, in seconds divided by weight."""

    start: float
    weight: float = 1.0
    queue: deque[_Work] = field(default_factory=deque)
    running: int = 0


class FairWorkers:
    """Daemon threads that run the work of many clients, each client's in order of arrival.

    Of two clients with queued work, neither gets more than one piece per thread ahead of its weighted share
    of the threads' time. The threads never keep the process from exiting.

    Args:
        threads: number of threads
        name: prefix of the threads' names
        clock: returns monotonic seconds
    """

    def __init__(self, threads: int, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wake = threading.Condition()
        self._clients: dict[str, _Backlog] = {}
        self._virtual = 0.0
        self._closed = False
        for number in range(threads):
            threading.Thread(target=self._loop, name=f"{name}-{number}", daemon=True).start()

    def submit(
        self, run: Callable[[], Result], *, client: str = "", weight: float = 1.0, cost_s: float = 0.0
    ) -> Future[Result]:
        """Queue work; cancel the future to withdraw it before it starts.

        Args:
            run: the work
            client: clients share the threads' time in proportion to their `weight`
            weight: a finite number above 0
            cost_s: estimated seconds of the work

        Returns:
            the future result; it is cancelled if the workers are closed before the work starts
        """
        future: Future[Result] = Future()
        with self._wake:
            if self._closed:
                future.cancel()
                return future
            backlog = self._clients.setdefault(client, _Backlog(self._virtual))
            backlog.weight = weight
            if not backlog.queue:
                # An idle client has no claim on the time that it did not use.
                backlog.start = max(backlog.start, self._virtual)
            backlog.queue.append(_Work(future, run, max(cost_s, _MIN_COST_S)))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Cancel all work that has not started, and end the threads; does not wait for running work."""
        with self._wake:
            self._closed = True
            queued = [work for backlog in self._clients.values() for work in backlog.queue]
            self._clients = {}
            self._wake.notify_all()
        for work in queued:
            work.future.cancel()

    def _loop(self) -> None:
        while taken := self._take():
            backlog, work = taken
            started_s = self._clock()
            if work.future.set_running_or_notify_cancel():
                _settle(work)
            self._finish(backlog, self._clock() - started_s - work.cost_s)
            del taken, backlog, work  # else the result would live until the next work

    def _take(self) -> tuple[_Backlog, _Work] | None:
        """Wait for work and return the next piece in fair order; None once closed."""
        with self._wake:
            while not (queued := [backlog for backlog in self._clients.values() if backlog.queue]):
                if self._closed:
                    return None
                self._wake.wait()
            first = min(queued, key=lambda backlog: backlog.start)
            work = first.queue.popleft()
            self._virtual = max(self._virtual, first.start)
            first.start += work.cost_s / first.weight
            first.running += 1
            return first, work

    def _finish(self, backlog: _Backlog, seconds: float) -> None:
        """Charge a client the seconds beyond the estimate, and forget clients that are not ahead."""
        with self._wake:
            backlog.running -= 1
            backlog.start += seconds / backlog.weight
            active = any(other.queue or other.running for other in self._clients.values())
            # Without work in progress nobody is behind: a new busy period.
            self._clients = {
                name: other
                for name, other in self._clients.items()
                if active and (other.queue or other.running or other.start > self._virtual)
            }


def _settle(work: _Work) -> None:
    try:
        result = work.run()
    except BaseException as error:  # noqa: BLE001 - the future's owner gets it
        work.future.set_exception(error)
        # The error's traceback has this frame: without a reference from here to the error, no cycle keeps the
        # work, and what it holds, until the next garbage collection.
        del work
    else:
        work.future.set_result(result)
