"""Client beside an attack, a process of its own: `python -m tests.support.attacks.observer URL light|live`.

Every 50 ms it scores one pair of 64 px, or requests `/health/live`, on a kept connection, and prints `ready`
when it begins. A line on stdin ends it, after the request in progress; it then prints its `Waits` as JSON.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import msgspec

from tests.support.attacks.bodies import Message, images
from tests.support.attacks.png import flat

EVERY_S = 0.05
_TIMEOUT_S = 180.0
_OK = "200"


class Waits(msgspec.Struct):
    """Waits of one client in seconds.

    Attributes:
        answers: number of requests by status, or by the name of the error
        longest_s: the longest wait for an answer, from the start of the request
        late_s: the longest delay of the client itself: how late it woke up for a request
    """

    answers: dict[str, int]
    longest_s: float
    late_s: float

    @property
    def failed(self) -> int:
        """Number of requests that got no answer, or another status than 200."""
        return sum(number for status, number in self.answers.items() if status != _OK)


class Observer:
    """Client that sends the same request again and again and records its waits."""

    def __init__(self, url: str, message: Message) -> None:
        self._message = message
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)

    def run(self, ended: threading.Event) -> Waits:
        """Send requests until the event, and at least one."""
        answers, longest_s, late_s = Counter[str](), 0.0, 0.0
        due_s = time.monotonic()
        while not answers or not ended.is_set():
            time.sleep(max(0.0, due_s - time.monotonic()))
            begun_s = time.monotonic()
            late_s = max(late_s, begun_s - due_s)
            answers[self._status()] += 1
            longest_s = max(longest_s, time.monotonic() - begun_s)
            due_s = max(due_s + EVERY_S, time.monotonic())
        return Waits(dict(answers), longest_s, late_s)

    def _status(self) -> str:
        message = self._message
        headers = {"Content-Type": message.content_type, "X-Client-Id": "light"}
        try:
            self._connection.request(message.method, message.path, message.body or None, headers)
            response = self._connection.getresponse()
            response.read()
        except (OSError, HTTPException) as error:
            self._connection.close()
            return type(error).__name__
        return str(response.status)


MESSAGES = {
    "light": images(flat(64)),
    "live": Message(path="/health/live", method="GET"),
}


def main(url: str, kind: str) -> None:
    """Observe until a line on stdin."""
    ended = threading.Event()

    def wait_for_line() -> None:
        sys.stdin.readline()
        ended.set()

    threading.Thread(target=wait_for_line, daemon=True).start()
    print("ready", flush=True)
    waits = Observer(url, MESSAGES[kind]).run(ended)
    print(msgspec.json.encode(waits).decode(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
