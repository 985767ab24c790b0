"""A long run under mixed load: memory, throughput, and every score held against the engine's own.

    python -m tests.support.faults.soak --minutes 20 --load 0.8 [--out benchmarks/results/soak-cpu.json]

The miniature's service runs in a process of its own. Its capacity for this mix is measured first, by eight
callers who ask again as soon as they are answered; then requests come at random (Poisson) at the given share
of it, whether or not earlier ones are answered. The engine of this process scores every pair once, and every
answer is compared with that within docs/numerics.md's tolerance. Callers and service share the machine.
Exit status 1 if an answer was wrong, missing or not 200.
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
from tests.support.faults.bystander import Truth
from tests.support.faults.calling import sample_image
from tests.support.faults.mutants import FORM

CALLERS, CAPACITY_S, LATEST = 8, 5.0, 2000
OK = 200
_PARTS = 20
_SIDES = ((64, 64), (96, 64), (128, 128), (40, 90))


@dataclass(frozen=True)
class Errand:
    """One request ready to be sent, and which of the known pairs it asks for."""

    client: str
    kind: str
    body: bytes
    rows: tuple[int, ...]


@dataclass
class Findings:
    """What a run showed. `windows`: seconds since the start, resident MB, pairs/s, p50 and p99 in ms."""

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
        """Growth of the resident memory: a straight line through all but the first tenth."""
        kept = np.array(self.windows[len(self.windows) // 10 :])
        return float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0]) * 3600

    @property
    def drift_percent(self) -> float:
        """Change of the throughput from start to end by a straight line, of its mean."""
        kept = np.array(self.windows)
        slope = float(np.polyfit(kept[:, 0], kept[:, 2], 1)[0])
        return 100 * slope * float(kept[-1, 0] - kept[0, 0]) / float(kept[:, 2].mean())

    @property
    def in_order(self) -> bool:
        """Every request was answered, and rightly."""
        return not self.wrong and set(self.answers) == {"200"}


def known() -> tuple[list[Pair], list[Errand]]:
    """The pairs of all errands, and the errands: a trainer's, a curator's, a notebook's and a form's."""
    rng = np.random.default_rng(8)
    pairs: list[Pair] = []
    errands: list[Errand] = []

    def add(client: str, kind: str, made: Sequence[tuple[Pair, bytes | None]]) -> None:
        rows = tuple(range(len(pairs), len(pairs) + len(made)))
        pairs.extend(pair for pair, _ in made)
        errands.append(Errand(client, kind, _body(kind, made), rows))

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
    return pairs, errands


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
    """Sends errands and looks at every answer."""

    def __init__(self, client: httpx.AsyncClient, truth: Truth, errands: Sequence[Errand]) -> None:
        self._client, self._truth, self.errands = client, truth, errands
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.pairs = 0
        self.times_ms: list[float] = []

    async def ask(self, errand: Errand) -> None:
        """One request, from its sending to the comparison of its scores."""
        headers = {"Content-Type": errand.kind, "X-Client-Id": errand.client}
        begun = time.perf_counter()
        try:
            answer = await self._client.post("/v1/score", content=errand.body, headers=headers)
        except httpx.HTTPError as error:
            self.statuses[type(error).__name__] += 1
            return
        self.times_ms.append(1000 * (time.perf_counter() - begun))
        self.statuses[str(answer.status_code)] += 1
        if answer.status_code == OK:
            self.wrong += self._truth.mistakes(errand.rows, decode_response(answer.content, JSON))
            self.pairs += len(errand.rows)

    async def capacity(self) -> float:
        """Pairs a second that callers get who never pause."""
        mix, until = itertools.cycle(self.errands), time.monotonic() + CAPACITY_S

        async def caller() -> None:
            while time.monotonic() < until:
                await self.ask(next(mix))

        begun, before = time.monotonic(), self.pairs
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return (self.pairs - before) / (time.monotonic() - begun)

    async def arrivals(self, pairs_s: float, seconds: float) -> None:
        """Requests at random moments, so many pairs a second on average, whatever becomes of them."""
        rng, open_ = random.Random(9), set[asyncio.Task[None]]()
        mean = sum(len(errand.rows) for errand in self.errands) / len(self.errands)
        begun = due = time.monotonic()
        while (due := due + rng.expovariate(pairs_s / mean)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(open_) >= LATEST:
                self.statuses["not sent: too many open"] += 1
                continue
            task = asyncio.create_task(self.ask(rng.choice(self.errands)))
            open_.add(task)
            task.add_done_callback(open_.discard)
        await asyncio.gather(*open_)

    async def watch(self, pid: int, found: Findings, every_s: float) -> None:
        """Note memory, throughput and latency of each stretch until cancelled."""
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
    """A process's resident memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1000


@contextlib.contextmanager
def service() -> Iterator[tuple[int, str]]:
    """The miniature's, ready; its process id and address."""
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


async def soak(minutes: float, load: float, seed_truth: Truth, errands: Sequence[Errand]) -> Findings:
    """A whole run."""
    found = Findings(minutes, load, f"{platform.machine()}, {os.cpu_count()} cores")
    with service() as (pid, url):
        limits = httpx.Limits(max_connections=LATEST, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            run = Soak(client, seed_truth, errands)
            await run.capacity()  # warms caches, allocators and connections
            found.capacity_pairs_s = await run.capacity()
            found.offered_pairs_s = load * found.capacity_pairs_s
            before, run.statuses = run.pairs, Counter()
            # Stretches of a minute in a long run, twenty in a short one.
            watch = asyncio.create_task(run.watch(pid, found, min(60.0, 60 * minutes / _PARTS)))
            await run.arrivals(found.offered_pairs_s, 60 * minutes)
            watch.cancel()
    found.answers, found.wrong = dict(run.statuses), run.wrong[:100]
    found.pairs = run.pairs - before
    return found


def report(found: Findings) -> str:
    """As Markdown."""
    thin = found.windows[:: max(1, len(found.windows) // _PARTS)]
    rows = [
        f"| {at:.0f} | {mb:.1f} | {speed:.0f} | {p50:.1f} | {p99:.1f} |" for at, mb, speed, p50, p99 in thin
    ]
    lines = [
        "# Soak",
        "",
        f"`python -m tests.support.faults.soak --minutes {found.minutes:g} --load {found.load:g}`",
        f"on {found.machine}, callers and service together; the miniature, mixed requests of 1 to 32 pairs.",
        "",
        "| | |",
        "|---|---|",
        f"| verdict | {'in order' if found.in_order else 'NOT in order'} |",
        f"| capacity, pairs/s | {found.capacity_pairs_s:.0f} |",
        f"| offered, pairs/s | {found.offered_pairs_s:.0f} |",
        f"| answers by status | {', '.join(f'{key}: {count:,}' for key, count in found.answers.items())} |",
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
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--out", type=Path, help="a .json file; the report goes beside it as .md")
    options = parser.parse_args()
    pairs, errands = known()
    truth = Truth.of(build_engine(load_config(overrides=["threads=1"])), pairs)
    found = asyncio.run(soak(options.minutes, options.load, truth, errands))
    print(report(found))
    print("\n".join(found.wrong[:20]), file=sys.stderr)
    if options.out:
        numbers = asdict(found) | {"slope_mb_h": found.slope_mb_h, "drift_percent": found.drift_percent}
        options.out.with_suffix(".json").write_text(json.dumps(numbers, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(report(found))
    sys.exit(0 if found.in_order else 1)


if __name__ == "__main__":
    main()
