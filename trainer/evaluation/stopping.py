"""Evaluation results of a fold, and the stoppers that may end it after one: patience and the guard.

A decision to stop is a function of the evaluations so far: a resumed fold ends at the same iteration as one
that was never interrupted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from trainer.config import TrainerConfig
from trainer.evaluation.comparison import Comparison, Measurement, compare, comparison_sentences
from trainer.evaluation.guard import Drift, GuardVerdict, check_guard, measure_drift
from trainer.evaluation.intervals import Floats, Groups, standard_error
from trainer.rl.rewards import Scorer, composite

StopperState = dict[str, Any]  # JSON


# ----------------------------------------------------------------------------------------- evaluation


class EvaluationResult(NamedTuple):
    """The policy after `done` iterations against the base."""

    done: int
    base: Measurement
    tuned: Measurement
    comparison: Comparison
    groups: Groups
    guard: GuardVerdict | None
    drift: Drift

    def sentences(self) -> list[str]:
        """Return the findings in words."""
        guard = [] if self.guard is None else [self.guard.sentence]
        return [*comparison_sentences(self.comparison), *guard, *self.drift.sentences()]

    def monitors(self) -> dict[str, Any]:
        """Return what is monitored beside the scores, guard and drift, as JSON values."""
        return {"guard": self.guard and self.guard.to_dict(), "drift": self.drift.to_dict()}


def evaluate_against_base(
    config: TrainerConfig, scorer: Scorer, done: int, base: Measurement, tuned: Measurement, groups: Groups
) -> EvaluationResult:
    """Compare tuned with base, check the guard if one is configured, and measure drift in the images.

    The guard's chance of a false alarm is shared among all evaluations of the fold.

    Args:
        done: Iterations behind the tuned policy.
        groups: (P,) group of each prompt.
    """
    comparison = compare(base, tuned, scorer.evaluators, config.composite_weights, config.evaluation, groups)
    guard = None
    if config.guard.evaluator is not None:
        every = config.evaluation.every
        looks = config.iterations // every + 1 if every else 1
        guard = check_guard(base, tuned, scorer.evaluators, config, groups, looks)
    drift = measure_drift(base, tuned, config.evaluation, groups)
    return EvaluationResult(done, base, tuned, comparison, groups, guard, drift)


def reward_hacking_reason(evaluation: Mapping[str, Any]) -> str | None:
    """Return the reason to take a run's gain for reward hacking, or None.

    Args:
        evaluation: Content of evaluation.json; its guard has tripped, or has ended the run.
    """
    ending, guard = evaluation["ending"], evaluation["guard"]
    if ending is not None and ending["by"] == GuardStopper.name:
        return str(ending["reason"])
    return str(guard["sentence"]) if guard is not None and guard["tripped"] else None


# ------------------------------------------------------------------------------------------- stoppers


class Ending(NamedTuple):
    """The stopper that ended a fold before its last iteration, and its reason."""

    by: str  # "patience", "guard", ...
    reason: str


class Stopper(Protocol):
    """Receives every evaluation of a fold; may end the fold."""

    @property
    def name(self) -> str:
        """Name in `Ending.by` and in the saved state."""

    def on_evaluation(self, result: EvaluationResult) -> str | None:
        """Return the reason to end the fold now, or None."""

    def state(self) -> StopperState:
        """Return what `restore` needs, as JSON values."""

    def restore(self, state: StopperState) -> None:
        """Continue from a saved state."""


class Stoppers:
    """All stoppers of a fold: each receives every evaluation, the first with a reason ends the fold."""

    def __init__(self, *members: Stopper) -> None:
        self._members = members
        self.ending: Ending | None = None

    def on_evaluation(self, result: EvaluationResult) -> None:
        """Pass an evaluation to every stopper; set `ending` if one ends the fold."""
        for member in self._members:
            reason = member.on_evaluation(result)
            if reason is not None and self.ending is None:
                self.ending = Ending(member.name, reason)

    def state(self) -> StopperState:
        """Return the state to keep in a checkpoint."""
        ending = self.ending and self.ending._asdict()
        return {"ending": ending, "members": {member.name: member.state() for member in self._members}}

    def restore(self, state: StopperState) -> None:
        """Restore the state of a checkpoint; an empty one is of a version without stoppers."""
        saved = state.get("members", {})
        for member in self._members:
            if member.name in saved:
                member.restore(saved[member.name])
        self.ending = Ending(**state["ending"]) if state.get("ending") else None


def configured_stoppers(config: TrainerConfig, evaluators: Sequence[str], *others: Stopper) -> Stoppers:
    """Return the guard and patience stoppers, if configured, followed by the others."""
    members: list[Stopper] = []
    if config.guard.evaluator is not None and config.guard.stop:
        members.append(GuardStopper())
    if config.early_stopping.patience:
        members.append(PatienceStopper(config, evaluators))
    return Stoppers(*members, *others)


class GuardStopper:
    """Ends a fold whose composite rises while the evaluator that is not trained on falls."""

    name = "guard"

    def on_evaluation(self, result: EvaluationResult) -> str | None:
        """See `Stopper.on_evaluation`."""
        guard = result.guard
        return guard.sentence if guard is not None and guard.tripped else None

    def state(self) -> StopperState:
        """Return an empty state: no evaluation depends on an earlier one."""
        return {}

    def restore(self, state: StopperState) -> None:
        """Do nothing, see `state`."""


class PatienceStopper:
    """Ends a fold whose composite has not risen for `patience` evaluations."""

    name = "patience"

    def __init__(self, config: TrainerConfig, evaluators: Sequence[str]) -> None:
        self._early = EarlyStopping(config.early_stopping.patience, config.early_stopping.min_delta)
        self._evaluators = evaluators
        self._weights = config.composite_weights
        self._begun = False

    def on_evaluation(self, result: EvaluationResult) -> str | None:
        """See `Stopper.on_evaluation`."""
        if not self._begun:
            self._early.update(0, self._by_prompt(result.base), result.groups)
            self._begun = True
        if not self._early.update(result.done, self._by_prompt(result.tuned), result.groups):
            return None
        return f"no improvement in {self._early.patience} evaluations"

    def _by_prompt(self, measurement: Measurement) -> Floats:
        means: Floats = composite(measurement.z, self._evaluators, self._weights).mean(axis=1)
        return means

    def state(self) -> StopperState:
        """See `Stopper.state`."""
        return {"begun": self._begun, **self._early.state}

    def restore(self, state: StopperState) -> None:
        """See `Stopper.restore`."""
        self._begun = state["begun"]
        self._early.restore({key: value for key, value in state.items() if key != "begun"})


class EarlyStopping:
    """Early stopping in standard errors: stop after `patience` evaluations in a row without improvement.

    An evaluation is an improvement if the mean over prompts of its composite, minus the one of the last
    improvement, exceeds `min_delta` standard errors of that paired difference, and 0. The reference is the
    last improvement and not the evaluation before, so that small steps in one direction add up. The first
    evaluation is the first reference: pass the base's own, so that a policy that never beats it stops too.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        """Raises ValueError for a patience below 1 or a min_delta below 0."""
        if patience < 1 or min_delta < 0:
            raise ValueError(
                f"early stopping: expected patience ≥ 1 and min_delta ≥ 0, got {patience} and {min_delta}"
            )
        self.patience = patience
        self.min_delta = min_delta
        self.best: tuple[int, float] | None = None  # iterations done, and the highest mean composite so far
        self.waited = 0  # evaluations in a row without improvement
        self._reference: Floats | None = None  # (P,)

    def update(self, done: int, by_prompt: Floats, groups: Groups = None) -> bool:
        """Record an evaluation; return whether to stop.

        Args:
            done: Iterations behind the evaluated policy.
            by_prompt: (P,) composite of each prompt, of the same prompts at each evaluation.
            groups: (P,) group of each prompt.

        Raises:
            ValueError: A composite is missing or not finite.
        """
        now = np.asarray(by_prompt, dtype=np.float64)
        if self._improves(now, groups):
            self._reference, self.waited = now.copy(), 0
        else:
            self.waited += 1
        if self.best is None or now.mean() > self.best[1]:
            self.best = (done, float(now.mean()))
        return self.waited >= self.patience

    def _improves(self, now: Floats, groups: Groups) -> bool:
        if not len(now) or not np.isfinite(now).all():
            raise ValueError("a composite is missing or not finite")
        if self._reference is None:
            return True
        gain = now - self._reference
        error = standard_error(gain, groups)
        # A single group has no standard error: any gain counts.
        threshold = self.min_delta * error if np.isfinite(error) else 0.0
        return bool(gain.mean() > threshold)

    @property
    def state(self) -> dict[str, Any]:
        """The state that `restore` needs, as JSON values."""
        return {
            "best": self.best,
            "waited": self.waited,
            "reference": None if self._reference is None else self._reference.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly from a saved state."""
        best, reference = state["best"], state["reference"]
        self.best = None if best is None else (int(best[0]), float(best[1]))
        self.waited = int(state["waited"])
        self._reference = None if reference is None else np.asarray(reference, dtype=np.float64)
