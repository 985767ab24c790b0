"""Signals while a program starts, before its heavy imports, and while it ends; standard library only."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the process at once and in silence; an ignored signal stays ignored.

    For the time of the imports, which take seconds and can be interrupted anywhere. Without a handler,
    process 1 of a container would not even receive SIGTERM.
    """
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def interrupt_on_ctrl_c() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, for commands that have something to clean up."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(status: int) -> NoReturn:
    """End the process without Python's own shutdown.

    That waits for threads that cannot be stopped, aborts those that compute, and is killed by another Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, a full disk, or none at all
            stream.flush()
    os._exit(status)


def _exit(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)
