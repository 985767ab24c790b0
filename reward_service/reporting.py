"""What a running service reports to, from its start to its end, expected or not. No torch, no web."""

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
from reward_service.logs import Log, Sink, libraries_log_to, open_log
from reward_service.tracing import Tracer, open_tracer

#: The scheduler's name for the thread that runs the models.
DEVICE_THREAD = "device"
_LAST_LINES_S = 2.0
_LAST_WORDS_S = 5.0


@dataclass(frozen=True)
class Reporting:
    """The log, what writes it, and the tracer if spans are wanted."""

    log: Log
    sink: Sink
    tracer: Tracer | None


@contextmanager
def reporting(config: ServiceConfig) -> Iterator[Reporting]:
    """Log and trace as configured; what is left is written at the end, for some seconds at most."""
    sink = Sink()
    log = open_log(sink, config.logs.format)
    with libraries_log_to(log):
        tracer = open_tracer(config.tracing.endpoint)
        try:
            yield Reporting(log, sink, tracer)
        finally:
            if tracer:
                tracer.close()
            sink.flush(_LAST_LINES_S)


def end_soon(reason: str, log: Log, within_s: float = _LAST_WORDS_S) -> None:
    """See to it that the process is over soon, with status 1 if it hasn't ended by itself until then.

    A device that hangs can hold up an orderly end for ever: in a thread, in a destructor, while the
    interpreter shuts down. faulthandler's watchdog needs none of them; it writes nothing, for a log that
    nobody reads would hold up even that.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if names.get(ident) == DEVICE_THREAD:
            log.critical("this is where the device's thread is", stack="".join(traceback.format_stack(frame)))
    log.critical(f"{reason}; the process ends so that it can be started anew")
    faulthandler.dump_traceback_later(within_s, exit=True, file=os.open(os.devnull, os.O_WRONLY))
