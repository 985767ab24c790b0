"""The sockets beneath the application: bounded in number and in patience, and refused in our own words.

What uvicorn lacks: a time limit for a request's headers, an end for connections that send what nobody reads
or read nothing, room for a new caller among idle ones, and problem details for what never becomes a request.
"""

from __future__ import annotations

import resource
import uuid
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from reward_service.config import Limits
from reward_service.problems import ProblemError
from reward_service.protocol import JSON, PROBLEM, encode

_RESERVED_FILES = 128
_LINGER_S = 5.0
_REFUSED_S = 1.0
_REASONS = {400: b"Bad Request", 503: b"Service Unavailable"}


class Connections(H11Protocol):
    """One connection; :func:`connections` makes the class for a service's limits."""

    limits: ClassVar[Limits]
    most: ClassVar[int]
    #: Told status and problem code of what never becomes a request.
    on_refusal: Callable[[int, str], None]
    #: Connections without a request under way, the longest idle first.
    idle: ClassVar[dict[Connections, None]]

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Take a connection; if there are too many, an idle one makes room, or it is refused."""
        super().connection_made(transport)
        self._timer: TimerHandle | None = None
        self._refused = len(self.connections) > self.most and not self._make_room()
        if self._refused:  # once it has sent something: closed with unread bytes, it would not see the answer
            self._wait(_REFUSED_S)
            return
        self._rest()
        self._wait(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self.idle.pop(self, None)
        self._wait(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes from the caller. The first of a request start the clock for its headers."""
        if self.transport.is_closing():
            return
        if self._refused:
            self._refuse(ProblemError("too_many_connections", "too many callers are connected", (), 1))
            return
        if self in self.idle and self._timer is None:
            self._wait(self.limits.header_timeout_s)
        super().data_received(data)

    def handle_events(self) -> None:
        """uvicorn's own, after which a request may be under way."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self.idle.pop(self, None)
            self._wait(None)
            # Two lengths: what a proxy before us took for this body's end may not be where ours is, and
            # what follows no request of its caller's (RFC 9112, section 6.1).
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in self.headers}:
                self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """An answer is out; what is left of its request's body is read for some seconds, then no more."""
        unread = self.conn.their_state is h11.SEND_BODY
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered and not self.transport.is_closing():
            self._rest()
            half_a_head = bool(self.conn.trailing_data[0])
            # Between two requests the timer is uvicorn's.
            self._wait(_LINGER_S if unread else self.limits.header_timeout_s if half_a_head else None)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words
        """Answer what is not HTTP."""
        self._refuse(ProblemError("malformed_request", "this is not a request of HTTP/1.1; correct it"))

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, also one whose caller does not read its last answer."""
        self._close()

    def _rest(self) -> None:
        self.idle.pop(self, None)
        self.idle[self] = None

    def _wait(self, seconds: float | None) -> None:
        """Close the connection after so long; None for never."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._close)

    def _close(self) -> None:
        self.idle.pop(self, None)
        if not self.transport.is_closing():
            self.transport.close()
            # Closing waits until everything is written, which is never if the caller does not read.
            self.loop.call_later(_LINGER_S, self.transport.abort)

    def _make_room(self) -> bool:
        longest = next(iter(self.idle), None)
        if longest is not None:
            longest._close()
        return longest is not None

    def _refuse(self, error: ProblemError) -> None:
        self.on_refusal(int(error.status), error.code)
        body = encode(error.as_problem(uuid.uuid4().hex), JSON)
        headers = [("content-type", PROBLEM), ("content-length", str(len(body))), ("connection", "close")]
        if error.retry_after_s is not None:
            headers.append(("retry-after", str(error.retry_after_s)))
        answer = h11.Response(status_code=error.status, headers=headers, reason=_REASONS[error.status])
        with suppress(h11.LocalProtocolError):  # an answer is on its way already
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._close()


def connections(limits: Limits, on_refusal: Callable[[int, str], None]) -> type[Connections]:
    """The protocol for uvicorn's ``http`` option; one for each server."""
    shared: dict[str, Any] = {
        "limits": limits,
        "most": _allow_files(limits.max_connections),
        "on_refusal": staticmethod(on_refusal),
        "idle": {},
    }
    return type("ServiceConnections", (Connections,), shared)


def _allow_files(wanted: int) -> int:
    """Raise the process's limit of open files for so many connections.

    :returns: how many connections it allows
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + _RESERVED_FILES
    if soft == resource.RLIM_INFINITY or soft >= need:
        return wanted
    allowed = need if hard == resource.RLIM_INFINITY else min(need, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return max(1, min(wanted, soft - _RESERVED_FILES))
