"""The queue before the device."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service.faults import FatalDeviceError, OutOfMemoryError
from reward_service.pacing import BatchSize, BatchTime
from reward_service.scheduler import (
    ClosedError,
    Completed,
    DeadlineError,
    PairFailedError,
    QueueFullError,
    Scheduler,
    StuckError,
)

WAIT_S = 10.0
Numbers = Scheduler[int, int]


class Device:
    """Doubles numbers; refuses those in ``poison`` and more than ``memory`` at once; can be held busy."""

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
    """What ``run`` gets is what ``prepare`` made, and the next batch's is made before this one is done."""
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


def test_what_cannot_be_prepared_fails_alone() -> None:
    """An error of ``prepare`` is the pair's own, like one of ``run``."""

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


def test_a_failed_attempt_at_a_larger_batch_costs_little() -> None:
    """It goes back to what is known to fit, not below, and waits longer before the next one."""
    sizes = BatchSize(64)
    attempts = []
    sizes.overflows(64)
    for batch in range(2000):
        if sizes.now > 40:
            attempts.append(batch)
            sizes.overflows(sizes.now)
            assert sizes.now == 40
        sizes.fits(sizes.now)
    gaps = [later - earlier for earlier, later in pairwise(attempts)]
    assert len(gaps) >= 4
    assert gaps == sorted(set(gaps))


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


def test_the_batch_time_is_learnt() -> None:
    """Fixed and per-pair seconds come out of batches of several sizes, and a changed device is followed."""
    times = BatchTime(guess_s=0.5)
    assert times.coefficients == (0.0, 0.5)
    times.add(64, 6.4)
    assert times.coefficients == pytest.approx((0.0, 0.1))
    rng = random.Random(1)
    for fixed, per_pair in ((0.3, 0.01), (0.1, 0.05), (0.0, 0.002)):
        for _ in range(150):
            pairs = rng.randint(1, 64)
            times.add(pairs, fixed + per_pair * pairs)
        assert times.coefficients == pytest.approx((fixed, per_pair), rel=0.1, abs=0.01)
    assert times.seconds(130, 64) == pytest.approx(0.26, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 1024), st.floats(0, 1e4)), min_size=1, max_size=30))
def test_the_batch_time_is_never_negative(batches: list[tuple[int, float]]) -> None:
    """Whatever was measured, more pairs do not take less time."""
    times = BatchTime(0.01)
    for pairs, seconds in batches:
        times.add(pairs, seconds)
    fixed, per_pair = times.coefficients
    assert fixed >= 0
    assert per_pair >= 0


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
def test_pictures_are_freed_with_their_answer(end: str) -> None:
    """However a request ends, no ring of references keeps its works until the collector comes round."""

    def run(works: Sequence[Picture], lane: Hashable) -> list[int]:
        if end == "failed":
            raise ValueError
        return [1] * len(works)

    with collector_off():
        scheduler: Scheduler[Picture, int] = Scheduler(run, batch_pairs=2, max_queued_pairs=100)
        picture = Picture()
        seen = weakref.ref(picture)
        future = scheduler.submit([picture, picture, picture])
        if end == "cancelled":
            future.cancel()
        scheduler.close(WAIT_S)
        assert future.done()
        del picture, future
        assert seen() is None


@contextmanager
def collector_off() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
