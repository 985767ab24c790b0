"""Structured log on stderr: one JSON object per line, or plain text on a terminal.

Only values passed by name are logged; prompts, images and keys never are. A separate thread writes the lines:
a full disk, a closed stderr or a stalled reader costs lines, which are counted, and nothing else. This module
needs neither torch nor a web server.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import structlog

Log: TypeAlias = structlog.typing.FilteringBoundLogger
Format: TypeAlias = Literal["auto", "json", "text"]

_MAX_QUEUED_LINES = 10_000


def write_stderr(line: bytes) -> None:
    """Write to the process's stderr, unbuffered: no buffer is left whose flush could fail at exit.

    Raises:
        OSError: if stderr is full or closed
    """
    if sys.stderr is None:  # closed before the start: by now 2 may be the number of a socket
        raise OSError(errno.EBADF, "stderr is closed")
    while line:
        line = line[os.write(2, line) :]


class Sink:
    """Non-blocking line writer, for any thread or signal handler; a thread of its own does the writing.

    Args:
        write: writes one line with its line end
        max_lines: lines queued at most; further lines are lost

    Attributes:
        lost: number of lines that could not be written
    """

    def __init__(
        self, write: Callable[[bytes], object] = write_stderr, max_lines: int = _MAX_QUEUED_LINES
    ) -> None:
        self._write, self._max_lines = write, max_lines
        # The one queue whose put may interrupt another put of the same thread.
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self.lost = 0
        threading.Thread(target=self._drain, name="log", daemon=True).start()

    def __call__(self, line: str) -> None:
        """Queue a line, or count it as lost if the queue is full."""
        if self._lines.qsize() >= self._max_lines:
            self.lost += 1
        else:
            self._lines.put(line)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all lines queued so far are written; return whether they were within the timeout."""
        written = threading.Event()
        self._lines.put(written)
        return written.wait(timeout_s)

    def _drain(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            try:
                self._write(f"{line}\n".encode(errors="backslashreplace"))
            except (OSError, ValueError):
                self.lost += 1


def open_log(sink: Callable[[str], None], form: Format = "auto") -> Log:
    """Return a log that writes to a sink.

    Args:
        sink: gets each line, without line end
        form: `auto` is text if stderr is a terminal, else JSON
    """
    as_text = form == "text" or (form == "auto" and sys.stderr is not None and sys.stderr.isatty())
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    log: Log = structlog.wrap_logger(
        _SinkLogger(sink),
        processors=[
            structlog.processors.add_log_level,
            # A plain traceback: one with local variables would show what was sent.
            structlog.processors.format_exc_info,
            *([_as_text] if as_text else [stamp, _ordered, structlog.processors.JSONRenderer()]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    return log


@contextmanager
def redirect_library_logs(log: Log) -> Iterator[None]:
    """Redirect the libraries' log records of level warning or above, and Python's warnings, to this log.

    Pillow's warnings are dropped: they are about odd images of clients, and Python keeps the text of each new
    one in memory for ever.
    """
    root, handler = logging.getLogger(), _StandardLibraryHandler(log)
    root.addHandler(handler)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # By default they are written straight to stderr, where a stalled reader would block them.
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)


class _StandardLibraryHandler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        extra = {"exc_info": record.exc_info} if record.exc_info else {}
        self._log.log(record.levelno, record.getMessage(), logger=record.name, **extra)


class _SinkLogger:
    """Adapter from structlog's logger methods to a sink, the same for every level."""

    def __init__(self, sink: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = sink
        self.msg = self.log = sink


def _ordered(_: Any, __: str, event: Any) -> Any:
    """Put timestamp, level and event first; drop fields that are None."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return first | {key: value for key, value in event.items() if value is not None}


def _as_text(_: Any, level: str, event: Any) -> str:
    """Format as `event key=value`; the level is shown unless it is info."""
    del event["level"]
    message, traceback = event.pop("event"), event.pop("exception", None)
    prefix = "" if level == "info" else f"{level}: "
    fields = "".join(f" {key}={_printable(value)}" for key, value in event.items() if value is not None)
    line = f"{prefix}{_printable(message)}{fields}"
    return f"{line}\n{traceback}" if traceback else line


def _printable(value: object) -> str:
    """Return a value as text on one line, so that no value can forge a line of the log."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text.isprintable() else ascii(text)[1:-1]
