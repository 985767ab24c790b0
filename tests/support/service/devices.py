"""Devices that do as they are told, for the scheduler's tests."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from reward_service.engine.types import OutOfMemoryError
from reward_service.scheduler.scheduler import Completed, Scheduler

WAIT_S = 10.0
Numbers = Scheduler[int, int]


class Device:
    """Doubles numbers; refuses those in `poison` and more than `memory` at once; can be held busy."""

    def __init__(self, poison: Sequence[int] = (), memory: int = 1000) -> None:
        self.poison, self.memory = set(poison), memory
        self.batches: list[tuple[list[int], Hashable]] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()

    def __call__(self, works: Sequence[int], lane: Hashable) -> list[int]:
        self.entered.set()
        assert self.free.wait(WAIT_S)
        self.batches.append((list(works), lane))
        if len(works) > self.memory:
            raise OutOfMemoryError
        if self.poison & set(works):
            raise ValueError("poison")
        return [2 * work for work in works]


def hold(device: Device, scheduler: Scheduler[int, int]) -> Future[Completed[int]]:
    """Keep the device busy with one pair, so that what is submitted next has to queue."""
    device.free.clear()
    device.entered.clear()
    future = scheduler.submit([0])
    assert device.entered.wait(WAIT_S)
    return future


class Watcher:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def on_batch(self, pairs: int, capacity: int, queue_s: Sequence[float], run_s: float) -> None:
        assert all(wait >= 0 for wait in queue_s)
        assert run_s >= 0
        self.told.append(("batch", pairs, capacity, len(queue_s)))

    def on_cancelled(self, pairs: int) -> None:
        self.told.append(("cancelled", pairs))

    def on_expired(self, pairs: int) -> None:
        self.told.append(("expired", pairs))

    def on_oom(self, size: int) -> None:
        self.told.append(("oom", size))
        raise RuntimeError("an observer with a fault of its own")
