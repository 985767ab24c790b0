"""Train one trial of a search in its own run folder and report the result to the study."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.trial import TrialState
from rich.console import Console

from reward_service.client import OverloadedError, UnreachableError
from trainer.config import ConfigError, SearchConfig, TrainerConfig
from trainer.evaluation.stopping import EvaluationResult, StopperState
from trainer.experiments.experiment import Experiment
from trainer.experiments.space import resolve_settings, trial_config
from trainer.experiments.study import ClaimedTrial
from trainer.experiments.trial import GUARD, TrialSettings, settings_text
from trainer.rl.rewards import Images, Scorer, Scores, ScoringError
from trainer.runs.folder import BASE_FILE, METRICS_FILE, RunFolder, is_finished
from trainer.runs.train import train_run
from trainer.runtime.errors import DivergenceError, EvaluationError, RolloutError, reason
from trainer.runtime.files import write_atomically

SEARCH, TRIALS = "search", "trials"  # folders

TrialOutcome = dict[str, Any]  # gain, iterations, ending, reason: as the study stores them


class UnsuitableError(Exception):
    """The settings of a trial do not fit together."""


def run_trial(
    claimed: ClaimedTrial, experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console
) -> None:
    """Train a trial, or resume it, and finish it in the study.

    Errors that the trial's settings cause make it a failed trial. If the reward service is gone, the error is
    raised, and the trial can be resumed.
    """
    null = config.search.null_trial and claimed.number == 0
    changes = {} if null else resolve_settings(config, claimed.sample(config.search.space))
    claimed.store_settings(changes)
    text = "trains nothing" if null else settings_text(changes)
    console.print(f"Trial {claimed.number}: {text}", soft_wrap=True)
    monitored = OutageMonitor(scorer)
    try:
        outcome = _train(
            claimed, _checked_config(config, changes), config.search, experiment, monitored, null
        )
    except (DivergenceError, torch.OutOfMemoryError, UnsuitableError) as error:
        return _fail(claimed, error, console)
    except (RolloutError, EvaluationError) as error:
        if monitored.outage or not monitored.is_working(experiment.splits.fold(0).train[0]):
            error.add_note(
                f"trial {claimed.number} resumes from its checkpoint when this command is run again"
            )
            raise
        return _fail(claimed, error, console)
    pruned = outcome["ending"] == PrunerStopper.name
    state = TrialState.PRUNED if pruned else TrialState.COMPLETE
    claimed.finish(state, outcome["gain"]["difference"], outcome)
    ended = f", ended by the {outcome['ending']}" if outcome["ending"] else ""
    console.print(f"Trial {claimed.number}: gain {outcome['gain']['difference']:+.3f}{ended}", soft_wrap=True)
    return None


def _checked_config(config: TrainerConfig, changes: TrialSettings) -> TrainerConfig:
    try:
        return trial_config(config, changes)
    except ConfigError as error:
        raise UnsuitableError(f"these settings do not fit together: {error}") from None


def _fail(claimed: ClaimedTrial, error: Exception, console: Console) -> None:
    cause = reason(error)
    claimed.finish(TrialState.FAIL, None, {"reason": cause, "ending": None, "gain": None})
    console.print(f"Trial {claimed.number} failed: {cause}", soft_wrap=True)


def _train(
    claimed: ClaimedTrial,
    config: TrainerConfig,
    search: SearchConfig,
    experiment: Experiment,
    scorer: Scorer,
    null: bool,
) -> TrialOutcome:
    """Train the trial unless it is finished, report its evaluations and return its outcome."""
    split = experiment.splits.fold(0)
    run_config, run = experiment.open_run(config, SEARCH, TRIALS, f"{claimed.number:04d}")
    try:
        if not is_finished(run, run_config.iterations):
            # All trials have the same base policy: it is measured once.
            shared = experiment.path / SEARCH / BASE_FILE
            _copy_if_missing(shared, run.path / BASE_FILE)
            stoppers = [] if null else [PrunerStopper(claimed, search, run_config.iterations)]
            quiet = Console(quiet=True)
            train_run(run_config, split, scorer, run, quiet, last=0 if null else None, stoppers=stoppers)
            _copy_if_missing(run.path / BASE_FILE, shared)
        for iterations, gain in _logged_gains(run):
            claimed.report(iterations, gain)
        return _read_outcome(run)
    finally:
        run.close()


def _copy_if_missing(source: Path, target: Path) -> None:
    if source.exists() and not target.exists():
        write_atomically(target, source.read_bytes())


def _logged_gains(run: RunFolder) -> list[tuple[int, float]]:
    """Return (iterations, gain of the composite) of each evaluation in metrics.jsonl."""
    path = run.path / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    evaluated = [record for record in map(json.loads, lines) if "evaluation" in record]
    return [(it["iteration"] + 1, it["evaluation"]["composite"]["difference"]) for it in evaluated]


def _read_outcome(run: RunFolder) -> TrialOutcome:
    """Return the outcome of a finished run."""
    evaluation, finished = run.read_json("evaluation.json"), run.read_json("finished.json")
    ending = evaluation["ending"] or {"by": None, "reason": None}
    hacked = bool(evaluation["guard"] and evaluation["guard"]["tripped"])
    pruned = ending["by"] == PrunerStopper.name
    return {
        "gain": evaluation["rows"]["composite"],
        "iterations": finished["reached"],
        "ending": ending["by"],
        "reason": ending["reason"] if pruned else GUARD if hacked else ending["by"],
    }


class PrunerStopper:
    """Stopper that reports each evaluation to the study and ends the trial if the pruner decides so."""

    name = "pruner"

    def __init__(self, claimed: ClaimedTrial, config: SearchConfig, iterations: int) -> None:
        """Create the stopper of one trial.

        Args:
            claimed: The trial.
            config: The search; its warm-up iterations are never pruned.
            iterations: Length of the trial.
        """
        self._claimed = claimed
        self._config = config
        self._iterations = iterations

    def on_evaluation(self, result: EvaluationResult) -> str | None:
        """Return the reason to prune the trial, or None; never during warm-up or after the last iteration."""
        self._claimed.report(result.done, result.comparison.composite.difference)
        if not self._config.warmup_iterations < result.done < self._iterations:
            return None
        if not self._claimed.should_prune():
            return None
        return f"{self._config.pruner}: behind the others after {result.done} iterations"

    def state(self) -> StopperState:
        """Return nothing: the study stores the reports."""
        return {}

    def restore(self, state: StopperState) -> None:
        """Do nothing; see `state`."""


class OutageMonitor:
    """Scorer that passes requests on and records outages of the reward service."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.outage = False  # True once a request has failed because the service was gone

    @property
    def evaluators(self) -> tuple[str, ...]:
        """See `Scorer.evaluators`."""
        return self._scorer.evaluators

    @property
    def identity(self) -> Mapping[str, str]:
        """See `Scorer.identity`."""
        return self._scorer.identity

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        """See `Scorer.score`."""
        try:
            return self._scorer.score(prompts, images)
        except ScoringError as error:
            if error.outage or isinstance(error.__cause__, (OverloadedError, UnreachableError)):
                self.outage = True
            raise

    def is_working(self, prompt: str) -> bool:
        """Return whether the service scores a plain grey image."""
        try:
            self._scorer.score([prompt], np.full((1, 64, 64, 3), 128, np.uint8))
        except ScoringError:
            return False
        return True
