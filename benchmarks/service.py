"""Service benchmark: overhead, latency under load, and fairness among clients.

    python -m benchmarks.service --out benchmarks/results/service-cpu    # about 15 minutes, 8 GB
    python -m benchmarks.service --quick                                 # shows that it runs; says little
    python -m benchmarks.service --parts b,d

(a) throughput at saturation against the engine alone, with random towers of ViT-L/14 and ViT-H/14, (b) CPU
time by form of the request, (c) latency against offered load, (d) a light caller beside heavy ones. Service
and callers are processes of their own. Except in (a), which uses all cores, the service is bound to the last
core with one thread, and whoever calls it to the first. Figures that fall short are reported as such.
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

from benchmarks.common.results import Report, Rows, Say, machine, refuse, shown
from benchmarks.serving import parts
from benchmarks.serving.figures import Verdict
from benchmarks.serving.parts import QUICK, Found, Plan
from benchmarks.serving.processes import FailedError

PARTS: dict[str, tuple[str, Callable[[Plan, Sequence[int], Say], Found]]] = {
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
        "verdicts": "\n## What is asked, and what is found\n",
        "saturation": "\n## (a) Throughput at saturation\n\n"
        "Towers of ViT-L/14 and ViT-H/14 with random weights: aesthetic, clip and pickscore. The engine\n"
        "alone scores the very batches of the service again, in the same process, with the same threads,\n"
        "while the service is idle; the two alternate. Prompts are cached in both. The service's time is\n"
        "from the first byte sent to the last answer.\n",
        "wire": "\n## (b) CPU time of the service by form\n\n"
        "The miniature, batches of 64 pairs of 256×256, one request at a time. Receiving, parsing,\n"
        "decoding, queue, answer, log and metrics; user and system time. The engine's share is what the\n"
        "device's thread takes within it, with the threads that prepare images for it and torch's own;\n"
        "the rest of the process's CPU time is the service's.\n",
        "loads": "\n## (c) Latency against offered load\n\n"
        "The miniature with a queue of at most 512 pairs; requests of 4 pairs from 8 clients, arriving by\n"
        "chance (Poisson). Latency counts from when a request was due, not from when it was sent, and is of\n"
        "those answered with scores; goodput is theirs too.\n",
        "sharing": "\n## (d) A light caller beside heavy ones\n\n"
        "Heavy callers keep 3 requests of 64 pairs under way each, all the time. The light one sends single\n"
        "pairs at chance times in every second window. A heavy loss is that of such a window against its\n"
        "neighbour without the light caller, the places in batches that the light pairs take included; the\n"
        "median counts.\n",
    }
    verdicts: Rows = field(default_factory=list)
    saturation: Rows = field(default_factory=list)
    wire: Rows = field(default_factory=list)
    loads: Rows = field(default_factory=list)
    sharing: Rows = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    say: Say = partial(print, file=sys.stderr, flush=True)
    cores = sorted(os.sched_getaffinity(0))
    plan = replace(QUICK if options.quick else Plan(), full_dtype=options.dtype)
    command = shlex.join(["python", "-m", "benchmarks.service", *shown(arguments or sys.argv[1:])])
    dtype = getattr(torch, options.dtype)
    report = ServiceReport(machine(torch.device("cpu"), dtype, plan.full_layers, command))
    if options.out is not None:
        _keep(report, options)
    for part in options.parts:
        table, measure = PARTS[part]
        try:
            rows, verdicts = measure(plan, cores, say)
        except FailedError as error:
            refuse("service", str(error))
        setattr(report, table, rows)
        report.verdicts += map(_row, verdicts)
        report.verdicts.sort(key=lambda row: str(row["verdict"])[:3])
        for verdict in verdicts:
            say(str(verdict))
        if options.out is not None:  # at once: the next part may take minutes
            _write(report, options.out)
    print(report.markdown())


def _keep(report: ServiceReport, options: argparse.Namespace) -> None:
    """Keep the results of an earlier run for the parts that this one leaves out."""
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
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help="of a,b,c,d (all)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; one layer in (a)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the trunks' in (a) (bfloat16)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write, less .md and .json; parts not measured stay as they are there",
    )
    return parser.parse_args(arguments)


def _parts(text: str) -> list[str]:
    chosen = text.split(",")
    if not set(chosen) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"choose from {','.join(PARTS)}, with commas between")
    return chosen


if __name__ == "__main__":
    main()
