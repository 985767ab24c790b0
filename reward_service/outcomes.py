"""How a request can end, and who may watch. No torch, no web, no threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Completed(Generic[Result]):
    """A request's results in its own order, and the seconds it waited and was worked on."""

    results: list[Result]
    queued_s: float
    run_s: float


class QueueFullError(Exception):
    """No room now; ``retry_after_s`` is when there will probably be some."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The scheduler takes no more work, or was closed before this was done."""


class DeadlineError(Exception):
    """The deadline has passed, or would have before the work was done."""


class StuckError(Exception):
    """The device hangs or has failed for good; nothing more will be scored. ``__cause__`` may say why."""


class PairFailedError(Exception):
    """The pair at ``index`` of its request cannot be scored; ``__cause__`` says why."""

    def __init__(self, index: int) -> None:
        super().__init__(f"pair {index} cannot be scored")
        self.index = index


class Observer(Protocol):
    """Is told what happens; called on the scheduler's own thread, never while it holds a lock."""

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        """A batch has run.

        :param capacity: most pairs it could have had
        :param queue_s: seconds in the queue of each request whose first pairs were in it
        """

    def on_cancelled(self, pairs: int) -> None:
        """A caller left while so many of its pairs had not been dispatched."""

    def on_expired(self, pairs: int) -> None:
        """A deadline passed while so many of its request's pairs had not been dispatched."""

    def on_oom(self, size: int) -> None:
        """A batch of ``size`` pairs did not fit into the device's memory."""


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
