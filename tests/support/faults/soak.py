"""Long run under mixed load: memory, throughput, and a comparison of every score with the engine's own.

    python -m tests.support.faults.soak --minutes 20 --load 0.8 [--out benchmarks/results/soak-cpu.json]

The miniature's service runs in a process of its own. Its capacity for this mix is measured first, by eight
clients that send the next request as soon as they receive a response; then requests arrive as a Poisson
process at the given fraction of the capacity, whether or not earlier ones are finished. The engine of this
process scores every pair once, and the scores of every response are compared with its own, within the
tolerances of docs/numerics.md. Clients and service share the machine. The exit status is 1 if a response was
wrong, missing or not a 200.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import msgspec
import numpy as np

from reward_service.config import load_config
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair
from reward_service.images import decode
from reward_service.protocol import JSON, MSGPACK, decode_response
from tests.support.faults.bystander import ExpectedScores
from tests.support.faults.mutants import FORM
from tests.support.faults.requests import sample_image

CLIENTS, CAPACITY_S, MAX_OPEN = 8, 5.0, 2000
OK = 200
_PARTS = 20
_SIDES = ((64, 64), (96, 64), (128, 128), (40, 90))


@dataclass(frozen=True)
class PreparedRequest:
    """Request ready to be sent, and the rows of its pairs among the known pairs."""

    client: str
    kind: str
    body: bytes
    rows: tuple[int, ...]


@dataclass
class Findings:
    """Results of a run. `windows`: seconds since the start, resident MB, pairs/s, p50 and p99 in ms."""

    minutes: float
    load: float
    machine: str
    capacity_pairs_s: float = 0.0
    offered_pairs_s: float = 0.0
    answers: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    wrong: list[str] = field(default_factory=list)
    windows: list[tuple[float, float, float, float, float]] = field(default_factory=list)

    @property
    def slope_mb_h(self) -> float:
        """Growth of the resident memory in MB/h, by a line fitted to all but the first tenth."""
        kept = np.array(self.windows[len(self.windows) // 10 :])
        return float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0]) * 3600

    @property
    def drift_percent(self) -> float:
        """Change of the throughput over the run by a fitted line, in percent of its mean."""
        kept = np.array(self.windows)
        slope = float(np.polyfit(kept[:, 0], kept[:, 2], 1)[0])
        return 100 * slope * float(kept[-1, 0] - kept[0, 0]) / float(kept[:, 2].mean())

    @property
    def passed(self) -> bool:
        """True if every request got a 200 with correct scores."""
        return not self.wrong and set(self.answers) == {"200"}


def known() -> tuple[list[Pair], list[PreparedRequest]]:
    """Return the known pairs and the requests for them, as of a trainer, a curator, a notebook and a form."""
    rng = np.random.default_rng(8)
    pairs: list[Pair] = []
    requests: list[PreparedRequest] = []

    def add(client: str, kind: str, made: Sequence[tuple[Pair, bytes | None]]) -> None:
        rows = tuple(range(len(pairs), len(pairs) + len(made)))
        pairs.extend(pair for pair, _ in made)
        requests.append(PreparedRequest(client, kind, _body(kind, made), rows))

    for number in range(24):
        noise = [
            Pair(f"{number} things, {place}", rng.integers(0, 256, (*_SIDES[place % 4], 3), np.uint8))
            for place in range(32)
        ]
        add("trainer", MSGPACK, [(pair, None) for pair in noise])
        for client, kind, form, count in (
            ("curator", JSON, "PNG", 6), ("notebook", JSON, "JPEG", 1), ("form", FORM, "WEBP", 1),
            ("notebook", MSGPACK, "PNG", 1), ("evaluation", MSGPACK, "JPEG", 12),
        ):  # fmt: skip
            files = [sample_image(form, (32 + 3 * place, 48 + number)) for place in range(count)]
            add(client, kind, [(Pair(f"{form} {number}", decode(file).rgb), file) for file in files])
    return pairs, requests


def _body(kind: str, made: Sequence[tuple[Pair, bytes | None]]) -> bytes:
    if kind == FORM:
        ((pair, file),) = made
        start = b'--frontier\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        assert file is not None
        return start % (b"prompt", pair.prompt.encode()) + start % (b"image", file) + b"--frontier--\r\n"
    images = [
        {"data": pair.image.tobytes(), "format": "raw", "shape": pair.image.shape}
        if file is None
        else {"data": file}
        for pair, file in made
    ]
    items = [{"prompt": pair.prompt, "image": image} for (pair, _), image in zip(made, images, strict=True)]
    encode = msgspec.msgpack.encode if kind == MSGPACK else msgspec.json.encode
    return encode({"items": items})


class Soak:
    """Sender of requests; checks every response."""

    def __init__(
        self, client: httpx.AsyncClient, expected: ExpectedScores, requests: Sequence[PreparedRequest]
    ) -> None:
        self._client, self._expected, self.requests = client, expected, requests
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.pairs = 0
        self.times_ms: list[float] = []

    async def send(self, request: PreparedRequest) -> None:
        """Send a request and compare the scores of its response."""
        headers = {"Content-Type": request.kind, "X-Client-Id": request.client}
        begun = time.perf_counter()
        try:
            response = await self._client.post("/v1/score", content=request.body, headers=headers)
        except httpx.HTTPError as error:
            self.statuses[type(error).__name__] += 1
            return
        self.times_ms.append(1000 * (time.perf_counter() - begun))
        self.statuses[str(response.status_code)] += 1
        if response.status_code == OK:
            self.wrong += self._expected.mistakes(request.rows, decode_response(response.content, JSON))
            self.pairs += len(request.rows)

    async def capacity(self) -> float:
        """Measure the pairs per second of clients that never pause."""
        mix, until = itertools.cycle(self.requests), time.monotonic() + CAPACITY_S

        async def client() -> None:
            while time.monotonic() < until:
                await self.send(next(mix))

        begun, before = time.monotonic(), self.pairs
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return (self.pairs - before) / (time.monotonic() - begun)

    async def arrivals(self, pairs_s: float, seconds: float) -> None:
        """Send requests at random times, on average `pairs_s` pairs per second, without waiting."""
        rng, open_ = random.Random(9), set[asyncio.Task[None]]()
        mean = sum(len(request.rows) for request in self.requests) / len(self.requests)
        begun = due = time.monotonic()
        while (due := due + rng.expovariate(pairs_s / mean)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(open_) >= MAX_OPEN:
                self.statuses["not sent: too many open"] += 1
                continue
            task = asyncio.create_task(self.send(rng.choice(self.requests)))
            open_.add(task)
            task.add_done_callback(open_.discard)
        await asyncio.gather(*open_)

    async def watch(self, pid: int, found: Findings, every_s: float) -> None:
        """Record memory, throughput and latency of each window until cancelled."""
        begun = last = time.monotonic()
        while True:
            before = self.pairs
            self.times_ms.clear()
            await asyncio.sleep(every_s)
            now = time.monotonic()
            p50, p99 = np.percentile(self.times_ms or [0.0], [50, 99])
            speed = (self.pairs - before) / (now - last)
            row = (now - begun, resident_mb(pid), speed, float(p50), float(p99))
            found.windows.append(tuple(round(number, 2) for number in row))  # type: ignore[arg-type]
            last = now


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1000


@contextlib.contextmanager
def service() -> Iterator[tuple[int, str]]:
    """Run a ready service of the miniature; yields its process ID and address."""
    command = [sys.executable, "-m", "reward_service", "serve", "--port", "0", "--set", "threads=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert running.stdout is not None
        url = running.stdout.readline().split()[-1]
        while httpx.get(f"{url}/health/ready").status_code != OK:
            time.sleep(0.1)
        yield running.pid, url
        running.terminate()
        assert running.wait(60) == 0
    finally:
        running.kill()
        running.communicate()


async def soak(
    minutes: float, load: float, expected: ExpectedScores, requests: Sequence[PreparedRequest]
) -> Findings:
    """Run the whole test."""
    found = Findings(minutes, load, f"{platform.machine()}, {os.cpu_count()} cores")
    with service() as (pid, url):
        limits = httpx.Limits(max_connections=MAX_OPEN, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            run = Soak(client, expected, requests)
            await run.capacity()  # warms caches, allocators and connections
            found.capacity_pairs_s = await run.capacity()
            found.offered_pairs_s = load * found.capacity_pairs_s
            before, run.statuses = run.pairs, Counter()
            # Windows of a minute in a long run, twenty windows in a short one.
            watch = asyncio.create_task(run.watch(pid, found, min(60.0, 60 * minutes / _PARTS)))
            await run.arrivals(found.offered_pairs_s, 60 * minutes)
            watch.cancel()
    found.answers, found.wrong = dict(run.statuses), run.wrong[:100]
    found.pairs = run.pairs - before
    return found


def report(found: Findings) -> str:
    """Return the findings as Markdown."""
    thin = found.windows[:: max(1, len(found.windows) // _PARTS)]
    rows = [
        f"| {at:.0f} | {mb:.1f} | {speed:.0f} | {p50:.1f} | {p99:.1f} |" for at, mb, speed, p50, p99 in thin
    ]
    lines = [
        "# Soak",
        "",
        f"`python -m tests.support.faults.soak --minutes {found.minutes:g} --load {found.load:g}`",
        f"on {found.machine}, clients and service together; the miniature, mixed requests of 1 to 32 pairs.",
        "",
        "| | |",
        "|---|---|",
        f"| verdict | {'passed' if found.passed else 'FAILED'} |",
        f"| capacity, pairs/s | {found.capacity_pairs_s:.0f} |",
        f"| offered, pairs/s | {found.offered_pairs_s:.0f} |",
        f"| responses by status | {', '.join(f'{key}: {count:,}' for key, count in found.answers.items())} |",
        f"| pairs compared with the engine's own scores | {found.pairs:,} |",
        f"| of them wrong | {len(found.wrong)} |",
        f"| memory slope, MB/h | {found.slope_mb_h:+.1f} |",
        f"| throughput drift over the run | {found.drift_percent:+.1f} % |",
        "",
        "| s | resident MB | pairs/s | p50 ms | p99 ms |",
        "|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--out", type=Path, help="a .json file; the report goes beside it as .md")
    options = parser.parse_args()
    pairs, requests = known()
    expected = ExpectedScores.of(build_engine(load_config(overrides=["threads=1"])), pairs)
    found = asyncio.run(soak(options.minutes, options.load, expected, requests))
    print(report(found))
    print("\n".join(found.wrong[:20]), file=sys.stderr)
    if options.out:
        numbers = asdict(found) | {"slope_mb_h": found.slope_mb_h, "drift_percent": found.drift_percent}
        options.out.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(report(found))
    sys.exit(0 if found.passed else 1)


if __name__ == "__main__":
    main()
