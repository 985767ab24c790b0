"""Run the application: a socket that is known before anything is promised, and an orderly end.

The sockets beneath the application: bounded in number and in patience, and refused in our own words.

What uvicorn lacks: a time limit for a request's headers, an end for connections that send what nobody reads
or read nothing, room for a new caller among idle ones, and problem details for what never becomes a request.
"""

from __future__ import annotations

import ipaddress
import math
import resource
import signal
import socket
import threading
import time
import uuid
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from reward_service.config import Limits, ServiceConfig
from reward_service.observability.logs import Log
from reward_service.observability.tracing import Reporting, end_soon, reporting
from reward_service.protocol import JSON, PROBLEM, ProblemError, encode
from reward_service.scoring.auth import Keyring
from reward_service.scoring.service import ScoringService
from reward_service.settings import ConfigError, one_line
from reward_service.web.app import create_app

_RESERVED_FILES = 128
_LINGER_S = 5.0
_REFUSED_S = 1.0
_REASONS = {400: b"Bad Request", 503: b"Service Unavailable"}


class Connections(H11Protocol):
    """One connection; `connections` makes the class for a service's limits."""

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
    """The protocol for uvicorn's `http` option; one for each server."""
    shared: dict[str, Any] = {
        "limits": limits,
        "most": _allow_files(limits.max_connections),
        "on_refusal": staticmethod(on_refusal),
        "idle": {},
    }
    return type("ServiceConnections", (Connections,), shared)


def _allow_files(wanted: int) -> int:
    """Raise the process's limit of open files for so many connections.

    Returns:
        how many connections it allows
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


_BACKLOG = 2048
_LAST_ANSWERS_S = 2.0


def serve(config: ServiceConfig, say: Callable[[str], None]) -> str | None:
    """Serve until SIGTERM or SIGINT; then finish what was admitted. SIGHUP reads the keys again at once.

    Args:
        say: gets `listening on http://HOST:PORT` once connections are taken

    Returns:
        None after an orderly end, else one line that says why nothing can be scored

    Raises:
        ConfigError: the address cannot be used, or may not be without a key
    """
    _check_exposure(config)
    with reporting(config) as report, _listen(config.host, config.port) as listener:
        return _serve(config, say, report, listener)


def _serve(
    config: ServiceConfig, say: Callable[[str], None], report: Reporting, listener: socket.socket
) -> str | None:
    failures: list[str] = []

    def fail(message: str) -> None:
        if service.served:
            end_soon(message, report.log)
        failures.append(message)
        server.should_exit = True

    def listening() -> None:
        # A full disk behind stdout is no reason not to serve.
        with suppress(OSError, ValueError):
            say(f"listening on {_address(config.host, listener.getsockname()[1])}")

    service = ScoringService(
        config,
        on_ready=lambda detail: report.log.info(f"ready: {detail}"),
        on_failure=fail,
        on_notice=report.log.warning,
    )
    service.metrics.lost_log_lines.set_function(lambda: report.sink.lost)
    app = create_app(config, service, report.log, report.tracer)
    server = Server(options(app, config), listening, service, report.log)
    server.run(sockets=[listener])
    return failures[0] if failures else None


def options(app: FastAPI, config: ServiceConfig) -> uvicorn.Config:
    """What uvicorn is told."""
    return uvicorn.Config(
        app,
        http=connections(config.limits, partial(app.state.service.metrics.on_answer, "")),
        ws="none",
        # The same wherever it is installed: uvicorn would take uvloop where some other package brought it.
        loop="asyncio",
        # Its lines go to the root logger, and from there into the log.
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=math.ceil(config.limits.keep_alive_s),
        timeout_graceful_shutdown=math.ceil(config.drain_s),
    )


class Server(uvicorn.Server):
    """uvicorn's server, except that a signal is an orderly end with status 0.

    Readiness goes first. Until what was admitted is answered, or the time for it is over, new requests are
    still taken and told that the service is not ready.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_listening: Callable[[], None],
        service: ScoringService,
        log: Log,
    ) -> None:
        super().__init__(config)
        self._on_listening, self._judge, self._log = on_listening, service, log
        self._drained_s = math.inf
        self._reload_due = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._drained_s < math.inf and (self._judge.admission.idle or time.monotonic() > self._drained_s):
            self.should_exit = True
        if self._reload_due:
            self._reload_due = False
            self._reload()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close everything; what is left of the time for it is uvicorn's."""
        left_s = min(self._drained_s - time.monotonic(), self._judge.config.drain_s)
        self.config.timeout_graceful_shutdown = math.ceil(max(left_s, _LAST_ANSWERS_S))
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again afterwards, and the process would die of it."""
        handlers = {
            signal.SIGTERM: self._on_signal,
            signal.SIGINT: self._on_signal,
            signal.SIGHUP: self._on_hangup,
        }
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield
            return
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: Any) -> None:
        self._judge.stop_accepting()
        again = self._drained_s < math.inf
        self._drained_s = min(self._drained_s, time.monotonic() + self._judge.config.drain_s)
        # A second Ctrl-C does not wait for what is under way.
        if again and number == signal.SIGINT:
            self.force_exit = self.should_exit = True

    def _on_hangup(self, _: int, __: Any) -> None:
        # Not here: the handler may have interrupted a log line, whose lock the next one would wait for.
        self._reload_due = True

    def _reload(self) -> None:
        keys: Keyring | None = self.config.app.state.keys  # type: ignore[union-attr]  # ours
        if keys is None:
            self._log.warning("there is no file of keys to read again; see auth.keys")
        else:
            keys.reload()


def _check_exposure(config: ServiceConfig) -> None:
    auth = config.auth
    if auth.keys is None and not auth.allow_anonymous and not _is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host!r} can be reached by other machines and the service has no keys: "
            "make some with reward-service keys new NAME --file /PATH/keys.yaml and set "
            "auth.keys=/PATH/keys.yaml, use --host 127.0.0.1, "
            "or set auth.allow_anonymous=true where a trusted network surrounds it"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(
            f"cannot listen on {host}:{port} ({reason}); "
            "choose another --host, or another --port: 0 is a free one"
        ) from None
    return listener


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
