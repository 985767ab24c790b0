"""HTTP connections on real sockets, in front of an application that returns what it received."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from http.client import HTTPResponse
from typing import Any

import pytest
import uvicorn

from reward_service.config import Limits
from reward_service.protocol import MAX_HEAD_BYTES, MAX_HEADERS
from reward_service.web.addresses import listen, resolve
from reward_service.web.connections import connection_class
from tests.support.faults.requests import is_closed
from tests.support.service.serving import wait_until

TIMEOUT_S = 120.0
LIMITS = Limits(max_connections=3)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


#: Requests to /held whose body has begun to arrive.
HELD: list[bytes] = []


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Return the request as JSON; /refused does not read the body."""
    body = b""
    while scope["path"] != "/refused":
        message = await receive()
        body += message.get("body", b"")
        if scope["path"] == "/held":
            HELD.append(body)
        if not message.get("more_body"):
            break
    headers = [[name.decode(), value.decode()] for name, value in scope["headers"]]
    found = {key: scope[key] for key in ("method", "path")} | {"headers": headers, "body": body.decode()}
    content = json.dumps(found).encode()
    fields = [(b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": content})


def options() -> uvicorn.Config:
    http = connection_class(LIMITS, lambda status, code: None)
    return uvicorn.Config(echo, http=http, loop="asyncio", lifespan="off", log_config=None, access_log=False)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listen(resolve("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(options())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started, "the start")
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)


def request(path: str = "/", more: bytes = b"", method: str = "POST") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode() + more + b"\r\n"


def receive(client: socket.socket, method: str = "POST") -> tuple[int, dict[str, Any], HTTPResponse]:
    response = HTTPResponse(client, method=method)
    response.begin()
    return response.status, json.loads(response.read()), response


def refusal(port: int, sent: bytes) -> tuple[int, str]:
    """Send bytes; return status and code of the refusal, behind which the connection is closed."""
    with closing(connect(port)) as client:
        with suppress(OSError):  # refused before all of it was sent
            client.sendall(sent)
        status, problem, _ = receive(client)
        assert is_closed(client)
    return status, problem["code"]


# Latency ----------------------------------------------------------------------------------------------


def test_accepted_connections_send_at_once() -> None:
    """Nagle's algorithm would hold the second write of a response until the client acknowledges the first."""

    async def option() -> int:
        loop, made = asyncio.get_running_loop(), asyncio.Queue[int]()

        class Accepted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                found = transport.get_extra_info("socket")
                made.put_nowait(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        with listen(resolve("127.0.0.1", 0)) as listener:
            server = await loop.create_server(Accepted, sock=listener)
            with closing(connect(listener.getsockname()[1])):
                found = await made.get()
            server.close()
        return found

    assert asyncio.run(option())


class _Written(asyncio.Transport):
    """Transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def write_eof(self) -> None: ...
    def abort(self) -> None: ...


async def _exchange(*pieces: bytes) -> tuple[Any, _Written]:
    """Let a connection receive pieces, each after the responses to those before it."""
    config = options()
    config.load()
    written = _Written()
    protocol: Any = config.http_protocol_class
    server_state = uvicorn.Server(config).server_state
    connection = protocol(config=config, server_state=server_state, app_state={})
    connection.connection_made(written)
    for piece in pieces:
        connection.data_received(piece)
        while connection.cycle is not None and not connection.cycle.response_complete:
            await asyncio.sleep(0)
    return connection, written


def test_head_and_body_leave_in_one_write() -> None:
    """Each response is one packet where it fits."""
    _, written = asyncio.run(_exchange(request(), request()))
    assert len(written.writes) == 2
    assert all(b"\r\n\r\n{" in write for write in written.writes)


# Bounds -----------------------------------------------------------------------------------------------


def head_of(count: int) -> bytes:
    """Return a request with so many headers."""
    return request(more=b"".join(b"X-%d: b\r\n" % number for number in range(count - 1)))


LARGE_HEADS = {
    "Accept": request(more=b"Accept: " + b"a;q=1," * 10_000 + b"\r\n"),
    "Authorization": request(more=b"Authorization: Bearer " + b"a" * 100_000 + b"\r\n"),
    "traceparent without an end": request(more=b"traceparent: " + b"-" * 100_000)[:-2],
    "lines": head_of(10_000),
    "one line too many": head_of(MAX_HEADERS + 1),
    "address": request("/" + "a" * 60_000),
    "address without an end": b"GET /" + b"a" * MAX_HEAD_BYTES,
}


@pytest.mark.parametrize("name", LARGE_HEADS)
def test_large_head_is_refused(port: int, name: str) -> None:
    """Before anything parses it, with a problem that a client can read although it still sends."""
    assert refusal(port, LARGE_HEADS[name]) == (431, "headers_too_large")


def test_ordinary_head_is_accepted(port: int) -> None:
    """Up to the bounds, and in pieces of one byte."""
    sent = head_of(MAX_HEADERS)
    with closing(connect(port)) as client:
        client.sendall(sent)
        assert len(receive(client)[1]["headers"]) == MAX_HEADERS
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for place in range(len(sent)):
            client.sendall(sent[place : place + 1])
        assert len(receive(client)[1]["headers"]) == MAX_HEADERS


TINY_CHUNKS = {
    "one byte each": b"1\r\na\r\n" * 100_000,
    "long extensions": (b"1;" + b"a" * 500 + b"\r\na\r\n") * 1000,
    "trailers": b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 100_000,
    "a trailer without an end": b"1\r\na\r\n0\r\na: " + b"b" * 100_000,
}


@pytest.mark.parametrize("name", TINY_CHUNKS)
def test_tiny_chunks_are_refused(port: int, name: str) -> None:
    """The framing of a body is bounded by the bytes that it carries."""
    assert refusal(port, request(more=CHUNKED) + TINY_CHUNKS[name]) == (400, "malformed_request")


@pytest.mark.parametrize("size", [1, 16, 128, 100_000])
def test_ordinary_chunks_are_accepted(port: int, size: int) -> None:
    """A client that streams its body, also in small pieces; the connection is kept."""
    body = b"a" * min(300_000, 2000 * size)
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    sent = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    with closing(connect(port)) as client:
        for _ in range(2):
            client.sendall(request(more=CHUNKED) + sent)
            _, received, response = receive(client)
            assert received["body"].encode() == body
            assert response.getheader("connection") is None


def test_nothing_is_parsed_after_a_refusal() -> None:
    """Chunks behind the response to a request whose body was not read are ignored; the client is told."""
    chunk = b"1\r\na\r\n"
    connection, written = asyncio.run(_exchange(request("/refused", CHUNKED) + chunk, chunk))
    connection.parser = None
    connection.data_received(chunk * 1000)
    assert b"connection: close" in written.writes[0]
    assert len(written.writes) == 1


def test_empty_lines_before_a_request_are_bounded(port: int) -> None:
    """A few are ignored (RFC 9112, section 2.2)."""
    assert refusal(port, b"\r\n" * 100_000) == (400, "malformed_request")
    with closing(connect(port)) as client:
        client.sendall(b"\r\n\r\n" + request())
        assert receive(client)[0] == 200


# Parsing ----------------------------------------------------------------------------------------------


def test_trailers_are_no_headers(port: int) -> None:
    """They come when the request has been authorized already."""
    with closing(connect(port)) as client:
        client.sendall(request(more=CHUNKED) + b"1\r\na\r\n0\r\nAuthorization: x\r\n\r\n")
        assert [name for name, _ in receive(client)[1]["headers"]] == ["host", "transfer-encoding"]


def test_upgrade_with_a_body_is_ignored(port: int) -> None:
    """As curl and Java send it to offer HTTP/2: the request is served, and the next one."""
    more = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 2\r\n"
    with closing(connect(port)) as client:
        for _ in range(2):
            client.sendall(request(more=more) + b"hi")
            assert receive(client)[1]["body"] == "hi"


@pytest.mark.parametrize(
    ("method", "target", "path"),
    [
        ("BREW", "/a%20b?c", "/a b"),
        ("CONNECT", "x:80", "x:80"),
        ("OPTIONS", "*", "*"),
        ("GET", "http://x/a", "http://x/a"),
    ],
)
def test_application_decides_on_methods_and_targets(port: int, method: str, target: str, path: str) -> None:
    """They reach it as they were sent."""
    with closing(connect(port)) as client:
        client.sendall(request(target, method=method))
        found = receive(client)[1]
        assert (found["method"], found["path"]) == (method, path)


def test_request_behind_chunks_in_one_piece(port: int) -> None:
    """It is not parsed: the connection is closed, and the client has to repeat it."""
    with closing(connect(port)) as client:
        client.sendall(request(more=CHUNKED) + b"1\r\na\r\n0\r\n\r\n" + request() * 100)
        status, _, response = receive(client)
        assert (status, response.getheader("connection")) == (200, "close")
        assert is_closed(client)


def test_pipelined_requests_are_served_one_at_a_time() -> None:
    """However many arrive at once, one is in progress, and each gets its response."""

    async def in_progress() -> tuple[int, int]:
        connection, written = await _exchange()
        connection.data_received(request(method="GET") * 500)
        most = 0
        while len(written.writes) < 500:
            most = max(most, len(connection.tasks) + len(connection.pipeline))
            await asyncio.sleep(0)
        return most, len(written.writes)

    most, responses = asyncio.run(in_progress())
    assert most <= 2  # the next one, and one whose response has just been sent
    assert responses == 500


def test_health_probe_beside_too_many_requests(port: int) -> None:
    """It gets a response where other requests are refused."""
    HELD.clear()
    with ExitStack() as stack:
        for _ in range(LIMITS.max_connections):
            client = stack.enter_context(closing(connect(port)))
            client.sendall(request("/held", b"Content-Length: 5\r\n") + b"a")
        wait_until(lambda: len(HELD) == LIMITS.max_connections, "all requests")
        for path, status in (("/health/live", 200), ("/health/ready", 200), ("/score", 503)):
            with closing(connect(port)) as client:
                client.sendall(request(path, method="GET"))
                assert receive(client, "GET")[0] == status
                assert is_closed(client)
