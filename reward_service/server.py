"""Run the application: a socket that is known before anything is promised, and an orderly end."""

from __future__ import annotations

import ipaddress
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from reward_service.app import create_app
from reward_service.config import ServiceConfig
from reward_service.connections import connections
from reward_service.judge import Judge
from reward_service.keys import Keyring
from reward_service.logs import Log
from reward_service.reporting import Reporting, end_soon, reporting
from reward_service.settings import ConfigError, one_line

_BACKLOG = 2048
_LAST_ANSWERS_S = 2.0


def serve(config: ServiceConfig, say: Callable[[str], None]) -> str | None:
    """Serve until SIGTERM or SIGINT; then finish what was admitted. SIGHUP reads the keys again at once.

    :param say: gets ``listening on http://HOST:PORT`` once connections are taken
    :returns: None after an orderly end, else one line that says why nothing can be scored
    :raises ConfigError: the address cannot be used, or may not be without a key
    """
    _check_exposure(config)
    with reporting(config) as report, _listen(config.host, config.port) as listener:
        return _serve(config, say, report, listener)


def _serve(
    config: ServiceConfig, say: Callable[[str], None], report: Reporting, listener: socket.socket
) -> str | None:
    failures: list[str] = []

    def fail(message: str) -> None:
        if judge.served:
            end_soon(message, report.log)
        failures.append(message)
        server.should_exit = True

    def listening() -> None:
        # A full disk behind stdout is no reason not to serve.
        with suppress(OSError, ValueError):
            say(f"listening on {_address(config.host, listener.getsockname()[1])}")

    judge = Judge(
        config,
        on_ready=lambda detail: report.log.info(f"ready: {detail}"),
        on_failure=fail,
        on_notice=report.log.warning,
    )
    judge.metrics.lost_log_lines.set_function(lambda: report.sink.lost)
    app = create_app(config, judge, report.log, report.tracer)
    server = Server(options(app, config), listening, judge, report.log)
    server.run(sockets=[listener])
    return failures[0] if failures else None


def options(app: FastAPI, config: ServiceConfig) -> uvicorn.Config:
    """What uvicorn is told."""
    return uvicorn.Config(
        app,
        http=connections(config.limits, partial(app.state.judge.metrics.on_answer, "")),
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
        judge: Judge,
        log: Log,
    ) -> None:
        super().__init__(config)
        self._on_listening, self._judge, self._log = on_listening, judge, log
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
