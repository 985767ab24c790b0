"""Throughput of replicas on one machine: Ray Serve with 1 and 2, against one uvicorn process.

    python -m benchmarks.ray_replicas --out benchmarks/results/ray-cpu    # about 7 minutes, 8 GB
    python -m benchmarks.ray_replicas --quick                             # a quick check that it runs

Every service has one thread. All three arrangements run at the same time and are measured in turn, round
after round, so that disturbances of the machine affect all of them; ratios are taken within a round. Three
devices: the miniature, one layer of ViT-L/14 and of ViT-H/14 with random weights, and one that sleeps, which
stands for a GPU: it leaves the cores to the rest.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch

from benchmarks.common.results import Log, Report, Rows, exit_with_error, machine, visible_arguments
from benchmarks.serving.host import Setup
from benchmarks.serving.processes import (
    BenchmarkError,
    ChildProcess,
    ClientProcess,
    ServiceProcess,
    running_child,
    running_clients,
    running_service,
)
from benchmarks.serving.ray_host import Cluster

UVICORN, ONE, TWO = "uvicorn", "Ray, 1 replica", "Ray, 2 replicas"
_QUIET = ("threads=1", "watch.canary_every_s=86400", "logs.format=json")
_LAYERS = 1


@dataclass(frozen=True)
class Plan:
    """Durations of the benchmark."""

    rounds: int = 5
    seconds: float = 6.0


@dataclass
class ReplicasReport(Report):
    """Pairs a second by device and arrangement."""

    name = "ray"
    titles: ClassVar = {
        "machine": "# Replicas on one machine\n",
        "summary": "\n## Medians of the rounds, and the range of the ratios\n\n"
        "Every service has one thread; clients, Ray's proxy and its other processes share the cores with\n"
        "them. Batches of 64 pairs (full-size towers: 4) of 256×256 as raw msgpack, 6 open requests.\n",
        "rounds": "\n## Rounds, pairs/s\n",
    }
    summary: Rows = field(default_factory=list)
    rounds: Rows = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    log: Log = partial(print, file=sys.stderr, flush=True)
    plan = Plan(2, 1.0) if options.quick else Plan()
    command = shlex.join(
        ["python", "-m", "benchmarks.ray_replicas", *visible_arguments(arguments or sys.argv[1:])]
    )
    report = ReplicasReport(machine(torch.device("cpu"), torch.float32, None, command) | {"threads": 1})
    report.machine["layers"] = f"{_LAYERS} in the full-size towers"
    try:
        for device, (setup, pairs) in _devices().items():
            rows = list(_measure(device, setup, pairs, plan, log))
            report.rounds += rows
            report.summary.append(_summary(device, rows))
            if options.out is not None:
                _write(report, options.out)
    except BenchmarkError as error:
        exit_with_error("ray_replicas", str(error))
    print(report.markdown())


def _devices() -> dict[str, tuple[Setup, int]]:
    cores = sorted(os.sched_getaffinity(0))
    full = [*_QUIET, "evaluators.hpsv2.enabled=false", "canary=null", "batch_pairs=4"]
    return {
        "the miniature": (Setup([*_QUIET], cores), 64),
        "full-size towers": (Setup(full, cores, full=True, layers=_LAYERS), 4),
        "sleeps 0.5 s a batch": (Setup([*_QUIET, "canary=null"], cores, sleep_s=0.5), 64),
    }


def _measure(device: str, setup: Setup, pairs: int, plan: Plan, log: Log) -> Iterator[dict[str, Any]]:
    log(f"starting the services: {device}")
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        base = stack.enter_context(_running_cluster(setup))
        services = {
            UVICORN: stack.enter_context(running_service(setup)),
            ONE: ServiceProcess(base[0], f"{base[1]}/1"),
            TWO: ServiceProcess(base[0], f"{base[1]}/2"),
        }
        options: dict[str, Any] = {"pairs": pairs, "bodies": 4}
        clients = {
            name: stack.enter_context(running_clients(service, ["trainer"], cores, **options))
            for name, service in services.items()
        }
        for number in range(-1, plan.rounds):  # the first one fills the prompt cache
            log(f"{device}: round {number + 1} of {plan.rounds}")
            row = {name: _rate(each, pairs, plan.seconds) for name, each in clients.items()}
            if number >= 0:
                yield {"device": device, "round": number + 1} | row


def _rate(clients: ClientProcess, pairs: int, seconds: float) -> float:
    results = clients.run(in_flight=6, seconds=seconds)
    if failed := [each.status for each in results if each.status != 200]:
        raise BenchmarkError(f"{len(failed)} of {len(results)} requests were not scored: {failed[0]}")
    took_s = max(each.ended_s for each in results) - min(each.sent_s for each in results)
    return round(pairs * len(results) / took_s, 2)


def _summary(device: str, rows: Rows) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device}
    found |= {f"{name}, pairs/s": round(median(row[name] for row in rows), 1) for name in (UVICORN, ONE, TWO)}
    for name, above, below in (
        ("Ray 1 ÷ uvicorn", ONE, UVICORN),
        ("Ray 2 ÷ Ray 1", TWO, ONE),
        ("Ray 2 ÷ uvicorn", TWO, UVICORN),
    ):
        ratios = sorted(row[above] / row[below] for row in rows)
        found[name] = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return found


@contextmanager
def _running_cluster(setup: Setup) -> Iterator[tuple[ChildProcess, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with running_child("benchmarks.serving.ray_host", Cluster(setup, [1, 2], port)) as started:
        yield started, started.read_line().decode().split()[-1]


def _write(report: Report, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.md").write_text(report.markdown() + "\n")
    Path(f"{out}.json").write_text(report.json() + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ray_replicas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--out", type=Path, help="file to write, without .md and .json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
