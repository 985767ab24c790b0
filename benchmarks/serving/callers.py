"""Callers in a process of their own: ``python -m benchmarks.serving.callers``. No torch.

A line of JSON on stdin says who they are (:class:`Crowd`), each further one what they do (:class:`Errand`);
each is answered by a line of JSON on stdout: the bytes of a body, then every request's :class:`Outcome`.

With a rate, requests are due at the points of a Poisson process, whatever becomes of earlier ones, and their
latency counts from when they were due: a service that is slow does not slow down what is asked of it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from itertools import count

import httpx
import msgspec
import numpy as np

from benchmarks.serving.bodies import RAW, Body, body, scene
from reward_service.protocol import MSGPACK

_TIMEOUT_S = 120.0
_PROMPTS = 32
_BUSY = (429, 503)


class Crowd(msgspec.Struct, frozen=True):
    """Who calls, with bodies made beforehand; neighbouring ones differ in every picture."""

    url: str
    clients: list[str]
    pairs: int
    bodies: int
    cores: list[int]
    seed: int = 0
    size_px: int = 256
    form: str = RAW


class Errand(msgspec.Struct, frozen=True):
    """What the callers do from ``start_s`` on, on the clock of this machine.

    ``rate``: requests a second of all together, by chance; None: each has ``in_flight`` under way all the
    time. It ends after ``seconds``, or after so many ``requests``; what is under way then is waited for.
    """

    start_s: float
    rate: float | None = None
    in_flight: int = 1
    seconds: float = 3600.0
    requests: int | None = None


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """One request; times in seconds on the clock of this machine.

    ``status`` is 0 if there was no answer. ``in_order``: answered with scores, or told when to come again.
    """

    client: str
    due_s: float
    sent_s: float
    ended_s: float
    status: int
    in_order: bool


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """The points of a Poisson process of ``rate`` a second within ``seconds``."""
    rng = np.random.default_rng(seed)
    points: list[float] = []
    at = rng.exponential(1 / rate)
    while at < seconds:
        points.append(float(at))
        at += rng.exponential(1 / rate)
    return points


class Callers:
    """A crowd with its connections."""

    def __init__(self, crowd: Crowd, connection: httpx.AsyncClient) -> None:
        self._crowd, self._connection = crowd, connection
        self.bodies = list(_bodies(crowd))
        self._turns = count()
        self._errands = count()

    async def run(self, errand: Errand) -> list[Outcome]:
        """Do it."""
        if errand.rate is None:
            return await self._without_pause(errand)
        seed = self._crowd.seed + 1000 * next(self._errands)
        due = [errand.start_s + at for at in arrivals(errand.rate, errand.seconds, seed)]
        clients = np.random.default_rng(seed).choice(self._crowd.clients, len(due))
        asked = []
        for at, client in zip(due, clients, strict=True):
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            asked.append(asyncio.create_task(self._ask(str(client), at)))
        return await asyncio.gather(*asked)

    async def _without_pause(self, errand: Errand) -> list[Outcome]:
        outcomes: list[Outcome] = []
        left = count(errand.requests or sys.maxsize, -1)

        async def call(client: str) -> None:
            while time.monotonic() < errand.start_s + errand.seconds and next(left) > 0:
                outcomes.append(await self._ask(client))

        await asyncio.sleep(max(0.0, errand.start_s - time.monotonic()))
        places = [client for _ in range(errand.in_flight) for client in self._crowd.clients]
        await asyncio.gather(*map(call, places))
        return outcomes

    async def _ask(self, client: str, due_s: float | None = None) -> Outcome:
        sent: Body = self.bodies[next(self._turns) % len(self.bodies)]
        headers = {"Content-Type": sent.content_type, "Accept": MSGPACK, "X-Client-Id": client}
        sent_s = time.monotonic()
        try:
            answer = await self._connection.post("/v1/score", content=sent.content, headers=headers)
            status, again = answer.status_code, answer.headers.get("retry-after", "")
        except httpx.HTTPError:
            status, again = 0, ""
        in_order = status == httpx.codes.OK or (status in _BUSY and again.isdigit() and int(again) >= 1)
        return Outcome(client, sent_s if due_s is None else due_s, sent_s, time.monotonic(), status, in_order)


def _bodies(crowd: Crowd) -> Iterator[Body]:
    for number in range(crowd.bodies):
        first = number * crowd.pairs
        prompts = [
            f"{crowd.clients[0]} draws {n % _PROMPTS} discs" for n in range(first, first + crowd.pairs)
        ]
        seeds = range(crowd.seed + first, crowd.seed + first + crowd.pairs)
        yield body(crowd.form, prompts, [scene(crowd.size_px, seed) for seed in seeds])


async def _serve(crowd: Crowd) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=crowd.url, limits=limits, timeout=_TIMEOUT_S) as connection:
        callers = Callers(crowd, connection)
        _say(len(callers.bodies[0].content))
        while line := await asyncio.to_thread(sys.stdin.readline):
            _say(await callers.run(msgspec.json.decode(line, type=Errand)))


def _say(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


def main() -> None:
    """Serve whoever started this."""
    crowd = msgspec.json.decode(sys.stdin.readline(), type=Crowd)
    os.sched_setaffinity(0, crowd.cores)
    asyncio.run(_serve(crowd))


if __name__ == "__main__":
    main()
