"""Controllable device and recording observer for the scheduler's tests."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from reward_service.engine.types import OutOfMemoryError
from reward_service.scheduler.scheduler import Completed, Scheduler

WAIT_S = 60.0  # until an event that a loaded machine may delay; it never passes in a correct run
NumberScheduler = Scheduler[int, int]


class Device:
    """Doubles numbers; fails on those in `poison` and on more than `memory` at once; can be kept busy."""

    def __init__(self, poison: Sequence[int] = (), memory: int = 1000) -> None:
        self.poison, self.memory = set(poison), memory
        self.batches: list[tuple[list[int], Hashable]] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()

    def __call__(self, inputs: Sequence[int], lane: Hashable) -> list[int]:
        self.entered.set()
        assert self.free.wait(WAIT_S)
        self.batches.append((list(inputs), lane))
        if len(inputs) > self.memory:
            raise OutOfMemoryError
        if self.poison & set(inputs):
            raise ValueError("poison")
        return [2 * number for number in inputs]


def keep_busy(device: Device, scheduler: Scheduler[int, int]) -> Future[Completed[int]]:
    """Keep the device busy with one pair, so that requests submitted next are queued."""
    device.free.clear()
    device.entered.clear()
    future = scheduler.submit([0])
    assert device.entered.wait(WAIT_S)
    return future


class RecordingObserver:
    """Observer that records the events."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        assert all(wait >= 0 for wait in queue_s)
        assert run_s >= 0
        self.events.append(("batch", pairs, capacity, len(queue_s)))

    def on_cancelled(self, pairs: int) -> None:
        self.events.append(("cancelled", pairs))

    def on_expired(self, pairs: int) -> None:
        self.events.append(("expired", pairs))

    def on_oom(self, size: int) -> None:
        self.events.append(("oom", size))
        raise RuntimeError("an observer that fails")
