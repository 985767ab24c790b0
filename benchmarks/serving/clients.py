"""Clients in their own process: `python -m benchmarks.serving.clients`. No torch.

The first line of JSON on stdin configures the clients (`ClientSetup`), each further line starts a load
(`Load`). The process replies with a line of JSON on stdout: the size of a body in bytes, then every
`RequestResult` of a load.

With a rate, requests are due at the points of a Poisson process, independent of earlier responses, and
latency counts from when a request was due: a slow service does not lower the offered load.
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

from benchmarks.serving.bodies import RAW, Body, make_body, scene
from reward_service.protocol import MSGPACK

_TIMEOUT_S = 120.0
_MAX_IN_FLIGHT = 1024
_PROMPTS = 32
_OK, _BUSY = 200, (429, 503)


class ClientSetup(msgspec.Struct, frozen=True):
    """Clients and their prepared bodies; neighbouring bodies differ in every image."""

    url: str
    clients: list[str]
    pairs: int
    bodies: int
    cores: list[int]
    seed: int = 0
    size_px: int = 256
    form: str = RAW


class Load(msgspec.Struct, frozen=True):
    """Load that the clients generate.

    Attributes:
        start_s: start on the monotonic clock of this machine
        rate: requests a second of all clients together, as a Poisson process (open loop); None: each client
            keeps `in_flight` requests open all the time (closed loop)
        in_flight: open requests of each client, without a rate
        seconds: duration; open requests are awaited after it
        requests: end after this many requests; None for no limit
    """

    start_s: float
    rate: float | None = None
    in_flight: int = 1
    seconds: float = 3600.0
    requests: int | None = None


class RequestResult(msgspec.Struct, frozen=True, array_like=True):
    """Result of one request; times in seconds on the monotonic clock of this machine.

    Attributes:
        status: HTTP status; 0 without a response
        accepted: the response has scores, or is a 429 or 503 with a `Retry-After` of at least 1 s
    """

    client: str
    due_s: float
    sent_s: float
    ended_s: float
    status: int
    accepted: bool


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the points of a Poisson process of `rate` a second within `seconds`."""
    rng = np.random.default_rng(seed)
    points: list[float] = []
    at = rng.exponential(1 / rate)
    while at < seconds:
        points.append(float(at))
        at += rng.exponential(1 / rate)
    return points


class ClientPool:
    """Clients with their connections.

    Threads on blocking sockets: sending megabytes costs a tenth of the CPU time of an event loop, and clients
    that are short of CPU time would measure themselves.
    """

    def __init__(self, setup: ClientSetup) -> None:
        self._setup, url = setup, urlsplit(setup.url)
        self._address, self._path = url.netloc, f"{url.path}/v1/score"
        self.bodies = list(_bodies(setup))
        self._idle: list[HTTPConnection] = []
        self._threads = ThreadPoolExecutor(_MAX_IN_FLIGHT)
        self._turns = count()
        self._runs = count()

    def run(self, load: Load) -> list[RequestResult]:
        """Generate a load and return the result of every request."""
        if load.rate is None:
            return self._run_closed_loop(load)
        seed = self._setup.seed + 1000 * next(self._runs)
        due = [load.start_s + at for at in arrivals(load.rate, load.seconds, seed)]
        clients = np.random.default_rng(seed).choice(self._setup.clients, len(due))
        pending = []
        for at, client in zip(due, clients, strict=True):
            time.sleep(max(0.0, at - time.monotonic()))
            pending.append(self._threads.submit(self._send, str(client), at))
        return [each.result() for each in pending]

    def _run_closed_loop(self, load: Load) -> list[RequestResult]:
        results: list[RequestResult] = []
        left = count(load.requests or sys.maxsize, -1)

        def send_repeatedly(client: str) -> None:
            while time.monotonic() < load.start_s + load.seconds and next(left) > 0:
                results.append(self._send(client))

        time.sleep(max(0.0, load.start_s - time.monotonic()))
        clients = [client for _ in range(load.in_flight) for client in self._setup.clients]
        list(self._threads.map(send_repeatedly, clients))
        return results

    def _send(self, client: str, due_s: float | None = None) -> RequestResult:
        body = self.bodies[next(self._turns) % len(self.bodies)]
        headers = {"Content-Type": body.content_type, "Accept": MSGPACK, "X-Client-Id": client}
        sent_s = time.monotonic()
        connection = self._connection()
        try:
            response = _exchange(connection, self._path, body, headers)
            status, retry_after = response.status, response.getheader("retry-after") or ""
        except (OSError, HTTPException):
            connection.close()
            status, retry_after = 0, ""
        else:
            self._idle.append(connection)
        accepted = status == _OK or (status in _BUSY and retry_after.isdigit() and int(retry_after) >= 1)
        return RequestResult(
            client, sent_s if due_s is None else due_s, sent_s, time.monotonic(), status, accepted
        )

    def _connection(self) -> HTTPConnection:
        """Return an idle connection that the service has not closed meanwhile, or a new one."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return HTTPConnection(self._address, timeout=_TIMEOUT_S)
            if connection.sock is None or not select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()


def _exchange(connection: HTTPConnection, path: str, body: Body, headers: dict[str, str]) -> HTTPResponse:
    """Send a request and return its response, read to the end."""
    # The service may refuse a request before it has read the body, and close while the client still sends.
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", path, body.content, headers)
    response = connection.getresponse()
    response.read()
    return response


def _bodies(setup: ClientSetup) -> Iterator[Body]:
    for number in range(setup.bodies):
        first = number * setup.pairs
        prompts = [
            f"{setup.clients[0]} draws {n % _PROMPTS} discs" for n in range(first, first + setup.pairs)
        ]
        seeds = range(setup.seed + first, setup.seed + first + setup.pairs)
        yield make_body(setup.form, prompts, [scene(setup.size_px, seed) for seed in seeds])


def _write_line(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def main() -> None:
    """Serve the parent process."""
    setup = msgspec.json.decode(sys.stdin.readline(), type=ClientSetup)
    os.sched_setaffinity(0, setup.cores)
    clients = ClientPool(setup)
    _write_line(len(clients.bodies[0].content))
    for line in sys.stdin:
        _write_line(clients.run(msgspec.json.decode(line, type=Load)))


if __name__ == "__main__":
    main()
