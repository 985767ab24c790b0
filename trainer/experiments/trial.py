"""One trial of a search: trained in its own run folder, its result told to the study."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from optuna.trial import TrialState
from rich.console import Console

from reward_service.client import OverloadedError, UnreachableError
from trainer.config import ConfigError, SearchConfig, TrainerConfig
from trainer.evaluation.stopping import Examination, State
from trainer.experiments.experiment import Experiment
from trainer.experiments.ranking import GUARD, Row, listed
from trainer.experiments.space import Settings, settings, trial_config
from trainer.experiments.study import Taken
from trainer.rl.rewards import Images, Scorer, Scores, ScoringError
from trainer.runs.checkpoints import BASE_FILE
from trainer.runs.folder import METRICS_FILE, RunFolder, is_finished
from trainer.runs.train import train_run
from trainer.runtime.errors import DivergenceError, EvaluationError, RolloutError, reason
from trainer.runtime.files import write_atomically

SEARCH, TRIALS = "search", "trials"


def run_trial(
    taken: Taken, experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console
) -> None:
    """Train a trial, or go on with it, and tell the study what came of it.

    What is the trial's own fault makes it a failed one. Where the service is gone, the error passes: the trial
    can be gone on with.
    """
    null = config.search.null_trial and taken.number == 0
    changes = {} if null else settings(config, taken.draw(config.search.space))
    taken.note_settings(changes)
    console.print(f"Trial {taken.number}: {'trains nothing' if null else listed(changes)}", soft_wrap=True)
    service = Listening(scorer)
    try:
        placed = _placeable(config, changes)
        outcome = _trained(taken, placed, config.search, experiment, service, null)
    except (DivergenceError, torch.OutOfMemoryError, UnsuitableError) as error:
        return _fail(taken, error, console)
    except (RolloutError, EvaluationError) as error:
        if service.outage or not service.answers(experiment.splits.fold(0).train[0]):
            error.add_note(f"trial {taken.number} goes on from its checkpoint when this command is run again")
            raise
        return _fail(taken, error, console)
    pruned = outcome["ending"] == PrunerStopper.name
    state = TrialState.PRUNED if pruned else TrialState.COMPLETE
    taken.tell(state, outcome["gain"]["difference"], outcome)
    ended = f", ended by the {outcome['ending']}" if outcome["ending"] else ""
    console.print(f"Trial {taken.number}: gain {outcome['gain']['difference']:+.3f}{ended}", soft_wrap=True)
    return None


class UnsuitableError(Exception):
    """Settings that do not go together."""


def _placeable(config: TrainerConfig, changes: Settings) -> TrainerConfig:
    try:
        return trial_config(config, changes)
    except ConfigError as error:
        raise UnsuitableError(f"these settings do not go together: {error}") from None


def _fail(taken: Taken, error: Exception, console: Console) -> None:
    why = reason(error)
    taken.tell(TrialState.FAIL, None, {"reason": why, "ending": None, "gain": None})
    console.print(f"Trial {taken.number} failed: {why}", soft_wrap=True)


def _trained(
    taken: Taken,
    config: TrainerConfig,
    rules: SearchConfig,
    experiment: Experiment,
    scorer: Scorer,
    null: bool,
) -> Row:
    """What came of the trial, trained now or before."""
    split = experiment.splits.fold(0)
    placed, run = experiment.run(config, SEARCH, TRIALS, f"{taken.number:04d}")
    try:
        if not is_finished(run, placed.iterations):
            shared = experiment.path / SEARCH / BASE_FILE
            _copy_measurement(shared, run.path / BASE_FILE)
            others = [] if null else [PrunerStopper(taken, rules, placed.iterations)]
            quiet = Console(quiet=True)
            train_run(placed, split, scorer, run, quiet, last=0 if null else None, others=others)
            _copy_measurement(run.path / BASE_FILE, shared)
        for iterations, gain in _curve(run):
            taken.report(iterations, gain)
        return _outcome(run)
    finally:
        run.close()


def _copy_measurement(source: Path, target: Path) -> None:
    """The base is the same in all trials: it is measured once."""
    if source.exists() and not target.exists():
        write_atomically(target, source.read_bytes())


def _curve(run: RunFolder) -> list[tuple[int, float]]:
    """The composite's gain at each evaluation, after so many iterations, as it was logged."""
    path = run.path / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    logged = [record for record in map(json.loads, lines) if "evaluation" in record]
    return [(it["iteration"] + 1, it["evaluation"]["composite"]["difference"]) for it in logged]


def _outcome(run: RunFolder) -> Row:
    """What a finished run came to, in the words of search.json."""
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
    """Reports each evaluation to the study; ends the trial where the pruner says so. See deciding.Stopper."""

    name = "pruner"

    def __init__(self, taken: Taken, config: SearchConfig, iterations: int) -> None:
        self._taken = taken
        self._config = config
        self._iterations = iterations

    def heed(self, examined: Examination) -> str | None:
        """Nothing is pruned in its warm-up, nor after its last iteration."""
        gain = examined.comparison.composite.difference
        self._taken.report(examined.done, gain)
        if not self._config.warmup_iterations < examined.done < self._iterations:
            return None
        if not self._taken.is_to_be_pruned():
            return None
        return f"{self._config.pruner}: behind the others after {examined.done} iterations"

    def state(self) -> State:
        """Nothing: what was reported is in the study."""
        return {}

    def restore(self, state: State) -> None:
        """See `state`."""


class Listening:
    """A reward service, and whether it was gone at some time."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.outage = False

    @property
    def evaluators(self) -> tuple[str, ...]:
        """See Scorer."""
        return self._scorer.evaluators

    @property
    def identity(self) -> Mapping[str, str]:
        """See Scorer."""
        return self._scorer.identity

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        """See Scorer."""
        try:
            return self._scorer.score(prompts, images)
        except ScoringError as error:
            if error.outage or isinstance(error.__cause__, (OverloadedError, UnreachableError)):
                self.outage = True
            raise

    def answers(self, prompt: str) -> bool:
        """Whether it scores an image that is nobody's fault."""
        try:
            self._scorer.score([prompt], np.full((1, 64, 64, 3), 128, np.uint8))
        except ScoringError:
            return False
        return True
