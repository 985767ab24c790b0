"""HTTP connections: timeouts, bounds and refusals around uvicorn's protocol.

uvicorn lacks a timeout for a request's headers, bounds for the headers and for chunks, an end for connections
that never stop sending or never read, room for new clients among idle connections, and problem details for
bytes that never become a request; `Connection` adds them. llhttp (httptools) parses headers and chunks. It
gets one request at a time, the headers once they are whole and within the bounds, chunks in portions, each in
a turn of the event loop of its own; what follows a refusal is not parsed.
"""

from __future__ import annotations

import re
import uuid
from asyncio import AbstractEventLoop, Handle, TimerHandle, Transport
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar
from urllib.parse import unquote

from httptools import HttpParserError
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from reward_service.config import Limits
from reward_service.protocol import JSON, MAX_HEAD_BYTES, MAX_HEADERS, PROBLEM, ProblemError, encode
from reward_service.web.dependencies import LARGE_HEAD
from reward_service.web.open_files import allowed_connections

_LINGER_S = 5.0
_REFUSED_TIMEOUT_S = 1.0
_MAX_UNPARSED_BYTES = 65_536
_MAX_UNSENT_BYTES = 65_536
_PORTION_BYTES = 16_384
# What frames the chunks of a body may be this long, and a sixteenth of the bytes that they carry.
_FREE_FRAMING_BYTES, _CARRIED_PER_FRAMING = 16_384, 16
_MAX_EMPTY_LINES_BYTES = 64

_HEAD_END = b"\r\n\r\n"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}"
_REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/([0-9]\.[0-9])\r\n" % _TOKEN)
_REQUEST_LINE_START = re.compile(rb"%s(?: |\Z)" % _TOKEN)
_UPGRADE = re.compile(rb"\n[Uu][Pp][Gg][Rr][Aa][Dd][Ee]:")
_HEALTH_PROBE = re.compile(rb"(?:GET|HEAD) /health/(?:live|ready) ")
_HTTP_1_1 = b"1.1"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_MALFORMED = ProblemError("malformed_request", "not a valid HTTP/1.1 request; check the client")
_SMALL_CHUNKS = ProblemError(
    "malformed_request", "the chunks of the body are too small; send larger ones, or a Content-Length"
)
_TOO_MANY = ProblemError("too_many_connections", "too many clients are connected", (), 1)


def connection_class(limits: Limits, on_refusal: Callable[[int, str], None]) -> type[Connection]:
    """Return the protocol class of one server, for uvicorn's option `http`.

    Args:
        limits: of the service
        on_refusal: called with status and problem code of bytes that never become a request
    """
    attributes: dict[str, Any] = {
        "limits": limits,
        "max_connections": allowed_connections(limits.max_connections),
        "on_refusal": staticmethod(on_refusal),
        "idle": {},
    }
    return type("ServiceConnection", (Connection,), attributes)


class Connection(HttpToolsProtocol):
    """One connection; the class attributes are shared by the connections of a server."""

    limits: ClassVar[Limits]
    max_connections: ClassVar[int]
    on_refusal: Callable[[int, str], None]
    #: Connections without a request in progress, the longest idle first.
    idle: ClassVar[dict[Connection, None]]

    # Events of the transport --------------------------------------------------------------------------

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Accept a connection; if there are too many, close an idle one or refuse this one."""
        super().connection_made(transport)
        self.transport: _ResponseTransport = _ResponseTransport(transport, self.loop, self._finish)  # type: ignore[assignment]
        self.flow: _Flow = _Flow(transport)
        # Chunks take precedence over a Content-Length beside them; the connection is closed then.
        self.parser.set_dangerous_leniencies(lenient_chunked_length=True)
        self._timer: TimerHandle | None = None
        self._turn: Handle | None = None
        self._unparsed = b""
        self._discarding = self._in_body = self._chunked = False
        self._unread_bytes = 0
        self._excess = len(self.connections) > self.max_connections and not self._close_longest_idle()
        if self._excess:
            # Refused on its first bytes: if they were unread at the close, the response would be lost.
            self._set_timer(_REFUSED_TIMEOUT_S)
            return
        self._mark_idle()
        self._set_timer(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a closed connection."""
        self.idle.pop(self, None)
        self._set_timer(None)
        if self._turn is not None:
            self._turn.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process bytes of the client; the first bytes of a request start the timeout of its headers."""
        if self._discarding or self.transport.is_closing():
            return
        if self._excess and not self._unparsed and not _HEALTH_PROBE.match(data):
            self._refuse(_TOO_MANY)
            return
        self._unset_keepalive_if_required()
        self._unparsed = self._unparsed + data if self._unparsed else data
        if self._turn is None:
            self._parse()
        if self._timer is None and self in self.idle:
            self._set_timer(self.limits.header_timeout_s)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, also if its client does not read the last response."""
        self._close()

    # Parsing ------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        """Parse what was received, up to the end of a request that has no response yet.

        Headers and a portion of chunks end the turn; a body of a known length costs little however long.
        """
        self._turn = None
        costly = 0
        while self._unparsed and not self._discarding and (self._in_body or self._has_responded()):
            if self._unread_bytes:
                self._feed_body()
            elif costly:
                self._turn = self.loop.call_soon(self._parse)
                break
            elif self._in_body:
                self._feed_chunks()
                costly += 1
            elif self._feed_head():
                costly += 1
            else:
                break
        self.flow.hold(len(self._unparsed) > _MAX_UNPARSED_BYTES)

    def _has_responded(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _feed_head(self) -> bool:
        """Parse request line and headers; return False if they are incomplete, or refused."""
        received = self._unparsed.lstrip(b"\r\n")  # RFC 9112, section 2.2
        if len(self._unparsed) - len(received) > _MAX_EMPTY_LINES_BYTES:
            self._refuse(_MALFORMED)
            return False
        self._unparsed = received
        end = received.find(_HEAD_END, 0, MAX_HEAD_BYTES)
        whole = end >= 0
        head = received[: end + len(_HEAD_END)] if whole else received
        line = _REQUEST_LINE.match(head, 0, MAX_HEAD_BYTES)
        if line is None and (b"\n" in head[:MAX_HEAD_BYTES] or not _REQUEST_LINE_START.match(head)):
            self._refuse(_MALFORMED)
            return False
        if len(head) >= MAX_HEAD_BYTES or head.count(b"\n") > MAX_HEADERS + 2:
            self._refuse(LARGE_HEAD)
            return False
        if line is None or not whole:
            return False
        self._unparsed, self._request_line, self._chunked = received[len(head) :], line, False
        # The application answers requests with methods and targets that llhttp does not know, and ignores
        # upgrades, after which llhttp would not parse the body.
        start = b"POST / HTTP/1.1\r\n" if line[3] == _HTTP_1_1 else b"POST / HTTP/1.0\r\n"
        self._feed(_UPGRADE.sub(b"\nX-Ignored-Upgrade:", start + head[line.end() :]))
        return not self._discarding

    def _feed_body(self) -> None:
        portion = self._take(self._unread_bytes)
        self._unread_bytes -= len(portion)
        self._feed(portion)

    def _feed_chunks(self) -> None:
        portion = self._take(_PORTION_BYTES)
        self._framing_bytes += len(portion)  # `on_body` subtracts those that are carried
        self._feed(portion)
        if self._framing_bytes > _FREE_FRAMING_BYTES + self._carried_bytes / _CARRIED_PER_FRAMING:
            self._refuse(_SMALL_CHUNKS)

    def _take(self, count: int) -> bytes:
        portion, self._unparsed = self._unparsed[:count], self._unparsed[count:]
        return portion

    def _feed(self, portion: bytes) -> None:
        try:
            self.parser.feed_data(portion)
        except HttpParserError as error:
            if isinstance(error.__context__, _PipelinedError):
                self._discard()
            elif "overflow" in str(error) and self._in_body:
                self._discard()  # a chunk of more than 2^64 bytes: its end is not received in time
            else:
                self._refuse(_MALFORMED)

    # Events of the parser -----------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Start a request; its headers have been checked unless it follows chunks in the same portion."""
        if self._chunked:
            raise _PipelinedError
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header to the request; fields behind a chunked body are none."""
        if self._in_body:
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Start the application on a request.

        Raises:
            ValueError: the headers are contradictory, or necessary ones are missing
        """
        method, target, version = self._request_line.groups()
        length = _content_length(self.headers, version)
        self.idle.pop(self, None)
        self._set_timer(None)
        self._unset_keepalive_if_required()
        super().on_headers_complete()
        raw_path, _, query = target.partition(b"?")
        path = self.root_path + unquote(raw_path.decode())
        # The application's task has not started to run, so that it sees the request as it was sent.
        self.scope["method"], self.scope["http_version"] = method.decode(), version.decode()
        self.scope["path"], self.scope["query_string"] = path, query
        self.scope["raw_path"] = self.root_path.encode() + raw_path
        self._in_body, self._chunked = True, length is None
        self._unread_bytes, self._carried_bytes, self._framing_bytes = length or 0, 0, 0
        # With two lengths, a proxy before us may have seen another end of this body than we do, and the
        # bytes after it may be another client's (RFC 9112, section 6.1).
        both = self._chunked and any(name == b"content-length" for name, _ in self.headers)
        self._outlives_request = self.cycle.keep_alive and not both and not self._excess
        # The end of unread chunks would have to be searched for.
        self.cycle.keep_alive = self._outlives_request and not self._chunked

    def on_body(self, body: bytes) -> None:
        """Add bytes to the body of the request."""
        self._carried_bytes += len(body)
        self._framing_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note the end of a request."""
        self._in_body = False
        super().on_message_complete()
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._outlives_request
        elif self.cycle.response_complete:
            self._set_timer(None)

    # Responses and the end ----------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Await the next request; the rest of an unread body is read for some seconds at most."""
        super().on_response_complete()
        self.transport.flush()
        if self.transport.is_closing():
            return
        self._mark_idle()
        # Between two requests the timer is uvicorn's.
        self._set_timer(_LINGER_S if self._in_body else None)
        if self._unparsed and not self._in_body:
            self._set_timer(self.limits.header_timeout_s)
        if self._unparsed and self._turn is None:
            self._turn = self.loop.call_soon(self._parse)

    def _mark_idle(self) -> None:
        self.idle.pop(self, None)
        self.idle[self] = None

    def _set_timer(self, seconds: float | None) -> None:
        """Close the connection after so many seconds; None for never."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._close)

    def _discard(self) -> None:
        """Ignore what the client sends from here on."""
        self._discarding, self._unparsed = True, b""
        if not self._has_responded():
            self.cycle.keep_alive = False
        self.flow.hold(False)

    def _finish(self) -> None:
        """Close the connection after a last response, which a client that still sends has time to read."""
        if self.transport.is_closing() or not (self._in_body or self._unparsed or self._discarding):
            self._close()
            return
        self._discard()
        self.flow.resume_reading()
        self.transport.end()
        self._mark_idle()
        self._set_timer(_LINGER_S)

    def _close(self) -> None:
        self.idle.pop(self, None)
        if not self.transport.is_closed():
            self.transport.close_now()
            # Closing waits until everything is written: for ever if the client does not read.
            self.loop.call_later(_LINGER_S, self.transport.abort)

    def _close_longest_idle(self) -> bool:
        longest = next(iter(self.idle), None)
        if longest is not None:
            longest._close()
        return longest is not None

    def _refuse(self, error: ProblemError) -> None:
        """Send a problem, unless a response has been started, and close the connection."""
        self.on_refusal(int(error.status), error.code)
        in_progress = not self._has_responded()
        if not (in_progress and self.cycle.response_started):
            self.transport.write(_rendered(error))
        if in_progress:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._discard()
        self._finish()


class _PipelinedError(Exception):
    """Another request follows a chunked one in the same portion; its headers would be parsed unchecked.

    The connection is closed after the response, and a client has to repeat what it pipelined (RFC 9112,
    section 9.3.2).
    """


class _Flow(FlowControl):
    """uvicorn's control of reading, which is not resumed while it is held."""

    _held = False

    def hold(self, held: bool) -> None:
        """Pause reading whatever the application needs, or no longer."""
        if held:
            self.pause_reading()
        elif self._held:
            super().resume_reading()
        self._held = held

    def resume_reading(self) -> None:
        """Resume reading unless it is held."""
        if not self._held:
            super().resume_reading()


class _ResponseTransport:
    """Transport for uvicorn that sends a response's head and body in one write.

    Args:
        transport: of the connection
        loop: its event loop
        on_close: called instead of closing the transport
    """

    def __init__(self, transport: Transport, loop: AbstractEventLoop, on_close: Callable[[], None]) -> None:
        self._transport, self._loop, self.close = transport, loop, on_close
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._ended = False
        self.get_extra_info, self.abort = transport.get_extra_info, transport.abort
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading

    def write(self, data: bytes) -> None:
        """Send bytes at the end of this turn of the event loop."""
        if len(self._unsent) == 1:  # a head waits for the first bytes of its body
            self._loop.call_soon(self.flush)
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes > _MAX_UNSENT_BYTES or data == _CONTINUE:
            self.flush()

    def flush(self) -> None:
        """Send the bytes that wait."""
        if self._unsent and not self.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
        self._unsent_bytes = 0

    def is_closing(self) -> bool:
        """Return whether nothing can be sent any more."""
        return self._ended or self._transport.is_closing()

    def is_closed(self) -> bool:
        """Return whether nothing is received any more either."""
        return self._transport.is_closing()

    def end(self) -> None:
        """Send what waits and then the end of the stream; go on receiving."""
        self.flush()
        self._ended = True
        with suppress(OSError):  # the client has just left
            self._transport.write_eof()

    def close_now(self) -> None:
        """Send what waits and close."""
        self.flush()
        self._transport.close()


def _content_length(headers: list[tuple[bytes, bytes]], version: bytes) -> int | None:
    """Return the announced length of the body, or None if it is chunked.

    Raises:
        ValueError: the headers do not determine host and body
    """
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (hosts == 0 and version == _HTTP_1_1):
        raise ValueError("exactly one host is necessary")
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings:
        if codings != [b"chunked"]:
            raise ValueError("no other coding than chunked is supported")
        return None
    return int(next((value for name, value in headers if name == b"content-length"), b"0"))


def _rendered(error: ProblemError) -> bytes:
    """Return a problem as a whole response."""
    body = encode(error.to_problem(uuid.uuid4().hex), JSON)
    lines = [
        f"HTTP/1.1 {int(error.status)} {error.status.phrase}",
        f"content-type: {PROBLEM}",
        f"content-length: {len(body)}",
        "connection: close",
        *([] if error.retry_after_s is None else [f"retry-after: {error.retry_after_s}"]),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
