"""Log: format of its lines, and isolation of the service from a failing sink."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from reward_service.observability.logs import Log, Sink, open_log, redirect_library_logs

WAIT_S = 10.0


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def log(lines: list[str]) -> Log:
    return open_log(lines.append, "json")


@pytest.fixture
def libraries(log: Log) -> Iterator[None]:
    with redirect_library_logs(log):
        yield


def test_json_line_has_time_and_level(log: Log, lines: list[str]) -> None:
    """Each event is one line of valid JSON, whatever its values contain."""
    log.info("ready: 4 evaluators on cpu")
    log.warning("request", id="a\nb\ud800", status=500, queue_ms=1.5, trace_id=None)
    first, second = map(json.loads, lines)
    assert first["event"] == "ready: 4 evaluators on cpu"
    assert first["level"] == "info"
    assert first["timestamp"].endswith("Z")
    assert second["level"] == "warning"
    assert second["id"] == "a\nb\ud800"
    assert second["queue_ms"] == 1.5
    assert "trace_id" not in second
    assert list(first) == ["timestamp", "level", "event"]
    assert not any("\n" in line for line in lines)


def test_text_line_cannot_be_forged(lines: list[str]) -> None:
    """The event comes first, None is left out, and no value can start a new line."""
    log = open_log(lines.append, "text")
    log.info("ready: 4 evaluators on cpu")
    log.error("request", id="x\nready: forged", pairs=3, client=None, queue_ms=0.25)
    assert lines == [
        "ready: 4 evaluators on cpu",
        "error: request id=x\\nready: forged pairs=3 queue_ms=0.25",
    ]


@pytest.mark.parametrize("form", ["json", "text"])
def test_traceback_shows_no_variables(form: str, lines: list[str]) -> None:
    """The log has the place of an error, but no local variable, such as a prompt."""
    log = open_log(lines.append, form)  # type: ignore[arg-type]

    def fail() -> None:
        prompt = "my " + "secret"
        raise ValueError(f"{len(prompt)} letters are wrong")

    try:
        fail()
    except ValueError:
        log.exception("scoring failed")
    (line,) = lines
    assert "9 letters are wrong" in line
    assert "test_logs.py" in line
    assert "my secret" not in line


@pytest.mark.usefixtures("libraries")
def test_library_warnings_are_redirected(lines: list[str]) -> None:
    """Warnings and errors of libraries become lines of the log; their info records are dropped."""
    logging.getLogger("uvicorn.error").warning("invalid %s", "request")
    logging.getLogger("opentelemetry").info("connected")
    try:
        raise RuntimeError("why")
    except RuntimeError:
        logging.getLogger("asyncio").exception("it failed")
    first, second = map(json.loads, lines)
    assert (first["event"], first["logger"], first["level"]) == (
        "invalid request",
        "uvicorn.error",
        "warning",
    )
    assert "RuntimeError: why" in second["exception"]


def test_full_disk_loses_lines_only() -> None:
    """Callers get no error; lost lines are counted, and writing resumes when there is room."""
    written: list[bytes] = []
    full = True

    def write(line: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(line)

    sink = Sink(write)
    log = open_log(sink, "text")
    log.info("one")
    log.info("two")
    assert sink.flush(WAIT_S)
    full = False
    log.info("three")
    assert sink.flush(WAIT_S)
    assert (sink.lost, written) == (2, [b"three\n"])


def test_stalled_reader_blocks_no_caller() -> None:
    """If the pipe is not read, logging does not wait, and the queue stays bounded."""
    resume = threading.Event()
    sink = Sink(lambda _: resume.wait(WAIT_S), max_lines=10)
    for number in range(100):
        sink(f"line {number}")
    assert sink.lost >= 80
    assert not sink.flush(0.01)
    resume.set()
    assert sink.flush(WAIT_S)


@pytest.mark.parametrize("stderr", ["/dev/full", "closed"])
def test_process_without_stderr_exits_normally(stderr: str) -> None:
    """No buffer is left whose flush fails at exit, which would change the exit status."""
    program = (
        "from reward_service.observability.logs import Sink, open_log; sink = Sink(); "
        "open_log(sink).info('x'); "
        "sink.flush(5); print(sink.lost)"
    )
    redirect = "2>&-" if stderr == "closed" else f"2>{stderr}"
    command = ["sh", "-c", f'exec "{sys.executable}" -c "{program}" {redirect}']
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"1\n")


def test_python_warnings_are_redirected() -> None:
    """They go to the log and not to stderr, where they could block; Pillow's are dropped."""
    lines: list[str] = []
    with redirect_library_logs(open_log(lines.append, "json")):
        for number in range(3):
            warnings.warn_explicit(f"tag {number}", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin")
        assert lines == []
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("something is deprecated", UserWarning, stacklevel=1)
    (line,) = lines
    assert "something is deprecated" in json.loads(line)["event"]
