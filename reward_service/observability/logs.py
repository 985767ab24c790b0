"""The log on stderr: a line of JSON for each event, or plain text on a terminal.

What can be logged is what is passed by name; prompts, images and keys never are. A thread of its own
writes: a full disk, a closed stderr or a reader that has stopped costs lines, which are counted, and nothing
else. No torch, no web.
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

_MOST_WAITING = 10_000


def write_stderr(line: bytes) -> None:
    """Write to the process's stderr, unbuffered: nothing is left to fail at the exit.

    Raises:
        OSError: it is full or closed
    """
    if sys.stderr is None:  # closed before the start: by now 2 may be the number of a socket
        raise OSError(errno.EBADF, "stderr is closed")
    while line:
        line = line[os.write(2, line) :]


class Sink:
    """Takes lines without waiting, in any thread or signal handler; writes them on a thread of its own."""

    def __init__(self, write: Callable[[bytes], object] = write_stderr, most: int = _MOST_WAITING) -> None:
        self._write, self._most = write, most
        # The one queue whose put may interrupt another put of the same thread.
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self.lost = 0
        threading.Thread(target=self._drain, name="log", daemon=True).start()

    def __call__(self, line: str) -> None:
        """Have a line written, or count it as lost if too many wait."""
        if self._lines.qsize() >= self._most:
            self.lost += 1
        else:
            self._lines.put(line)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything so far is written; whether it was."""
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
    """A log that writes to a sink.

    Args:
        form: `auto` is text if stderr is a terminal
    """
    as_text = form == "text" or (form == "auto" and sys.stderr is not None and sys.stderr.isatty())
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    log: Log = structlog.wrap_logger(
        _Lines(sink),
        processors=[
            structlog.processors.add_log_level,
            # A plain traceback: one with local variables would show what was sent.
            structlog.processors.format_exc_info,
            *([_text] if as_text else [stamp, _known, structlog.processors.JSONRenderer()]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    return log


@contextmanager
def libraries_log_to(log: Log) -> Iterator[None]:
    """Let what everybody else logs at level warning or above, or warns of, come out of this log.

    Except Pillow's warnings: they tell what is odd about a caller's image, and of each new one Python keeps
    the words for ever.
    """
    root, handler = logging.getLogger(), _FromLogging(log)
    root.addHandler(handler)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # Their usual way is straight to stderr, where a reader that has stopped would hold them up.
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)


class _FromLogging(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        extra = {"exc_info": record.exc_info} if record.exc_info else {}
        self._log.log(record.levelno, record.getMessage(), logger=record.name, **extra)


class _Lines:
    """What structlog writes to: the same for every level."""

    def __init__(self, sink: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = sink
        self.msg = self.log = sink


def _known(_: Any, __: str, event: Any) -> Any:
    """What everybody looks for first, then the rest, without what is unknown."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event")}
    return first | {key: value for key, value in event.items() if value is not None}


def _text(_: Any, level: str, event: Any) -> str:
    """`event key=value`; the level only where it says more than that something happened."""
    del event["level"]
    message, traceback = event.pop("event"), event.pop("exception", None)
    mark = "" if level == "info" else f"{level}: "
    facts = "".join(f" {key}={_shown(value)}" for key, value in event.items() if value is not None)
    line = f"{mark}{_shown(message)}{facts}"
    return f"{line}\n{traceback}" if traceback else line


def _shown(value: object) -> str:
    """On one line, so that nobody can write a line of his own."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if text.isprintable() else ascii(text)[1:-1]
