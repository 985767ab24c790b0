"""Whether a gain is real: an evaluator that is not trained on watches for rewards that are gamed.

Which evaluators are independent enough to watch each other: docs/statistics.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.comparing import COMPOSITE, Gain, composite_gain, evaluator_gain
from trainer.config import ConfigError, TrainerConfig
from trainer.drift import Drift, measure_drift
from trainer.intervals import Groups
from trainer.measurements import Measurement
from trainer.sections import Weights

__all__ = ["ROTATE", "Drift", "GuardVerdict", "judge_guard", "measure_drift", "rotation", "with_guard"]

ROTATE = "rotate"  # guard.evaluator: each fold holds out another evaluator


@dataclass(frozen=True)
class GuardVerdict:
    """What the guard says of one evaluation."""

    name: str
    gain: Gain  # the guard's, in an interval that its level sets
    composite: Gain  # in the ordinary interval
    level: float  # chance that one look finds a fall where the guard has not fallen
    looks: int  # evaluations that share the run's chance of a false alarm

    @property
    def tripped(self) -> bool:
        """Whether the composite rises significantly while the guard falls significantly."""
        return self.composite.verdict == "rises" and self.gain.verdict == "falls"

    @property
    def sentence(self) -> str:
        """For people; without a full stop."""
        moved = f"{self.gain.deviations:+.2f} deviations"
        if self.tripped:
            return (
                f"Guard {self.name} falls significantly ({moved}) while the composite rises "
                f"({self.composite.difference:+.2f}): the rewards are gamed, the pictures not improved"
            )
        how = {
            "rises": "rises significantly",
            "falls": "falls significantly",
            "unclear": "has not fallen clearly",
        }
        but = ", but the composite does not rise" if self.gain.verdict == "falls" else ""
        return f"Guard {self.name} {how[self.gain.verdict]} ({moved}){but}"

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "tripped": self.tripped,
            "level": self.level,
            "looks": self.looks,
            "sentence": self.sentence,
            "gain": self.gain.to_dict(),
            COMPOSITE: self.composite.to_dict(),
        }


def judge_guard(
    base: Measurement,
    tuned: Measurement,
    evaluators: Sequence[str],
    config: TrainerConfig,
    groups: Groups,
    looks: int,
) -> GuardVerdict:
    """Whether the composite rises while the configured guard falls, at one of so many planned evaluations.

    A run whose guard has not truly fallen is stopped, by all its evaluations together, with a chance of at
    most 1 − guard.confidence: each look gets an equal share of that (Bonferroni: however the looks depend on
    each other). Raises ConfigError where the guard is no evaluator of the service.
    """
    name = config.guard.evaluator
    if name is None or name not in evaluators:
        raise ConfigError(
            f"trainer.guard.evaluator: the service has no evaluator {name}; it has {', '.join(evaluators)}"
        )
    level = (1 - config.guard.confidence) / max(looks, 1)
    # Only a fall can trip, so the interval has the level on that side and as much on the other.
    confidence = max(1 - 2 * level, 0.0)
    gain = evaluator_gain(name, base, tuned, evaluators, config.evaluation, groups, confidence)
    total = composite_gain(base, tuned, evaluators, config.judged_by, config.evaluation, groups)
    return GuardVerdict(name, gain, total, level, max(looks, 1))


def rotation(evaluators: Sequence[str], turn: int) -> str:
    """Which evaluator is held out at that turn (a fold or a trial, from 0): each comes once in a round."""
    return evaluators[turn % len(evaluators)]


def with_guard(config: TrainerConfig, turn: int) -> TrainerConfig:
    """The configuration of that turn: with guard.evaluator=rotate another evaluator is held out at each.

    Its weights become 0; the composite to stop by and to report is that of the others. Without rotation: the
    same configuration. Raises ConfigError where no other evaluator has a weight.
    """
    if config.guard.evaluator != ROTATE:
        return config
    held_out = rotation([name for name, weight in config.objective.weights.items() if weight > 0], turn)
    guard = config.guard.model_copy(update={"evaluator": held_out})
    objective = _without(held_out, config.objective.weights, "objective")
    changed = {"guard": guard, "objective": config.objective.model_copy(update={"weights": objective})}
    if config.evaluation.weights is not None:
        evaluation = _without(held_out, config.evaluation.weights, "evaluation")
        changed["evaluation"] = config.evaluation.model_copy(update={"weights": evaluation})
    return config.model_copy(update=changed)


def _without(held_out: str, weights: Weights, section: str) -> Weights:
    left = {**weights, held_out: 0.0}
    if not any(left.values()):
        raise ConfigError(
            f"trainer.guard.evaluator: {ROTATE} holds out one evaluator after the other, and only {held_out} "
            f"has a weight in {section}.weights; give another one a weight or name a guard"
        )
    return left
