"""Misbehaving clients on real sockets: disconnects, wrong lengths, slow data, other protocols."""

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

from tests.faults.conftest import LIMITS, RunningService
from tests.support.faults.bystander import Bystander, undisturbed
from tests.support.faults.requests import OK, Outcome, connect, head, is_closed, receive_outcome, request_of
from tests.support.service.serving import wait_until

BODY = request_of("x")
SIZE = len(BODY)
CHUNKED = "Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (SIZE, BODY)
NO_REQUEST, NO_BODY, LATE = (400, "malformed_request"), (400, "malformed_body"), (408, "body_timeout")
NOT_HERE, LARGE_HEAD = (405, "method_not_allowed"), (431, "headers_too_large")
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(autouse=True, scope="module")
def bystander(running: RunningService, expected_scores: Any) -> Iterator[Bystander]:
    """One client for all tests."""
    with undisturbed(running.url, expected_scores) as one:
        yield one


WRONG_LENGTHS: dict[str, tuple[bytes, Outcome]] = {
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


@pytest.mark.parametrize("name", WRONG_LENGTHS)
def test_wrong_content_length(service: RunningService, name: str) -> None:
    """It is rejected or times out, is never read as some other number, and everything is released."""
    sent, expected = WRONG_LENGTHS[name]
    with closing(connect(service.url)) as client:
        client.sendall(sent)
        assert receive_outcome(client) == expected
    assert service.all_released()


def test_content_length_beside_chunks(service: RunningService) -> None:
    """The chunks count, and the connection is closed: what follows may be another client's request."""
    with closing(connect(service.url)) as client:
        client.sendall(head(3, CHUNKED) + CHUNKS + LIVE)
        assert receive_outcome(client) == OK
        assert is_closed(client)


def reset_connection(client: socket.socket) -> None:
    """Close with a reset, as a killed process does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("disconnect", [socket.socket.close, reset_connection])
@pytest.mark.parametrize("part", [0, 1, SIZE // 2, SIZE - 1])
def test_disconnect_in_the_body(service: RunningService, disconnect: Any, part: int) -> None:
    """The resources of the request are released at once."""
    client = connect(service.url)
    client.sendall(head(SIZE) + BODY[:part])
    time.sleep(0.02)
    disconnect(client)
    assert service.all_released()


@pytest.mark.parametrize("disconnect", [socket.socket.close, reset_connection])
def test_disconnect_while_queued(service: RunningService, disconnect: Any) -> None:
    """The request is never scored; the one behind it is."""
    service.device.free.clear()
    wait_until(lambda: service.queued_pairs or service.device.seen, "a batch under way")
    gone, stays = connect(service.url), connect(service.url)
    for client, prompt in ((gone, "gone"), (stays, "stays")):
        sent = request_of(prompt, prompt)
        client.sendall(head(len(sent)) + sent)
    with closing(stays):
        wait_until(lambda: service.queued_pairs >= 4, "both in the queue")
        before = service.queued_pairs
        disconnect(gone)
        wait_until(lambda: service.queued_pairs <= before - 2, "its removal")
        service.device.free.set()
        assert receive_outcome(stays) == OK
    assert "gone" not in service.device.seen
    assert "stays" in service.device.seen


@pytest.mark.parametrize("disconnect", [socket.socket.close, reset_connection])
def test_disconnect_while_scored(service: RunningService, disconnect: Any) -> None:
    """The batch is finished for the other requests."""
    service.device.free.clear()
    client = connect(service.url)
    sent = request_of("under way")
    client.sendall(head(len(sent)) + sent)
    # Held before the device, the batch that has it may be the next: let single ones pass until it is seen.
    while "under way" not in service.device.seen:
        service.device.free.set()
        time.sleep(0.001)
        service.device.free.clear()
    disconnect(client)
    service.device.free.set()


@pytest.mark.parametrize("disconnect", [socket.socket.close, reset_connection])
def test_disconnect_after_scoring(service: RunningService, disconnect: Any) -> None:
    """A response that nobody receives blocks nothing."""
    for _ in range(5):
        client = connect(service.url)
        client.sendall(head(SIZE) + BODY)
        wait_until(lambda: "x" in service.device.seen, "its batch")
        disconnect(client)


def test_slow_body(service: RunningService) -> None:
    """A body of a byte at a time gets a 408 when its time is over."""
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(connect(service.url))) for _ in range(20)]
        for client in clients:
            client.sendall(head(SIZE))
        for place in range(4):
            time.sleep(0.1)
            for client in clients:
                client.sendall(BODY[place : place + 1])
        assert [receive_outcome(client) for client in clients] == [LATE] * 20
    assert service.all_released()


def test_slow_headers(service: RunningService) -> None:
    """The connection is closed when the time for the headers is over."""
    with closing(connect(service.url)) as client:
        for place in range(10):
            client.sendall(head(SIZE)[place : place + 1])
            time.sleep(0.05)
        assert is_closed(client)


def test_unread_responses(service: RunningService) -> None:
    """A client that pipelines and never reads fills its own buffers, not the service's memory."""
    client = connect(service.url)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    requests = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100
    sent, until = 0, time.monotonic() + 1.0
    while time.monotonic() < until:
        try:
            sent += client.send(requests)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    client.close()
    assert sent < 2**25


PROTOCOLS: dict[str, tuple[bytes, Outcome, bool]] = {
    "HTTP/1.0": (head(SIZE, version="1.0") + BODY, OK, True),
    "HTTP/2 from the start": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (404, "not_found"), True),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600), NO_REQUEST, True),
    "nonsense": (bytes(range(256)) * 8, NO_REQUEST, True),
    "a head of 100 KB": (head(SIZE, "X-A: " + "b" * 200_000 + "\r\n") + BODY, LARGE_HEAD, True),
    "a head of 20,000 lines": (
        head(SIZE, "".join(f"X-{i}: bbbb\r\n" for i in range(20_000))) + BODY, LARGE_HEAD, True),
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
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", LARGE_HEAD, True),
}  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOLS)
def test_other_protocol(service: RunningService, name: str) -> None:
    """A documented response, and the connection is closed if no valid request can follow."""
    sent, expected, closes = PROTOCOLS[name]
    with closing(connect(service.url)) as client:
        try:
            client.sendall(sent)
        except OSError:  # refused before all of it was sent
            assert closes
        assert receive_outcome(client) == expected
        if closes:
            assert is_closed(client)
        else:
            client.sendall(LIVE)
            assert receive_outcome(client, "GET") == OK


def test_head_has_no_body(service: RunningService) -> None:
    """The response is GET's without its body; where GET is not allowed, HEAD is not either."""
    for path, status in (("/health/live", 200), ("/v1/score", 405)):
        response = httpx.head(f"{service.url}{path}")
        assert (response.status_code, response.content) == (status, b"")
        assert int(response.headers["content-length"]) > 0


def test_pipelining(service: RunningService) -> None:
    """Pipelined requests get their responses in order; an invalid one affects no other."""
    with closing(connect(service.url)) as client:
        bodies = [BODY, b"[]", BODY]
        client.sendall(
            b"".join(head(len(it)) + it for it in bodies)
            + LIVE.replace(b"x\r\n", b"x\r\nConnection: close\r\n", 1)
        )
        received = b""
        while piece := client.recv(65536):
            received += piece
    statuses = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 422, 200, 200]


IDLE = """
import socket, sys
clients = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60) for _ in range(2000)]
print("connected", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
def test_two_thousand_idle_connections(service: RunningService, bystander: Bystander) -> None:
    """They are kept or closed, and no active client notices; from a process of their own."""
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
        bystander.wait_for_scores(10)
        assert httpx.post(
            f"{service.url}/score", content=BODY, headers={"Content-Type": "application/json"}, timeout=30
        ).is_success
    finally:
        process.communicate(b"\n", timeout=30)
    bystander.wait_for_scores(5)
