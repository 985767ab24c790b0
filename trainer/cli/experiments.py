"""Commands `crossval`, `search` and `report`, and the hidden ones that their worker processes run."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reward_service.runtime.console import open_console
from reward_service.settings import DEFAULT_CONFIG
from trainer.cli.options import ConfigOption, Overrides, SeedOption, SetOption, refuse_several
from trainer.config import (
    ConfigError,
    TrainerConfig,
    command_overrides,
    load_experiment_config,
    load_trainer_config,
    with_values,
)
from trainer.experiments.experiment import Experiment
from trainer.experiments.workers import local_service
from trainer.rl.rewards import ServiceScorer
from trainer.runtime.errors import RunError
from trainer.runtime.parent_watch import end_with_parent


def report_command(runs: Sequence[Path], out: Path | None, *, compare: bool, console: Console) -> None:
    """Write the report of one run, or the comparison of several, and print its path. Needs no torch.

    Raises:
        ConfigError: the arguments contradict each other
        StorageError: a folder is not a run
    """
    # SciPy and Optuna take a second to import: other commands do without.
    from trainer.report.compare import COMPARE_FILE, write_comparison
    from trainer.report.report import write_report

    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise ConfigError(f"{out}: cannot be written; name a file in an existing folder")
    if compare:
        written = write_comparison(runs, out or Path(COMPARE_FILE))
    elif len(runs) == 1:
        written = write_report(runs[0], out)
    else:
        raise ConfigError(f"report: {len(runs)} runs; add --compare to put them side by side, or name one")
    console.print(f"Report: {written}", soft_wrap=True)


FOLDS_CONFIG, TRIALS_CONFIG = "folds/config.yaml", "search/config.yaml"
SERVICE_LOG = "service.log"

commands = typer.Typer(rich_markup_mode=None)

ExperimentOption = Annotated[
    Path | None,
    typer.Option("--run", help="Folder of the experiment. [default: NAME-experiment in runs_dir]"),
]
ServiceOption = Annotated[
    bool, typer.Option("--judge", help="Start a reward service for this command, as `demo` does.")
]


@commands.command()
def crossval(
    config: ConfigOption = DEFAULT_CONFIG,
    search: Annotated[
        bool, typer.Option("--search", help="Search settings first; train with the best.")
    ] = False,
    service: ServiceOption = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Same as crossval.workers=N: folds side by side.")
    ] = None,
    seed: SeedOption = None,
    run: ExperimentOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Train k folds, fit on all of them, measure the test prompts once. Run again to resume."""
    refuse_several("crossval")
    more = [] if workers is None else [f"crossval.workers={workers}"]
    settings = load_experiment_config(config, [*command_overrides(seed, set_, overrides), *more])
    cross_validate_command(settings, run, config if service else None, search=search, console=open_console())


@commands.command()
def search(
    config: ConfigOption = DEFAULT_CONFIG,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Same as search.trials=N.")] = None,
    service: ServiceOption = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Same as search.workers=N: trials side by side.")
    ] = None,
    seed: SeedOption = None,
    run: ExperimentOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Try settings from search.space; measure the best again. Run again to resume or to add a worker."""
    refuse_several("search")
    counts = {"search.trials": trials, "search.workers": workers}
    more = [f"{key}={count}" for key, count in counts.items() if count is not None]
    settings = load_experiment_config(config, [*command_overrides(seed, set_, overrides), *more])
    search_command(settings, run, config if service else None, open_console())


@commands.command(hidden=True)
def trials(
    run: Annotated[Path, typer.Option("--run", help="Folder of the experiment.")], set_: SetOption = None
) -> None:
    """Run trials of an experiment's search; `search` starts these."""
    trials_command(run, set_ or [])


@commands.command(hidden=True)
def fold(
    number: Annotated[int, typer.Argument(help="Counted from 0.")],
    run: Annotated[Path, typer.Option("--run", help="Folder of the experiment.")],
    set_: SetOption = None,
) -> None:
    """Train one fold of an experiment; `crossval` starts these."""
    fold_command(run, set_ or [], number)


@commands.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folder of a run or of an experiment.")
    ],
    compare: Annotated[bool, typer.Option("--compare", help="Put several runs side by side.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Page to write. [default: report.html in RUN; compare.html here]"),
    ] = None,
) -> None:
    """Write a page about a run, finished or not, from the files that it left; or compare runs."""
    report_command(runs, out, compare=compare, console=open_console())


# ------------------------------------------------------------------------------------ implementation


@contextmanager
def with_service(config: TrainerConfig, service: Path | None, log: Path) -> Iterator[TrainerConfig]:
    """Start a reward service for this block and yield the configuration with its address.

    Args:
        service: its configuration file; None starts none and yields `config` unchanged
        log: file for its output
    """
    if service is None:
        yield config
        return
    with local_service(service, log) as url:
        # Loading the models takes longer than a request.
        yield with_values(config, {"service.url": url, "service.ready_timeout_s": 300.0})


def cross_validate_command(
    config: TrainerConfig, path: Path | None, service: Path | None, *, search: bool, console: Console
) -> None:
    """Start or resume a cross-validation; `service` configures a reward service to start for it, if given."""
    experiment = Experiment.open(config, path)
    with ExitStack() as stack:
        stack.enter_context(experiment.exclusive("cross-validation"))
        connected = stack.enter_context(with_service(config, service, experiment.path / SERVICE_LOG))
        scorer = stack.enter_context(ServiceScorer.connect(connected.service))
        from trainer.experiments.crossval import cross_validate

        with _with_report(experiment.path, console):
            if search:
                from trainer.experiments.search import search_winner

                winner = search_winner(experiment, connected, scorer, console)
                connected = with_values(connected, winner, "search: ")
            experiment.folder.write_config(connected, FOLDS_CONFIG)
            cross_validate(experiment, connected, scorer, console, _fold_command(experiment, connected))


@contextmanager
def _with_report(path: Path, console: Console) -> Iterator[None]:
    """Write the report at the end of this block; an error of the block takes precedence."""
    from trainer.report.report import write_report

    try:
        yield
    except BaseException:
        with suppress(OSError, RunError):
            console.print(f"Report: {write_report(path)}", soft_wrap=True)
        raise
    console.print(f"Report: {write_report(path)}", soft_wrap=True)


def _fold_command(experiment: Experiment, config: TrainerConfig) -> Sequence[str]:
    """Return the command that trains one fold in its own process, without the fold's number."""
    command = [sys.executable, "-m", "trainer", "fold", "--run", str(experiment.path)]
    if config.threads is not None:
        command += ["--set", f"threads={max(1, config.threads // config.crossval.workers)}"]
    return command


def search_command(config: TrainerConfig, path: Path | None, service: Path | None, console: Console) -> None:
    """Start, resume or join the experiment's search."""
    experiment = Experiment.open(config, path)
    with ExitStack() as stack:
        connected = stack.enter_context(with_service(config, service, experiment.path / SERVICE_LOG))
        scorer = stack.enter_context(ServiceScorer.connect(connected.service))
        from trainer.experiments.search import search

        with _with_report(experiment.path, console):
            search(experiment, connected, scorer, console)


def trials_command(path: Path, overrides: Sequence[str]) -> None:
    """Run trials of an experiment until they are done or the parent process ends."""
    end_with_parent()
    config = load_trainer_config(path / TRIALS_CONFIG, overrides)
    experiment = Experiment.load(path)
    with ServiceScorer.connect(config.service) as scorer:
        from trainer.experiments.search import work

        work(experiment, config, scorer, open_console())


def fold_command(path: Path, overrides: Sequence[str], fold: int) -> None:
    """Train one fold of an experiment; end early if the parent process ends."""
    end_with_parent()
    config = load_trainer_config(path / FOLDS_CONFIG, overrides)
    experiment = Experiment.load(path)
    with ServiceScorer.connect(config.service) as scorer:
        from trainer.experiments.crossval import train_one_fold

        train_one_fold(experiment, config, scorer, open_console(), fold)
