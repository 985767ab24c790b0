"""Fair worker threads: shares by time, order within a client, cancellation and shutdown."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from reward_service.scheduler.workers import FairWorkers

TIMEOUT_S = 60.0


class Bench:
    """One worker thread with a clock that each piece of work advances."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, [""] * 0
        self.workers = FairWorkers(1, "test", clock=lambda: self.now)
        self._gate = threading.Event()
        self._futures: list[Future[Any]] = [self.workers.submit(self._gate.wait, client="gate")]

    def add(self, client: str, seconds: float, *, weight: float = 1.0, cost_s: float = 0.0) -> Future[None]:
        def run() -> None:
            self.now += seconds
            self.order.append(client)

        future = self.workers.submit(run, client=client, weight=weight, cost_s=cost_s)
        self._futures.append(future)
        return future

    def run(self) -> list[str]:
        """Run everything that was added and return the clients in the order of their work."""
        self._gate.set()
        for future in self._futures:
            if not future.cancelled():
                future.result(TIMEOUT_S)
        return self.order


def test_clients_get_equal_time_whatever_their_pieces_cost() -> None:
    """Pieces of 1 s and of 0.1 s, without an estimate: shares are equal by time, not by pieces."""
    bench = Bench()
    for _ in range(10):
        bench.add("heavy", 1.0)
    for _ in range(30):
        bench.add("light", 0.1)
    order = bench.run()
    assert Counter(order[: order.index("light") + 22])["heavy"] <= 3


def test_light_client_waits_for_one_piece_only() -> None:
    bench = Bench()
    for _ in range(100):
        bench.add("heavy", 1.0, cost_s=1.0)
    bench.add("light", 0.01)
    assert bench.run().index("light") <= 1


def test_shares_follow_the_weights() -> None:
    bench = Bench()
    for _ in range(40):
        bench.add("one", 1.0, cost_s=1.0)
        bench.add("three", 1.0, weight=3.0, cost_s=1.0)
    first = Counter(bench.run()[:20])
    assert 14 <= first["three"] <= 16


def test_wrong_estimate_is_corrected() -> None:
    """A client that announces nothing is charged what its work took."""
    bench = Bench()
    for _ in range(10):
        bench.add("liar", 5.0, cost_s=0.0)
        bench.add("honest", 1.0, cost_s=1.0)
    order = bench.run()
    assert Counter(order[:12])["liar"] <= 3


def test_work_of_a_client_runs_in_order() -> None:
    workers, seen = FairWorkers(1, "test"), list[int]()
    futures = [workers.submit(lambda i=i: seen.append(i)) for i in range(20)]  # type: ignore[misc]
    for future in futures:
        future.result(TIMEOUT_S)
    assert seen == list(range(20))


def test_cancelled_work_does_not_run() -> None:
    bench = Bench()
    assert bench.add("gone", 1.0).cancel()
    bench.add("here", 1.0)
    assert bench.run() == ["here"]


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3)])
def test_error_reaches_the_future_and_spares_the_thread(error: BaseException) -> None:
    def fail() -> None:
        raise error

    workers = FairWorkers(1, "test")
    assert workers.submit(fail).exception(TIMEOUT_S) is error
    assert workers.submit(lambda: 7).result(TIMEOUT_S) == 7


def test_close_cancels_what_has_not_started_and_waits_for_nothing() -> None:
    workers, started, release = FairWorkers(1, "test"), threading.Event(), threading.Event()

    def run() -> bool:
        started.set()
        return release.wait(TIMEOUT_S)

    running = workers.submit(run)
    assert started.wait(TIMEOUT_S)
    queued = workers.submit(lambda: None)
    workers.close()
    assert queued.cancelled()
    assert workers.submit(lambda: None).cancelled()
    release.set()
    assert running.result(TIMEOUT_S)


def test_idle_time_is_no_claim() -> None:
    """A client that was idle does not get the time back that it did not use."""
    bench = Bench()
    for _ in range(10):
        bench.add("busy", 1.0, cost_s=1.0)
    bench.run()
    gate = threading.Event()
    held = bench.workers.submit(gate.wait, client="gate")
    for _ in range(10):
        bench.add("busy", 1.0, cost_s=1.0)
        bench.add("new", 1.0, cost_s=1.0)
    gate.set()
    held.result(TIMEOUT_S)
    assert Counter(bench.run()[10:20]) == {"busy": 5, "new": 5}


def test_memory_follows_the_clients_with_work() -> None:
    workers = FairWorkers(2, "test")
    for number in range(2000):
        workers.submit(lambda: None, client=str(number)).result(TIMEOUT_S)
    workers.submit(lambda: None).result(TIMEOUT_S)
    assert len(workers._clients) < 100


def test_failed_work_is_released_without_garbage_collection() -> None:
    """The error's traceback does not keep the work, and the body that it parses, alive."""

    class Body:
        pass

    def fail(_: Body) -> None:
        raise ValueError

    workers, body = FairWorkers(1, "test"), Body()
    released = weakref.ref(body)
    gc.disable()
    try:
        future = workers.submit(partial(fail, body))
        del body
        assert isinstance(future.exception(TIMEOUT_S), ValueError)
        del future
        deadline = time.monotonic() + TIMEOUT_S
        while released() is not None:
            assert time.monotonic() < deadline, "the work is still held"
            time.sleep(0.01)
    finally:
        gc.enable()
