"""`reward-trainer crossval`: folds, each trained from the base; a final fit on all; one look at the test.

    for each fold k:
        train from the base on the others' prompts, stop early on its own, keep the best checkpoint
    iterations of the final fit: the median of the folds' best
    train from the base on all folds for so many iterations
    measure it on the test prompts, which nothing before has looked at

A fold's gain is that of its best checkpoint on the prompts by which that was chosen, so it flatters; the test
gain does not.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trainer.config import ConfigError, TrainerConfig, with_values
from trainer.data.splits import Split
from trainer.evaluation.comparison import Measurement, pooled
from trainer.evaluation.guard import ROTATE, with_guard
from trainer.evaluation.stopping import gamed
from trainer.experiments.experiment import Experiment
from trainer.experiments.workers import Job, run_side_by_side
from trainer.rl.rewards import Scorer
from trainer.runs.checkpoints import BASE_FILE, TUNED_FILE
from trainer.runs.folder import RunFolder, is_finished, pin_prompts
from trainer.runs.train import train_run
from trainer.runtime.errors import GuardError

CROSSVAL_FILE, TEST_FILE = "crossval.json", "test.json"
FOLDS, FINAL = "folds", "final"

Row = dict[str, Any]


def cross_validate(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console, command: Sequence[str]
) -> None:
    """Train the folds, then the final fit; measure that on the test prompts. Goes on where it was ended.

    `config` is the experiment's, or with a search's winner in it. `command` is how a process of its own
    trains one fold, where several are trained side by side: it gets the fold's number.
    Raises GuardError where a guard has tripped; where it was a fold's, there is no final fit.
    """
    experiment.pin(scorer)
    train_folds(experiment, config, scorer, console, command)
    summary = summarize(experiment, config)
    experiment.folder.write_json(CROSSVAL_FILE, summary)
    console.print(fold_table(summary))
    if config.guard.stop:
        _refuse_gamed(summary)
    test = fit(experiment, config, scorer, console, summary["chosen_iterations"])
    found = gamed(test)
    if found is not None and config.guard.stop:
        raise GuardError(f"the final fit is not to be trusted: on the test prompts, {found}")


def train_folds(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console, command: Sequence[str]
) -> None:
    """Train every fold that is not finished, one after the other or side by side."""
    waiting = [fold for fold in range(config.crossval.folds) if not _finished(experiment, config, fold)]
    if config.crossval.workers == 1:
        for fold in waiting:
            train_one_fold(experiment, config, scorer, console, fold)
        return
    jobs = [
        Job(f"fold {fold}", [*command, str(fold)], experiment.path / FOLDS / f"{fold}.log")
        for fold in waiting
    ]
    run_side_by_side(jobs, config.crossval.workers, console)


def train_one_fold(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console, fold: int
) -> None:
    """Train one fold from the base, in its own run folder."""
    if not 0 <= fold < config.crossval.folds:
        raise ConfigError(f"fold {fold}: there are {config.crossval.folds}, counted from 0")
    placed, run = experiment.run(with_guard(config, fold), FOLDS, str(fold))
    try:
        if not is_finished(run, placed.iterations):
            console.print(f"Fold {fold + 1} of {config.crossval.folds}")
            train_run(placed, experiment.splits.fold(fold), scorer, run, console, fold=fold)
    finally:
        run.close()


def _finished(experiment: Experiment, config: TrainerConfig, fold: int) -> bool:
    """Raises ConfigError where the fold is there with other prompts, or settings (as without a search)."""
    placed = experiment.placed(with_guard(config, fold), FOLDS, str(fold))
    run = RunFolder(experiment.path / FOLDS / str(fold))
    finished = is_finished(run, placed.iterations)
    if finished:
        pin_prompts(run, experiment.splits.fold(fold))
    return finished


# ----------------------------------------------------------------------------------------- the folds


def summarize(experiment: Experiment, config: TrainerConfig) -> Row:
    """crossval.json: a row for each fold, all of them together, and how long the final fit is to be."""
    rows, parts = [], []
    for fold in range(config.crossval.folds):
        split = experiment.splits.fold(fold)
        run = RunFolder(experiment.path / FOLDS / str(fold))
        rows.append(_fold_row(fold, split, run))
        base, tuned = (
            Measurement.load(run.path / name, split.validation) for name in (BASE_FILE, TUNED_FILE)
        )
        parts.append((base, tuned, split.groups))
    together = pooled(parts, experiment.evaluators, config.reward_evaluators, config.evaluation)
    chosen = max(1, round(statistics.median(row["best"] for row in rows)))
    return {"folds": rows, "pooled": together.to_dict(), "chosen_iterations": chosen}


def _fold_row(fold: int, split: Split, run: RunFolder) -> Row:
    evaluation, finished = run.read_json("evaluation.json"), run.read_json("finished.json")
    return {
        "fold": fold,
        "train": len(split.train),
        "prompts": len(split.validation),
        "iterations": finished["reached"],
        "best": finished["done"],
        "stopped": evaluation["ending"],
        "rows": evaluation["rows"],
        "gamed": gamed(evaluation),
        "guard": evaluation["guard"],
        "drift": evaluation["drift"],
    }


def _refuse_gamed(summary: Mapping[str, Any]) -> None:
    found = {row["fold"]: row["gamed"] for row in summary["folds"] if row["gamed"] is not None}
    if found:
        which, why = ", ".join(map(str, found)), next(iter(found.values()))
        raise GuardError(
            f"no final fit: the guard tripped in fold {which}: {why}; give its evaluator a weight and guard "
            "with another, or lower update.learning_rate"
        )


def fold_table(summary: Mapping[str, Any]) -> Table:
    """The folds' composite gains, and that of all of them together."""
    shown = Table(title="Cross-validation: gain of the composite", box=SIMPLE, padding=(0, 1, 0, 0))
    total = summary["pooled"]
    interval = f"{total['confidence']:.0%} interval"
    for column in ("fold", "prompts", "best of", "gain", interval, "ended by", "guard"):
        shown.add_column(column, justify="left" if column in ("ended by", "guard") else "right", no_wrap=True)
    for row in summary["folds"]:
        ended = row["stopped"]["by"] if row["stopped"] else ""
        best = f"{row['best']} of {row['iterations']}"
        gain = _gain_cells(row["rows"]["composite"])
        shown.add_row(str(row["fold"]), str(row["prompts"]), best, *gain, ended, _guard_cell(row["guard"]))
    shown.add_section()
    shown.add_row("all", str(total["prompts"]), "", *_gain_cells(total["rows"]["composite"]), "", "")
    return shown


def _guard_cell(guard: Mapping[str, Any] | None) -> str:
    if guard is None:
        return ""
    return f"{guard['name']} {'TRIPPED' if guard['tripped'] else guard['gain']['verdict']}"


def _gain_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    ends = ("no interval",) if row["low"] is None else (f"{row['low']:+.3f} {row['high']:+.3f}",)
    return f"{row['difference']:+.3f}", ends[0]


# ------------------------------------------------------------------------------------- the final fit


def fit(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console, iterations: int
) -> Row:
    """Train on all folds for so many iterations of the schedule; measure on the test prompts, once.

    Nothing looks at the test prompts on the way: no evaluation, no early stopping.
    """
    blind = with_values(config, {"early_stopping.patience": 0, "evaluation.every": 0})
    if config.guard.evaluator == ROTATE:  # each has had its turn; the final fit learns from all
        blind = with_values(blind, {"guard.evaluator": None})
    placed, run = experiment.run(blind, FINAL)
    try:
        if not is_finished(run, placed.iterations):
            console.print(f"Final fit on all folds, {iterations} iterations; then the test prompts, once")
            last, fold = iterations, config.crossval.folds
            train_run(placed, experiment.splits.final(), scorer, run, console, fold=fold, last=last)
        test: Row = run.read_json("evaluation.json")
        experiment.folder.write_json(TEST_FILE, test)
        return test
    finally:
        run.close()
