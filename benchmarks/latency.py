"""Latency on a kept connection: the service against a bare uvicorn application in the same run.

    python -m benchmarks.latency --out benchmarks/results/latency-cpu    # about a minute

Each round asks every server in turn, over one connection to each, so that whatever else the machine does
meets all of them. The medians of the rounds count. Both servers run on asyncio and parse with httptools.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import socket
import statistics
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.common.results import (
    Report,
    Rows,
    exit_with_error,
    machine,
    positive,
    visible_arguments,
)

#: Most that `/health/live` may take, as a multiple of the bare application.
TARGET = 1.5
_REQUESTS = 20
_START_S = 120.0
_BARE = """
import sys, uvicorn
async def app(scope, receive, send):
    headers = [(b"content-type", b"application/json"), (b"content-length", b"17")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"status":"live"}'})
options = {"loop": "asyncio", "http": "httptools", "lifespan": "off", "log_config": None}
uvicorn.run(app, port=int(sys.argv[1]), timeout_keep_alive=600, **options)
"""


@dataclass
class LatencyReport(Report):
    """Results of the latency benchmark."""

    name = "latency"
    titles: ClassVar = {
        "machine": "# Latency on a kept connection\n",
        "latency": "\n## One request at a time\n\n"
        "One `http.client` connection to each server, its own time included; milliseconds. `/score` is one\n"
        "pair of 64×64 of the miniature as raw pixels, its prompt cached.\n",
    }
    latency: Rows = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; exit with status 2 if the target is missed."""
    options = _options(arguments)
    given = arguments if arguments is not None else sys.argv[1:]
    command = shlex.join(["python", "-m", "benchmarks.latency", *visible_arguments(given)])
    report = LatencyReport(machine(torch.device("cpu"), torch.float32, None, command))
    report.latency = measure(options.rounds)
    print(report.markdown())
    if options.out is not None:
        Path(f"{options.out}.md").write_text(report.markdown() + "\n")
        Path(f"{options.out}.json").write_text(report.json() + "\n")
    ratio = report.latency[1]["of bare"]
    if ratio > TARGET:
        exit_with_error(
            "latency", f"/health/live takes {ratio} times the bare application, more than {TARGET}"
        )


def measure(rounds: int) -> Rows:
    """Return a row for the bare application, `/health/live` and `/score`.

    Args:
        rounds: of 20 requests to each
    """
    service = [sys.executable, "-m", "reward_service", "serve", "--set", "threads=1", "--port"]
    pixels = b64encode(bytes(64 * 64 * 3)).decode()
    image = {"data": pixels, "format": "raw", "shape": [64, 64, 3]}
    pair = json.dumps({"items": [{"prompt": "a red circle", "image": image}]})
    with ExitStack() as stack:
        bare = stack.enter_context(_connection([sys.executable, "-c", _BARE], "/"))
        own = stack.enter_context(_connection(service, "/health/ready"))
        probes: dict[str, tuple[http.client.HTTPConnection, str, str | None]] = {
            "bare application": (bare, "GET", None),
            "/health/live": (own, "GET", None),
            "/score": (own, "POST", pair),
        }
        medians: dict[str, list[float]] = {name: [] for name in probes}
        for _ in range(rounds + 1):
            for name, (connection, method, body) in probes.items():
                path = name if name.startswith("/") else "/"
                times = [_time(connection, method, path, body) for _ in range(_REQUESTS)]
                medians[name].append(statistics.median(times))
    base = statistics.median(medians["bare application"][1:])
    return [_row(name, found[1:], base) for name, found in medians.items()]


def _row(name: str, medians: Sequence[float], base: float) -> dict[str, object]:
    median = statistics.median(medians)
    return {
        "request": name,
        "median": round(1000 * median, 3),
        "fastest round": round(1000 * min(medians), 3),
        "slowest round": round(1000 * max(medians), 3),
        "of bare": round(median / base, 2),
    }


def _time(connection: http.client.HTTPConnection, method: str, path: str, body: str | None) -> float:
    begun = time.perf_counter()
    connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        raise RuntimeError(f"{path}: status {response.status}")
    return time.perf_counter() - begun


@contextmanager
def _connection(command: Sequence[str], path: str) -> Iterator[http.client.HTTPConnection]:
    """Run a server with a free port as its last argument; yield a connection once `path` has status 200."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_START_S)
    deadline = time.monotonic() + _START_S
    try:
        while not _responds(connection, path):
            if process.poll() is not None or time.monotonic() > deadline:
                exit_with_error("latency", f"{shlex.join(command[:4])}: the server does not start")
            time.sleep(0.1)
        yield connection
    finally:
        connection.close()
        process.terminate()
        process.wait()


def _responds(connection: http.client.HTTPConnection, path: str) -> bool:
    try:
        _time(connection, "GET", path, None)
    except (OSError, http.client.HTTPException, RuntimeError):
        connection.close()
        return False
    return True


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=50, help="rounds of 20 requests to each (50)")
    parser.add_argument("--out", type=Path, help="file to write, without .md and .json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
