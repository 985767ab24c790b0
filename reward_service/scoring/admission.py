"""Admission control: limits on pairs, body bytes and decoded bytes in progress, per client and in total.

A request counts from before its body is read until its response. This module imports neither torch nor a web
framework.
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

Resource = Literal["pairs", "body bytes", "decoded bytes"]
RESOURCES: tuple[Resource, ...] = get_args(Resource)

# The last eighth of each total limit is reserved for clients that use less than a sixteenth of it.
_LIGHT_CLIENT = 1 / 16
_RESERVED_FOR_LIGHT = 1 / 8

_TOO_LARGE = "pictures_too_large"


@dataclass
class _Account:
    """Resources that a client has in use, and the number of requests in progress of each of its parts."""

    used: Counter[Resource] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)


class Admission:
    """Thread-safe accounts of the resources in use, checked against the limits.

    Args:
        limits: per client and in total
        retry_after_s: returns the estimated seconds until there is room again
    """

    def __init__(self, limits: Limits, retry_after_s: Callable[[], int] = lambda: 1) -> None:
        self._limits, self._retry_after_s = limits, retry_after_s
        self._client_limits: dict[Resource, int] = {
            "pairs": limits.max_client_pairs,
            "body bytes": limits.max_client_bytes,
            "decoded bytes": limits.max_client_decoded_bytes,
        }
        self._total_limits: dict[Resource, int] = {
            "pairs": limits.max_queued_pairs,
            "body bytes": limits.max_inflight_bytes,
            "decoded bytes": limits.max_decoded_bytes,
        }
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}
        self._used: Counter[Resource] = Counter()
        self._open_requests = 0

    @property
    def idle(self) -> bool:
        """True if no request is in progress."""
        return self._open_requests == 0

    @property
    def used(self) -> dict[Resource, int]:
        """Resources in use by all requests."""
        with self._lock:
            return {resource: self._used[resource] for resource in RESOURCES}

    def admit(self, client: Client, body_bytes: int | None) -> Ticket:
        """Admit a request before its body is read; it counts as one pair at first.

        Args:
            client: sender of the request
            body_bytes: announced size; None if it was not announced, which counts as the largest body

        Returns:
            a context manager that releases the request's resources at its end

        Raises:
            ProblemError: `client_busy` for the client's own limits, `queue_full` for the total ones
        """
        size = self._limits.max_body_bytes if body_bytes is None else body_bytes
        ticket = Ticket(self, client)
        with self._lock:
            self._open_requests += 1
            self._accounts.setdefault(client.account, _Account()).parts[client.part] += 1
        try:
            ticket.reserve("pairs", 1)
            ticket.reserve("body bytes", size)
        except ProblemError:
            ticket.close()
            raise
        return ticket

    def reserve(self, ticket: Ticket, resource: Resource, amount: int) -> None:
        """Add `amount` of a resource to a ticket.

        Raises:
            ProblemError: it would exceed a limit, or the ticket is closed
        """
        with self._lock:
            if ticket.closed:
                raise ProblemError("deadline_exceeded", "the request was cancelled")
            problem = self._problem(ticket, resource, amount)
            if problem is None:
                self._add(ticket, resource, amount)
                return
        code, detail = problem
        raise ProblemError(code, detail, retry_after_s=None if code == _TOO_LARGE else self._retry_after_s())

    def release(self, ticket: Ticket, resource: Resource, amount: int) -> None:
        """Remove `amount` of a resource from a ticket; do nothing if it is closed."""
        with self._lock:
            if not ticket.closed:
                self._add(ticket, resource, -amount)

    def close(self, ticket: Ticket) -> None:
        """Release all resources of a ticket; do nothing if it is closed."""
        with self._lock:
            if ticket.closed:
                return
            ticket.closed = True
            for resource, amount in list(ticket.used.items()):
                self._add(ticket, resource, -amount)
            account = self._accounts[ticket.client.account]
            account.parts[ticket.client.part] -= 1
            account.parts += Counter()  # drops the parts at 0
            if not account.parts:
                del self._accounts[ticket.client.account]
            self._open_requests -= 1

    def weight(self, client: Client) -> float:
        """Return a client's share of the device: the parts in progress divide the key's weight equally."""
        if not client.name:
            return client.weight
        with self._lock:
            account = self._accounts.get(client.account)
            return client.weight / max(1, len(account.parts) if account else 1)

    def _add(self, ticket: Ticket, resource: Resource, amount: int) -> None:
        for used in (ticket.used, self._accounts[ticket.client.account].used, self._used):
            used[resource] += amount

    def _problem(self, ticket: Ticket, resource: Resource, amount: int) -> tuple[str, str] | None:
        """Return code and detail of the limit that would be exceeded, if any; the lock is held."""
        client, own = ticket.client, ticket.used[resource] + amount
        client_limit, total_limit = self._client_limits[resource], self._total_limits[resource]
        if resource == "pairs" and client.max_pairs is not None:
            client_limit = client.max_pairs
        if resource == "decoded bytes" and own > min(client_limit, total_limit):
            limit = min(client_limit, total_limit) / 2**20
            return _TOO_LARGE, f"the images exceed {limit:g} MiB when decoded; send fewer pairs per request"
        # A single request may exceed the limit of pairs, or it could never be scored.
        client_used = self._accounts[client.account].used[resource] + amount
        if client_used > own and client_used > client_limit:
            detail = f"limit of {client_limit} {resource} for this client's requests in progress; "
            return "client_busy", detail + "wait for a response before you send more"
        total_used = self._used[resource] + amount
        if client_used > total_limit * _LIGHT_CLIENT:
            total_limit = int(total_limit * (1 - _RESERVED_FOR_LIGHT))
        if total_used > own and total_used > total_limit:
            return "queue_full", f"other requests in progress use all {resource} of the service; retry later"
        return None


class Ticket:
    """Resources of one admitted request."""

    def __init__(self, admission: Admission, client: Client) -> None:
        self._admission = admission
        self.client = client
        self.used: Counter[Resource] = Counter()
        self.closed = False

    @property
    def weight(self) -> float:
        """The client's share of the device at this moment."""
        return self._admission.weight(self.client)

    def reserve(self, resource: Resource, amount: int) -> None:
        """Add `amount` of a resource.

        Raises:
            ProblemError: it would exceed a limit, or the ticket is closed, so that the work can stop
        """
        if amount > 0:
            self._admission.reserve(self, resource, amount)

    def set(self, resource: Resource, amount: int) -> None:
        """Set the used amount of a resource.

        Raises:
            ProblemError: it would exceed a limit
        """
        if (change := amount - self.used[resource]) > 0:
            self.reserve(resource, change)
        else:
            self._admission.release(self, resource, -change)

    def close(self) -> None:
        """Release all resources; further calls do nothing."""
        self._admission.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
