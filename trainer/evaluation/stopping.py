"""Who decides after an evaluation whether a fold goes on: patience, the guard, and whoever else is asked.

A decision is a function of the evaluations so far, so a fold that is resumed ends where it would have ended.

When a fold has stopped getting better: early stopping in standard errors.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from trainer.config import TrainerConfig
from trainer.evaluation.comparison import Comparison, Measurement, compare, sentences
from trainer.evaluation.guard import Drift, GuardVerdict, check_guard, measure_drift
from trainer.evaluation.intervals import Floats, Groups, standard_error
from trainer.rl.rewards import Scorer, composite


class EarlyStopping:
    """Bears `patience` evaluations without improvement and stops at the last of them; remembers the best.

    An evaluation is an improvement where the mean over prompts of its composite, less the one of the last
    improvement, exceeds `min_delta` standard errors of that paired difference, and 0. The reference is the
    last improvement and not the evaluation before, so that small steps in one direction add up. The first
    evaluation heard is the first reference: the base's own, for a policy that never beats it to stop too.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        """Raises ValueError for a patience below 1 or a min_delta below 0."""
        if patience < 1 or min_delta < 0:
            raise ValueError(f"patience {patience} must be 1 or more, and min_delta {min_delta} 0 or more")
        self.patience = patience
        self.min_delta = min_delta
        self.best: tuple[int, float] | None = None  # iterations done, composite: the highest mean heard
        self.waited = 0  # evaluations in a row without improvement
        self._reference: Floats | None = None  # (P,)

    def heed(self, done: int, by_prompt: Floats, groups: Groups = None) -> bool:
        """Whether to stop, having heard the composite (P,) of each prompt after `done` iterations.

        `groups` (P,) tells which prompts belong together. Prompts must be the same at each evaluation. Raises
        ValueError for a number that is not finite.
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
        # Of a single group no error is known, and the plain difference has to do.
        needed = self.min_delta * error if np.isfinite(error) else 0.0
        return bool(gain.mean() > needed)

    @property
    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON."""
        return {
            "best": self.best,
            "waited": self.waited,
            "reference": None if self._reference is None else self._reference.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where that state was taken."""
        best, reference = state["best"], state["reference"]
        self.best = None if best is None else (int(best[0]), float(best[1]))
        self.waited = int(state["waited"])
        self._reference = None if reference is None else np.asarray(reference, dtype=np.float64)


State = dict[str, Any]  # JSON


class Examination(NamedTuple):
    """One evaluation on the way: the policy after `done` iterations against the base."""

    done: int
    base: Measurement
    tuned: Measurement
    comparison: Comparison
    groups: Groups
    guard: GuardVerdict | None
    drift: Drift

    def sentences(self) -> list[str]:
        """What it means, in words."""
        guard = [] if self.guard is None else [self.guard.sentence]
        return [*sentences(self.comparison), *guard, *self.drift.sentences()]

    def watched(self) -> dict[str, Any]:
        """What is watched beside the scores, as JSON."""
        return {"guard": self.guard and self.guard.to_dict(), "drift": self.drift.to_dict()}


class Ending(NamedTuple):
    """Why a fold ends before its last iteration, and by whose decision."""

    by: str  # "patience", "guard", ...
    reason: str


class Stopper(Protocol):
    """Hears of every evaluation of a fold; may end it."""

    @property
    def name(self) -> str:
        """By which an ending and the state are known."""

    def heed(self, examined: Examination) -> str | None:
        """Why the fold is to end now, or None."""

    def state(self) -> State:
        """What it has to remember, as JSON."""

    def restore(self, state: State) -> None:
        """Remember it again."""


class Stoppers:
    """All of a fold's stoppers: each hears of every evaluation, the first to say so ends the fold."""

    def __init__(self, *members: Stopper) -> None:
        self._members = members
        self.ending: Ending | None = None

    def heed(self, examined: Examination) -> None:
        """Have all of them hear of an evaluation."""
        for member in self._members:
            reason = member.heed(examined)
            if reason is not None and self.ending is None:
                self.ending = Ending(member.name, reason)

    def state(self) -> State:
        """What checkpoints keep."""
        ending = self.ending and self.ending._asdict()
        return {"ending": ending, "members": {member.name: member.state() for member in self._members}}

    def restore(self, state: State) -> None:
        """What a checkpoint kept; nothing where it was written before there were stoppers."""
        kept = state.get("members", {})
        for member in self._members:
            if member.name in kept:
                member.restore(kept[member.name])
        self.ending = Ending(**state["ending"]) if state.get("ending") else None


class PatienceStopper:
    """Ends a fold whose composite has not risen for `patience` evaluations."""

    name = "patience"

    def __init__(self, config: TrainerConfig, evaluators: Sequence[str]) -> None:
        self._early = EarlyStopping(config.early_stopping.patience, config.early_stopping.min_delta)
        self._evaluators = evaluators
        self._weights = config.reward_evaluators
        self._begun = False

    def heed(self, examined: Examination) -> str | None:
        """See `Stopper.heed`."""
        if not self._begun:
            self._early.heed(0, self._by_prompt(examined.base), examined.groups)
            self._begun = True
        if not self._early.heed(examined.done, self._by_prompt(examined.tuned), examined.groups):
            return None
        return f"no improvement in {self._early.patience} evaluations"

    def _by_prompt(self, measured: Measurement) -> Floats:
        means: Floats = composite(measured.z, self._evaluators, self._weights).mean(axis=1)
        return means

    def state(self) -> State:
        """See `Stopper.state`."""
        return {"begun": self._begun, **self._early.state}

    def restore(self, state: State) -> None:
        """See `Stopper.restore`."""
        self._begun = state["begun"]
        self._early.restore({key: value for key, value in state.items() if key != "begun"})


class GuardStopper:
    """Ends a fold whose composite rises while the evaluator that is not trained on falls."""

    name = "guard"

    def heed(self, examined: Examination) -> str | None:
        """See `Stopper.heed`."""
        guard = examined.guard
        return guard.sentence if guard is not None and guard.tripped else None

    def state(self) -> State:
        """Nothing: each evaluation speaks for itself."""
        return {}

    def restore(self, state: State) -> None:
        """See `state`."""


def gamed(evaluation: Mapping[str, Any]) -> str | None:
    """Why a run's gain is not to be believed, by its evaluation.json: its guard has tripped, or ended it."""
    ending, guard = evaluation["ending"], evaluation["guard"]
    if ending is not None and ending["by"] == GuardStopper.name:
        return str(ending["reason"])
    return str(guard["sentence"]) if guard is not None and guard["tripped"] else None


def configured_stoppers(config: TrainerConfig, evaluators: Sequence[str], *others: Stopper) -> Stoppers:
    """The guard and patience where they are configured, then the others."""
    members: list[Stopper] = []
    if config.guard.evaluator is not None and config.guard.stop:
        members.append(GuardStopper())
    if config.early_stopping.patience:
        members.append(PatienceStopper(config, evaluators))
    return Stoppers(*members, *others)


def examination(
    config: TrainerConfig, scorer: Scorer, done: int, base: Measurement, tuned: Measurement, groups: Groups
) -> Examination:
    """Compare, ask the guard, look at the images. The guard's level is shared among all looks of a fold."""
    comparison = compare(base, tuned, scorer.evaluators, config.reward_evaluators, config.evaluation, groups)
    guard = None
    if config.guard.evaluator is not None:
        every = config.evaluation.every
        looks = config.iterations // every + 1 if every else 1
        guard = check_guard(base, tuned, scorer.evaluators, config, groups, looks)
    drift = measure_drift(base, tuned, config.evaluation, groups)
    return Examination(done, base, tuned, comparison, groups, guard, drift)
