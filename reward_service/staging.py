"""The next batch gets ready while one runs: pairs are prepared ahead on a thread of their own.

What is staged is a forecast, not a promise. When the device is free the batch is formed anew, in fair order,
from what is waiting then; whatever of it has not been prepared is prepared on the spot. So nobody who comes
while a batch runs waits for another one to pass because it had been staged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from reward_service.backlog import Unit

Work = TypeVar("Work")
Result = TypeVar("Result")

Prepare = Callable[[Sequence[Work], Hashable], Sequence[Any]]


class Stage(Generic[Work, Result]):
    """Prepares what will probably be run next.

    :param prepare: makes works of one lane ready, each for itself, in order; never called twice at once
    :param upcoming: the pairs of the next batch as it would be now, all of one lane
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

        :raises Exception: whatever ``prepare`` raised
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
