"""HTTP server: graceful shutdown around uvicorn.

`Server` turns a signal into a graceful shutdown with exit status 0; `addresses` has its listening socket and
`connections` its protocol.
"""

from __future__ import annotations

import asyncio
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

from reward_service.config import ServiceConfig
from reward_service.observability.logs import Log
from reward_service.observability.telemetry import Telemetry, exit_soon, open_telemetry
from reward_service.runtime.process import freeze_objects
from reward_service.runtime.signals import leave
from reward_service.scoring.auth import Keyring
from reward_service.scoring.service import ScoringService
from reward_service.web.addresses import BACKLOG, check_exposure, listen, resolve, url
from reward_service.web.app import create_app
from reward_service.web.connections import connection_class
from reward_service.web.open_files import file_limit_warning

_MIN_SHUTDOWN_S = 2.0
_INTERRUPTED_S = 1.0
_FLUSH_TIMEOUT_S = 1.0
_POLL_S = 0.1
_ACCEPTS_PER_TURN = 16
_INTERRUPTED = 128 + signal.SIGINT


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
    address = resolve(config.host, config.port)
    check_exposure(config, address)
    with open_telemetry(config) as telemetry, listen(address) as listener:
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
            say(f"listening on {url(config.host, listener.getsockname()[1])}")

    def on_ready(detail: str) -> None:
        freeze_objects()
        telemetry.log.info(f"ready: {detail}")

    service = ScoringService(
        config,
        on_ready=on_ready,
        on_failure=on_failure,
        on_warning=telemetry.log.warning,
    )
    service.metrics.lost_log_lines.set_function(lambda: telemetry.sink.lost)
    if warning := file_limit_warning(config.limits.max_connections):
        telemetry.log.warning(warning)
    app = create_app(config, service, telemetry.log, telemetry.tracer)
    server = Server(
        uvicorn_config(app, config), on_listening, service, telemetry.log, partial(_exit_now, telemetry)
    )
    server.run(sockets=[listener])
    return failures[0] if failures else None


def _exit_now(telemetry: Telemetry) -> None:
    """Write what is left of the log and end the process."""
    telemetry.sink.flush(_FLUSH_TIMEOUT_S)
    leave(_INTERRUPTED)


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
        # asyncio accepts that many connections before anything else gets its turn; see `Server.startup`.
        backlog=_ACCEPTS_PER_TURN,
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
        exit_now: ends the process after a second Ctrl-C
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_listening: Callable[[], None],
        service: ScoringService,
        log: Log,
        exit_now: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._on_listening, self._service, self._log, self._exit_now = on_listening, service, log, exit_now
        self._drain_until_s = math.inf
        self._reload_requested = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections and call `on_listening`."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio has set it to the number of accepts per turn
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
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not (ending.done() or self.force_exit):
            await asyncio.wait({ending}, timeout=_POLL_S)
        if self.force_exit:
            await self._cancel_requests()
            self._exit_now()
        await ending

    async def _cancel_requests(self) -> None:
        """Give unfinished requests a moment to send their responses."""
        tasks = set(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_INTERRUPTED_S)

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
