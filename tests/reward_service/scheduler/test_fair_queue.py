"""The fair queue, the open requests and the isolation of failures, against a model. No threads, no clock."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

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
    Backlog,
    ClosedError,
    Completed,
    DeadlineError,
    Ending,
    PairFailedError,
    Request,
    Unit,
)

WEIGHTS = {"light": 0.5, "plain": 1.0, "other": 1.0, "heavy": 3.0}
MAX_QUEUED = 60


@dataclass(eq=False)
class Asked:
    """What the model knows of a request."""

    request: Request[int, int]
    future: Future[Completed[int]]
    poison: frozenset[int]
    dispatched: set[int] = field(default_factory=set)
    over: bool = False

    @property
    def waiting(self) -> int:
        return 0 if self.over else self.request.pairs - len(self.dispatched)

    @property
    def urgency(self) -> float:
        return self.request.deadline_s


class QueueMachine(RuleBasedStateMachine):
    """Random callers, a device with poison and little memory, cancellations, deadlines and a close."""

    lanes: Sequence[str] = ("a", "b", "c")
    asked = Bundle("asked")

    @initialize(batch=st.integers(1, 12), quantum=st.integers(1, 4))
    def start(self, batch: int, quantum: int) -> None:
        self.batch, self.quantum = batch, min(quantum, batch)
        self.backlog: Backlog[int, int] = Backlog(batch, self.quantum, MAX_QUEUED)
        self.sizes = BatchSize(batch)
        self.memory = batch
        self.now = 0.0
        self.closed = False
        self.wrong: list[str] = []
        self.leaving: list[Asked] = []
        self.all: dict[Request[int, int], Asked] = {}
        self.works = itertools.count()
        self.poison: set[int] = set()
        self.ran: Counter[int] = Counter()
        self.running: Iterator[tuple[Sequence[Unit[int, int]], Sequence[int] | Exception]] | None = None
        self.served: defaultdict[str, float] = defaultdict(float)
        self.ahead: dict[tuple[str, str], tuple[float, float]] = {}

    @precondition(lambda self: not self.closed)
    @rule(
        target=asked,
        client=st.sampled_from(sorted(WEIGHTS)),
        lane=st.integers(0, 2),
        pairs=st.integers(1, 30),
        due=st.none() | st.integers(1, 8),
        poison=st.sets(st.integers(0, 29), max_size=2),
    )
    def submit(self, client: str, lane: int, pairs: int, due: int | None, poison: set[int]) -> Any:
        waiting = sum(asked.waiting for asked in self.all.values())
        assert self.backlog.has_room(pairs) == (waiting == 0 or waiting + pairs <= MAX_QUEUED)
        if not self.backlog.has_room(pairs):
            return multiple()
        works = list(itertools.islice(self.works, pairs))
        bad = frozenset(works[place] for place in poison if place < pairs)
        deadline = math.inf if due is None else self.now + due
        lane_name = self.lanes[lane % len(self.lanes)]
        request = Request[int, int](works, lane_name, client, WEIGHTS[client], deadline, self.now)
        self.all[request] = Asked(request, self.backlog.add(request), bad)
        self.poison |= bad
        return self.all[request]

    @precondition(lambda self: self.running is None)
    @rule(estimate_s=st.sampled_from([0.0, 0.0, 2.0]))
    def dispatch(self, estimate_s: float) -> None:
        self.end(self.backlog.expire(self.now))
        before = self.backlog.queued_pairs
        self.end(self.backlog.drop_late(self.now, lambda _: estimate_s), self.now + estimate_s)
        waiting = sum(asked.waiting for asked in self.all.values())
        assert bool(waiting) == bool(before), "an estimate alone does not empty the queue"
        backlogged = self.backlogged()
        forecast = self.backlog.upcoming(self.sizes.now)
        units = self.backlog.take(self.sizes.now, self.now)
        assert units == forecast, "what is staged is what is taken, if nothing comes between"
        assert bool(units) == bool(waiting), "the device is not idle while something waits"
        assert len(units) <= self.sizes.now
        assert len({unit.request.lane for unit in units}) <= 1
        if units:
            self.check_order(units)
        for unit in units:
            asked = self.all[unit.request]
            assert not asked.over, "a caller who left or was answered is not worked for"
            assert unit.place not in asked.dispatched
            asked.dispatched.add(unit.place)
            self.served[unit.request.client] += 1 / unit.request.weight
        self.check_shares(backlogged & self.backlogged())
        self.running = run_isolated(units, self.device, lambda unit: unit.request in self.backlog, self.sizes)

    @precondition(lambda self: self.running is not None)
    @rule()
    def proceed(self) -> None:
        """One part of the batch is done."""
        assert self.running is not None
        part, outcome = next(self.running, ([], []))
        assert not self.wrong
        if not part:
            self.running = None
        elif isinstance(outcome, Exception):
            assert len(part) == 1
            self.end(self.backlog.fail(part[0], outcome))
        else:
            self.end(self.backlog.finish(part, outcome, self.now))

    @rule(asked=asked)
    def leave(self, asked: Asked) -> None:
        can_leave = asked.request in self.backlog or asked.future.cancelled()
        left = asked.waiting
        assert asked.future.cancel() == can_leave
        assert self.backlog.leave(asked.request) == left
        asked.over = True

    @rule(asked=asked)
    def leave_during_the_next_run(self, asked: Asked) -> None:
        self.leaving.append(asked)

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        due = {a.request for a in self.all.values() if not a.over and a.urgency <= self.now}
        self.end(self.backlog.expire(self.now))
        assert all(self.all[request].over for request in due), "nobody waits beyond the deadline"

    @rule(memory=st.integers(0, 12))
    def change_memory(self, memory: int) -> None:
        self.memory = memory

    @rule()
    def close(self) -> None:
        self.closed = True

    @precondition(lambda self: self.closed)
    @rule()
    def abandon(self) -> None:
        """The time for an orderly end is over."""
        self.end(self.backlog.end_all(lambda: ClosedError("over")))
        assert self.backlog.queued_pairs == 0

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "all"):
            return
        waiting = [asked.waiting for asked in self.all.values() if asked.waiting]
        assert self.backlog.queued_pairs == sum(waiting)
        assert sum(waiting) <= MAX_QUEUED
        backlogged = self.backlogged()
        self.ahead = {pair: ahead for pair, ahead in self.ahead.items() if backlogged.issuperset(pair)}
        deadlines = [asked.urgency for asked in self.all.values() if not asked.over]
        assert self.backlog.next_deadline_s == min(deadlines, default=math.inf)

    def teardown(self) -> None:
        """Shutting down answers everything that was admitted."""
        if not hasattr(self, "all"):
            return
        while self.running is not None or self.backlog.queued_pairs:
            if self.running is None:
                self.dispatch(0.0)
            self.proceed()
        assert all(asked.over for asked in self.all.values())
        assert all(asked.future.done() for asked in self.all.values())

    def device(self, units: Sequence[Unit[int, int]]) -> list[int]:
        # What is raised here is taken for a pair's fault: noted, and asserted outside.
        if not 0 < len(units) <= self.sizes.now:
            self.wrong.append("a batch is no larger than what fitted")
        if any(self.all[unit.request].over for unit in units):
            self.wrong.append("what nobody wants any more is not run")
        while self.leaving:
            self.leave(self.leaving.pop())
        if len(units) > self.memory:
            raise OutOfMemoryError
        works = [unit.work for unit in units]
        if self.poison & set(works):
            raise ValueError("poison")
        self.ran.update(works)
        return [2 * work for work in works]

    def end(self, endings: Sequence[Ending[int]], due_s: float | None = None) -> None:
        """Each request ends once, with its own results in order or with its own error."""
        for ending in endings:
            [asked] = [asked for asked in self.all.values() if asked.future is ending.future]
            assert not asked.over
            assert ending.dropped == asked.waiting
            asked.over = True
            ending.deliver()
            self.check_outcome(asked, ending.outcome, self.now if due_s is None else due_s)

    def check_outcome(self, asked: Asked, outcome: Completed[int] | Exception, due_s: float) -> None:
        works = asked.request.works
        if isinstance(outcome, Completed):
            assert outcome.results == [2 * work for work in works]
            assert all(self.ran[work] == 1 for work in works), "each pair is run to its end once"
            assert not asked.poison
        elif isinstance(outcome, PairFailedError):
            alone_too_large = isinstance(outcome.__cause__, OutOfMemoryError)
            assert works[outcome.index] in asked.poison or alone_too_large
        elif isinstance(outcome, DeadlineError):
            assert asked.urgency <= due_s
        else:
            assert isinstance(outcome, ClosedError)
            assert self.closed

    def backlogged(self) -> set[str]:
        return {asked.request.client for asked in self.all.values() if asked.waiting}

    def check_order(self, units: Sequence[Unit[int, int]]) -> None:
        """Within a client and lane: by deadline, then arrival. The first pair is its client's most urgent."""
        position = {request: number for number, request in enumerate(self.all)}
        first = units[0].request
        own = [a.request for a in self.all.values() if a.waiting and a.request.client == first.client]
        assert first is min(own, key=lambda request: (request.deadline_s, position[request]))
        for client in {unit.request.client for unit in units}:
            taken = [unit for unit in units if unit.request.client == client]
            keys = [(unit.request.deadline_s, position[unit.request], unit.place) for unit in taken]
            assert keys == sorted(keys)
            rest = [
                (asked.urgency, position[asked.request])
                for asked in self.all.values()
                if (asked.request.client, asked.request.lane) == (client, first.lane)
                and asked.waiting > sum(unit.request is asked.request for unit in taken)
            ]
            assert not rest or keys[-1][:2] <= min(rest)

    def check_shares(self, backlogged: set[str]) -> None:
        """Theorem 1 of start-time fair queueing, over every interval in which both of two clients wait."""
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
    """All requests alike: the bound is a quantum each."""

    lanes = ("a",)


LONG = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestLanes = QueueMachine.TestCase
TestLanes.settings = LONG
TestOneLane = OneLaneMachine.TestCase
TestOneLane.settings = LONG


@dataclass(eq=False)
class Plain:
    """A job."""

    pairs: int
    client: str
    lane: str = "a"
    weight: float = 1.0
    deadline_s: float = math.inf


def served(queue: FairQueue[Plain], batches: int, most: int) -> Counter[str]:
    count: Counter[str] = Counter()
    for _ in range(batches):
        for share in queue.take(most):
            count[share.job.client] += share.stop - share.start
    return count


def test_the_device_is_shared_by_weight() -> None:
    """Three clients with endless work get shares in proportion to their weights."""
    queue: FairQueue[Plain] = FairQueue(2, 16)
    for client, weight in (("a", 1.0), ("b", 2.0), ("c", 5.0)):
        queue.add(Plain(10_000, client, weight=weight))
    count = served(queue, 100, 16)
    assert abs(count["a"] - 200) <= 4
    assert abs(count["b"] - 400) <= 6
    assert abs(count["c"] - 1000) <= 10


def test_a_light_caller_is_in_the_next_batch() -> None:
    """However much others have queued, and however long they have been served."""
    queue: FairQueue[Plain] = FairQueue(8, 64)
    for heavy in range(100):
        queue.add(Plain(10_000, f"heavy {heavy}"))
    served(queue, 50, 64)
    queue.add(Plain(1, "light"))
    assert served(queue, 1, 64)["light"] == 1


def test_absence_earns_no_credit() -> None:
    """Who comes late gets a fair share from then on, not what they could have had before."""
    queue: FairQueue[Plain] = FairQueue(2, 8)
    queue.add(Plain(10_000, "early"))
    served(queue, 100, 8)
    queue.add(Plain(10_000, "late"))
    count = served(queue, 10, 8)
    assert abs(count["early"] - count["late"]) <= 4


def test_a_pause_earns_no_credit() -> None:
    """Who was served, paused and comes back gets a fair share from then on, too."""
    queue: FairQueue[Plain] = FairQueue(2, 8)
    queue.add(Plain(10_000, "steady"))
    queue.add(Plain(4, "pausing"))
    served(queue, 100, 8)
    queue.add(Plain(10_000, "pausing"))
    count = served(queue, 10, 8)
    assert abs(count["steady"] - count["pausing"]) <= 4


def test_a_small_client_cannot_lift_others_of_its_lane() -> None:
    """Batches that one client begins again and again are not filled with its neighbour for ever.

    Without a limit `neighbour` would get 15 pairs with each of `drip`, `elsewhere` next to none.
    """
    queue: FairQueue[Plain] = FairQueue(5, 16)
    queue.add(Plain(10_000, "neighbour", "a"))
    queue.add(Plain(10_000, "elsewhere", "b"))
    count: Counter[str] = Counter()
    for _ in range(300):
        queue.add(Plain(1, "drip", "a"))
        count += served(queue, 1, 16)
        assert abs(count["neighbour"] - count["elsewhere"]) <= 16


def test_memory_follows_what_is_queued() -> None:
    """A flood of names and of cancelled requests leaves nothing behind, even while somebody always waits."""
    queue: FairQueue[Plain] = FairQueue(2, 8)
    queue.add(Plain(10**9, "steady"))
    for number in range(5_000):
        job = Plain(1, f"name {number}")
        queue.add(job)
        if number % 2:
            queue.remove(job)
        else:
            queue.take(8)
    served(queue, 100, 8)
    queue.remove(Plain(1, "x"))
    assert len(queue._clients) < 300
    assert len(queue._order) < 300
    assert queue._entries < 300
