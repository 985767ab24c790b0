"""The log: what a line is, and that no trouble with it reaches the service."""

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

from reward_service.observability.logs import Log, Sink, libraries_log_to, open_log

WAIT_S = 10.0


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def log(lines: list[str]) -> Log:
    return open_log(lines.append, "json")


@pytest.fixture
def libraries(log: Log) -> Iterator[None]:
    with libraries_log_to(log):
        yield


def test_a_json_line_is_an_object_with_time_and_level(log: Log, lines: list[str]) -> None:
    """One line each, whatever it holds; machines can read every one."""
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


def test_text_is_for_people_and_cannot_be_forged(lines: list[str]) -> None:
    """The event first, what is unknown left out, and no value can begin a line of its own."""
    log = open_log(lines.append, "text")
    log.info("ready: 4 evaluators on cpu")
    log.error("request", id="x\nready: forged", pairs=3, client=None, queue_ms=0.25)
    assert lines == [
        "ready: 4 evaluators on cpu",
        "error: request id=x\\nready: forged pairs=3 queue_ms=0.25",
    ]


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_shows_no_variables(form: str, lines: list[str]) -> None:
    """What was being worked on, such as a prompt, isn't in the log; where it failed is."""
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
def test_libraries_come_out_of_the_same_log(lines: list[str]) -> None:
    """uvicorn's and the exporter's warnings are lines like ours; their chatter is left out."""
    logging.getLogger("uvicorn.error").warning("invalid %s", "request")
    logging.getLogger("opentelemetry").info("chatter")
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


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    """Nobody who logs sees the error; lines are counted as lost, and come again when there is room."""
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


def test_a_reader_that_has_stopped_holds_up_nobody() -> None:
    """A pipe that isn't read fills up; who logs never waits for it, and memory stays bounded."""
    go_on = threading.Event()
    sink = Sink(lambda _: go_on.wait(WAIT_S), most=10)
    for number in range(100):
        sink(f"line {number}")
    assert sink.lost >= 80
    assert not sink.flush(0.01)
    go_on.set()
    assert sink.flush(WAIT_S)


@pytest.mark.parametrize("stderr", ["/dev/full", "closed"])
def test_a_process_without_a_stderr_ends_well(stderr: str) -> None:
    """Nothing is left in a buffer that fails at the exit, which would change the status."""
    program = (
        "from reward_service.observability.logs import Sink, open_log; sink = Sink(); "
        "open_log(sink).info('x'); "
        "sink.flush(5); print(sink.lost)"
    )
    redirect = "2>&-" if stderr == "closed" else f"2>{stderr}"
    command = ["sh", "-c", f'exec "{sys.executable}" -c "{program}" {redirect}']
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"1\n")


def test_warnings_come_out_of_the_log() -> None:
    """Never straight to stderr, where they could be held up; Pillow's, about images, not at all."""
    lines: list[str] = []
    with libraries_log_to(open_log(lines.append, "json")):
        for number in range(3):
            warnings.warn_explicit(f"tag {number}", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin")
        assert lines == []
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("something is deprecated", UserWarning, stacklevel=1)
    (line,) = lines
    assert "something is deprecated" in json.loads(line)["event"]
