"""The queue before the device."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service.scheduler import ClosedError, Completed, PairFailedError, QueueFullError, Scheduler

WAIT_S = 10.0


class Device:
    """Doubles numbers; refuses those in ``poison``; can be held busy."""

    def __init__(self, poison: Sequence[int] = ()) -> None:
        self.poison = set(poison)
        self.batches: list[tuple[list[int], Hashable]] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()

    def __call__(self, works: Sequence[int], lane: Hashable) -> list[int]:
        self.entered.set()
        assert self.free.wait(WAIT_S)
        self.batches.append((list(works), lane))
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


def test_waiting_requests_share_a_batch() -> None:
    """While the device is busy requests gather; then they go together, results each to their own."""
    device = Device()
    scheduler = Scheduler(device, batch_pairs=8, max_queued_pairs=100)
    hold(device, scheduler)
    futures = [scheduler.submit(works) for works in ([1, 2], [3], [4, 5, 6])]
    device.free.set()
    assert [future.result(WAIT_S).results for future in futures] == [[2, 4], [6], [8, 10, 12]]
    assert [batch for batch, _ in device.batches] == [[0], [1, 2, 3, 4, 5, 6]]
    scheduler.close(WAIT_S)


def test_a_large_request_is_cut_into_batches() -> None:
    """No batch exceeds its bound, and the order within a request is kept."""
    device = Device()
    scheduler = Scheduler(device, batch_pairs=4, max_queued_pairs=4)
    assert scheduler.submit(range(11)).result(WAIT_S).results == [2 * n for n in range(11)]
    assert [len(batch) for batch, _ in device.batches] == [4, 4, 3]
    scheduler.close(WAIT_S)


def test_lanes_do_not_mix() -> None:
    """Requests with other options never share a batch."""
    device = Device()
    scheduler = Scheduler(device, batch_pairs=8, max_queued_pairs=100)
    hold(device, scheduler)
    futures = [scheduler.submit([n], lane) for n, lane in ((1, "a"), (2, "b"), (3, "a"))]
    device.free.set()
    assert [future.result(WAIT_S).results for future in futures] == [[2], [4], [6]]
    assert device.batches[1:] == [([1, 3], "a"), ([2], "b")]
    scheduler.close(WAIT_S)


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    poison=st.sets(st.integers(1, 40), max_size=3),
    batch=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_only_the_request_at_fault_fails(sizes: list[int], poison: set[int], batch: int) -> None:
    """Whatever is poisoned, wherever it lies in the batches: every other request is answered correctly."""
    device = Device(sorted(poison))
    scheduler = Scheduler(device, batch_pairs=batch, max_queued_pairs=1000)
    hold(device, scheduler)
    numbers = iter(range(1, 1000))
    requests = [[next(numbers) for _ in range(size)] for size in sizes]
    futures = [scheduler.submit(works) for works in requests]
    device.free.set()
    for works, future in zip(requests, futures, strict=True):
        if poison & set(works):
            error = future.exception(WAIT_S)
            assert isinstance(error, PairFailedError)
            assert works[error.index] in poison
            assert isinstance(error.__cause__, ValueError)
        else:
            assert future.result(WAIT_S).results == [2 * work for work in works]
    assert scheduler.close(WAIT_S)
    assert scheduler.queued_pairs == 0


def test_the_queue_is_bounded() -> None:
    """A request that does not fit whole is refused with a time to come back, and the rest is served."""
    device = Device()
    scheduler = Scheduler(device, batch_pairs=2, max_queued_pairs=5)
    hold(device, scheduler)
    accepted = scheduler.submit([1, 2, 3])
    with pytest.raises(QueueFullError) as refused:
        scheduler.submit([4, 5, 6])
    assert refused.value.retry_after_s >= 1
    fits = scheduler.submit([7, 8])
    device.free.set()
    assert accepted.result(WAIT_S).results == [2, 4, 6]
    assert fits.result(WAIT_S).results == [14, 16]
    scheduler.close(WAIT_S)


def test_a_caller_who_left_is_not_worked_for() -> None:
    """A cancelled request is never run and frees its room."""
    device = Device()
    scheduler = Scheduler(device, batch_pairs=8, max_queued_pairs=3)
    hold(device, scheduler)
    gone = scheduler.submit([1, 2, 3])
    assert gone.cancel()
    device.free.set()
    assert scheduler.close(WAIT_S)
    assert [batch for batch, _ in device.batches] == [[0]]
    assert scheduler.queued_pairs == 0


def test_closing_finishes_what_was_admitted() -> None:
    """After close nothing more comes in, and everything that had come in is answered."""
    device = Device()
    scheduler = Scheduler(device, batch_pairs=2, max_queued_pairs=100)
    hold(device, scheduler)
    futures = [scheduler.submit([n]) for n in range(1, 6)]
    device.free.set()
    assert scheduler.close(WAIT_S)
    assert [future.result(0).results for future in futures] == [[2 * n] for n in range(1, 6)]
    with pytest.raises(ClosedError):
        scheduler.submit([1])


def test_closing_does_not_wait_for_ever() -> None:
    """A device that hangs leaves the rest with an error instead of silence."""
    device = Device()
    scheduler = Scheduler(device, batch_pairs=1, max_queued_pairs=100)
    hold(device, scheduler)
    waiting = scheduler.submit([1])
    assert not scheduler.close(0.05)
    assert isinstance(waiting.exception(WAIT_S), ClosedError)
    device.free.set()
