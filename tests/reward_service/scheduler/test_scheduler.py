"""Scheduler: batching, deadlines, cancellation, closing and preparation ahead."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from reward_service.scheduler.scheduler import ClosedError, DeadlineMissedError, QueueFullError, Scheduler
from tests.support.service.devices import WAIT_S, Device, NumberScheduler, RecordingObserver, keep_busy


def test_queued_requests_share_a_batch() -> None:
    """Requests that queue while the device is busy run together, and each gets its own results."""
    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=8, max_queued_pairs=100)
    keep_busy(device, scheduler)
    futures = [scheduler.submit(inputs) for inputs in ([1, 2], [3], [4, 5, 6])]
    device.free.set()
    assert [future.result(WAIT_S).results for future in futures] == [[2, 4], [6], [8, 10, 12]]
    assert [batch for batch, _ in device.batches] == [[0], [1, 2, 3, 4, 5, 6]]
    scheduler.close(WAIT_S)


def test_large_request_is_split_into_batches() -> None:
    """No batch exceeds its limit, and the order within a request is kept."""
    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=4, max_queued_pairs=4)
    assert scheduler.submit(range(11)).result(WAIT_S).results == [2 * n for n in range(11)]
    assert [len(batch) for batch, _ in device.batches] == [4, 4, 3]
    scheduler.close(WAIT_S)


def test_lanes_never_share_a_batch() -> None:
    """Requests with different options run in different batches."""
    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=8, max_queued_pairs=100)
    keep_busy(device, scheduler)
    futures = [scheduler.submit([n], lane) for n, lane in ((1, "a"), (2, "b"), (3, "a"))]
    device.free.set()
    assert [future.result(WAIT_S).results for future in futures] == [[2], [4], [6]]
    assert device.batches[1:] == [([1, 3], "a"), ([2], "b")]
    scheduler.close(WAIT_S)


def test_queue_is_bounded() -> None:
    """A request that does not fit as a whole is refused with a retry time; the others are scored."""
    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=2, max_queued_pairs=5)
    keep_busy(device, scheduler)
    accepted = scheduler.submit([1, 2, 3])
    with pytest.raises(QueueFullError) as refused:
        scheduler.submit([4, 5, 6])
    assert refused.value.retry_after_s >= 1
    fits = scheduler.submit([7, 8])
    device.free.set()
    assert accepted.result(WAIT_S).results == [2, 4, 6]
    assert fits.result(WAIT_S).results == [14, 16]
    scheduler.close(WAIT_S)


def test_cancelled_request_is_never_run() -> None:
    """A cancelled request frees its room in the queue and does not reach the device."""
    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=8, max_queued_pairs=3)
    keep_busy(device, scheduler)
    cancelled = scheduler.submit([1, 2, 3])
    assert cancelled.cancel()
    device.free.set()
    assert scheduler.close(WAIT_S)
    assert [batch for batch, _ in device.batches] == [[0]]
    assert scheduler.queued_pairs == 0


def test_close_finishes_admitted_requests() -> None:
    """After close, new requests are refused and all admitted ones have their results."""
    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=2, max_queued_pairs=100)
    keep_busy(device, scheduler)
    futures = [scheduler.submit([n]) for n in range(1, 6)]
    device.free.set()
    assert scheduler.close(WAIT_S)
    assert [future.result(0).results for future in futures] == [[2 * n] for n in range(1, 6)]
    with pytest.raises(ClosedError):
        scheduler.submit([1])


def test_close_times_out_on_a_hung_device() -> None:
    """Requests behind a hung device fail with an error instead of waiting for ever."""
    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=1, max_queued_pairs=100)
    keep_busy(device, scheduler)
    waiting = scheduler.submit([1])
    assert not scheduler.close(0.05)
    assert isinstance(waiting.exception(WAIT_S), ClosedError)
    device.free.set()
    with pytest.raises(ClosedError):
        scheduler.submit([2])


def test_light_client_waits_for_one_batch_at_most() -> None:
    """The batch after the running one has the new request in it, even if another was already prepared."""
    device, prepared = Device(), threading.Event()

    def prepare(inputs: Sequence[int], lane: Hashable) -> Sequence[int]:
        if 8 in inputs:
            prepared.set()
        return inputs

    scheduler = NumberScheduler(device, batch_pairs=4, max_queued_pairs=100, prepare=prepare)
    keep_busy(device, scheduler)
    heavy = scheduler.submit(range(5, 50), client="heavy")
    assert prepared.wait(WAIT_S)
    light = scheduler.submit([1], client="light")
    device.free.set()
    assert light.result(WAIT_S).results == [2]
    assert heavy.result(WAIT_S).results == [2 * n for n in range(5, 50)]
    assert 1 in device.batches[1][0]
    assert scheduler.close(WAIT_S)


def test_pairs_are_prepared_once_while_the_device_runs() -> None:
    """`run` gets the results of `prepare`, and the next batch is prepared before this one is finished."""
    prepare_calls: Counter[int] = Counter()
    second_batch_prepared = threading.Event()

    def prepare(inputs: Sequence[int], lane: Hashable) -> list[str]:
        prepare_calls.update(inputs)
        if 5 in inputs:
            second_batch_prepared.set()
        return [f"{lane} {number}" for number in inputs]

    def run(ready: Sequence[str], lane: Hashable) -> list[str]:
        if "x 5" not in ready and "x 0" in ready:
            assert second_batch_prepared.wait(WAIT_S)
        return [text.upper() for text in ready]

    scheduler: Scheduler[int, str] = Scheduler(run, batch_pairs=4, max_queued_pairs=100, prepare=prepare)
    results = scheduler.submit(range(12), "x").result(WAIT_S).results
    assert results == [f"X {n}" for n in range(12)]
    assert scheduler.close(WAIT_S)
    assert set(prepare_calls.values()) == {1}


def test_requests_fail_at_their_deadline() -> None:
    """They fail when it passes, whether queued or running; pairs that were not dispatched never run."""
    device, observer = Device(), RecordingObserver()
    scheduler = NumberScheduler(device, batch_pairs=2, max_queued_pairs=100, observer=observer)
    device.free.clear()
    running = scheduler.submit([0], deadline_s=time.monotonic() + 1.0)
    assert device.entered.wait(WAIT_S)
    queued = scheduler.submit([1, 2, 3], deadline_s=time.monotonic() + 1.0)
    no_deadline = scheduler.submit([4])
    for future in (running, queued):
        assert isinstance(future.exception(WAIT_S), DeadlineMissedError)
    assert not device.free.is_set()
    device.free.set()
    assert no_deadline.result(WAIT_S).results == [8]
    assert scheduler.close(WAIT_S)
    assert [batch for batch, _ in device.batches] == [[0], [4]]
    assert ("expired", 3) in observer.events


def test_unreachable_deadline_is_refused_at_once() -> None:
    """A deadline in the past, or one that a busy device cannot meet."""
    device = Device()

    def slow(inputs: Sequence[int], lane: Hashable) -> list[int]:
        time.sleep(0.05 * len(inputs))
        return device(inputs, lane)

    scheduler = NumberScheduler(slow, batch_pairs=4, max_queued_pairs=1000)
    with pytest.raises(DeadlineMissedError):
        scheduler.submit([1], deadline_s=time.monotonic() - 1)
    scheduler.submit([1, 2, 3]).result(WAIT_S)
    keep_busy(device, scheduler)
    with pytest.raises(DeadlineMissedError):
        scheduler.submit(range(100), deadline_s=time.monotonic() + 1)
    assert scheduler.queued_pairs == 0
    device.free.set()
    assert scheduler.close(WAIT_S)


def test_earliest_deadline_goes_first_within_a_client() -> None:
    """Then come the requests without a deadline, in the order of their arrival."""
    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=1, max_queued_pairs=100)
    keep_busy(device, scheduler)
    now = time.monotonic()
    for number, due in ((1, None), (2, now + 900), (3, None), (4, now + 600)):
        scheduler.submit([number], deadline_s=due)
    device.free.set()
    assert scheduler.close(WAIT_S)
    assert [batch for batch, _ in device.batches] == [[0], [4], [2], [1], [3]]


def test_retry_after_grows_with_the_queue() -> None:
    """It is at least a second, and more for a longer queue, by the measured duration of batches."""
    device = Device()

    def run(inputs: Sequence[int], lane: Hashable) -> list[int]:
        time.sleep(0.02 * len(inputs))
        return device(inputs, lane)

    scheduler = NumberScheduler(run, batch_pairs=4, max_queued_pairs=10_000)
    scheduler.submit(range(8)).result(WAIT_S)
    assert scheduler.retry_after_s() == 1
    keep_busy(device, scheduler)
    long_request = scheduler.submit(range(1000))
    assert scheduler.retry_after_s() >= 15
    long_request.cancel()
    device.free.set()
    assert scheduler.close(WAIT_S)


def test_invalid_requests_are_refused() -> None:
    """A request without pairs or with a weight that is not a finite number above 0."""
    scheduler = NumberScheduler(Device(), batch_pairs=4, max_queued_pairs=100)
    with pytest.raises(ValueError, match="one pair"):
        scheduler.submit([])
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="weight"):
            scheduler.submit([1], weight=weight)
    assert scheduler.close(WAIT_S)


class Image:
    """Object whose deallocation a weak reference can detect."""


@pytest.mark.parametrize("outcome", ["scored", "failed", "cancelled"])
def test_images_are_freed_when_a_request_ends(outcome: str) -> None:
    """For every outcome, no reference cycle keeps the inputs until the next garbage collection."""

    def run(inputs: Sequence[Image], lane: Hashable) -> list[int]:
        if outcome == "failed":
            raise ValueError
        return [1] * len(inputs)

    with garbage_collection_disabled():
        scheduler: Scheduler[Image, int] = Scheduler(run, batch_pairs=2, max_queued_pairs=100)
        image = Image()
        reference = weakref.ref(image)
        future = scheduler.submit([image, image, image])
        if outcome == "cancelled":
            future.cancel()
        scheduler.close(WAIT_S)
        assert future.done()
        del image, future
        assert reference() is None


@contextmanager
def garbage_collection_disabled() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
