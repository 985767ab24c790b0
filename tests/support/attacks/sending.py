"""Client side of an attack: its target, its deadline, and the answers that it gets. Blocking sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from urllib.parse import urlsplit

from tests.support.attacks.bodies import Message

_TIMEOUT_S = 30.0


class Target:
    """Service under attack until a deadline; counts the answers by status, or by how a request ended.

    Args:
        url: address of the service
        seconds: time of the attack, from now on
    """

    def __init__(self, url: str, seconds: float) -> None:
        at = urlsplit(url)
        self.address = (at.hostname or "", at.port or 80)
        self._end_s = time.monotonic() + seconds
        self._timeout_s = max(_TIMEOUT_S, seconds)
        self.answers: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """True after the deadline."""
        return time.monotonic() > self._end_s

    def count(self, answer: str) -> None:
        """Count an answer."""
        with self._lock:
            self.answers[answer] += 1

    def connect(self) -> socket.socket:
        """Open a connection, within `counted`."""
        return socket.create_connection(self.address, timeout=self._timeout_s)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count how a connection in the block ends, if not by the block."""
        try:
            yield
        except (OSError, HTTPException) as error:
            self.count("left" if self.over else type(error).__name__)
            # A service that refuses connections must not make the attack a busy loop.
            time.sleep(0.01)

    def send(self, pieces: Iterable[bytes], read: bool = True) -> None:
        """Send pieces on a new connection until the deadline or its end; count the answer."""
        with self.counted(), self.connect() as opened:
            with suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    opened.sendall(piece)
                    if self.over:
                        break
            if read:
                self.count(read_status(opened))

    def exchange(self, message: Message, leave_s: float | None = None) -> None:
        """Send a request on a new connection and count its answer.

        Args:
            message: the request
            leave_s: time after which the client closes the connection, whatever has come; None to wait
        """
        with self.counted(), self.connect() as opened:
            leave = threading.Timer(self._timeout_s if leave_s is None else leave_s, _shut, (opened,))
            leave.start()
            try:
                # The service may refuse a request, and close, before its body has been read.
                with suppress(BrokenPipeError, ConnectionResetError):
                    opened.sendall(head(message))
                    opened.sendall(message.body)
                self.count(read_status(opened))
            except (OSError, HTTPException):
                if leave_s is None:
                    raise
                self.count("left")
            finally:
                leave.cancel()


def head(message: Message, length: int | str | None = None) -> bytes:
    """Return the request line and headers of a request.

    Args:
        message: the request
        length: value of `Content-Length`, if it is not that of the body; an empty text to leave it out
    """
    headers = {"Host": "x", "X-Client-Id": "attacker", "Content-Type": message.content_type}
    headers["Content-Length"] = str(len(message.body) if length is None else length)
    lines = [f"{message.method} {message.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in (headers | message.headers).items() if value]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def read_status(opened: socket.socket) -> str:
    """Receive a response to its end and return its status."""
    response = HTTPResponse(opened)
    response.begin()
    response.read()
    return str(response.status)


def in_parallel(count: int, run: Callable[[int], None], target: Target) -> None:
    """Call a function again and again until the deadline, in this many threads, each with its number."""

    def repeat(number: int) -> None:
        while not target.over:
            run(number)

    threads = [threading.Thread(target=repeat, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not target.over:
            thread.join(0.1)


def _shut(opened: socket.socket) -> None:
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)
