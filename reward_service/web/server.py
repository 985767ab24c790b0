"""HTTP server: listening socket, connection limits and graceful shutdown around uvicorn.

Uvicorn lacks a timeout for a request's headers, an end for connections that never stop sending or never read,
room for new clients among idle connections, and problem details for bytes that never become a request;
`Connection` adds them to its protocol. `Server` turns a signal into a graceful shutdown with exit status 0.
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
from reward_service.observability.telemetry import Telemetry, exit_soon, open_telemetry
from reward_service.protocol import JSON, PROBLEM, ProblemError, encode
from reward_service.scoring.auth import Keyring
from reward_service.scoring.service import ScoringService
from reward_service.settings import ConfigError, one_line
from reward_service.web.app import create_app

_BACKLOG = 2048
_RESERVED_FILES = 128
_LINGER_S = 5.0
_REFUSED_TIMEOUT_S = 1.0
_MIN_SHUTDOWN_S = 2.0
_REASON_PHRASES = {400: b"Bad Request", 503: b"Service Unavailable"}


# Serving ----------------------------------------------------------------------------------------------


def serve(config: ServiceConfig, say: Callable[[str], None]) -> str | None:
    """Serve until SIGTERM or SIGINT, then finish the admitted requests; SIGHUP reloads the keys at once.

    Args:
        config: of the service
        say: called with `listening on http://HOST:PORT` once connections are accepted

    Returns:
        None after a graceful shutdown, else one line with the reason why nothing can be scored

    Raises:
        ConfigError: if the address cannot be used, or needs API keys and there are none
    """
    _check_exposure(config)
    with open_telemetry(config) as telemetry, _listen(config.host, config.port) as listener:
        return _serve(config, say, telemetry, listener)


def _serve(
    config: ServiceConfig, say: Callable[[str], None], telemetry: Telemetry, listener: socket.socket
) -> str | None:
    failures: list[str] = []

    def on_failure(message: str) -> None:
        if service.has_been_ready:
            exit_soon(message, telemetry.log)
        failures.append(message)
        server.should_exit = True

    def on_listening() -> None:
        # A full disk behind stdout is no reason not to serve.
        with suppress(OSError, ValueError):
            say(f"listening on {_url(config.host, listener.getsockname()[1])}")

    service = ScoringService(
        config,
        on_ready=lambda detail: telemetry.log.info(f"ready: {detail}"),
        on_failure=on_failure,
        on_warning=telemetry.log.warning,
    )
    service.metrics.lost_log_lines.set_function(lambda: telemetry.sink.lost)
    app = create_app(config, service, telemetry.log, telemetry.tracer)
    server = Server(uvicorn_config(app, config), on_listening, service, telemetry.log)
    server.run(sockets=[listener])
    return failures[0] if failures else None


def uvicorn_config(app: FastAPI, config: ServiceConfig) -> uvicorn.Config:
    """Return uvicorn's configuration for an application of `create_app`."""
    on_refusal = partial(app.state.service.metrics.on_response, "")
    return uvicorn.Config(
        app,
        http=connection_class(config.limits, on_refusal),
        ws="none",
        # The same on every machine: uvicorn would use uvloop if another package happened to install it.
        loop="asyncio",
        # Its records go to the root logger, and from there into the service's log.
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=math.ceil(config.limits.keep_alive_s),
        timeout_graceful_shutdown=math.ceil(config.drain_s),
    )


class Server(uvicorn.Server):
    """uvicorn's server, but a signal starts a graceful shutdown that ends with exit status 0.

    On the signal the service becomes unready. Until the admitted requests are finished, or `drain_s` seconds
    have passed, new connections are accepted, and their requests get the problem `not_ready`.

    Args:
        config: uvicorn's
        on_listening: called once connections are accepted
        service: the service of the application
        log: gets a warning when keys cannot be reloaded
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_listening: Callable[[], None],
        service: ScoringService,
        log: Log,
    ) -> None:
        super().__init__(config)
        self._on_listening, self._service, self._log = on_listening, service, log
        self._drain_until_s = math.inf
        self._reload_requested = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen and call `on_listening`."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        """Check for the end of a shutdown and for a requested reload; called ten times a second."""
        draining = self._drain_until_s < math.inf
        if draining and (self._service.admission.idle or time.monotonic() > self._drain_until_s):
            self.should_exit = True
        if self._reload_requested:
            self._reload_requested = False
            self._reload_keys()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections, within the time that is left for the shutdown."""
        left_s = min(self._drain_until_s - time.monotonic(), self._service.config.drain_s)
        self.config.timeout_graceful_shutdown = math.ceil(max(left_s, _MIN_SHUTDOWN_S))
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving; uvicorn's own version raises them again, which kills the process."""
        handlers = {
            signal.SIGTERM: self._on_signal,
            signal.SIGINT: self._on_signal,
            signal.SIGHUP: self._on_hangup,
        }
        if threading.current_thread() is not threading.main_thread():  # Python allows it there only
            yield
            return
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: Any) -> None:
        self._service.stop_accepting()
        repeated = self._drain_until_s < math.inf
        self._drain_until_s = min(self._drain_until_s, time.monotonic() + self._service.config.drain_s)
        # A second Ctrl-C does not wait for the admitted requests.
        if repeated and number == signal.SIGINT:
            self.force_exit = self.should_exit = True

    def _on_hangup(self, _: int, __: Any) -> None:
        # Not reloaded here: the handler may have interrupted the log, whose lock a warning would wait for.
        self._reload_requested = True

    def _reload_keys(self) -> None:
        keys: Keyring | None = self.config.app.state.keys  # type: ignore[union-attr]  # our application
        if keys is None:
            self._log.warning("there is no keys file to reload; see auth.keys")
        else:
            keys.reload()


# Connections ------------------------------------------------------------------------------------------


def connection_class(limits: Limits, on_refusal: Callable[[int, str], None]) -> type[Connection]:
    """Return the protocol class of one server, for uvicorn's option `http`.

    Args:
        limits: of the service
        on_refusal: called with status and problem code of bytes that never become a request
    """
    attributes: dict[str, Any] = {
        "limits": limits,
        "max_connections": _raise_file_limit(limits.max_connections),
        "on_refusal": staticmethod(on_refusal),
        "idle": {},
    }
    return type("ServiceConnection", (Connection,), attributes)


class Connection(H11Protocol):
    """One connection; the class attributes are shared by the connections of a server."""

    limits: ClassVar[Limits]
    max_connections: ClassVar[int]
    on_refusal: Callable[[int, str], None]
    #: Connections without a request in progress, the longest idle first.
    idle: ClassVar[dict[Connection, None]]

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Accept a connection; if there are too many, close an idle one or refuse this one."""
        super().connection_made(transport)
        self._timer: TimerHandle | None = None
        self._refused = len(self.connections) > self.max_connections and not self._close_longest_idle()
        if self._refused:
            # Refused on its first bytes: if they were unread at the close, the response would be lost.
            self._set_timer(_REFUSED_TIMEOUT_S)
            return
        self._mark_idle()
        self._set_timer(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a closed connection."""
        self.idle.pop(self, None)
        self._set_timer(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process bytes of the client; the first bytes of a request start the timeout of its headers."""
        if self.transport.is_closing():
            return
        if self._refused:
            self._refuse(ProblemError("too_many_connections", "too many clients are connected", (), 1))
            return
        if self in self.idle and self._timer is None:
            self._set_timer(self.limits.header_timeout_s)
        super().data_received(data)

    def handle_events(self) -> None:
        """Process parsed events as uvicorn does, and note when a request has started."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self.idle.pop(self, None)
            self._set_timer(None)
            # With two lengths, a proxy before us may have seen another end of this body than we do, and the
            # bytes after it may be another client's (RFC 9112, section 6.1).
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in self.headers}:
                self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """Await the next request; the rest of an unread body is read for some seconds at most."""
        unread_body = self.conn.their_state is h11.SEND_BODY
        finished = self.cycle
        super().on_response_complete()
        if self.cycle is finished and not self.transport.is_closing():
            self._mark_idle()
            partial_headers = bool(self.conn.trailing_data[0])
            # Between two requests the timer is uvicorn's.
            self._set_timer(
                _LINGER_S if unread_body else self.limits.header_timeout_s if partial_headers else None
            )

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's message
        """Refuse bytes that are not HTTP."""
        self._refuse(ProblemError("malformed_request", "not a valid HTTP/1.1 request; check the client"))

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, also if its client does not read the last response."""
        self._close()

    def _mark_idle(self) -> None:
        self.idle.pop(self, None)
        self.idle[self] = None

    def _set_timer(self, seconds: float | None) -> None:
        """Close the connection after so many seconds; None for never."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._close)

    def _close(self) -> None:
        self.idle.pop(self, None)
        if not self.transport.is_closing():
            self.transport.close()
            # `close` waits until everything is written: for ever if the client does not read.
            self.loop.call_later(_LINGER_S, self.transport.abort)

    def _close_longest_idle(self) -> bool:
        longest = next(iter(self.idle), None)
        if longest is not None:
            longest._close()
        return longest is not None

    def _refuse(self, error: ProblemError) -> None:
        """Send a problem and close the connection."""
        self.on_refusal(int(error.status), error.code)
        body = encode(error.to_problem(uuid.uuid4().hex), JSON)
        headers = [("content-type", PROBLEM), ("content-length", str(len(body))), ("connection", "close")]
        if error.retry_after_s is not None:
            headers.append(("retry-after", str(error.retry_after_s)))
        reason = _REASON_PHRASES[error.status]
        response = h11.Response(status_code=error.status, headers=headers, reason=reason)
        with suppress(h11.LocalProtocolError):  # a response has been started already
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._close()


def _raise_file_limit(connections: int) -> int:
    """Raise the process's limit of open files as far as needed; return how many connections it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _RESERVED_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return max(1, min(connections, soft - _RESERVED_FILES))


# Address ----------------------------------------------------------------------------------------------


def _check_exposure(config: ServiceConfig) -> None:
    auth = config.auth
    if auth.keys is None and not auth.allow_anonymous and not _is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host!r} is reachable from other machines, but the service has no API keys: "
            "create one with reward-service keys new NAME --file /PATH/keys.yaml and set "
            "auth.keys=/PATH/keys.yaml, use --host 127.0.0.1, "
            "or set auth.allow_anonymous=true if the network is trusted"
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
            "choose another --host or another --port (0 selects a free one)"
        ) from None
    return listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
