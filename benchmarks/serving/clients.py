"""Clients in their own process: `python -m benchmarks.serving.clients`. No torch.

A line of JSON on stdin says who they are (`Crowd`), each further one what they do (`Errand`);
each is answered by a line of JSON on stdout: the bytes of a body, then every request's `Outcome`.

With a rate, requests are due at the points of a Poisson process, whatever becomes of earlier ones, and their
latency counts from when they were due: a service that is slow does not slow down what is asked of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from itertools import count
from select import select
from urllib.parse import urlsplit

import msgspec
import numpy as np

from benchmarks.serving.bodies import RAW, Body, body, scene
from reward_service.protocol import MSGPACK

_TIMEOUT_S = 120.0
_MOST_UNDER_WAY = 1024
_PROMPTS = 32
_OK, _BUSY = 200, (429, 503)


class Crowd(msgspec.Struct, frozen=True):
    """Clients with prepared bodies; neighbouring bodies differ in every image."""

    url: str
    clients: list[str]
    pairs: int
    bodies: int
    cores: list[int]
    seed: int = 0
    size_px: int = 256
    form: str = RAW


class Errand(msgspec.Struct, frozen=True):
    """What the callers do from `start_s` on, on the clock of this machine.

    `rate`: requests a second of all together, by chance; None: each has `in_flight` under way all the
    time. It ends after `seconds`, or after so many `requests`; what is under way then is waited for.
    """

    start_s: float
    rate: float | None = None
    in_flight: int = 1
    seconds: float = 3600.0
    requests: int | None = None


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """One request; times in seconds on the clock of this machine.

    `status` is 0 if there was no answer. `in_order`: answered with scores, or told when to come again.
    """

    client: str
    due_s: float
    sent_s: float
    ended_s: float
    status: int
    in_order: bool


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """The points of a Poisson process of `rate` a second within `seconds`."""
    rng = np.random.default_rng(seed)
    points: list[float] = []
    at = rng.exponential(1 / rate)
    while at < seconds:
        points.append(float(at))
        at += rng.exponential(1 / rate)
    return points


class Callers:
    """A crowd with its connections.

    Threads on blocking sockets: megabytes go out at a tenth of what they cost an event loop, and callers
    that are short of CPU time would measure themselves.
    """

    def __init__(self, crowd: Crowd) -> None:
        self._crowd, url = crowd, urlsplit(crowd.url)
        self._address, self._path = url.netloc, f"{url.path}/v1/score"
        self.bodies = list(_bodies(crowd))
        self._idle: list[HTTPConnection] = []
        self._threads = ThreadPoolExecutor(_MOST_UNDER_WAY)
        self._turns = count()
        self._errands = count()

    def run(self, errand: Errand) -> list[Outcome]:
        """Run the plan."""
        if errand.rate is None:
            return self._without_pause(errand)
        seed = self._crowd.seed + 1000 * next(self._errands)
        due = [errand.start_s + at for at in arrivals(errand.rate, errand.seconds, seed)]
        clients = np.random.default_rng(seed).choice(self._crowd.clients, len(due))
        asked = []
        for at, client in zip(due, clients, strict=True):
            time.sleep(max(0.0, at - time.monotonic()))
            asked.append(self._threads.submit(self._ask, str(client), at))
        return [each.result() for each in asked]

    def _without_pause(self, errand: Errand) -> list[Outcome]:
        outcomes: list[Outcome] = []
        left = count(errand.requests or sys.maxsize, -1)

        def call(client: str) -> None:
            while time.monotonic() < errand.start_s + errand.seconds and next(left) > 0:
                outcomes.append(self._ask(client))

        time.sleep(max(0.0, errand.start_s - time.monotonic()))
        places = [client for _ in range(errand.in_flight) for client in self._crowd.clients]
        list(self._threads.map(call, places))
        return outcomes

    def _ask(self, client: str, due_s: float | None = None) -> Outcome:
        sent = self.bodies[next(self._turns) % len(self.bodies)]
        headers = {"Content-Type": sent.content_type, "Accept": MSGPACK, "X-Client-Id": client}
        sent_s = time.monotonic()
        connection = self._connection()
        try:
            answer = _answer(connection, self._path, sent, headers)
            status, again = answer.status, answer.getheader("retry-after") or ""
        except (OSError, HTTPException):
            connection.close()
            status, again = 0, ""
        else:
            self._idle.append(connection)
        in_order = status == _OK or (status in _BUSY and again.isdigit() and int(again) >= 1)
        return Outcome(client, sent_s if due_s is None else due_s, sent_s, time.monotonic(), status, in_order)

    def _connection(self) -> HTTPConnection:
        """One that is idle and that the service has not closed meanwhile, or a new one."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return HTTPConnection(self._address, timeout=_TIMEOUT_S)
            if connection.sock is None or not select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()


def _answer(connection: HTTPConnection, path: str, sent: Body, headers: dict[str, str]) -> HTTPResponse:
    """The answer, read to its end."""
    # One that was refused before its body was read may be answered and closed while it is sent.
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", path, sent.content, headers)
    answer = connection.getresponse()
    answer.read()
    return answer


def _bodies(crowd: Crowd) -> Iterator[Body]:
    for number in range(crowd.bodies):
        first = number * crowd.pairs
        prompts = [
            f"{crowd.clients[0]} draws {n % _PROMPTS} discs" for n in range(first, first + crowd.pairs)
        ]
        seeds = range(crowd.seed + first, crowd.seed + first + crowd.pairs)
        yield body(crowd.form, prompts, [scene(crowd.size_px, seed) for seed in seeds])


def _say(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def main() -> None:
    """Serve the parent process."""
    crowd = msgspec.json.decode(sys.stdin.readline(), type=Crowd)
    os.sched_setaffinity(0, crowd.cores)
    callers = Callers(crowd)
    _say(len(callers.bodies[0].content))
    for line in sys.stdin:
        _say(callers.run(msgspec.json.decode(line, type=Errand)))


if __name__ == "__main__":
    main()
