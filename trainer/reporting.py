"""The `report` command: pages from what runs have left. Nothing here needs torch or a service."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from trainer.compared import COMPARE_FILE, write_comparison
from trainer.config import ConfigError
from trainer.report import write_report


def report_command(runs: Sequence[Path], out: Path | None, *, compare: bool, console: Console) -> None:
    """Write the report of one run, or the comparison of several, and say where.

    Raises ConfigError for arguments that do not fit, StorageError for a folder that is no run.
    """
    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise ConfigError(f"{out}: cannot be written; name a file in a folder that exists")
    if compare:
        written = write_comparison(runs, out or Path(COMPARE_FILE))
    elif len(runs) == 1:
        written = write_report(runs[0], out)
    else:
        raise ConfigError(f"report: {len(runs)} runs; add --compare to put them side by side, or name one")
    console.print(f"Report: {written}", soft_wrap=True)
