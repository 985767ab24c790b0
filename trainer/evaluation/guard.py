"""Whether a gain is real: an evaluator that is not trained on watches for rewards that are gamed.

Which evaluators are independent enough to watch each other: docs/statistics.md.

What the images themselves show: whether a policy draws ever the same image, or other colours.

Rewards can be raised by tricks that scores do not show: one image for every seed, more saturation, more
light. All here is a function of pixels, and compared as scores are: by prompt, with intervals over groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from trainer.config import ConfigError, EvaluationConfig, TrainerConfig, Weights
from trainer.evaluation.comparison import (
    COMPOSITE,
    Change,
    Gain,
    Measurement,
    change,
    composite_gain,
    evaluator_gain,
)
from trainer.evaluation.intervals import Groups
from trainer.rl.rewards import Floats, Images

SIZE_PX = 64  # images are reduced to no more: what matters here is large, and memory stays small

DIVERSITY, SATURATION = "diversity", "saturation"
COLOURS = ("lightness", "a*", "b*")  # CIELAB: 0 to 100, green to red, blue to yellow
LOOKS = (*COLOURS, SATURATION, "contrast")
FEATURES = (DIVERSITY, *LOOKS)

JUST_VISIBLE = 2.3  # ΔE*ab (Mahy, Van Eycken and Oosterlinck 1994)
VISIBLE_SATURATION = 0.02

# sRGB (IEC 61966-2-1), linear, to CIE XYZ relative to the white D65.
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
TO_XYZ /= TO_XYZ.sum(axis=1, keepdims=True)
LINEAR_BELOW = (6 / 29) ** 3


@dataclass(frozen=True)
class Drift:
    """Tuned against base, in pixels."""

    diversity: Change | None  # None where each prompt has but one image
    looks: tuple[Change, ...]  # LOOKS, in their order

    @property
    def colour_shift(self) -> float:
        """ΔE*ab between the mean colours before and after."""
        return float(np.linalg.norm([row.difference for row in self.looks[: len(COLOURS)]]))

    def sentences(self) -> list[str]:
        """What has drifted significantly and visibly, in words."""
        rows = {row.name: row for row in self.looks}
        said = []
        if self.diversity is not None and self.diversity.verdict == "falls":
            lost, row = -self.diversity.difference / self.diversity.before, self.diversity
            said.append(
                f"Warning: images of one prompt have become {lost:.0%} more alike "
                f"({row.before:.3f} to {row.after:.3f})."
            )
        colour = [_towards(rows[name]) for name in COLOURS if rows[name].verdict != "unclear"]
        if colour and self.colour_shift >= JUST_VISIBLE:
            said.append(f"Colours have shifted by ΔE {self.colour_shift:.1f}: {', '.join(colour)}.")
        row = rows[SATURATION]
        if row.verdict != "unclear" and abs(row.difference) >= VISIBLE_SATURATION:
            said.append(f"Saturation {row.difference:+.2f} ({row.before:.2f} to {row.after:.2f}).")
        return said

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; diversity is null where there is none."""
        return {
            "rows": {DIVERSITY: self.diversity and self.diversity.to_dict()}
            | {row.name: row.to_dict() for row in self.looks},
            "colour_shift": self.colour_shift,
            "sentences": self.sentences(),
        }


def _towards(row: Change) -> str:
    falls, rises = {"lightness": ("darker", "lighter"), "a*": ("greener", "redder")}.get(
        row.name, ("bluer", "yellower")
    )
    return rises if row.verdict == "rises" else falls


def measure_drift(
    base: Measurement, tuned: Measurement, config: EvaluationConfig, groups: Groups = None
) -> Drift:
    """How the tuned policy's images differ from the base's of the same prompts."""
    before, after = (np.array([_features(own) for own in m.images]) for m in (base, tuned))
    rows = [change(name, before[:, k], after[:, k], config, groups) for k, name in enumerate(FEATURES)]
    several = base.images.shape[1] > 1
    return Drift(rows[0] if several else None, tuple(rows[1:]))


def _features(images: Images) -> Floats:
    """FEATURES of the images of one prompt, (G, H, W, 3)."""
    small = reduced(images)
    return np.array([diversity(small), *looks(small)])


def reduced(images: Images) -> Floats:
    """Images (G, H, W, 3) of 0 to 255 as (G, h, w, 3) of 0 to 1, in means of square blocks, h, w ≤ 64.

    Rows and columns that fill no block are left out.
    """
    count, height, width, _ = images.shape
    block = -(-max(height, width) // SIZE_PX)
    rows, columns = max(height // block, 1), max(width // block, 1)
    cut = images[:, : rows * block, : columns * block]
    blocks = cut.reshape(count, rows, cut.shape[1] // rows, columns, cut.shape[2] // columns, 3)
    means: Floats = blocks.mean(axis=(2, 4), dtype=np.float64) / 255
    return means


def diversity(images: Floats) -> float:
    """Mean over pairs of G images (G, h, w, 3) of 0 to 1 of their RMS difference: 0 where all are alike.

    0 also of a single image.
    """
    distances = [np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(images, 2)]
    return float(np.mean(distances)) if distances else 0.0


def looks(images: Floats) -> Floats:
    """LOOKS of images (G, h, w, 3) of 0 to 1; contrast is the deviation of L* within an image."""
    colours = lab(images)
    high, low = images.max(axis=-1), images.min(axis=-1)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    contrast = colours[..., 0].std(axis=(1, 2))
    return np.array([*colours.mean(axis=(0, 1, 2)), saturation.mean(), contrast.mean()])


def lab(srgb: Floats) -> Floats:
    """CIELAB (..., 3) under D65 of sRGB (..., 3) of 0 to 1."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ TO_XYZ.T
    cubic = np.where(xyz > LINEAR_BELOW, np.cbrt(xyz), xyz * 841 / 108 + 4 / 29)
    x, y, z = np.moveaxis(cubic, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


__all__ = ["ROTATE", "Drift", "GuardVerdict", "check_guard", "measure_drift", "rotation", "with_guard"]

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
                f"({self.composite.difference:+.2f}): the rewards are gamed, the images not improved"
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


def check_guard(
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
    total = composite_gain(base, tuned, evaluators, config.reward_evaluators, config.evaluation, groups)
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
