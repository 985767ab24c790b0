"""The scheduler when pairs, memory or the device fail, and with many threads at once."""

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
    DeadlineError,
    PairFailedError,
    QueueFullError,
    StuckError,
)
from tests.support.service.devices import WAIT_S, Device, Numbers, Watcher, hold


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    poison=st.sets(st.integers(1, 40), max_size=3),
    batch=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_only_the_request_at_fault_fails(sizes: list[int], poison: set[int], batch: int) -> None:
    """Whatever is poisoned, wherever it lies in the batches: every other request is answered correctly."""
    device = Device(sorted(poison))
    scheduler = Numbers(device, batch_pairs=batch, max_queued_pairs=1000)
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


def test_what_cannot_be_prepared_fails_alone() -> None:
    """An error of `prepare` is the pair's own, like one of `run`."""

    def prepare(works: Sequence[int], lane: Hashable) -> Sequence[int]:
        if 3 in works:
            raise ValueError("unpreparable")
        return works

    device = Device()
    scheduler = Numbers(device, batch_pairs=8, max_queued_pairs=100, prepare=prepare)
    hold(device, scheduler)
    good, bad = scheduler.submit([1, 2]), scheduler.submit([4, 3])
    device.free.set()
    assert good.result(WAIT_S).results == [2, 4]
    error = bad.exception(WAIT_S)
    assert isinstance(error, PairFailedError)
    assert error.index == 1
    assert scheduler.close(WAIT_S)


def test_running_out_of_memory_halves_and_remembers() -> None:
    """Everybody is answered, later batches keep to what fits, and in time larger ones are tried again."""
    device, watcher = Device(memory=20), Watcher()
    scheduler = Numbers(device, batch_pairs=64, max_queued_pairs=10_000, observer=watcher)
    assert scheduler.submit(range(64)).result(WAIT_S).results == [2 * n for n in range(64)]
    assert scheduler.batch_pairs == 16
    device.batches.clear()
    scheduler.submit(range(100)).result(WAIT_S)
    assert {len(batch) for batch, _ in device.batches} == {16, 4}
    device.memory = 64
    scheduler.submit(range(6_000)).result(WAIT_S)
    assert scheduler.batch_pairs == 64
    assert scheduler.close(WAIT_S)
    assert [told for told in watcher.told if told[0] == "oom"] == [("oom", 64), ("oom", 32)]
    assert ("batch", 64, 64, 1) in watcher.told


def test_a_pair_too_large_for_the_device_fails_alone() -> None:
    """It does not make the batches of the others small."""
    device = Device()

    def run(works: Sequence[int], lane: Hashable) -> list[int]:
        if 13 in works:
            raise OutOfMemoryError
        return device(works, lane)

    scheduler = Numbers(run, batch_pairs=16, max_queued_pairs=100)
    hold(device, scheduler)
    good, giant = scheduler.submit([1, 2, 3]), scheduler.submit([12, 13])
    device.free.set()
    assert good.result(WAIT_S).results == [2, 4, 6]
    error = giant.exception(WAIT_S)
    assert isinstance(error, PairFailedError)
    assert (error.index, type(error.__cause__)) == (1, OutOfMemoryError)
    assert scheduler.batch_pairs == 16
    assert scheduler.close(WAIT_S)


def test_a_hung_device_is_given_up() -> None:
    """Everybody is told, the owner once, and nothing more comes in."""
    device, stuck = Device(), []
    told = threading.Event()

    def on_stuck(error: StuckError) -> None:
        stuck.append(error)
        told.set()

    scheduler = Numbers(device, batch_pairs=1, max_queued_pairs=100, hang_s=0.2, on_stuck=on_stuck)
    futures = [hold(device, scheduler), scheduler.submit([1, 2])]
    assert all(isinstance(future.exception(WAIT_S), StuckError) for future in futures)
    assert told.wait(WAIT_S)
    with pytest.raises(StuckError):
        scheduler.submit([3])
    device.free.set()
    assert not scheduler.close(WAIT_S)
    assert len(stuck) == 1
    assert [batch for batch, _ in device.batches] in ([], [[0]])


@pytest.mark.parametrize("fault", [FatalDeviceError("ECC"), SystemExit("a bug")])
def test_a_broken_device_is_given_up(fault: BaseException) -> None:
    """A fault that a smaller batch does not help against fails all that is open, with its cause."""
    device, stuck = Device(), threading.Event()

    def run(works: Sequence[int], lane: Hashable) -> list[int]:
        device(works, lane)
        raise fault

    scheduler = Numbers(run, batch_pairs=1, max_queued_pairs=100, on_stuck=lambda _: stuck.set())
    futures = [hold(device, scheduler), scheduler.submit([1])]
    device.free.set()
    for future in futures:
        error = future.exception(WAIT_S)
        assert isinstance(error, StuckError)
        assert error.__cause__ is fault
    assert stuck.wait(WAIT_S)
    assert not scheduler.close(WAIT_S)


def test_many_threads_at_once() -> None:
    """Thousands of pairs of many callers, with poison, too little memory, deadlines and people who leave."""
    device, watcher = Device(range(0, 100_000, 97), memory=20), Watcher()
    scheduler = Numbers(device, batch_pairs=32, max_queued_pairs=5_000, observer=watcher)
    outcomes: list[tuple[list[int], Future[Completed[int]]]] = []

    def call(number: int) -> None:
        rng = random.Random(number)
        works = iter(range(number * 1000 + 1, (number + 1) * 1000 + 1))
        for _ in range(50):
            own = [next(works) for _ in range(rng.randint(1, 20))]
            due = time.monotonic() + rng.uniform(0.001, 1) if rng.random() < 0.2 else None
            try:
                future = scheduler.submit(
                    own, rng.choice("ab"), client=f"c{number % 5}", weight=1 + number % 3, deadline_s=due
                )
            except (QueueFullError, DeadlineError):
                continue
            outcomes.append((own, future))
            if rng.random() < 0.2:
                future.cancel()

    run_together([partial(call, number) for number in range(12)])
    assert scheduler.close(60)
    ends: Counter[str] = Counter()
    for own, future in outcomes:
        assert future.done()
        ends[check_outcome(own, future, device.poison)] += 1
    assert ends["results"] > 100
    assert ends["PairFailedError"] > 10
    assert ends["cancelled"] > 10
    scored = [batch for batch, _ in device.batches if len(batch) <= 20 and not device.poison & set(batch)]
    once = Counter(work for batch in scored for work in batch)
    assert set(once.values()) == {1}
    assert once.keys() >= {work for own, future in outcomes if is_answered(future) for work in own}


def is_answered(future: Future[Completed[int]]) -> bool:
    return not future.cancelled() and future.exception() is None


def check_outcome(own: list[int], future: Future[Completed[int]], poison: set[int]) -> str:
    """The name of how it ended, which must be its own way."""
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    if error is None:
        assert future.result().results == [2 * work for work in own]
        assert not poison & set(own)
        return "results"
    if isinstance(error, PairFailedError):
        assert own[error.index] in poison
    else:
        assert isinstance(error, DeadlineError)
    return type(error).__name__


def run_together(calls: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
