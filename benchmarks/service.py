"""Service benchmark: overhead, latency under load, and fairness among clients.

    python -m benchmarks.service --out benchmarks/results/service-cpu    # about 15 minutes, 8 GB
    python -m benchmarks.service --quick                                 # a quick check that it runs
    python -m benchmarks.service --parts b,d

(a) throughput at saturation against the engine alone, with random towers of ViT-L/14 and ViT-H/14, (b) CPU
time by format of the request, (c) latency against offered load, (d) a light client beside heavy ones. Service
and clients are processes of their own. Except in (a), which uses all cores, the service is bound to the last
core with one thread, and the clients to the first. The report names the targets that are missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.common.results import Log, Report, Rows, exit_with_error, machine, visible_arguments
from benchmarks.serving import parts
from benchmarks.serving.figures import Verdict
from benchmarks.serving.parts import QUICK, PartResult, Plan
from benchmarks.serving.processes import BenchmarkError

PARTS: dict[str, tuple[str, Callable[[Plan, Sequence[int], Log], PartResult]]] = {
    "a": ("saturation", parts.saturation),
    "b": ("wire", parts.wire),
    "c": ("loads", parts.loads),
    "d": ("sharing", parts.sharing),
}


@dataclass
class ServiceReport(Report):
    """Results of the service benchmark."""

    name = "service"
    titles: ClassVar = {
        "machine": "# Service benchmark\n",
        "verdicts": "\n## Targets\n",
        "saturation": "\n## (a) Throughput at saturation\n\n"
        "Towers of ViT-L/14 and ViT-H/14 with random weights: aesthetic, clip and pickscore. The engine\n"
        "alone scores the same batches as the service again, in the same process, with the same threads,\n"
        "while the service is idle; the two alternate. Prompts are cached in both. The service's time is\n"
        "from the first byte sent to the last response.\n",
        "wire": "\n## (b) CPU time of the service by format\n\n"
        "The miniature, batches of 64 pairs of 256×256, one request at a time. Receiving, parsing,\n"
        "decoding, queue, response, log and metrics; user and system time. The engine's share is what the\n"
        "device's thread takes within it, with the threads that preprocess images for it and torch's own;\n"
        "the rest of the process's CPU time is the service's.\n",
        "loads": "\n## (c) Latency against offered load\n\n"
        "The miniature with a queue of at most 512 pairs; requests of 4 pairs from 8 clients, arriving at\n"
        "random (Poisson). Latency counts from when a request was due, not from when it was sent; it and\n"
        "the goodput are of the requests that got scores.\n",
        "sharing": "\n## (d) A light client beside heavy ones\n\n"
        "Heavy clients keep 3 requests of 64 pairs open each, all the time. The light one sends single\n"
        "pairs at random times in every second window. The heavy loss compares such a window with its\n"
        "neighbour without the light client, and includes the places in batches that the light pairs take;\n"
        "the median counts.\n",
    }
    verdicts: Rows = field(default_factory=list)
    saturation: Rows = field(default_factory=list)
    wire: Rows = field(default_factory=list)
    loads: Rows = field(default_factory=list)
    sharing: Rows = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    log: Log = partial(print, file=sys.stderr, flush=True)
    cores = sorted(os.sched_getaffinity(0))
    plan = replace(QUICK if options.quick else Plan(), full_dtype=options.dtype)
    command = shlex.join(
        ["python", "-m", "benchmarks.service", *visible_arguments(arguments or sys.argv[1:])]
    )
    dtype = getattr(torch, options.dtype)
    report = ServiceReport(machine(torch.device("cpu"), dtype, plan.full_layers, command))
    if options.out is not None:
        _keep_other_parts(report, options)
    for part in options.parts:
        table, measure = PARTS[part]
        try:
            rows, verdicts = measure(plan, cores, log)
        except BenchmarkError as error:
            exit_with_error("service", str(error))
        setattr(report, table, rows)
        report.verdicts += map(_row, verdicts)
        report.verdicts.sort(key=lambda row: str(row["verdict"])[:3])
        for verdict in verdicts:
            log(str(verdict))
        if options.out is not None:  # now: the next part may take minutes
            _write(report, options.out)
    print(report.markdown())


def _keep_other_parts(report: ServiceReport, options: argparse.Namespace) -> None:
    """Keep the results of an earlier run for the parts that this run leaves out."""
    earlier = Path(f"{options.out}.json")
    found = json.loads(earlier.read_text()) if earlier.exists() else {}
    for part in PARTS.keys() - set(options.parts):
        table = PARTS[part][0]
        setattr(report, table, found.get(table, []))
        report.verdicts += [
            row for row in found.get("verdicts", []) if row["verdict"].startswith(f"({part})")
        ]


def _row(verdict: Verdict) -> dict[str, str]:
    return {"verdict": str(verdict)}


def _write(report: Report, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.md").write_text(report.markdown() + "\n")
    Path(f"{out}.json").write_text(report.json() + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="service", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", type=_parts, default=list(PARTS), help="parts to measure, of a,b,c,d (all)"
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; one layer in (a)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="dtype of the trunks in (a) (bfloat16)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write, without .md and .json; parts that are not measured keep their earlier results",
    )
    return parser.parse_args(arguments)


def _parts(text: str) -> list[str]:
    chosen = text.split(",")
    if not set(chosen) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"choose from {','.join(PARTS)}, separated by commas")
    return chosen


if __name__ == "__main__":
    main()
