"""Who decides after an evaluation whether a fold goes on: patience, the guard, and whoever else is asked.

A decision is a function of the evaluations so far, so a fold that is resumed ends where it would have ended.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from trainer.comparing import Comparison, compare, sentences
from trainer.config import TrainerConfig
from trainer.drift import Drift, measure_drift
from trainer.guards import GuardVerdict, judge_guard
from trainer.intervals import Groups
from trainer.measurements import Measurement
from trainer.patience import EarlyStopping
from trainer.scoring import Floats, Scorer, composite

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
        self._weights = config.judged_by
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
    """Compare, ask the guard, look at the pictures. The guard's level is shared among all looks of a fold."""
    comparison = compare(base, tuned, scorer.evaluators, config.judged_by, config.evaluation, groups)
    guard = None
    if config.guard.evaluator is not None:
        every = config.evaluation.every
        looks = config.iterations // every + 1 if every else 1
        guard = judge_guard(base, tuned, scorer.evaluators, config, groups, looks)
    drift = measure_drift(base, tuned, config.evaluation, groups)
    return Examination(done, base, tuned, comparison, groups, guard, drift)
