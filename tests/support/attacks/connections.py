"""Hostile connections: chunks of one byte, headers without end, pipelines, readers that never read.

Each function plays one connection of the attack until the target's deadline or the end of the connection.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException

from tests.support.attacks.bodies import FORM, Message
from tests.support.attacks.sending import Target, head, read_status

_ANY = Message(path="/anywhere", method="GET", content_type="")
_LIVE = Message(path="/health/live", method="GET", content_type="")
_PIECE = 2**16


def _chunked(more: dict[str, str] | None = None, path: str = "/v1/score") -> bytes:
    headers = {"Transfer-Encoding": "chunked", **(more or {})}
    return head(Message(path=path, headers=headers), length="")


def _without_end(start: bytes, unit: bytes) -> Iterator[bytes]:
    """Yield the start, and then the unit for ever."""
    yield start
    piece = unit * max(1, _PIECE // len(unit))
    while True:
        yield piece


def small_chunks(target: Target, _: int) -> None:
    """Send a body in chunks of one byte without end."""
    target.send(_without_end(_chunked(), b"1\r\na\r\n"))


def small_chunks_of_a_form(target: Target, _: int) -> None:
    """The same for a form."""
    headers = {"Transfer-Encoding": "chunked"}
    message = Message(content_type=FORM, headers=headers)
    target.send(_without_end(head(message, length=""), b"1\r\na\r\n"))


def small_chunks_after_refusal(target: Target, _: int) -> None:
    """Go on with chunks of one byte after the service has refused the request, and never read."""
    start = _chunked({"Authorization": "Bearer wrong"}, "/nowhere")
    target.send(_without_end(start, b"1\r\na\r\n"), read=False)


def small_chunks_after_bad_type(target: Target, _: int) -> None:
    """Go on with chunks of one byte after a 415."""
    message = Message(content_type="text/plain", headers={"Transfer-Encoding": "chunked"})
    target.send(_without_end(head(message, length=""), b"1\r\na\r\n"), read=False)


def small_chunks_of_a_get(target: Target, _: int) -> None:
    """Send chunks of one byte as the body of a GET."""
    message = Message(path="/health/live", method="GET", headers={"Transfer-Encoding": "chunked"})
    target.send(_without_end(head(message, length=""), b"1\r\na\r\n"), read=False)


def chunk_extensions(target: Target, _: int) -> None:
    """Send chunks of one byte with extensions."""
    target.send(_without_end(_chunked(), b"1;a=" + b"b" * 200 + b"\r\na\r\n"))


def one_long_extension(target: Target, _: int) -> None:
    """Send one chunk whose extension has no end."""
    target.send(_without_end(_chunked() + b"1;a=", b"b"))


def padded_sizes(target: Target, _: int) -> None:
    """Send chunk sizes with leading zeros without end."""
    target.send(_without_end(_chunked(), b"0000000000000001\r\na\r\n"))


def trailers(target: Target, _: int) -> None:
    """Send trailers without end behind a body."""
    target.send(_without_end(_chunked() + b"1\r\na\r\n0\r\n", b"a: b\r\n"))


def many_trailers(target: Target, _: int) -> None:
    """Send a thousand trailers behind a valid body."""
    body = b'd\r\n{"items": []}\r\n0\r\n' + b"a: b\r\n" * 1000 + b"\r\n"
    target.send([_chunked() + body])


def long_accept(target: Target, _: int) -> None:
    """Send 60 kB of Accept to addresses of every kind."""
    accept = ",".join([f"a/{number};q=0.{number % 1000:03}" for number in range(4000)])[:60_000]
    for message in (
        _LIVE,
        _ANY,
        Message(b"{}"),
        Message(path="/v1/score", method="GET", content_type=""),
    ):
        target.exchange(
            Message(message.body, message.content_type, message.path, message.method, {"Accept": accept})
        )


def commas_in_accept(target: Target, _: int) -> None:
    """Send 60 kB of commas as Accept."""
    for accept in ("," * 60_000, "*/*;" * 15_000, 'a/b;c="' + "\\" * 59_000):
        target.exchange(Message(b"{}", headers={"Accept": accept}))


def long_headers(target: Target, _: int) -> None:
    """Send 60 kB of each header that the service may read."""
    values = {
        "Authorization": "Bearer " + "k" * 59_000,
        "X-Client-Id": "c" * 59_000,
        "X-Request-Id": "r" * 59_000,
        "X-Deadline-Ms": "9" * 59_000,
        "Content-Type": FORM + ";a=b" * 14_000,
        "Cookie": "a=b;" * 14_000,
        "traceparent": "00-" + "a" * 59_000,
        "baggage": "a=b," * 14_000,
        "Forwarded": "for=1.2.3.4," * 4_000,
        "X-Forwarded-For": "1.2.3.4," * 7_000,
        "Accept-Encoding": "gzip," * 11_000,
        "Range": "bytes=" + "0-1," * 14_000,
        "If-None-Match": '"a",' * 14_000,
        "Connection": "a," * 28_000,
        "Expect": "100-continue," * 4_000,
    }
    for name, value in values.items():
        target.exchange(Message(b"{}", headers={name: value}))


def long_target(target: Target, _: int) -> None:
    """Send addresses and queries of 60 kB."""
    for path in (
        "/" + "%41" * 19_000,
        "/v1/score?" + "a=b&" * 14_000,
        "/page/" + "../" * 19_000,
        "/" * 59_000,
    ):
        target.exchange(Message(path=path, method="GET", content_type=""))


def many_headers(target: Target, _: int) -> None:
    """Send 10,000 headers."""
    start = head(_LIVE)[:-2]
    target.send([start + b"a:\r\n" * 10_000 + b"\r\n"])


def headers_without_end(target: Target, _: int) -> None:
    """Send headers without end."""
    target.send(_without_end(head(_LIVE)[:-2], b"a: b\r\n"))


def one_header_by_bytes(target: Target, _: int) -> None:
    """Send one header byte by byte, as fast as can be."""
    with target.counted(), target.connect() as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.sendall(head(_LIVE)[:-2] + b"a: ")
        with suppress(BrokenPipeError, ConnectionResetError):
            while not target.over:
                for _ in range(20):
                    opened.sendall(b"b")
                time.sleep(0.001)
        target.count(read_status(opened))


def folded_header(target: Target, _: int) -> None:
    """Send one header in folded lines without end."""
    target.send(_without_end(head(_LIVE)[:-2] + b"a: b\r\n", b" c\r\n"))


def blank_lines(target: Target, _: int) -> None:
    """Send line ends without end instead of a request."""
    target.send(_without_end(b"", b"\r\n"))


def noise(target: Target, _: int) -> None:
    """Send bytes that are no HTTP, and TLS greetings."""
    target.send([b"\x16\x03\x01\x02\x00\x01" + bytes(500)])
    target.send([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(500)])
    target.send([b"GET\r\n\r\n"])


def pipeline(target: Target, _: int) -> None:
    """Send thousands of requests at once on one connection and read every response."""
    count = 2000
    last = Message(path="/health/live", method="GET", content_type="", headers={"Connection": "close"})
    with target.counted(), target.connect() as opened:
        opened.sendall(head(_LIVE) * count + head(last))
        # One reader: a response's own would take the beginning of the next one too.
        with opened.makefile("rb") as received:
            for line in received:
                if line.startswith(b"HTTP/1.1 "):
                    target.count(line[9:12].decode())


def pipeline_unread(target: Target, _: int) -> None:
    """Send requests for a large response without end, and never read one."""
    large = Message(path="/openapi.json", method="GET", content_type="")
    target.send(_without_end(b"", head(large)), read=False)


def pipeline_behind_refusal(target: Target, _: int) -> None:
    """Send requests that are refused, without end, and never read a response."""
    target.send(_without_end(b"", head(Message(b"{}")) + b"{}"), read=False)


def churn(target: Target, _: int) -> None:
    """Open connections and close them at once, some with a reset."""
    with suppress(OSError), socket.create_connection(target.address, timeout=5) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        target.count("closed")


def idle_connections(target: Target, _: int) -> None:
    """Hold 600 connections open, each with half of a request line."""
    opened = []
    with suppress(OSError):
        for _ in range(600):
            opened.append(socket.create_connection(target.address, timeout=5))
            opened[-1].sendall(b"GET /health")
    while not target.over:
        time.sleep(0.05)
    for each in opened:
        each.close()
    target.count(f"{len(opened)} held")


def slow_bodies(target: Target, _: int) -> None:
    """Announce the largest body on many connections and send none of it."""
    opened = []
    with suppress(OSError):
        for _ in range(60):
            opened.append(socket.create_connection(target.address, timeout=5))
            opened[-1].sendall(head(Message(), length=60_000_000))
    while not target.over:
        time.sleep(0.05)
    for each in opened:
        each.settimeout(0.1)
        with suppress(OSError, HTTPException):
            target.count(read_status(each))
        each.close()


def upgrades(target: Target, _: int) -> None:
    """Ask for WebSocket and HTTP/2 upgrades."""
    websocket = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "a" * 24}
    for more in (websocket, {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}):
        target.exchange(Message(path="/v1/score", method="GET", content_type="", headers=more))


def known_addresses(target: Target, _: int) -> None:
    """Request every address that needs no body, as fast as can be, on one connection."""
    paths = ("/metrics", "/openapi.json", "/docs", "/", "/v1/evaluators", "/health/ready", "/page/page.js")
    with target.counted(), target.connect() as opened:
        while not target.over:
            for path in paths:
                opened.sendall(head(Message(path=path, method="GET", content_type="")))
                target.count(read_status(opened))


def refused_bodies(target: Target, _: int) -> None:
    """Send large bodies to addresses that take none, and of a type that is refused."""
    body = bytes(30_000_000)
    target.exchange(Message(body, path="/nowhere"))
    target.exchange(Message(body, content_type="text/plain"))
    target.exchange(Message(body, path="/health/live"))
