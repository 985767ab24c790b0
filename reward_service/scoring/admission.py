"""How much may be under way: pairs, bytes of bodies and of decoded images, per client and in all.

A request is counted from before its body is read until its answer. No torch, no web.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, get_args

from reward_service.config import Limits
from reward_service.protocol import ProblemError
from reward_service.scoring.auth import Client

Kind = Literal["pairs", "body bytes", "decoded bytes"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_LITTLE = 1 / 16
_KEPT_FOR_LITTLE = 1 / 8


@dataclass
class _Account:
    """What a client has under way, by kind, and by how many requests of which of its parts."""

    used: Counter[Kind] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)


class Admission:
    """Counts what is under way against the limits; any thread may ask.

    Args:
        retry_after_s: when there will probably be room again
    """

    def __init__(self, limits: Limits, retry_after_s: Callable[[], int] = lambda: 1) -> None:
        self._retry_after_s = retry_after_s
        self._limits = limits
        self._client_bounds: dict[Kind, int] = {
            "pairs": limits.max_client_pairs,
            "body bytes": limits.max_client_bytes,
            "decoded bytes": limits.max_client_decoded_bytes,
        }
        self._bounds: dict[Kind, int] = {
            "pairs": limits.max_queued_pairs,
            "body bytes": limits.max_inflight_bytes,
            "decoded bytes": limits.max_decoded_bytes,
        }
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}
        self._used: Counter[Kind] = Counter()
        self._open = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self._open == 0

    @property
    def used(self) -> dict[Kind, int]:
        """What is under way in all."""
        with self._lock:
            return {kind: self._used[kind] for kind in KINDS}

    def enter(self, client: Client, body_bytes: int | None) -> Ticket:
        """Let a request in before its body is read, as one pair at first.

        Args:
            body_bytes: as announced; None where it is not, which counts as the longest body

        Returns:
            a context manager; what it holds is given back at its end

        Raises:
            ProblemError: `client_busy` for the client's own limits, `queue_full` for the service's
        """
        size = self._limits.max_body_bytes if body_bytes is None else body_bytes
        ticket = Ticket(self, client)
        with self._lock:
            self._open += 1
            self._accounts.setdefault(client.account, _Account()).parts[client.part] += 1
        try:
            ticket.grow("pairs", 1)
            ticket.grow("body bytes", size)
        except ProblemError:
            ticket.close()
            raise
        return ticket

    def take(self, ticket: Ticket, kind: Kind, more: int) -> None:
        """Count `more` of a kind for a ticket.

        Raises:
            ProblemError: there is no room for it
        """
        with self._lock:
            if ticket.closed:
                raise ProblemError("deadline_exceeded", "the request was given up")
            problem = self._problem(ticket, kind, more)
            if problem is None:
                self._add(ticket, kind, more)
                return
        code, detail = problem
        raise ProblemError(code, detail, retry_after_s=None if code == _TOO_LARGE else self._retry_after_s())

    def give_back(self, ticket: Ticket, kind: Kind, less: int) -> None:
        """Count so much less of a kind for a ticket."""
        with self._lock:
            if not ticket.closed:
                self._add(ticket, kind, -less)

    def leave(self, ticket: Ticket) -> None:
        """The request is answered; again does nothing."""
        with self._lock:
            if ticket.closed:
                return
            ticket.closed = True
            for kind, amount in list(ticket.used.items()):
                self._add(ticket, kind, -amount)
            account = self._accounts[ticket.client.account]
            account.parts[ticket.client.part] -= 1
            account.parts += Counter()  # forgets the parts at 0
            if not account.parts:
                del self._accounts[ticket.client.account]
            self._open -= 1

    def weight(self, client: Client) -> float:
        """A client's share of the device: its parts under way divide the key's among them."""
        if not client.name:
            return client.weight
        with self._lock:
            account = self._accounts.get(client.account)
            return client.weight / max(1, len(account.parts) if account else 1)

    def _add(self, ticket: Ticket, kind: Kind, more: int) -> None:
        for used in (ticket.used, self._accounts[ticket.client.account].used, self._used):
            used[kind] += more

    def _problem(self, ticket: Ticket, kind: Kind, more: int) -> tuple[str, str] | None:
        """Code and detail of what speaks against it. The lock is held."""
        client, own = ticket.client, ticket.used[kind] + more
        bound = self._client_bounds[kind]
        if kind == "pairs" and client.max_pairs is not None:
            bound = client.max_pairs
        if kind == "decoded bytes" and own > min(bound, self._bounds[kind]):
            limit = min(bound, self._bounds[kind]) / 2**20
            return _TOO_LARGE, f"the images exceed {limit:g} MiB when decoded; send fewer pairs a request"
        held = self._accounts[client.account].used[kind] + more
        if held > own and held > bound:
            detail = f"this client's requests under way may have {bound} {kind} together; wait for an answer"
            return "client_busy", detail
        total, most = self._used[kind] + more, self._bounds[kind]
        if held > most * _LITTLE:
            most = int(most * (1 - _KEPT_FOR_LITTLE))
        if total > own and total > most:
            return (
                "queue_full",
                f"requests under way have all the {kind} that the service takes; try again",
            )
        return None


_TOO_LARGE = "pictures_too_large"


class Ticket:
    """One request's share of what is under way."""

    def __init__(self, admission: Admission, client: Client) -> None:
        self._admission = admission
        self.client = client
        self.used: Counter[Kind] = Counter()
        self.closed = False

    @property
    def weight(self) -> float:
        """The client's share of the device at this moment."""
        return self._admission.weight(self.client)

    def grow(self, kind: Kind, more: int) -> None:
        """Count more of a kind.

        Raises:
            ProblemError: there is no room, or the request is over, so that nobody waits for it
        """
        if more > 0:
            self._admission.take(self, kind, more)

    def set(self, kind: Kind, amount: int) -> None:
        """Count exactly so much of a kind.

        Raises:
            ProblemError: there is no room for it
        """
        if (change := amount - self.used[kind]) > 0:
            self.grow(kind, change)
        else:
            self._admission.give_back(self, kind, -change)

    def close(self) -> None:
        """Give everything back; again does nothing."""
        self._admission.leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
