"""Damaged requests by the hundred thousand: no crash, no 5xx, and the memory back at its level.

    python -m tests.support.faults.mutations --count 200000 --seed 0 [--out benchmarks/results/mutations.md]

Most go to the intake, which is where bytes are parsed and decoded; one in twenty goes through the whole
application and one in a hundred through a socket as well, where an image that still decodes is scored by the
miniature's engine. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import platform
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from reward_service.config import ServiceConfig, load_config
from reward_service.engine.loading import build_engine
from reward_service.protocol import PROBLEM_CODES, ProblemError
from reward_service.scoring.requests import RequestParser
from tests.support.faults.mutants import Body, mutants
from tests.support.service.serving import running_server

EVERY_APPLICATION, EVERY_SOCKET = 20, 100
#: What fragments of the heap may cost at the end, and what a single request may at any time.
LEVEL_MB = 24.0
_WARM_UP = 0.2
OK, SERVER_ERROR = 200, 500


@dataclass
class Findings:
    """What the requests were answered with, by way in; what must not be, and memory in MB."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    warm_mb: float = 0.0
    end_mb: float = 0.0
    seconds: float = 0.0

    def note(self, way: str, status: int, code: str, body: Body) -> None:
        """One answer."""
        self.answers[way, f"{status} {code}".strip()] += 1
        if status >= SERVER_ERROR or (status != OK and code not in PROBLEM_CODES):
            self.failures.append(f"{way}: {status} {code} for {body[0]} {body[1].hex()[:2000]}")

    @property
    def in_order(self) -> bool:
        """Nothing failed, and the memory is back."""
        return not self.failures and self.end_mb - self.warm_mb < LEVEL_MB


def resident_mb() -> float:
    """Resident memory once what is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def attack(config: ServiceConfig, url: str, application: object, count: int, seed: int) -> Findings:
    """Send so many mutants."""
    found, make, parser = Findings(), mutants(seed), RequestParser(config)
    begun = time.monotonic()
    inside = httpx.ASGITransport(app=application, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with (
        httpx.AsyncClient(transport=inside, base_url="http://inside") as in_process,
        httpx.AsyncClient(base_url=url, timeout=60) as outside,
    ):
        ways = {
            "application": lambda body: _posted(in_process, body),
            "socket": lambda body: _posted(outside, body),
        }
        for number in range(count):
            if number == int(_WARM_UP * count):
                found.warm_mb = resident_mb()
            body = make()
            found.note("intake", *_taken_in(parser, body), body)
            for way, every in (("application", EVERY_APPLICATION), ("socket", EVERY_SOCKET)):
                if number % every == 0:
                    await _ask(found, way, ways[way], body)
    found.end_mb, found.seconds = resident_mb(), time.monotonic() - begun
    return found


async def _ask(
    found: Findings, way: str, post: Callable[[Body], Awaitable[tuple[int, str]]], body: Body
) -> None:
    try:
        status, code = await post(body)
    except httpx.HTTPError as error:
        status, code = 599, repr(error)
    found.note(way, status, code, body)


def _taken_in(parser: RequestParser, body: Body) -> tuple[int, str]:
    try:
        parser(body[1], body[0])
    except ProblemError as error:
        return int(error.status), error.code
    except Exception as error:  # noqa: BLE001 - it is what is looked for
        return 599, repr(error)[:300]
    return 200, ""


async def _posted(client: httpx.AsyncClient, body: Body) -> tuple[int, str]:
    answer = await client.post("/score", content=body[1], headers={"Content-Type": body[0]})
    return answer.status_code, "" if answer.is_success else str(answer.json().get("code"))


def run(count: int, seed: int) -> Findings:
    """The whole attack on a service of the miniature."""
    config = load_config(overrides=["threads=1"])
    with running_server(config, build_engine(config)) as (server, port):
        application = server.config.app
        return asyncio.run(attack(config, f"http://127.0.0.1:{port}", application, count, seed))


def report(found: Findings, count: int, seed: int) -> str:
    """As Markdown."""
    ways = ("intake", "application", "socket")
    statuses = sorted({status for _, status in found.answers})
    rows = [
        f"| {status} | " + " | ".join(f"{found.answers[way, status]:,}" for way in ways) + " |"
        for status in statuses
    ]
    verdict = "in order" if found.in_order else f"NOT in order: {len(found.failures)} failures"
    command = f"python -m tests.support.faults.mutations --count {count} --seed {seed}"
    lines = [
        "# Damaged requests",
        "",
        f"`{command}`: {count:,} mutations of valid JSON, msgpack and multipart",
        "bodies and of PNG, JPEG, WebP and raw images in them, to the intake; some of them to the whole",
        f"application and through a socket too. Python {platform.python_version()}, {found.seconds:.0f} s.",
        "",
        f"Verdict: {verdict}; no crash. Resident memory: {found.warm_mb:.1f} MB after the first fifth,",
        f"{found.end_mb:.1f} MB at the end.",
        "",
        "| answer | " + " | ".join(ways) + " |",
        "|---|" + "---:|" * len(ways),
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = run(options.count, options.seed)
    text = report(found, options.count, options.seed)
    print(text)
    print("\n".join(found.failures[:20]), file=sys.stderr)
    if options.out:
        options.out.write_text(text)
    sys.exit(0 if found.in_order else 1)


if __name__ == "__main__":
    main()
