"""Attacks by one client beside another: `python -m tests.support.attacks [NAME...] --seconds N`.

    python -m tests.support.attacks                                   # all of them: about half an hour
    python -m tests.support.attacks png-13-flat chunks-of-one-byte --seconds 5
    python -m tests.support.attacks --group prompts --write benchmarks/results/attacks.md

The miniature's service runs as a program of its own. Beside each attack, one client scores a pair of 64 px
and another requests `/health/live`, both every 50 ms on a kept connection; what counts is the longest wait.
Half of the attack's requests are abandoned after a second. The sender's CPU time is reported: it takes the
cores of the service. The exit status is 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.common.results import Report, Rows, machine
from tests.support.attacks.catalog import Attack, attacks
from tests.support.attacks.measuring import ENDED_S, LIGHT_S, LIVE_S, MEMORY, Result, end_during, measure
from tests.support.attacks.program import COMMAND, running

_NOTHING, _AT_THE_END = "nothing", "jpeg-6000-scans"


@dataclass
class AttackReport(Report):
    """Results of all attacks, in a table for each group."""

    name = "attacks"
    titles: ClassVar = {
        "machine": "# Attacks\n",
        "bounds": "\n## Bounds\n\n"
        "A client scores one pair of 64 px (light) and another requests `/health/live` (live), both every\n"
        '50 ms on a kept connection; the longest wait counts, in seconds. "delay" is how late these clients\n'
        'themselves woke up, which is part of the noise. "sender" is the share of one core that the attack\n'
        "itself took; it runs on the same cores. Memory is that of all processes of the service: before, at\n"
        'its highest, and after it had at most 20 s to settle. "busy" is how long the service still worked\n'
        "when the sender had gone.\n",
        "images": "\n## Images\n",
        "bodies": "\n## Bodies\n",
        "connections": "\n## Connections\n",
        "prompts": "\n## Prompts\n",
    }
    bounds: Rows = field(default_factory=list)
    images: Rows = field(default_factory=list)
    bodies: Rows = field(default_factory=list)
    connections: Rows = field(default_factory=list)
    prompts: Rows = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = _options(arguments)
    results: list[tuple[Attack | None, Result]] = []
    with ExitStack() as stack:
        command = shlex.split(options.command)
        for attack, result in _measured(stack, _chosen(options), options.seconds, command):
            results.append((attack, result))
            line = ", ".join(f"{key} {value}" for key, value in _row(result).items() if key != "attack")
            print(f"{result.name}: {line}", file=sys.stderr, flush=True)
        ended_s = end_during(stack.enter_context(running(command)), _AT_THE_END)
    report = _report(results, ended_s, sys.argv[1:] if arguments is None else arguments)
    print(report.markdown())
    if options.write:
        options.write.write_text(report.markdown() + "\n")
    raise SystemExit(ended_s > ENDED_S or any(result.missed() for _, result in results))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks; all of them if none is named")
    parser.add_argument("--group", action="append", default=[], help="images, bodies, connections or prompts")
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of each attack")
    parser.add_argument("--command", default=shlex.join(COMMAND), help="program to attack")
    parser.add_argument("--write", type=Path, help="file for the report")
    parser.add_argument("--list", action="store_true", help="print the attacks' names and end")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(attacks()))
        raise SystemExit(0)
    if unknown := [name for name in options.names if name not in attacks()]:
        parser.error(f"unknown attack {unknown[0]}; --list prints the names")
    return options


def _chosen(options: argparse.Namespace) -> list[Attack]:
    found = attacks()
    if options.names or options.group:
        wanted = {*options.names, *(name for name, each in found.items() if each.group in options.group)}
        return [attack for name, attack in found.items() if name in wanted]
    return list(found.values())


def _measured(
    stack: ExitStack, chosen: Sequence[Attack], seconds: float, command: Sequence[str]
) -> Iterator[tuple[Attack | None, Result]]:
    """Yield the result of no attack, and of each; a service that is not ready afterwards is started anew."""
    program = stack.enter_context(running(command))
    for attack in (None, *chosen):
        result = measure(program, attack.name if attack else _NOTHING, seconds)
        yield attack, result
        if not result.ready:
            stack.close()
            program = stack.enter_context(running(command))
    stack.close()


def _report(
    results: Sequence[tuple[Attack | None, Result]], ended_s: float, arguments: Sequence[str]
) -> AttackReport:
    head = machine(torch.device("cpu"), torch.float32, None, _command(arguments))
    missing = [result for _, result in results if result.missed()]
    report = AttackReport(
        {
            **{key: value for key, value in head.items() if key not in ("layers", "trunk dtype", "threads")},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": "the miniature",
            "attacks": sum(attack is not None for attack, _ in results),
            "bounds missed by": len(missing),
        },
        bounds=_bounds_rows(results, ended_s),
    )
    for attack, result in results:
        if attack is not None:
            getattr(report, attack.group).append(_row(result))
    return report


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "tests.support.attacks", *arguments])


def _bounds_rows(results: Sequence[tuple[Attack | None, Result]], ended_s: float) -> Rows:
    alone = results[0][1]
    worst = [result for attack, result in results if attack is not None] or [alone]
    measures: dict[str, tuple[float, Callable[[Result], float]]] = {
        "light, s": (LIGHT_S, lambda result: result.light.longest_s),
        "live, s": (LIVE_S, lambda result: result.live.longest_s),
        "memory after ÷ before": (MEMORY, lambda result: result.after_mb / result.before_mb),
    }
    rows: Rows = [
        {
            "what": what,
            "bound": bound,
            "without an attack": round(measure_of(alone), 3),
            "worst": round(max(map(measure_of, worst)), 3),
        }
        for what, (bound, measure_of) in measures.items()
    ]
    at_the_end = {"what": f"SIGTERM during {_AT_THE_END}, s", "bound": ENDED_S, "without an attack": ""}
    return [*rows, {**at_the_end, "worst": round(ended_s, 1)}]


def _row(result: Result) -> dict[str, Any]:
    return {
        "attack": result.name,
        "verdict": "passed" if not result.missed() else "MISSED: " + ", ".join(result.missed()),
        "light, s": f"{result.light.longest_s:.2f}",
        "live, s": f"{result.live.longest_s:.3f}",
        "delay, s": f"{max(result.light.late_s, result.live.late_s):.3f}",
        "light answers": _counts(result.light.answers),
        "attack's answers": _counts(result.sent.answers),
        "sender, %": round(100 * result.sent.cpu_s / result.seconds),
        "memory, MB": f"{result.before_mb:.0f}, {result.peak_mb:.0f}, {result.after_mb:.0f}",
        "busy, s": f"{result.busy_s:.1f}",
    }


def _counts(answers: dict[str, int]) -> str:
    return ", ".join(f"{answer}: {number:,}" for answer, number in sorted(answers.items())) or "none"


if __name__ == "__main__":
    main()
