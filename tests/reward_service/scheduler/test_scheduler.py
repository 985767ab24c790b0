"""The queue before the device."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from reward_service.scheduler.scheduler import ClosedError, DeadlineError, QueueFullError, Scheduler
from tests.support.service.devices import WAIT_S, Device, Numbers, Watcher, hold


def test_waiting_requests_share_a_batch() -> None:
    """While the device is busy requests gather; then they go together, results each to their own."""
    device = Device()
    scheduler = Numbers(device, batch_pairs=8, max_queued_pairs=100)
    hold(device, scheduler)
    futures = [scheduler.submit(works) for works in ([1, 2], [3], [4, 5, 6])]
    device.free.set()
    assert [future.result(WAIT_S).results for future in futures] == [[2, 4], [6], [8, 10, 12]]
    assert [batch for batch, _ in device.batches] == [[0], [1, 2, 3, 4, 5, 6]]
    scheduler.close(WAIT_S)


def test_a_large_request_is_cut_into_batches() -> None:
    """No batch exceeds its bound, and the order within a request is kept."""
    device = Device()
    scheduler = Numbers(device, batch_pairs=4, max_queued_pairs=4)
    assert scheduler.submit(range(11)).result(WAIT_S).results == [2 * n for n in range(11)]
    assert [len(batch) for batch, _ in device.batches] == [4, 4, 3]
    scheduler.close(WAIT_S)


def test_lanes_do_not_mix() -> None:
    """Requests with other options never share a batch."""
    device = Device()
    scheduler = Numbers(device, batch_pairs=8, max_queued_pairs=100)
    hold(device, scheduler)
    futures = [scheduler.submit([n], lane) for n, lane in ((1, "a"), (2, "b"), (3, "a"))]
    device.free.set()
    assert [future.result(WAIT_S).results for future in futures] == [[2], [4], [6]]
    assert device.batches[1:] == [([1, 3], "a"), ([2], "b")]
    scheduler.close(WAIT_S)


def test_the_queue_is_bounded() -> None:
    """A request that does not fit whole is refused with a time to come back, and the rest is served."""
    device = Device()
    scheduler = Numbers(device, batch_pairs=2, max_queued_pairs=5)
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
    scheduler = Numbers(device, batch_pairs=8, max_queued_pairs=3)
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
    scheduler = Numbers(device, batch_pairs=2, max_queued_pairs=100)
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
    scheduler = Numbers(device, batch_pairs=1, max_queued_pairs=100)
    hold(device, scheduler)
    waiting = scheduler.submit([1])
    assert not scheduler.close(0.05)
    assert isinstance(waiting.exception(WAIT_S), ClosedError)
    device.free.set()
    with pytest.raises(ClosedError):
        scheduler.submit([2])


def test_a_light_caller_waits_for_one_batch_at_most() -> None:
    """Behind the running batch comes one with the newcomer in it, also when another had been prepared."""
    device, prepared = Device(), threading.Event()

    def prepare(works: Sequence[int], lane: Hashable) -> Sequence[int]:
        if 8 in works:
            prepared.set()
        return works

    scheduler = Numbers(device, batch_pairs=4, max_queued_pairs=100, prepare=prepare)
    hold(device, scheduler)
    heavy = scheduler.submit(range(5, 50), client="heavy")
    assert prepared.wait(WAIT_S)
    light = scheduler.submit([1], client="light")
    device.free.set()
    assert light.result(WAIT_S).results == [2]
    assert heavy.result(WAIT_S).results == [2 * n for n in range(5, 50)]
    assert 1 in device.batches[1][0]
    assert scheduler.close(WAIT_S)


def test_pairs_are_prepared_once_while_the_device_works() -> None:
    """What `run` gets is what `prepare` made, and the next batch's is made before this one is done."""
    made: Counter[int] = Counter()
    ahead = threading.Event()

    def prepare(works: Sequence[int], lane: Hashable) -> list[str]:
        made.update(works)
        if 5 in works:
            ahead.set()
        return [f"{lane} {work}" for work in works]

    def run(ready: Sequence[str], lane: Hashable) -> list[str]:
        if "x 5" not in ready and "x 0" in ready:
            assert ahead.wait(WAIT_S)
        return [text.upper() for text in ready]

    scheduler: Scheduler[int, str] = Scheduler(run, batch_pairs=4, max_queued_pairs=100, prepare=prepare)
    results = scheduler.submit(range(12), "x").result(WAIT_S).results
    assert results == [f"X {n}" for n in range(12)]
    assert scheduler.close(WAIT_S)
    assert set(made.values()) == {1}


def test_nobody_waits_beyond_the_deadline() -> None:
    """A deadline that passes in the queue or on a busy device is told then; what had not begun never runs."""
    device, watcher = Device(), Watcher()
    scheduler = Numbers(device, batch_pairs=2, max_queued_pairs=100, observer=watcher)
    device.free.clear()
    running = scheduler.submit([0], deadline_s=time.monotonic() + 0.1)
    assert device.entered.wait(WAIT_S)
    queued = scheduler.submit([1, 2, 3], deadline_s=time.monotonic() + 0.1)
    patient = scheduler.submit([4])
    for future in (running, queued):
        assert isinstance(future.exception(WAIT_S), DeadlineError)
    assert not device.free.is_set()
    device.free.set()
    assert patient.result(WAIT_S).results == [8]
    assert scheduler.close(WAIT_S)
    assert [batch for batch, _ in device.batches] == [[0], [4]]
    assert ("expired", 3) in watcher.told


def test_the_impossible_is_refused_at_once() -> None:
    """A deadline in the past, or one that a busy device cannot keep."""
    device = Device()

    def slow(works: Sequence[int], lane: Hashable) -> list[int]:
        time.sleep(0.05 * len(works))
        return device(works, lane)

    scheduler = Numbers(slow, batch_pairs=4, max_queued_pairs=1000)
    with pytest.raises(DeadlineError):
        scheduler.submit([1], deadline_s=time.monotonic() - 1)
    scheduler.submit([1, 2, 3]).result(WAIT_S)
    hold(device, scheduler)
    with pytest.raises(DeadlineError):
        scheduler.submit(range(100), deadline_s=time.monotonic() + 1)
    assert scheduler.queued_pairs == 0
    device.free.set()
    assert scheduler.close(WAIT_S)


def test_urgent_work_goes_first_within_a_client() -> None:
    """Earliest deadline, then those without one in the order they came."""
    device = Device()
    scheduler = Numbers(device, batch_pairs=1, max_queued_pairs=100)
    hold(device, scheduler)
    now = time.monotonic()
    for work, due in ((1, None), (2, now + 900), (3, None), (4, now + 600)):
        scheduler.submit([work], deadline_s=due)
    device.free.set()
    assert scheduler.close(WAIT_S)
    assert [batch for batch, _ in device.batches] == [[0], [4], [2], [1], [3]]


def test_the_time_to_come_back_follows_the_queue() -> None:
    """At least a second; more with more in the queue, by what batches have taken."""
    device = Device()

    def run(works: Sequence[int], lane: Hashable) -> list[int]:
        time.sleep(0.02 * len(works))
        return device(works, lane)

    scheduler = Numbers(run, batch_pairs=4, max_queued_pairs=10_000)
    scheduler.submit(range(8)).result(WAIT_S)
    assert scheduler.retry_after_s() == 1
    hold(device, scheduler)
    gone = scheduler.submit(range(1000))
    assert scheduler.retry_after_s() >= 15
    gone.cancel()
    device.free.set()
    assert scheduler.close(WAIT_S)


def test_senseless_requests_are_refused() -> None:
    """No pairs, or a weight that shares nothing."""
    scheduler = Numbers(Device(), batch_pairs=4, max_queued_pairs=100)
    with pytest.raises(ValueError, match="one pair"):
        scheduler.submit([])
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weight"):
            scheduler.submit([1], weight=weight)
    assert scheduler.close(WAIT_S)


class Picture:
    """Something whose end can be seen."""


@pytest.mark.parametrize("end", ["scored", "failed", "cancelled"])
def test_images_are_freed_with_their_answer(end: str) -> None:
    """However a request ends, no ring of references keeps its works until the collector comes round."""

    def run(works: Sequence[Picture], lane: Hashable) -> list[int]:
        if end == "failed":
            raise ValueError
        return [1] * len(works)

    with collector_off():
        scheduler: Scheduler[Picture, int] = Scheduler(run, batch_pairs=2, max_queued_pairs=100)
        image = Picture()
        seen = weakref.ref(image)
        future = scheduler.submit([image, image, image])
        if end == "cancelled":
            future.cancel()
        scheduler.close(WAIT_S)
        assert future.done()
        del image, future
        assert seen() is None


@contextmanager
def collector_off() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
