"""Start-time fair queue over clients: a data structure without threads or clocks.

Goyal, Vin and Cheng, "Start-time fair queuing", SIGCOMM 1996, with the paper's symbols:

| name | symbol | meaning |
|---|---|---|
| `start` | S | start tag of a client's next quantum: max(v at arrival, finish tag of its last quantum) |
| finish | F | S + cost / weight; a client's finish tag is the start tag of its next quantum |
| `virtual` | v | virtual time: start tag of the quantum taken last |

The unit of cost is an ordinary pair; a pair that takes longer costs several. The smallest start tag goes
first. Of two backlogged clients, neither gets more than one quantum each ahead of its weighted share (theorem
1 of the paper): |W_f/r_f - W_m/r_m| <= l_f/r_f + l_m/r_m.

Pairs of different lanes cannot share a batch. A batch has the lane of the client that is first, and is filled
in the same order with pairs of that lane, from clients that are less than a whole batch ahead of the other
backlogged ones. The bound is then one batch each instead of one quantum each.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

_STALE_ENTRIES = 64  # tolerated before memory is compacted
_ROUNDING = 1e-6  # pairs; tags are sums of floats


class Job(Protocol):
    """Queued work: `pairs` of one lane. Jobs are compared by identity."""

    @property
    def pairs(self) -> int:
        """Number of pairs."""

    @property
    def pair_cost(self) -> int:
        """Cost of each pair, in ordinary pairs."""

    @property
    def client(self) -> str:
        """Client that the pairs belong to."""

    @property
    def weight(self) -> float:
        """Weight of the client, above 0."""

    @property
    def lane(self) -> Hashable:
        """Lane: only pairs of the same lane share a batch."""

    @property
    def deadline_s(self) -> float:
        """Deadline in seconds; inf if there is none."""


AnyJob = TypeVar("AnyJob", bound=Job)


class JobSlice(NamedTuple, Generic[AnyJob]):
    """Pairs `start` to `stop` (exclusive) of a job."""

    job: AnyJob
    start: int
    stop: int


@dataclass(eq=False)
class _Client(Generic[AnyJob]):
    start: float
    weight: float = 1.0
    backlogged: bool = False
    lanes: dict[Hashable, list[tuple[float, int, AnyJob]]] = field(default_factory=dict)

    def copy(self) -> _Client[AnyJob]:
        lanes = {lane: heap.copy() for lane, heap in self.lanes.items()}
        return _Client(self.start, self.weight, self.backlogged, lanes)


class FairQueue(Generic[AnyJob]):
    """Jobs of many clients, taken in fair order; within a client by deadline, then by arrival.

    Args:
        quantum: cost of one client's pairs before the next client's turn; a single pair may cost more
        batch_pairs: cost that a client may be ahead of backlogged clients of other lanes
    """

    def __init__(self, quantum: int, batch_pairs: int) -> None:
        self._quantum, self._batch_pairs = quantum, batch_pairs
        self._sequence = 0
        self._clear()

    def _clear(self) -> None:
        self.pairs = 0
        self._virtual = 0.0
        self._clients: dict[str, _Client[AnyJob]] = {}
        self._order: list[tuple[float, bool, int, _Client[AnyJob]]] = []
        self._taken: dict[AnyJob, int] = {}  # for every job that still has pairs queued
        self._entries = 0
        self._prune_clients_at = _STALE_ENTRIES

    def __contains__(self, job: AnyJob) -> bool:
        return job in self._taken

    def remaining_pairs(self, job: AnyJob) -> int:
        """Return how many of a job's pairs are queued."""
        return job.pairs - self._taken[job] if job in self._taken else 0

    def add(self, job: AnyJob) -> None:
        """Add all of a job's pairs to the queue."""
        client = self._clients.setdefault(job.client, _Client(self._virtual))
        client.weight = job.weight
        heapq.heappush(client.lanes.setdefault(job.lane, []), (job.deadline_s, self._next_sequence(), job))
        self._entries += 1
        self._taken[job] = 0
        self.pairs += job.pairs
        if not client.backlogged:
            client.backlogged = True
            client.start = max(client.start, self._virtual)
            # Of equal tags the new client's goes first: the paper leaves it open, and light clients benefit.
            heapq.heappush(self._order, (client.start, False, self._next_sequence(), client))

    def remove(self, job: AnyJob) -> int:
        """Remove the queued pairs of a job and return their number."""
        remaining = self.remaining_pairs(job)
        self._taken.pop(job, None)
        self.pairs -= remaining
        self._compact()
        return remaining

    def take(self, max_pairs: int) -> list[JobSlice[AnyJob]]:
        """Take pairs of one lane that cost up to `max_pairs`, and at least one if any are queued."""
        slices: list[JobSlice[AnyJob]] = []
        skipped: list[tuple[float, bool, int, _Client[AnyJob]]] = []
        lane: Hashable = None
        room = max_pairs
        while room > 0 and self._order:
            entry = heapq.heappop(self._order)
            start, _, _, client = entry
            head = self._head(client)
            if head is None:
                client.backlogged = False
                continue
            lane = lane if slices else head.lane
            lowest_start = skipped[0][0] if skipped else start
            allowed = int(self._batch_pairs - (start - lowest_start) * client.weight + _ROUNDING)
            heap = client.lanes.get(lane)
            if not heap or allowed < 1 or (slices and heap[0][2].pair_cost > room):
                skipped.append(entry)
                continue
            self._virtual = lowest_start
            taken = self._take_slice(client, lane, min(room, allowed, self._quantum))
            slices.append(taken)
            room -= (taken.stop - taken.start) * taken.job.pair_cost
        for entry in skipped:
            heapq.heappush(self._order, entry)
        self._compact()
        return slices

    def peek(self, max_pairs: int) -> list[JobSlice[AnyJob]]:
        """Return what `take` would return now, without taking it."""
        copies = {name: client.copy() for name, client in self._clients.items()}
        copy_of = {id(client): copies[name] for name, client in self._clients.items()}
        other: FairQueue[AnyJob] = FairQueue(self._quantum, self._batch_pairs)
        other.pairs, other._virtual, other._sequence = self.pairs, self._virtual, self._sequence
        other._clients, other._taken, other._entries = copies, self._taken.copy(), self._entries
        other._order = [(*entry[:3], copy_of[id(entry[3])]) for entry in self._order]
        return other.take(max_pairs)

    def _take_slice(self, client: _Client[AnyJob], lane: Hashable, max_cost: int) -> JobSlice[AnyJob]:
        job = client.lanes[lane][0][2]
        start = self._taken[job]
        stop = min(job.pairs, start + max(1, max_cost // job.pair_cost))
        if stop == job.pairs:
            del self._taken[job]
        else:
            self._taken[job] = stop
        self.pairs -= stop - start
        client.start += (stop - start) * job.pair_cost / client.weight
        heapq.heappush(self._order, (client.start, True, self._next_sequence(), client))
        return JobSlice(job, start, stop)

    def _head(self, client: _Client[AnyJob]) -> AnyJob | None:
        """Return the client's first job; drop stale entries from the front of its lanes."""
        heads = []
        for lane, heap in list(client.lanes.items()):
            while heap and heap[0][2] not in self._taken:
                heapq.heappop(heap)
                self._entries -= 1
            if heap:
                heads.append(heap[0])
            else:
                del client.lanes[lane]
        return min(heads)[2] if heads else None

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def _compact(self) -> None:
        """Keep memory proportional to what is queued."""
        if not self._taken:  # no client is backlogged, so none can be behind: a new busy period
            self._clear()
        elif self._entries > 2 * len(self._taken) + _STALE_ENTRIES:
            self._drop_stale_entries()
        if len(self._clients) > self._prune_clients_at:
            # A start tag below v has no influence on a client any more.
            self._clients = {
                n: c for n, c in self._clients.items() if c.backlogged or c.start > self._virtual
            }
            self._prune_clients_at = 2 * len(self._clients) + _STALE_ENTRIES

    def _drop_stale_entries(self) -> None:
        self._entries = 0
        for client in self._clients.values():
            for lane, heap in client.lanes.items():
                client.lanes[lane] = [entry for entry in heap if entry[2] in self._taken]
                heapq.heapify(client.lanes[lane])
                self._entries += len(client.lanes[lane])
