"""Fair queue, open requests and failure isolation, against a reference model without threads or clocks."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from reward_service.engine.types import OutOfMemoryError
from reward_service.scheduler.batching import BatchSize, run_isolated
from reward_service.scheduler.fair_queue import FairQueue
from reward_service.scheduler.requests import (
    ClosedError,
    Completed,
    DeadlineMissedError,
    FinishedRequest,
    OpenRequests,
    PairFailedError,
    QueuedRequest,
    RequestPair,
)

WEIGHTS = {"light": 0.5, "plain": 1.0, "other": 1.0, "heavy": 3.0}
MAX_QUEUED = 60


@dataclass(eq=False)
class ModelRequest:
    """State of a request in the model."""

    request: QueuedRequest[int, int]
    future: Future[Completed[int]]
    poison: frozenset[int]
    dispatched: set[int] = field(default_factory=set)
    finished: bool = False

    @property
    def queued_pairs(self) -> int:
        return 0 if self.finished else self.request.pairs - len(self.dispatched)

    @property
    def deadline_s(self) -> float:
        return self.request.deadline_s


class QueueMachine(RuleBasedStateMachine):
    """Random requests, failing pairs, changing memory, cancellations, deadlines and a close."""

    lanes: Sequence[str] = ("a", "b", "c")
    model = Bundle("model")

    @initialize(batch=st.integers(1, 12), quantum=st.integers(1, 4))
    def start(self, batch: int, quantum: int) -> None:
        self.batch, self.quantum = batch, min(quantum, batch)
        self.open: OpenRequests[int, int] = OpenRequests(batch, self.quantum, MAX_QUEUED)
        self.sizes = BatchSize(batch)
        self.memory = batch
        self.now = 0.0
        self.closed = False
        self.violations: list[str] = []
        self.cancel_during_run: list[ModelRequest] = []
        self.requests: dict[QueuedRequest[int, int], ModelRequest] = {}
        self.numbers = itertools.count()
        self.poison: set[int] = set()
        self.run_counts: Counter[int] = Counter()
        self.running: Iterator[tuple[Sequence[RequestPair[int, int]], Sequence[int] | Exception]] | None = (
            None
        )
        self.served: defaultdict[str, float] = defaultdict(float)
        self.ahead: dict[tuple[str, str], tuple[float, float]] = {}

    @precondition(lambda self: not self.closed)
    @rule(
        target=model,
        client=st.sampled_from(sorted(WEIGHTS)),
        lane=st.integers(0, 2),
        pairs=st.integers(1, 30),
        due=st.none() | st.integers(1, 8),
        poison=st.sets(st.integers(0, 29), max_size=2),
    )
    def submit(self, client: str, lane: int, pairs: int, due: int | None, poison: set[int]) -> Any:
        queued = sum(model.queued_pairs for model in self.requests.values())
        assert self.open.has_room(pairs) == (queued == 0 or queued + pairs <= MAX_QUEUED)
        if not self.open.has_room(pairs):
            return multiple()
        numbers = list(itertools.islice(self.numbers, pairs))
        bad = frozenset(numbers[index] for index in poison if index < pairs)
        deadline = math.inf if due is None else self.now + due
        lane_name = self.lanes[lane % len(self.lanes)]
        request = QueuedRequest[int, int](numbers, lane_name, client, WEIGHTS[client], deadline, self.now)
        self.requests[request] = ModelRequest(request, self.open.add(request), bad)
        self.poison |= bad
        return self.requests[request]

    @precondition(lambda self: self.running is None)
    @rule(estimate_s=st.sampled_from([0.0, 0.0, 2.0]))
    def dispatch(self, estimate_s: float) -> None:
        self.check_finished(self.open.expire(self.now))
        queued_before = self.open.queued_pairs
        self.check_finished(self.open.drop_late(self.now, lambda _: estimate_s), self.now + estimate_s)
        queued = sum(model.queued_pairs for model in self.requests.values())
        assert bool(queued) == bool(queued_before), "an estimate alone never empties the queue"
        backlogged = self.backlogged()
        forecast = self.open.peek(self.sizes.current)
        batch = self.open.take(self.sizes.current, self.now)
        assert batch == forecast, "the forecast is the next batch if nothing changes"
        assert bool(batch) == bool(queued), "the device is not idle while pairs are queued"
        assert len(batch) <= self.sizes.current
        assert len({pair.request.lane for pair in batch}) <= 1
        if batch:
            self.check_order(batch)
        for pair in batch:
            model = self.requests[pair.request]
            assert not model.finished, "pairs of finished requests are never dispatched"
            assert pair.position not in model.dispatched
            model.dispatched.add(pair.position)
            self.served[pair.request.client] += 1 / pair.request.weight
        self.check_shares(backlogged & self.backlogged())
        self.running = run_isolated(batch, self.device, lambda pair: pair.request in self.open, self.sizes)

    @precondition(lambda self: self.running is not None)
    @rule()
    def proceed(self) -> None:
        """Run one more part of the batch."""
        assert self.running is not None
        part, outcome = next(self.running, ([], []))
        assert not self.violations
        if not part:
            self.running = None
        elif isinstance(outcome, Exception):
            assert len(part) == 1
            self.check_finished(self.open.fail(part[0], outcome))
        else:
            self.check_finished(self.open.complete(part, outcome, self.now))

    @rule(model=model)
    def cancel(self, model: ModelRequest) -> None:
        can_cancel = model.request in self.open or model.future.cancelled()
        queued = model.queued_pairs
        assert model.future.cancel() == can_cancel
        assert self.open.cancel(model.request) == queued
        model.finished = True

    @rule(model=model)
    def cancel_in_next_run(self, model: ModelRequest) -> None:
        self.cancel_during_run.append(model)

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        due = {a.request for a in self.requests.values() if not a.finished and a.deadline_s <= self.now}
        self.check_finished(self.open.expire(self.now))
        assert all(self.requests[request].finished for request in due), (
            "no request stays open beyond its deadline"
        )

    @rule(memory=st.integers(0, 12))
    def change_memory(self, memory: int) -> None:
        self.memory = memory

    @rule()
    def close(self) -> None:
        self.closed = True

    @precondition(lambda self: self.closed)
    @rule()
    def abort(self) -> None:
        """Fail what is not finished when the time for closing is over."""
        self.check_finished(self.open.fail_all(lambda: ClosedError("closed")))
        assert self.open.queued_pairs == 0

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "requests"):
            return
        queued = [model.queued_pairs for model in self.requests.values() if model.queued_pairs]
        assert self.open.queued_pairs == sum(queued)
        assert sum(queued) <= MAX_QUEUED
        backlogged = self.backlogged()
        self.ahead = {pair: ahead for pair, ahead in self.ahead.items() if backlogged.issuperset(pair)}
        deadlines = [model.deadline_s for model in self.requests.values() if not model.finished]
        assert self.open.next_deadline_s == min(deadlines, default=math.inf)

    def teardown(self) -> None:
        """Check that closing finishes every admitted request."""
        if not hasattr(self, "requests"):
            return
        while self.running is not None or self.open.queued_pairs:
            if self.running is None:
                self.dispatch(0.0)
            self.proceed()
        assert all(model.finished for model in self.requests.values())
        assert all(model.future.done() for model in self.requests.values())

    def device(self, batch: Sequence[RequestPair[int, int]]) -> list[int]:
        # An exception raised here would count as a failing pair: violations are asserted outside.
        if not 0 < len(batch) <= self.sizes.current:
            self.violations.append("a batch is larger than its limit")
        if any(self.requests[pair.request].finished for pair in batch):
            self.violations.append("a finished request is run")
        while self.cancel_during_run:
            self.cancel(self.cancel_during_run.pop())
        if len(batch) > self.memory:
            raise OutOfMemoryError
        numbers = [pair.input for pair in batch]
        if self.poison & set(numbers):
            raise ValueError("poison")
        self.run_counts.update(numbers)
        return [2 * number for number in numbers]

    def check_finished(self, finished: Sequence[FinishedRequest[int]], due_s: float | None = None) -> None:
        """Check that each request ends once, with its own results in order or with its own error."""
        for ended in finished:
            [model] = [model for model in self.requests.values() if model.future is ended.future]
            assert not model.finished
            assert ended.dropped == model.queued_pairs
            model.finished = True
            ended.settle()
            self.check_outcome(model, ended.outcome, self.now if due_s is None else due_s)

    def check_outcome(self, model: ModelRequest, outcome: Completed[int] | Exception, due_s: float) -> None:
        numbers = model.request.inputs
        if isinstance(outcome, Completed):
            assert outcome.results == [2 * number for number in numbers]
            assert all(self.run_counts[number] == 1 for number in numbers), "each pair completes once"
            assert not model.poison
        elif isinstance(outcome, PairFailedError):
            alone_too_large = isinstance(outcome.__cause__, OutOfMemoryError)
            assert numbers[outcome.index] in model.poison or alone_too_large
        elif isinstance(outcome, DeadlineMissedError):
            assert model.deadline_s <= due_s
        else:
            assert isinstance(outcome, ClosedError)
            assert self.closed

    def backlogged(self) -> set[str]:
        return {model.request.client for model in self.requests.values() if model.queued_pairs}

    def check_order(self, batch: Sequence[RequestPair[int, int]]) -> None:
        """Check the order within a client and lane: by deadline, then by arrival."""
        arrival = {request: number for number, request in enumerate(self.requests)}
        first = batch[0].request
        own = [
            a.request for a in self.requests.values() if a.queued_pairs and a.request.client == first.client
        ]
        assert first is min(own, key=lambda request: (request.deadline_s, arrival[request]))
        for client in {pair.request.client for pair in batch}:
            taken = [pair for pair in batch if pair.request.client == client]
            keys = [(pair.request.deadline_s, arrival[pair.request], pair.position) for pair in taken]
            assert keys == sorted(keys)
            rest = [
                (model.deadline_s, arrival[model.request])
                for model in self.requests.values()
                if (model.request.client, model.request.lane) == (client, first.lane)
                and model.queued_pairs > sum(pair.request is model.request for pair in taken)
            ]
            assert not rest or keys[-1][:2] <= min(rest)

    def check_shares(self, backlogged: set[str]) -> None:
        """Check theorem 1 of start-time fair queueing over every interval with two backlogged clients."""
        most = self.quantum if len(self.lanes) == 1 else self.batch
        pairs = set(itertools.combinations(sorted(backlogged), 2))
        ahead = {}
        for one, other in pairs:
            now = self.served[one] - self.served[other]
            low, high = self.ahead.get((one, other), (now, now))
            ahead[one, other] = low, high = min(low, now), max(high, now)
            assert high - low <= most / WEIGHTS[one] + most / WEIGHTS[other] + 1e-6
        self.ahead = ahead


class OneLaneMachine(QueueMachine):
    """Requests of a single lane: the bound is one quantum each."""

    lanes = ("a",)


LONG = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestLanes = QueueMachine.TestCase
TestLanes.settings = LONG
TestOneLane = OneLaneMachine.TestCase
TestOneLane.settings = LONG


@dataclass(eq=False)
class PlainJob:
    """Job of the fair queue."""

    pairs: int
    client: str
    lane: str = "a"
    weight: float = 1.0
    deadline_s: float = math.inf
    pair_cost: int = 1


def served(queue: FairQueue[PlainJob], batches: int, most: int) -> Counter[str]:
    count: Counter[str] = Counter()
    for _ in range(batches):
        for taken in queue.take(most):
            count[taken.job.client] += taken.stop - taken.start
    return count


def test_device_is_shared_by_weight() -> None:
    """Three clients that are always backlogged get shares in proportion to their weights."""
    queue: FairQueue[PlainJob] = FairQueue(2, 16)
    for client, weight in (("a", 1.0), ("b", 2.0), ("c", 5.0)):
        queue.add(PlainJob(10_000, client, weight=weight))
    count = served(queue, 100, 16)
    assert abs(count["a"] - 200) <= 4
    assert abs(count["b"] - 400) <= 6
    assert abs(count["c"] - 1000) <= 10


def test_light_client_is_in_the_next_batch() -> None:
    """This holds for any queue length of the other clients, and however long they have been served."""
    queue: FairQueue[PlainJob] = FairQueue(8, 64)
    for heavy in range(100):
        queue.add(PlainJob(10_000, f"heavy {heavy}"))
    served(queue, 50, 64)
    queue.add(PlainJob(1, "light"))
    assert served(queue, 1, 64)["light"] == 1


def test_new_client_gets_no_credit_for_the_past() -> None:
    """A client that starts late gets a fair share from then on, and nothing for the time before."""
    queue: FairQueue[PlainJob] = FairQueue(2, 8)
    queue.add(PlainJob(10_000, "early"))
    served(queue, 100, 8)
    queue.add(PlainJob(10_000, "late"))
    count = served(queue, 10, 8)
    assert abs(count["early"] - count["late"]) <= 4


def test_pause_earns_no_credit() -> None:
    """A client that pauses and returns gets a fair share from then on, and nothing for the pause."""
    queue: FairQueue[PlainJob] = FairQueue(2, 8)
    queue.add(PlainJob(10_000, "steady"))
    queue.add(PlainJob(4, "pausing"))
    served(queue, 100, 8)
    queue.add(PlainJob(10_000, "pausing"))
    count = served(queue, 10, 8)
    assert abs(count["steady"] - count["pausing"]) <= 4


def test_small_client_does_not_favour_its_lane() -> None:
    """Batches that a small client starts are not always filled with another client of its lane.

    Without a limit, `same lane` would get 15 pairs with each pair of `small`, and `other lane` almost none.
    """
    queue: FairQueue[PlainJob] = FairQueue(5, 16)
    queue.add(PlainJob(10_000, "same lane", "a"))
    queue.add(PlainJob(10_000, "other lane", "b"))
    count: Counter[str] = Counter()
    for _ in range(300):
        queue.add(PlainJob(1, "small", "a"))
        count += served(queue, 1, 16)
        assert abs(count["same lane"] - count["other lane"]) <= 16


def test_memory_is_proportional_to_the_queue() -> None:
    """Many client names and cancelled jobs leave nothing behind, even if one client is always backlogged."""
    queue: FairQueue[PlainJob] = FairQueue(2, 8)
    queue.add(PlainJob(10**9, "steady"))
    for number in range(5_000):
        job = PlainJob(1, f"name {number}")
        queue.add(job)
        if number % 2:
            queue.remove(job)
        else:
            queue.take(8)
    served(queue, 100, 8)
    queue.remove(PlainJob(1, "x"))
    assert len(queue._clients) < 300
    assert len(queue._order) < 300
    assert queue._entries < 300


def test_costly_pairs_share_no_batch() -> None:
    """Pairs that take long are taken one by one, and leave room for others of the same batch."""
    queue: FairQueue[PlainJob] = FairQueue(2, 16)
    queue.add(PlainJob(3, "heavy", pair_cost=12))
    queue.add(PlainJob(2, "light"))
    batches = [[(it.job.client, it.stop - it.start) for it in queue.take(16)] for _ in range(3)]
    assert sorted(batches[0]) == [("heavy", 1), ("light", 2)]
    assert batches[1:] == [[("heavy", 1)]] * 2


def test_pair_beyond_a_whole_batch_is_taken() -> None:
    """Alone, however much it costs."""
    queue: FairQueue[PlainJob] = FairQueue(2, 16)
    queue.add(PlainJob(2, "heavy", pair_cost=100))
    assert [served(queue, 1, 16)["heavy"] for _ in range(2)] == [1, 1]


def test_clients_are_charged_for_the_cost_of_their_pairs() -> None:
    """Two backlogged clients get equal time, not equally many pairs."""
    queue: FairQueue[PlainJob] = FairQueue(2, 16)
    queue.add(PlainJob(1000, "heavy", pair_cost=4))
    queue.add(PlainJob(1000, "light"))
    count = served(queue, 50, 16)
    assert count["light"] == pytest.approx(4 * count["heavy"], rel=0.1)
