"""Command-line options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from trainer.config import ConfigError
from trainer.runtime.distributed import launched_world_size

ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file; its trainer section is read.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, such as update.learning_rate=1e-4."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The same without --set.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Same as seed=N.")]
RunOption = Annotated[
    Path | None, typer.Option("--run", help="Run folder; by default the next free in runs_dir.")
]


def refuse_several(command: str) -> None:
    """Refuse to run in a job of several processes.

    Raises:
        ConfigError: a launcher has started several
    """
    if launched_world_size() > 1:
        raise ConfigError(f"{command} runs in one process; start it without a launcher")
