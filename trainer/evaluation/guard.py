"""Reward-hacking checks: a guard evaluator that is not trained on, and drift in the images themselves.

The guard trips if the composite rises while the evaluator that is held out falls. docs/statistics.md explains
which evaluators are independent enough to guard each other.

Rewards can also be raised by tricks that no score shows: one image for every seed, more saturation, more
light. Drift measures these from pixels, and compares them as scores are compared: by prompt, with intervals
over groups.
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
    composite_gain,
    evaluator_gain,
    paired_change,
)
from trainer.evaluation.intervals import Groups
from trainer.rl.rewards import Floats, Images

ROTATE = "rotate"  # value of guard.evaluator: each fold holds out another evaluator


# ---------------------------------------------------------------------------------------------- guard


@dataclass(frozen=True)
class GuardVerdict:
    """Result of the guard check at one evaluation."""

    name: str
    gain: Gain  # of the guard, with an interval at `level`
    composite: Gain  # with an interval at evaluation.confidence
    level: float  # false-alarm probability of one evaluation
    looks: int  # planned evaluations of the fold, which share its false-alarm probability

    @property
    def tripped(self) -> bool:
        """True if the composite rises significantly while the guard falls significantly."""
        return self.composite.verdict == "rises" and self.gain.verdict == "falls"

    @property
    def sentence(self) -> str:
        """The verdict in words, without a full stop."""
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
        """Return JSON values."""
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
    """Check whether the composite rises while the configured guard falls, at one evaluation of a fold.

    A run whose guard has not truly fallen is stopped, over all its evaluations, with a probability of at most
    1 − guard.confidence. Each evaluation gets an equal share of that (Bonferroni, which holds for any
    dependence between evaluations).

    Args:
        evaluators: Names of the K columns of scores.
        groups: (P,) group of each prompt.
        looks: Planned evaluations of the fold.

    Raises:
        ConfigError: The service does not have the guard's evaluator.
    """
    name = config.guard.evaluator
    if name is None or name not in evaluators:
        raise ConfigError(
            f"trainer.guard.evaluator: the service has no evaluator {name}; it has {', '.join(evaluators)}"
        )
    level = (1 - config.guard.confidence) / max(looks, 1)
    # Only a fall trips, but the interval is two-sided: it leaves out `level` on either side.
    confidence = max(1 - 2 * level, 0.0)
    gain = evaluator_gain(name, base, tuned, evaluators, config.evaluation, groups, confidence)
    total = composite_gain(base, tuned, evaluators, config.composite_weights, config.evaluation, groups)
    return GuardVerdict(name, gain, total, level, max(looks, 1))


def rotated_guard(evaluators: Sequence[str], turn: int) -> str:
    """Return the evaluator that is held out at a turn (fold or trial, from 0): each in its order, in turn."""
    return evaluators[turn % len(evaluators)]


def with_guard(config: TrainerConfig, turn: int) -> TrainerConfig:
    """Return the configuration of a turn (fold or trial): with guard.evaluator=rotate, another guard each.

    The weights of the guard become 0: the composite to stop by and to report is that of the other evaluators.
    Without rotation, the configuration is returned as it is.

    Raises:
        ConfigError: No other evaluator has a weight.
    """
    if config.guard.evaluator != ROTATE:
        return config
    held_out = rotated_guard([name for name, weight in config.objective.weights.items() if weight > 0], turn)
    guard = config.guard.model_copy(update={"evaluator": held_out})
    objective = _without_weight(held_out, config.objective.weights, "objective")
    changed = {"guard": guard, "objective": config.objective.model_copy(update={"weights": objective})}
    if config.evaluation.weights is not None:
        evaluation = _without_weight(held_out, config.evaluation.weights, "evaluation")
        changed["evaluation"] = config.evaluation.model_copy(update={"weights": evaluation})
    return config.model_copy(update=changed)


def _without_weight(held_out: str, weights: Weights, section: str) -> Weights:
    remaining = {**weights, held_out: 0.0}
    if not any(remaining.values()):
        raise ConfigError(
            f"trainer.guard.evaluator: {ROTATE} holds out one evaluator after the other, and only {held_out} "
            f"has a weight in {section}.weights; give another one a weight, or name a guard"
        )
    return remaining


# ---------------------------------------------------------------------------------------------- drift

MAX_SIZE_PX = 64  # images are downscaled to this: drift is of low frequency, and memory stays small

DIVERSITY, SATURATION = "diversity", "saturation"
COLOURS = ("lightness", "a*", "b*")  # CIELAB: 0 to 100, green to red, blue to yellow
APPEARANCE = (*COLOURS, SATURATION, "contrast")
FEATURES = (DIVERSITY, *APPEARANCE)

JUST_VISIBLE = 2.3  # ΔE*ab (Mahy, Van Eycken and Oosterlinck 1994)
VISIBLE_SATURATION = 0.02

# sRGB (IEC 61966-2-1), linear, to CIE XYZ relative to the white D65.
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
TO_XYZ /= TO_XYZ.sum(axis=1, keepdims=True)
LINEAR_BELOW = (6 / 29) ** 3


@dataclass(frozen=True)
class Drift:
    """Differences of the tuned policy's images from the base policy's, in pixels."""

    diversity: Change | None  # None if each prompt has a single image
    appearance: tuple[Change, ...]  # a row for each of APPEARANCE

    @property
    def colour_shift(self) -> float:
        """ΔE*ab between the mean colours before and after training."""
        return float(np.linalg.norm([row.difference for row in self.appearance[: len(COLOURS)]]))

    def sentences(self) -> list[str]:
        """Return what has drifted significantly and visibly, in words."""
        rows = {row.name: row for row in self.appearance}
        lines = []
        if self.diversity is not None and self.diversity.verdict == "falls":
            lost, row = -self.diversity.difference / self.diversity.before, self.diversity
            lines.append(
                f"Warning: images of one prompt have become {lost:.0%} more alike "
                f"({row.before:.3f} to {row.after:.3f})."
            )
        colour = [_direction(rows[name]) for name in COLOURS if rows[name].verdict != "unclear"]
        if colour and self.colour_shift >= JUST_VISIBLE:
            lines.append(f"Colours have shifted by ΔE {self.colour_shift:.1f}: {', '.join(colour)}.")
        row = rows[SATURATION]
        if row.verdict != "unclear" and abs(row.difference) >= VISIBLE_SATURATION:
            lines.append(f"Saturation {row.difference:+.2f} ({row.before:.2f} to {row.after:.2f}).")
        return lines

    def to_dict(self) -> dict[str, object]:
        """Return JSON values; diversity is null if each prompt has a single image."""
        return {
            "rows": {DIVERSITY: self.diversity and self.diversity.to_dict()}
            | {row.name: row.to_dict() for row in self.appearance},
            "colour_shift": self.colour_shift,
            "sentences": self.sentences(),
        }


def _direction(row: Change) -> str:
    falls, rises = {"lightness": ("darker", "lighter"), "a*": ("greener", "redder")}.get(
        row.name, ("bluer", "yellower")
    )
    return rises if row.verdict == "rises" else falls


def measure_drift(
    base: Measurement, tuned: Measurement, config: EvaluationConfig, groups: Groups = None
) -> Drift:
    """Measure how the tuned policy's images differ from the base's of the same prompts."""
    before, after = (np.array([_features(images) for images in m.images]) for m in (base, tuned))
    rows = [paired_change(name, before[:, k], after[:, k], config, groups) for k, name in enumerate(FEATURES)]
    several = base.images.shape[1] > 1
    return Drift(rows[0] if several else None, tuple(rows[1:]))


def _features(images: Images) -> Floats:
    """Return FEATURES of the images of one prompt, (G, H, W, 3)."""
    small = downscale(images)
    return np.array([diversity(small), *appearance(small)])


def downscale(images: Images) -> Floats:
    """Return images (G, H, W, 3) of 0 to 255 as (G, h, w, 3) of 0 to 1: means of square blocks, h, w ≤ 64.

    Rows and columns that do not fill a block are left out.
    """
    count, height, width, _ = images.shape
    block = -(-max(height, width) // MAX_SIZE_PX)
    rows, columns = max(height // block, 1), max(width // block, 1)
    cut = images[:, : rows * block, : columns * block]
    blocks = cut.reshape(count, rows, cut.shape[1] // rows, columns, cut.shape[2] // columns, 3)
    means: Floats = blocks.mean(axis=(2, 4), dtype=np.float64) / 255
    return means


def diversity(images: Floats) -> float:
    """Return the mean RMS difference over pairs of G images (G, h, w, 3) of 0 to 1; 0 for a single image."""
    distances = [np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(images, 2)]
    return float(np.mean(distances)) if distances else 0.0


def appearance(images: Floats) -> Floats:
    """Return APPEARANCE of images (G, h, w, 3) of 0 to 1; contrast is the deviation of L* in an image."""
    colours = srgb_to_lab(images)
    high, low = images.max(axis=-1), images.min(axis=-1)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    contrast = colours[..., 0].std(axis=(1, 2))
    return np.array([*colours.mean(axis=(0, 1, 2)), saturation.mean(), contrast.mean()])


def srgb_to_lab(srgb: Floats) -> Floats:
    """Convert sRGB (..., 3) of 0 to 1 to CIELAB (..., 3) under D65."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ TO_XYZ.T
    cubic = np.where(xyz > LINEAR_BELOW, np.cbrt(xyz), xyz * 841 / 108 + 4 / 29)
    x, y, z = np.moveaxis(cubic, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
