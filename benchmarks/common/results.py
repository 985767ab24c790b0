"""Report of a benchmark: the machine, then a table for each measurement.

Also helpers that the benchmarks' command lines share.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeAlias

import torch


def visible_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the command line without the output folder, which depends on the machine."""
    places = [place for place, argument in enumerate(arguments) if argument in ("--output", "--out")]
    hidden = {place + step for place in places for step in (0, 1)}
    return [argument for place, argument in enumerate(arguments) if place not in hidden]


def exit_with_error(program: str, problem: str) -> NoReturn:
    """Print one line to stderr and exit with code 2."""
    print(f"{program}: {problem}", file=sys.stderr)
    raise SystemExit(2)


def positive(text: str) -> int:
    """Return the argument as an integer above 0; for use as an argparse type.

    Raises:
        argparse.ArgumentTypeError: the number is below 1
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


Rows: TypeAlias = "list[dict[str, Any]]"
Log: TypeAlias = Callable[[str], None]


@dataclass
class Report:
    """Results of one run; a subclass has a field of rows for each table, and its `titles`."""

    name: ClassVar[str]
    titles: ClassVar[Mapping[str, str]]
    machine: dict[str, Any]

    def json(self) -> str:
        """Return the results as JSON."""
        return json.dumps(asdict(self), indent=2)

    def markdown(self) -> str:
        """Return the results as Markdown, without empty tables."""
        parts = []
        for field, rows in asdict(self).items():
            listed = [{"": key, " ": value} for key, value in rows.items()] if field == "machine" else rows
            parts += [self.titles[field], table(listed)] if listed else []
        return "\n".join(parts)

    def write(self, folder: Path) -> None:
        """Write `NAME-DEVICE.md` and `.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.name}-{self.machine['device']}"
        (folder / f"{stem}.md").write_text(self.markdown() + "\n")
        (folder / f"{stem}.json").write_text(self.json() + "\n")


def machine(device: torch.device, dtype: torch.dtype, layers: int | None, command: str) -> dict[str, Any]:
    """Return the machine's processor, device and versions."""
    packages = ("torch", "open-clip-torch", "transformers", "torchvision", "pillow")
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "command": command,
        "device": device.type,
        **gpu,
        "CPU": _cpu_name(),
        "CPU cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 1),
        "trunk dtype": str(dtype).removeprefix("torch."),
        "layers": "as published" if layers is None else layers,
        **{name: version(name) for name in packages},
    }


@torch.inference_mode()
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *[[str(row[key]) for key in head] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
