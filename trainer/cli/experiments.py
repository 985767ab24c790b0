"""The commands `crossval`, `search` and `report`: open the experiment, have a reward service, leave a report.

The `report` command: pages from what runs have left. Nothing here needs torch or a service.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reward_service.settings import DEFAULT_CONFIG
from trainer.cli.options import ConfigOption, Overrides, SeedOption, SetOption, refuse_several
from trainer.config import (
    ConfigError,
    TrainerConfig,
    given,
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
    """Write the report of one run, or the comparison of several, and say where.

    Raises ConfigError for arguments that do not fit, StorageError for a folder that is no run.
    """
    # SciPy and Optuna take a second to import: not for the other commands.
    from trainer.report.compare import COMPARE_FILE, write_comparison
    from trainer.report.report import write_report

    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise ConfigError(f"{out}: cannot be written; name a file in a folder that exists")
    if compare:
        written = write_comparison(runs, out or Path(COMPARE_FILE))
    elif len(runs) == 1:
        written = write_report(runs[0], out)
    else:
        raise ConfigError(f"report: {len(runs)} runs; add --compare to put them side by side, or name one")
    console.print(f"Report: {written}", soft_wrap=True)


FOLDS_CONFIG, TRIALS_CONFIG = "folds/config.yaml", "search/config.yaml"
JUDGE_LOG = "judge.log"

commands = typer.Typer()

ExperimentOption = Annotated[
    Path | None,
    typer.Option("--run", help="Folder of the experiment. \\[default: NAME-experiment in runs_dir]"),
]
JudgeOption = Annotated[
    bool, typer.Option("--judge", help="Start a service of its own, as `demo` does, for as long as it takes.")
]


@commands.command()
def crossval(
    config: ConfigOption = DEFAULT_CONFIG,
    search: Annotated[
        bool, typer.Option("--search", help="Search settings first; train with the best.")
    ] = False,
    service: JudgeOption = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Same as crossval.workers=N: folds side by side.")
    ] = None,
    seed: SeedOption = None,
    run: ExperimentOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Train k folds, fit on all of them, look at the test prompts once. The same command goes on with it."""
    refuse_several("crossval")
    more = [] if workers is None else [f"crossval.workers={workers}"]
    settings = load_experiment_config(config, [*given(seed, set_, overrides), *more])
    cross_validate_command(settings, run, config if service else None, search=search, console=Console())


@commands.command()
def search(
    config: ConfigOption = DEFAULT_CONFIG,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Same as search.trials=N.")] = None,
    service: JudgeOption = False,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Same as search.workers=N: trials side by side.")
    ] = None,
    seed: SeedOption = None,
    run: ExperimentOption = None,
    set_: SetOption = None,
    overrides: Overrides = None,
) -> None:
    """Try settings from search.space; measure the best again. The same command goes on, or joins in."""
    refuse_several("search")
    counts = {"search.trials": trials, "search.workers": workers}
    more = [f"{key}={count}" for key, count in counts.items() if count is not None]
    settings = load_experiment_config(config, [*given(seed, set_, overrides), *more])
    search_command(settings, run, config if service else None, Console())


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
        typer.Option("--out", help="Page to write. \\[default: report.html in RUN; compare.html here]"),
    ] = None,
) -> None:
    """Write a page about a run, finished or not, from the files that it left; or compare runs."""
    report_command(runs, out, compare=compare, console=Console())


# ------------------------------------------------------------------------------------------- doing


@contextmanager
def judged(config: TrainerConfig, service: Path | None, log: Path) -> Iterator[TrainerConfig]:
    """The configuration with the address of a reward service of its own, which `service` configures; None: unchanged."""
    if service is None:
        yield config
        return
    with local_service(service, log) as url:
        # Loading the service's models takes longer than answering does.
        yield with_values(config, {"service.url": url, "service.ready_timeout_s": 300.0})


def cross_validate_command(
    config: TrainerConfig, path: Path | None, service: Path | None, *, search: bool, console: Console
) -> None:
    """Begin or go on with the experiment; `service` is the configuration of a reward service to start for it."""
    experiment = Experiment.open(config, path)
    with ExitStack() as stack:
        stack.enter_context(experiment.alone("cross-validation"))
        reached = stack.enter_context(judged(config, service, experiment.path / JUDGE_LOG))
        scorer = stack.enter_context(ServiceScorer.connect(reached.service))
        from trainer.experiments.crossval import cross_validate

        with _leaving_a_report(experiment.path, console):
            if search:
                from trainer.experiments.search import search_winner

                winner = search_winner(experiment, reached, scorer, console)
                reached = with_values(reached, winner, "search: ")
            experiment.folder.write_config(reached, FOLDS_CONFIG)
            cross_validate(experiment, reached, scorer, console, _fold_command(experiment, reached))


@contextmanager
def _leaving_a_report(path: Path, console: Console) -> Iterator[None]:
    """However this block ends: its own error is the one that is told."""
    from trainer.report.report import write_report

    try:
        yield
    except BaseException:
        with suppress(OSError, RunError):
            console.print(f"Report:   {write_report(path)}", soft_wrap=True)
        raise
    console.print(f"Report:   {write_report(path)}", soft_wrap=True)


def _fold_command(experiment: Experiment, config: TrainerConfig) -> Sequence[str]:
    """How one fold is trained in a process of its own; its number follows."""
    command = [sys.executable, "-m", "trainer", "fold", "--run", str(experiment.path)]
    if config.threads is not None:
        command += ["--set", f"threads={max(1, config.threads // config.crossval.workers)}"]
    return command


def search_command(config: TrainerConfig, path: Path | None, service: Path | None, console: Console) -> None:
    """Begin or go on with the experiment's search, beside whoever else is at it."""
    experiment = Experiment.open(config, path)
    with ExitStack() as stack:
        reached = stack.enter_context(judged(config, service, experiment.path / JUDGE_LOG))
        scorer = stack.enter_context(ServiceScorer.connect(reached.service))
        from trainer.experiments.search import search

        with _leaving_a_report(experiment.path, console):
            search(experiment, reached, scorer, console)


def trials_command(path: Path, overrides: Sequence[str]) -> None:
    """Run trials of an experiment, and no longer than whoever asked for it lives."""
    end_with_parent()
    config = load_trainer_config(path / TRIALS_CONFIG, overrides)
    experiment = Experiment.load(path)
    with ServiceScorer.connect(config.service) as scorer:
        from trainer.experiments.search import work

        work(experiment, config, scorer, Console())


def fold_command(path: Path, overrides: Sequence[str], fold: int) -> None:
    """Train one fold of an experiment, and no longer than whoever asked for it lives."""
    end_with_parent()
    config = load_trainer_config(path / FOLDS_CONFIG, overrides)
    experiment = Experiment.load(path)
    with ServiceScorer.connect(config.service) as scorer:
        from trainer.experiments.crossval import train_one_fold

        train_one_fold(experiment, config, scorer, Console(), fold)
