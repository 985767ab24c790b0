"""Test of the service with hundreds of thousands of corrupted requests: no crash, no 5xx, no memory growth.

    python -m tests.support.faults.mutations --count 200000 --seed 0 [--out benchmarks/results/mutations.md]

All requests are parsed and decoded; one in twenty also goes through the whole application, and one in a
hundred through a socket, where images that can still be decoded are scored by the miniature's engine. The
exit status is 1 if anything failed.
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
from reward_service.requests.parsing import RequestParser
from tests.support.faults.mutants import Body, mutants
from tests.support.service.serving import running_server

EVERY_APPLICATION, EVERY_SOCKET = 20, 100
#: Growth that fragments of the heap may cause.
LEVEL_MB = 24.0
_WARM_UP = 0.2
OK, SERVER_ERROR = 200, 500


@dataclass
class Findings:
    """Outcomes of the requests by entry point, failures, and memory in MB."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    warm_mb: float = 0.0
    end_mb: float = 0.0
    seconds: float = 0.0

    def record(self, entry: str, status: int, code: str, body: Body) -> None:
        """Record an outcome."""
        self.outcomes[entry, f"{status} {code}".strip()] += 1
        if status >= SERVER_ERROR or (status != OK and code not in PROBLEM_CODES):
            self.failures.append(f"{entry}: {status} {code} for {body[0]} {body[1].hex()[:2000]}")

    @property
    def passed(self) -> bool:
        """True if nothing failed and the memory did not grow."""
        return not self.failures and self.end_mb - self.warm_mb < LEVEL_MB


def resident_mb() -> float:
    """Return the resident memory after free memory is returned to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def send_mutants(
    config: ServiceConfig, url: str, application: object, count: int, seed: int
) -> Findings:
    """Send `count` corrupted requests; return their outcomes."""
    found, make, parser = Findings(), mutants(seed), RequestParser(config)
    begun = time.monotonic()
    inside = httpx.ASGITransport(app=application, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with (
        httpx.AsyncClient(transport=inside, base_url="http://inside") as in_process,
        httpx.AsyncClient(base_url=url, timeout=60) as outside,
    ):
        entries = {
            "application": lambda body: _post(in_process, body),
            "socket": lambda body: _post(outside, body),
        }
        for number in range(count):
            if number == int(_WARM_UP * count):
                found.warm_mb = resident_mb()
            body = make()
            found.record("parser", *_parse(parser, body), body)
            for entry, every in (("application", EVERY_APPLICATION), ("socket", EVERY_SOCKET)):
                if number % every == 0:
                    await _send(found, entry, entries[entry], body)
    found.end_mb, found.seconds = resident_mb(), time.monotonic() - begun
    return found


async def _send(
    found: Findings, entry: str, post: Callable[[Body], Awaitable[tuple[int, str]]], body: Body
) -> None:
    try:
        status, code = await post(body)
    except httpx.HTTPError as error:
        status, code = 599, repr(error)
    found.record(entry, status, code, body)


def _parse(parser: RequestParser, body: Body) -> tuple[int, str]:
    try:
        parser(body[1], body[0])
    except ProblemError as error:
        return int(error.status), error.code
    except Exception as error:  # noqa: BLE001 - this is what the test looks for
        return 599, repr(error)[:300]
    return 200, ""


async def _post(client: httpx.AsyncClient, body: Body) -> tuple[int, str]:
    response = await client.post("/score", content=body[1], headers={"Content-Type": body[0]})
    return response.status_code, "" if response.is_success else str(response.json().get("code"))


def run(count: int, seed: int) -> Findings:
    """Send corrupted requests to a service of the miniature; return their outcomes."""
    config = load_config(overrides=["threads=1"])
    with running_server(config, build_engine(config)) as (server, port):
        application = server.config.app
        return asyncio.run(send_mutants(config, f"http://127.0.0.1:{port}", application, count, seed))


def report(found: Findings, count: int, seed: int) -> str:
    """Return the findings as Markdown."""
    entries = ("parser", "application", "socket")
    statuses = sorted({status for _, status in found.outcomes})
    rows = [
        f"| {status} | " + " | ".join(f"{found.outcomes[entry, status]:,}" for entry in entries) + " |"
        for status in statuses
    ]
    verdict = "passed" if found.passed else f"FAILED: {len(found.failures)} failures"
    command = f"python -m tests.support.faults.mutations --count {count} --seed {seed}"
    lines = [
        "# Corrupted requests",
        "",
        f"`{command}`: {count:,} mutations of valid JSON, msgpack and multipart",
        "bodies and of PNG, JPEG, WebP and raw images in them, to the parser; some of them to the whole",
        f"application and through a socket too. Python {platform.python_version()}, {found.seconds:.0f} s.",
        "",
        f"Verdict: {verdict}; no crash. Resident memory: {found.warm_mb:.1f} MB after the first fifth,",
        f"{found.end_mb:.1f} MB at the end.",
        "",
        "| outcome | " + " | ".join(entries) + " |",
        "|---|" + "---:|" * len(entries),
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
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
    sys.exit(0 if found.passed else 1)


if __name__ == "__main__":
    main()
