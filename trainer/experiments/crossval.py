"""Cross-validation: folds trained from the base, a final fit on all of them, one measurement on the test.

    for each fold k:
        train from the base on the other folds' prompts, stop early on fold k, keep the best checkpoint
    iterations of the final fit: the median of the folds' best
    train from the base on all folds for so many iterations
    measure on the test prompts, which nothing before has used

A fold's gain is measured on the prompts that chose its best checkpoint, so it is optimistic; the test gain is
not.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trainer.config import ConfigError, TrainerConfig, with_values
from trainer.data.splits import Split
from trainer.evaluation.comparison import Measurement, compare_pooled
from trainer.evaluation.guard import ROTATE, with_guard
from trainer.evaluation.stopping import reward_hacking_reason
from trainer.experiments.experiment import Experiment
from trainer.experiments.workers import WorkerCommand, run_side_by_side
from trainer.rl.rewards import Scorer
from trainer.runs.folder import BASE_FILE, TUNED_FILE, RunFolder, is_finished, pin_prompts
from trainer.runs.train import train_run
from trainer.runtime.errors import GuardError

CROSSVAL_FILE, TEST_FILE = "crossval.json", "test.json"
FOLDS, FINAL = "folds", "final"  # folders

JsonObject = dict[str, Any]


def cross_validate(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console, command: Sequence[str]
) -> None:
    """Train the folds, then the final fit; measure that on the test prompts. Resumes after an interruption.

    Args:
        experiment: The experiment.
        config: Its configuration, or that with the settings of a search's winner.
        scorer: The reward service.
        console: Receives progress and the table of folds.
        command: Command that trains one fold in a process, without the fold's number, which is appended.

    Raises:
        GuardError: A guard tripped. If it was a fold's, there is no final fit.
    """
    experiment.pin(scorer)
    train_folds(experiment, config, scorer, console, command)
    summary = summarize(experiment, config)
    experiment.folder.write_json(CROSSVAL_FILE, summary)
    console.print(fold_table(summary))
    if config.guard.stop:
        _check_no_fold_hacked(summary)
    test = final_fit(experiment, config, scorer, console, summary["chosen_iterations"])
    cause = reward_hacking_reason(test)
    if cause is not None and config.guard.stop:
        raise GuardError(f"the final fit is not valid: on the test prompts, {cause}")


# -------------------------------------------------------------------------------------------- folds


def train_folds(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console, command: Sequence[str]
) -> None:
    """Train every unfinished fold, one after the other or in several processes."""
    unfinished = [fold for fold in range(config.crossval.folds) if not _is_finished(experiment, config, fold)]
    if config.crossval.workers == 1:
        for fold in unfinished:
            train_one_fold(experiment, config, scorer, console, fold)
        return
    jobs = [
        WorkerCommand(f"fold {fold}", [*command, str(fold)], experiment.path / FOLDS / f"{fold}.log")
        for fold in unfinished
    ]
    run_side_by_side(jobs, config.crossval.workers, console)


def train_one_fold(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console, fold: int
) -> None:
    """Train one fold from the base, in its own run folder.

    Raises:
        ConfigError: There is no such fold.
    """
    if not 0 <= fold < config.crossval.folds:
        raise ConfigError(f"fold {fold}: there are {config.crossval.folds}, counted from 0")
    run_config, run = experiment.open_run(with_guard(config, fold), FOLDS, str(fold))
    try:
        if not is_finished(run, run_config.iterations):
            console.print(f"Fold {fold + 1} of {config.crossval.folds}")
            train_run(run_config, experiment.splits.fold(fold), scorer, run, console, fold=fold)
    finally:
        run.close()


def _is_finished(experiment: Experiment, config: TrainerConfig, fold: int) -> bool:
    """Return whether a fold is finished.

    Raises:
        ConfigError: It was started with other prompts, or with other settings (as without a search).
    """
    run_config = experiment.run_config(with_guard(config, fold), FOLDS, str(fold))
    run = RunFolder(experiment.path / FOLDS / str(fold))
    finished = is_finished(run, run_config.iterations)
    if finished:
        pin_prompts(run, experiment.splits.fold(fold))
    return finished


# ------------------------------------------------------------------------------------------ summary


def summarize(experiment: Experiment, config: TrainerConfig) -> JsonObject:
    """Return the content of crossval.json: each fold, all folds pooled, and the length of the final fit."""
    rows, parts = [], []
    for fold in range(config.crossval.folds):
        split = experiment.splits.fold(fold)
        run = RunFolder(experiment.path / FOLDS / str(fold))
        rows.append(_fold_row(fold, split, run))
        base, tuned = (
            Measurement.load(run.path / name, split.validation) for name in (BASE_FILE, TUNED_FILE)
        )
        parts.append((base, tuned, split.groups))
    all_folds = compare_pooled(parts, experiment.evaluators, config.composite_weights, config.evaluation)
    chosen = max(1, round(statistics.median(row["best"] for row in rows)))
    return {"folds": rows, "pooled": all_folds.to_dict(), "chosen_iterations": chosen}


def _fold_row(fold: int, split: Split, run: RunFolder) -> JsonObject:
    evaluation, finished = run.read_json("evaluation.json"), run.read_json("finished.json")
    return {
        "fold": fold,
        "train": len(split.train),
        "prompts": len(split.validation),
        "iterations": finished["reached"],
        "best": finished["done"],
        "stopped": evaluation["ending"],
        "rows": evaluation["rows"],
        "gamed": reward_hacking_reason(evaluation),
        "guard": evaluation["guard"],
        "drift": evaluation["drift"],
    }


def _check_no_fold_hacked(summary: Mapping[str, Any]) -> None:
    causes = {row["fold"]: row["gamed"] for row in summary["folds"] if row["gamed"] is not None}
    if causes:
        folds, cause = ", ".join(map(str, causes)), next(iter(causes.values()))
        raise GuardError(
            f"no final fit: the guard tripped in fold {folds}: {cause}; give its evaluator a weight and use "
            "another as the guard, or lower update.learning_rate"
        )


def fold_table(summary: Mapping[str, Any]) -> Table:
    """Return a table of the folds' composite gains, and of the pooled one."""
    table = Table(title="Cross-validation: gain of the composite", box=SIMPLE, padding=(0, 1, 0, 0))
    total = summary["pooled"]
    interval = f"{total['confidence']:.0%} interval"
    for column in ("fold", "prompts", "best of", "gain", interval, "ended by", "guard"):
        table.add_column(column, justify="left" if column in ("ended by", "guard") else "right", no_wrap=True)
    for row in summary["folds"]:
        ended = row["stopped"]["by"] if row["stopped"] else ""
        best = f"{row['best']} of {row['iterations']}"
        gain = _gain_cells(row["rows"]["composite"])
        table.add_row(str(row["fold"]), str(row["prompts"]), best, *gain, ended, _guard_cell(row["guard"]))
    table.add_section()
    table.add_row("all", str(total["prompts"]), "", *_gain_cells(total["rows"]["composite"]), "", "")
    return table


def _guard_cell(guard: Mapping[str, Any] | None) -> str:
    if guard is None:
        return ""
    return f"{guard['name']} {'TRIPPED' if guard['tripped'] else guard['gain']['verdict']}"


def _gain_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    interval = "no interval" if row["low"] is None else f"{row['low']:+.3f} {row['high']:+.3f}"
    return f"{row['difference']:+.3f}", interval


# ---------------------------------------------------------------------------------------- final fit


def final_fit(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console, iterations: int
) -> JsonObject:
    """Train on all folds for so many iterations of the schedule; measure once on the test prompts.

    The test prompts are not used during training: no evaluation, no early stopping.

    Returns:
        The content of evaluation.json, which is written to test.json too.
    """
    untested = with_values(config, {"early_stopping.patience": 0, "evaluation.every": 0})
    if config.guard.evaluator == ROTATE:  # each has been the guard of a fold; the final fit trains on all
        untested = with_values(untested, {"guard.evaluator": None})
    run_config, run = experiment.open_run(untested, FINAL)
    try:
        if not is_finished(run, run_config.iterations):
            console.print(f"Final fit on all folds, {iterations} iterations; then the test prompts, once")
            last, fold = iterations, config.crossval.folds
            train_run(run_config, experiment.splits.final(), scorer, run, console, fold=fold, last=last)
        test: JsonObject = run.read_json("evaluation.json")
        experiment.folder.write_json(TEST_FILE, test)
        return test
    finally:
        run.close()
