"""Life cycle of the log and the tracer, and the forced exit of a process that hangs.

This module needs neither torch nor a web server.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from reward_service.config import ServiceConfig
from reward_service.observability.logs import Log, Sink, open_log, redirect_library_logs
from reward_service.observability.tracing import Tracer, open_tracer

#: Name that the scheduler gives to the thread that runs the models.
DEVICE_THREAD = "device"
_FLUSH_TIMEOUT_S = 2.0
_EXIT_WITHIN_S = 5.0


@dataclass(frozen=True)
class Telemetry:
    """Log of a running service, the sink that writes it, and the tracer if tracing is configured."""

    log: Log
    sink: Sink
    tracer: Tracer | None


@contextmanager
def open_telemetry(config: ServiceConfig) -> Iterator[Telemetry]:
    """Open the log and the tracer of a configuration; flush both at the end, for a few seconds at most."""
    sink = Sink()
    log = open_log(sink, config.logs.format)
    with redirect_library_logs(log):
        tracer = open_tracer(config.tracing.endpoint)
        try:
            yield Telemetry(log, sink, tracer)
        finally:
            if tracer:
                tracer.close()
            sink.flush(_FLUSH_TIMEOUT_S)


def exit_soon(reason: str, log: Log, within_s: float = _EXIT_WITHIN_S) -> None:
    """Make the process exit with status 1 unless it has exited by itself in time.

    A hanging device can block an orderly exit for ever: in a thread, in a destructor, or while the
    interpreter shuts down. The watchdog of `faulthandler` depends on none of them. Its traceback goes to
    /dev/null, since a stderr that nobody reads would block even the watchdog.

    Args:
        reason: the failure, for the log
        log: gets the stack of the device's thread and the reason
        within_s: seconds until the forced exit
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if names.get(ident) == DEVICE_THREAD:
            log.critical("stack of the device's thread", stack="".join(traceback.format_stack(frame)))
    log.critical(f"{reason}; the process exits so that it can be restarted")
    faulthandler.dump_traceback_later(within_s, exit=True, file=os.open(os.devnull, os.O_WRONLY))
