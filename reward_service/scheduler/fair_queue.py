"""Whose pairs are next: start-time fair queueing over clients. A data structure without threads or clocks.

Goyal, Vin and Cheng, "Start-time fair queuing", SIGCOMM 1996, with the paper's names:

=================  ==============================================================================
`start`  S       tag of a client's next quantum: max(v at arrival, finish tag of its last one)
finish     F       S + pairs / weight; a client's finish tag is the start tag of its next quantum
`virtual` v      start tag of the quantum taken last
=================  ==============================================================================

The smallest start tag goes first. Of two clients that both have work waiting, neither gets more than one
quantum each ahead of its weighted share (theorem 1 of the paper): |W_f/r_f - W_m/r_m| <= l_f/r_f + l_m/r_m.
Pairs of different lanes cannot share a batch, so the lane of whoever is first is filled, in the same order,
from those who have pairs of it, as long as they are not a whole batch ahead of those who wait; then the
bound is one batch each instead of one quantum each.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

_SPARE = 64  # stale entries that are not worth a clean-up
_ROUNDING = 1e-6  # pairs; tags are sums of floats


class Job(Protocol):
    """What is queued: `pairs` of one lane; told apart by identity."""

    @property
    def pairs(self) -> int:
        """How many it has."""

    @property
    def client(self) -> str:
        """Whose they are."""

    @property
    def weight(self) -> float:
        """The client's, above 0."""

    @property
    def lane(self) -> Hashable:
        """What they can share a batch with."""

    @property
    def deadline_s(self) -> float:
        """When they are due; inf for never."""


AnyJob = TypeVar("AnyJob", bound=Job)


class Share(NamedTuple, Generic[AnyJob]):
    """Pairs `start` to `stop` (exclusive) of a job."""

    job: AnyJob
    start: int
    stop: int


@dataclass(eq=False)
class _Client(Generic[AnyJob]):
    start: float
    weight: float = 1.0
    waiting: bool = False
    lanes: dict[Hashable, list[tuple[float, int, AnyJob]]] = field(default_factory=dict)

    def copy(self) -> _Client[AnyJob]:
        lanes = {lane: heap.copy() for lane, heap in self.lanes.items()}
        return _Client(self.start, self.weight, self.waiting, lanes)


class FairQueue(Generic[AnyJob]):
    """Jobs of many clients, taken in fair order; within a client by deadline (none: inf), then arrival.

    Args:
        quantum: most pairs of one client before the next one's turn
        batch_pairs: most pairs that a client may be ahead of others who wait in another lane
    """

    def __init__(self, quantum: int, batch_pairs: int) -> None:
        self._quantum, self._batch_pairs = quantum, batch_pairs
        self._turn = 0
        self._clear()

    def _clear(self) -> None:
        self.pairs = 0
        self._virtual = 0.0
        self._clients: dict[str, _Client[AnyJob]] = {}
        self._order: list[tuple[float, bool, int, _Client[AnyJob]]] = []
        self._taken: dict[AnyJob, int] = {}  # of every job with pairs left
        self._entries = 0
        self._forget_at = _SPARE

    def __contains__(self, job: AnyJob) -> bool:
        return job in self._taken

    def left(self, job: AnyJob) -> int:
        """How many of a job's pairs are queued."""
        return job.pairs - self._taken[job] if job in self._taken else 0

    def add(self, job: AnyJob) -> None:
        """Queue all of a job's pairs."""
        client = self._clients.setdefault(job.client, _Client(self._virtual))
        client.weight = job.weight
        heapq.heappush(client.lanes.setdefault(job.lane, []), (job.deadline_s, self._next_turn(), job))
        self._entries += 1
        self._taken[job] = 0
        self.pairs += job.pairs
        if not client.waiting:
            client.waiting = True
            client.start = max(client.start, self._virtual)
            # Of equal tags the newcomer's goes first: the paper leaves it open, and light callers gain by it.
            heapq.heappush(self._order, (client.start, False, self._next_turn(), client))

    def remove(self, job: AnyJob) -> int:
        """Drop what is left of a job.

        Returns:
            so many pairs
        """
        left = self.left(job)
        self._taken.pop(job, None)
        self.pairs -= left
        self._tidy()
        return left

    def take(self, most: int) -> list[Share[AnyJob]]:
        """Take up to `most` pairs of one lane; something, if anything is queued."""
        shares: list[Share[AnyJob]] = []
        passed: list[tuple[float, bool, int, _Client[AnyJob]]] = []
        lane: Hashable = None
        while most and self._order:
            place = heapq.heappop(self._order)
            start, _, _, client = place
            head = self._head(client)
            if head is None:
                client.waiting = False
                continue
            lane = lane if shares else head.lane
            least = passed[0][0] if passed else start
            allowed = int(self._batch_pairs - (start - least) * client.weight + _ROUNDING)
            if lane not in client.lanes or allowed < 1:
                passed.append(place)
                continue
            self._virtual = least
            share = self._share(client, lane, min(most, allowed, self._quantum))
            shares.append(share)
            most -= share.stop - share.start
        for place in passed:
            heapq.heappush(self._order, place)
        self._tidy()
        return shares

    def peek(self, most: int) -> list[Share[AnyJob]]:
        """What `take` would give now; takes nothing."""
        copies = {name: client.copy() for name, client in self._clients.items()}
        copy_of = {id(client): copies[name] for name, client in self._clients.items()}
        other: FairQueue[AnyJob] = FairQueue(self._quantum, self._batch_pairs)
        other.pairs, other._virtual, other._turn = self.pairs, self._virtual, self._turn
        other._clients, other._taken, other._entries = copies, self._taken.copy(), self._entries
        other._order = [(*place[:3], copy_of[id(place[3])]) for place in self._order]
        return other.take(most)

    def _share(self, client: _Client[AnyJob], lane: Hashable, most: int) -> Share[AnyJob]:
        job = client.lanes[lane][0][2]
        start = self._taken[job]
        stop = min(job.pairs, start + most)
        if stop == job.pairs:
            del self._taken[job]
        else:
            self._taken[job] = stop
        self.pairs -= stop - start
        client.start += (stop - start) / client.weight
        heapq.heappush(self._order, (client.start, True, self._next_turn(), client))
        return Share(job, start, stop)

    def _head(self, client: _Client[AnyJob]) -> AnyJob | None:
        """The client's first job, after forgetting those that are gone from the front of its lanes."""
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

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _tidy(self) -> None:
        """Keep memory in proportion to what is queued."""
        if not self._taken:  # nobody waits, so nobody can be behind: a new busy period
            self._clear()
        elif self._entries > 2 * len(self._taken) + _SPARE:
            self._drop_stale_entries()
        if len(self._clients) > self._forget_at:
            # A start tag that v has passed no longer says anything about a client.
            self._clients = {n: c for n, c in self._clients.items() if c.waiting or c.start > self._virtual}
            self._forget_at = 2 * len(self._clients) + _SPARE

    def _drop_stale_entries(self) -> None:
        self._entries = 0
        for client in self._clients.values():
            for lane, heap in client.lanes.items():
                client.lanes[lane] = [entry for entry in heap if entry[2] in self._taken]
                heapq.heapify(client.lanes[lane])
                self._entries += len(client.lanes[lane])
