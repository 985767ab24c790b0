"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn


def shown(arguments: Sequence[str]) -> list[str]:
    """The command line without the folder of the results, which is a matter of the machine."""
    places = [place for place, argument in enumerate(arguments) if argument in ("--output", "--out")]
    hidden = {place + step for place in places for step in (0, 1)}
    return [argument for place, argument in enumerate(arguments) if place not in hidden]


def refuse(program: str, problem: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"{program}: {problem}", file=sys.stderr)
    raise SystemExit(2)


def positive(text: str) -> int:
    """A whole number above 0, as an argument's type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number
