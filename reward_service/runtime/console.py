"""Console of both programs: as wide as the terminal, and without a limit in a file or a pipe."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from rich.console import Console

#: Columns away from a terminal: wider than any table, and rich pads none to it.
UNLIMITED = 1_000_000


def open_console() -> Console:
    """Return a console on standard output.

    Only a terminal has a width: the variable `COLUMNS`, which shells export for it, is not that of a file.
    A width of 0 means that it is not known.
    """
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=shutil.get_terminal_size().columns if on_terminal else UNLIMITED)


def show_whole_summaries(command: Any) -> None:
    """Let the help of a group show each command's first paragraph, which is cut to the width otherwise."""
    for inner in getattr(command, "commands", {}).values():
        inner.short_help = " ".join((inner.help or "").split("\n\n")[0].split())
        show_whole_summaries(inner)
