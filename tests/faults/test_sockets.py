"""Callers who leave, lie, dawdle or speak another tongue, on real sockets beside one who does not."""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from tests.faults.conftest import LIMITS, Service
from tests.support.faults.bystander import Bystander, undisturbed
from tests.support.faults.calling import OK, Told, closed, connect, head, heard, request_of
from tests.support.service.serving import wait_until

BODY = request_of("x")
SIZE = len(BODY)
CHUNKED = "Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (SIZE, BODY)
NO_REQUEST, NO_BODY, LATE = (400, "malformed_request"), (400, "malformed_body"), (408, "body_timeout")
NOT_HERE = (405, "method_not_allowed")
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(autouse=True, scope="module")
def bystander(running: Service, truth: Any) -> Iterator[Bystander]:
    """One for all of them."""
    with undisturbed(running.url, truth) as one:
        yield one


LIES: dict[str, tuple[bytes, Told]] = {
    "too long": (head(SIZE + 1) + BODY, LATE),
    "too short": (head(10) + BODY, NO_BODY),
    "negative": (head(-1) + BODY, NO_REQUEST),
    "with a sign": (head(f"+{SIZE}") + BODY, NO_REQUEST),
    "empty": (head("") + BODY, NO_REQUEST),
    "hexadecimal": (head(hex(SIZE)) + BODY, NO_REQUEST),
    "two that differ": (head(SIZE, "Content-Length: 3\r\n") + BODY, NO_REQUEST),
    "a list that differs": (head(f"{SIZE}, 3") + BODY, NO_REQUEST),
    "beyond every limit": (head("9" * 40) + BODY, NO_REQUEST),
    "too large": (head(LIMITS.max_body_bytes + 1) + BODY, (413, "body_too_large")),
    "none": (head(None) + BODY, NO_BODY),
    "a chunk's size that is none": (head(None, CHUNKED) + b"zz\r\n" + BODY, NO_REQUEST),
    "a negative chunk": (head(None, CHUNKED) + b"-5\r\n" + BODY, NO_REQUEST),
    "a chunk of 2^80": (head(None, CHUNKED) + b"f" * 20 + b"\r\n" + BODY, LATE),
    "a chunk that goes on": (head(None, CHUNKED) + b"%x\r\n%sXX0\r\n\r\n" % (SIZE, BODY), NO_REQUEST),
    "chunks without an end": (head(None, CHUNKED) + CHUNKS[:-5], LATE),
    "an unknown coding": (head(None, "Transfer-Encoding: gzip, chunked\r\n") + CHUNKS, NO_REQUEST),
}


@pytest.mark.parametrize("name", LIES)
def test_a_length_that_lies(service: Service, name: str) -> None:
    """Refused or given up in time, never read as some other number; what it held is free again."""
    sent, expected = LIES[name]
    with closing(connect(service.url)) as caller:
        caller.sendall(sent)
        assert heard(caller) == expected
    assert service.nothing_left()


def test_two_lengths_at_once(service: Service) -> None:
    """Chunked counts, and the connection ends: what follows may be another caller's, smuggled in."""
    with closing(connect(service.url)) as caller:
        caller.sendall(head(3, CHUNKED) + CHUNKS + LIVE)
        assert heard(caller) == OK
        assert closed(caller)


def abort(caller: socket.socket) -> None:
    """Leave with a reset, as a process that was killed does."""
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    caller.close()


@pytest.mark.parametrize("leave", [socket.socket.close, abort])
@pytest.mark.parametrize("part", [0, 1, SIZE // 2, SIZE - 1])
def test_half_a_body_and_gone(service: Service, leave: Any, part: int) -> None:
    """What it held is free at once."""
    caller = connect(service.url)
    caller.sendall(head(SIZE) + BODY[:part])
    time.sleep(0.02)
    leave(caller)
    assert service.nothing_left()


@pytest.mark.parametrize("leave", [socket.socket.close, abort])
def test_gone_before_its_turn(service: Service, leave: Any) -> None:
    """Never scored; who waits behind it is."""
    service.device.free.clear()
    wait_until(lambda: service.queued or service.device.seen, "a batch under way")
    gone, stays = connect(service.url), connect(service.url)
    for caller, prompt in ((gone, "gone"), (stays, "stays")):
        sent = request_of(prompt, prompt)
        caller.sendall(head(len(sent)) + sent)
    with closing(stays):
        wait_until(lambda: service.queued >= 4, "both in the queue")
        before = service.queued
        leave(gone)
        wait_until(lambda: service.queued <= before - 2, "its leaving")
        service.device.free.set()
        assert heard(stays) == OK
    assert "gone" not in service.device.seen
    assert "stays" in service.device.seen


@pytest.mark.parametrize("leave", [socket.socket.close, abort])
def test_gone_while_it_is_scored(service: Service, leave: Any) -> None:
    """Its batch is finished for the others."""
    service.device.free.clear()
    caller = connect(service.url)
    sent = request_of("under way")
    caller.sendall(head(len(sent)) + sent)
    # Held before the device, the batch that has it may be the next: let single ones pass until it is seen.
    while "under way" not in service.device.seen:
        service.device.free.set()
        time.sleep(0.001)
        service.device.free.clear()
    leave(caller)
    service.device.free.set()


@pytest.mark.parametrize("leave", [socket.socket.close, abort])
def test_gone_after_it_was_scored(service: Service, leave: Any) -> None:
    """An answer that nobody reads holds up nobody."""
    for _ in range(5):
        caller = connect(service.url)
        caller.sendall(head(SIZE) + BODY)
        wait_until(lambda: "x" in service.device.seen, "its batch")
        leave(caller)


def test_a_slow_body(service: Service) -> None:
    """A byte at a time: 408 when its time is over, however lively it is."""
    with ExitStack() as stack:
        callers = [stack.enter_context(closing(connect(service.url))) for _ in range(20)]
        for caller in callers:
            caller.sendall(head(SIZE))
        for place in range(4):
            time.sleep(0.1)
            for caller in callers:
                caller.sendall(BODY[place : place + 1])
        assert [heard(caller) for caller in callers] == [LATE] * 20
    assert service.nothing_left()


def test_a_slow_head(service: Service) -> None:
    """Closed when its time is over."""
    with closing(connect(service.url)) as caller:
        for place in range(10):
            caller.sendall(head(SIZE)[place : place + 1])
            time.sleep(0.05)
        assert closed(caller)


def test_answers_that_nobody_reads(service: Service) -> None:
    """A caller who pipelines and never reads fills his own buffers and nobody's memory."""
    caller = connect(service.url)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.setblocking(False)
    ask = b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 100
    sent, until = 0, time.monotonic() + 1.0
    while time.monotonic() < until:
        try:
            sent += caller.send(ask)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    caller.close()
    assert sent < 2**25


SPOKEN: dict[str, tuple[bytes, Told, bool]] = {
    "HTTP/1.0": (head(SIZE, version="1.0") + BODY, OK, True),
    "HTTP/2 from the start": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (404, "not_found"), True),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600), NO_REQUEST, True),
    "nonsense": (bytes(range(256)) * 8, NO_REQUEST, True),
    "a head of 100 KB": (head(SIZE, "X-A: " + "b" * 200_000 + "\r\n") + BODY, NO_REQUEST, True),
    "a head of 20,000 lines": (
        head(SIZE, "".join(f"X-{i}: bbbb\r\n" for i in range(20_000))) + BODY, NO_REQUEST, True),
    "a header with a zero byte": (head(SIZE, "X-A: b\0c\r\n") + BODY, NO_REQUEST, True),
    "two hosts": (head(SIZE, "Host: y\r\n") + BODY, NO_REQUEST, True),
    "a space before the colon": (head(SIZE, "Content-Length : 3\r\n") + BODY, NO_REQUEST, True),
    "OPTIONS": (head(0, method="OPTIONS"), NOT_HERE, False),
    "TRACE": (head(0, method="TRACE"), NOT_HERE, False),
    "PUT": (head(SIZE, method="PUT") + BODY, NOT_HERE, False),
    "a method of its own": (head(0, method="BREW"), NOT_HERE, False),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", (404, "not_found"), False),
    "a websocket": (
        LIVE[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        OK, False),
    "a way out of the folder": (
        b"GET /page/%2e%2e/%2e%2e/pyproject.toml HTTP/1.1\r\nHost: x\r\n\r\n", (404, "not_found"), False),
    "an address of 60 KB": (
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", (404, "not_found"), False),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOKEN)
def test_another_tongue(service: Service, name: str) -> None:
    """A documented answer, and the connection ends where nothing sensible can follow."""
    sent, expected, ends = SPOKEN[name]
    with closing(connect(service.url)) as caller:
        try:
            caller.sendall(sent)
        except OSError:  # refused before all of it was sent
            assert ends
        assert heard(caller) == expected
        if ends:
            assert closed(caller)
        else:
            caller.sendall(LIVE)
            assert heard(caller, "GET") == OK


def test_head_has_no_body(service: Service) -> None:
    """As GET's answer, without its body; where GET is not, it is not either."""
    for path, status in (("/health/live", 200), ("/v1/score", 405)):
        answer = httpx.head(f"{service.url}{path}")
        assert (answer.status_code, answer.content) == (status, b"")
        assert int(answer.headers["content-length"]) > 0


def test_pipelining(service: Service) -> None:
    """Requests sent without waiting are answered one by one, in their order; the bad one spoils no other."""
    with closing(connect(service.url)) as caller:
        bodies = [BODY, b"[]", BODY]
        caller.sendall(
            b"".join(head(len(it)) + it for it in bodies)
            + LIVE.replace(b"x\r\n", b"x\r\nConnection: close\r\n", 1)
        )
        received = b""
        while piece := caller.recv(65536):
            received += piece
    statuses = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 422, 200, 200]


IDLE = """
import socket, sys
callers = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60) for _ in range(2000)]
print("connected", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
def test_two_thousand_idle_connections(service: Service, bystander: Bystander) -> None:
    """They are held or let go, and nobody who asks notices; from a process of their own."""
    needed, (_, hard) = 2500, resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"at most {hard} open files are allowed here; this needs {needed}")
    command = [
        sys.executable,
        "-c",
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({needed}, {hard}))\n{IDLE}",
    ]
    port = service.url.rpartition(":")[2]
    process = subprocess.Popen(
        [*command, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"connected\n"
        bystander.again(10)
        assert httpx.post(
            f"{service.url}/score", content=BODY, headers={"Content-Type": "application/json"}, timeout=30
        ).is_success
    finally:
        process.communicate(b"\n", timeout=30)
    bystander.again(5)
