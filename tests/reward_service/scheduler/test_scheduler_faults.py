"""Scheduler under failing pairs, lack of memory, a failing device and many threads."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service.engine.types import FatalDeviceError, OutOfMemoryError
from reward_service.scheduler.scheduler import (
    Completed,
    DeadlineMissedError,
    PairFailedError,
    QueueFullError,
    StuckError,
)
from tests.support.service.devices import WAIT_S, Device, NumberScheduler, RecordingObserver, keep_busy


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    poison=st.sets(st.integers(1, 40), max_size=3),
    batch=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_only_the_request_of_a_failing_pair_fails(sizes: list[int], poison: set[int], batch: int) -> None:
    """Wherever failing pairs are in the batches, every other request gets its correct results."""
    device = Device(sorted(poison))
    scheduler = NumberScheduler(device, batch_pairs=batch, max_queued_pairs=1000)
    keep_busy(device, scheduler)
    numbers = iter(range(1, 1000))
    requests = [[next(numbers) for _ in range(size)] for size in sizes]
    futures = [scheduler.submit(inputs) for inputs in requests]
    device.free.set()
    for inputs, future in zip(requests, futures, strict=True):
        if poison & set(inputs):
            error = future.exception(WAIT_S)
            assert isinstance(error, PairFailedError)
            assert inputs[error.index] in poison
            assert isinstance(error.__cause__, ValueError)
        else:
            assert future.result(WAIT_S).results == [2 * number for number in inputs]
    assert scheduler.close(WAIT_S)
    assert scheduler.queued_pairs == 0


def test_failure_to_prepare_a_pair_fails_its_request_only() -> None:
    """An error of `prepare` is attributed to the pair, like an error of `run`."""

    def prepare(inputs: Sequence[int], lane: Hashable) -> Sequence[int]:
        if 3 in inputs:
            raise ValueError("cannot be prepared")
        return inputs

    device = Device()
    scheduler = NumberScheduler(device, batch_pairs=8, max_queued_pairs=100, prepare=prepare)
    keep_busy(device, scheduler)
    good, bad = scheduler.submit([1, 2]), scheduler.submit([4, 3])
    device.free.set()
    assert good.result(WAIT_S).results == [2, 4]
    error = bad.exception(WAIT_S)
    assert isinstance(error, PairFailedError)
    assert error.index == 1
    assert scheduler.close(WAIT_S)


def test_out_of_memory_halves_the_batch_size() -> None:
    """All pairs are scored, later batches keep to the size that fits, and larger ones are retried later."""
    device, observer = Device(memory=20), RecordingObserver()
    scheduler = NumberScheduler(device, batch_pairs=64, max_queued_pairs=10_000, observer=observer)
    assert scheduler.submit(range(64)).result(WAIT_S).results == [2 * n for n in range(64)]
    assert scheduler.batch_pairs == 16
    device.batches.clear()
    scheduler.submit(range(100)).result(WAIT_S)
    assert {len(batch) for batch, _ in device.batches} == {16, 4}
    device.memory = 64
    scheduler.submit(range(6_000)).result(WAIT_S)
    assert scheduler.batch_pairs == 64
    assert scheduler.close(WAIT_S)
    assert [event for event in observer.events if event[0] == "oom"] == [("oom", 64), ("oom", 32)]
    assert ("batch", 64, 64, 1) in observer.events


def test_pair_too_large_for_the_memory_fails_its_request_only() -> None:
    """The batch size for other requests is not reduced."""
    device = Device()

    def run(inputs: Sequence[int], lane: Hashable) -> list[int]:
        if 13 in inputs:
            raise OutOfMemoryError
        return device(inputs, lane)

    scheduler = NumberScheduler(run, batch_pairs=16, max_queued_pairs=100)
    keep_busy(device, scheduler)
    good, giant = scheduler.submit([1, 2, 3]), scheduler.submit([12, 13])
    device.free.set()
    assert good.result(WAIT_S).results == [2, 4, 6]
    error = giant.exception(WAIT_S)
    assert isinstance(error, PairFailedError)
    assert (error.index, type(error.__cause__)) == (1, OutOfMemoryError)
    assert scheduler.batch_pairs == 16
    assert scheduler.close(WAIT_S)


def test_hung_device_fails_all_requests() -> None:
    """Open requests fail, `on_stuck` is called once, and new requests are refused."""
    device, stuck = Device(), []
    reported = threading.Event()

    def on_stuck(error: StuckError) -> None:
        stuck.append(error)
        reported.set()

    scheduler = NumberScheduler(device, batch_pairs=1, max_queued_pairs=100, hang_s=1.0, on_stuck=on_stuck)
    futures = [keep_busy(device, scheduler), scheduler.submit([1, 2])]
    assert all(isinstance(future.exception(WAIT_S), StuckError) for future in futures)
    assert reported.wait(WAIT_S)
    with pytest.raises(StuckError):
        scheduler.submit([3])
    device.free.set()
    assert not scheduler.close(WAIT_S)
    assert len(stuck) == 1
    assert [batch for batch, _ in device.batches] in ([], [[0]])


@pytest.mark.parametrize("fault", [FatalDeviceError("ECC"), SystemExit("a bug")])
def test_failed_device_fails_all_requests(fault: BaseException) -> None:
    """A fatal error fails all open requests and is their cause."""
    device, stuck = Device(), threading.Event()

    def run(inputs: Sequence[int], lane: Hashable) -> list[int]:
        device(inputs, lane)
        raise fault

    scheduler = NumberScheduler(run, batch_pairs=1, max_queued_pairs=100, on_stuck=lambda _: stuck.set())
    futures = [keep_busy(device, scheduler), scheduler.submit([1])]
    device.free.set()
    for future in futures:
        error = future.exception(WAIT_S)
        assert isinstance(error, StuckError)
        assert error.__cause__ is fault
    assert stuck.wait(WAIT_S)
    assert not scheduler.close(WAIT_S)


def test_requests_of_many_threads_end_correctly() -> None:
    """Thousands of pairs, with failing pairs, too little memory, deadlines and cancellations."""
    device, observer = Device(range(0, 100_000, 97), memory=20), RecordingObserver()
    scheduler = NumberScheduler(device, batch_pairs=32, max_queued_pairs=5_000, observer=observer)
    outcomes: list[tuple[list[int], Future[Completed[int]]]] = []

    def submit_requests(number: int) -> None:
        rng = random.Random(number)
        numbers = iter(range(number * 1000 + 1, (number + 1) * 1000 + 1))
        for _ in range(50):
            own = [next(numbers) for _ in range(rng.randint(1, 20))]
            due = time.monotonic() + rng.uniform(0.001, 1) if rng.random() < 0.2 else None
            try:
                future = scheduler.submit(
                    own, rng.choice("ab"), client=f"c{number % 5}", weight=1 + number % 3, deadline_s=due
                )
            except (QueueFullError, DeadlineMissedError):
                continue
            outcomes.append((own, future))
            if rng.random() < 0.2:
                future.cancel()

    run_together([partial(submit_requests, number) for number in range(12)])
    assert scheduler.close(WAIT_S)
    outcome_counts: Counter[str] = Counter()
    for own, future in outcomes:
        assert future.done()
        outcome_counts[check_outcome(own, future, device.poison)] += 1
    assert outcome_counts["results"] > 100
    assert outcome_counts["PairFailedError"] > 10
    assert outcome_counts["cancelled"] > 10
    scored = [batch for batch, _ in device.batches if len(batch) <= 20 and not device.poison & set(batch)]
    runs = Counter(number for batch in scored for number in batch)
    assert set(runs.values()) == {1}
    assert runs.keys() >= {number for own, future in outcomes if has_results(future) for number in own}


def has_results(future: Future[Completed[int]]) -> bool:
    return not future.cancelled() and future.exception() is None


def check_outcome(own: list[int], future: Future[Completed[int]], poison: set[int]) -> str:
    """Check the outcome of a request and return its kind."""
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    if error is None:
        assert future.result().results == [2 * number for number in own]
        assert not poison & set(own)
        return "results"
    if isinstance(error, PairFailedError):
        assert own[error.index] in poison
    else:
        assert isinstance(error, DeadlineMissedError)
    return type(error).__name__


def run_together(calls: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
