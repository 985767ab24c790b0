"""The commands `crossval` and `search`: open the experiment, have a judge, do the work, leave a report."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from trainer.children import end_with_parent
from trainer.config import TrainerConfig, load_trainer_config, with_values
from trainer.demo import local_service
from trainer.experiments import Experiment
from trainer.scoring import ServiceScorer

FOLDS_CONFIG, TRIALS_CONFIG = "folds/config.yaml", "search/config.yaml"
JUDGE_LOG = "judge.log"


@contextmanager
def judged(config: TrainerConfig, judge: Path | None, log: Path) -> Iterator[TrainerConfig]:
    """The configuration with the address of a judge of its own, which `judge` configures; None: unchanged."""
    if judge is None:
        yield config
        return
    with local_service(judge, log) as url:
        # Loading the judge's models takes longer than answering does.
        yield with_values(config, {"service.url": url, "service.ready_timeout_s": 300.0})


def cross_validate_command(
    config: TrainerConfig, path: Path | None, judge: Path | None, *, search: bool, console: Console
) -> None:
    """Begin or go on with the experiment; `judge` is the configuration of a judge to start for it."""
    experiment = Experiment.open(config, path)
    with ExitStack() as stack:
        stack.enter_context(experiment.alone("cross-validation"))
        reached = stack.enter_context(judged(config, judge, experiment.path / JUDGE_LOG))
        scorer = stack.enter_context(ServiceScorer.connect(reached.service))
        from trainer.crossval import cross_validate
        from trainer.report import write_report

        try:
            if search:
                from trainer.search import search_winner

                winner = search_winner(experiment, reached, scorer, console)
                reached = with_values(reached, winner, "search: ")
            experiment.folder.write_config(reached, FOLDS_CONFIG)
            cross_validate(experiment, reached, scorer, console, _fold_command(experiment, reached))
        finally:
            console.print(f"Report:   {write_report(experiment.path)}", soft_wrap=True)


def _fold_command(experiment: Experiment, config: TrainerConfig) -> Sequence[str]:
    """How one fold is trained in a process of its own; its number follows."""
    command = [sys.executable, "-m", "trainer", "fold", "--run", str(experiment.path)]
    if config.threads is not None:
        command += ["--set", f"threads={max(1, config.threads // config.crossval.workers)}"]
    return command


def search_command(config: TrainerConfig, path: Path | None, judge: Path | None, console: Console) -> None:
    """Begin or go on with the experiment's search, beside whoever else is at it."""
    experiment = Experiment.open(config, path)
    with ExitStack() as stack:
        reached = stack.enter_context(judged(config, judge, experiment.path / JUDGE_LOG))
        scorer = stack.enter_context(ServiceScorer.connect(reached.service))
        from trainer.report import write_report
        from trainer.search import search

        try:
            search(experiment, reached, scorer, console)
        finally:
            console.print(f"Report:   {write_report(experiment.path)}", soft_wrap=True)


def trials_command(path: Path, overrides: Sequence[str]) -> None:
    """Run trials of an experiment, and no longer than whoever asked for it lives."""
    end_with_parent()
    config = load_trainer_config(path / TRIALS_CONFIG, overrides)
    experiment = Experiment.load(path)
    with ServiceScorer.connect(config.service) as scorer:
        from trainer.search import work

        work(experiment, config, scorer, Console())


def fold_command(path: Path, overrides: Sequence[str], fold: int) -> None:
    """Train one fold of an experiment, and no longer than whoever asked for it lives."""
    end_with_parent()
    config = load_trainer_config(path / FOLDS_CONFIG, overrides)
    experiment = Experiment.load(path)
    with ServiceScorer.connect(config.service) as scorer:
        from trainer.crossval import train_one_fold

        train_one_fold(experiment, config, scorer, Console(), fold)
