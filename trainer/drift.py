"""What the pictures themselves show: whether a policy draws ever the same picture, or other colours.

Rewards can be raised by tricks that scores do not show: one picture for every seed, more saturation, more
light. All here is a function of pixels, and compared as scores are: by prompt, with intervals over groups.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from trainer.comparing import Change, change
from trainer.config import EvaluationConfig
from trainer.intervals import Groups
from trainer.measurements import Measurement
from trainer.scoring import Floats, Pictures

SIZE_PX = 64  # pictures are reduced to no more: what matters here is large, and memory stays small

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

    diversity: Change | None  # None where each prompt has but one picture
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
                f"Warning: pictures of one prompt have become {lost:.0%} more alike "
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
    """How the tuned policy's pictures differ from the base's of the same prompts."""
    before, after = (np.array([_features(own) for own in m.pictures]) for m in (base, tuned))
    rows = [change(name, before[:, k], after[:, k], config, groups) for k, name in enumerate(FEATURES)]
    several = base.pictures.shape[1] > 1
    return Drift(rows[0] if several else None, tuple(rows[1:]))


def _features(pictures: Pictures) -> Floats:
    """FEATURES of the pictures of one prompt, (G, H, W, 3)."""
    small = reduced(pictures)
    return np.array([diversity(small), *looks(small)])


def reduced(pictures: Pictures) -> Floats:
    """Pictures (G, H, W, 3) of 0 to 255 as (G, h, w, 3) of 0 to 1, in means of square blocks, h, w ≤ 64.

    Rows and columns that fill no block are left out.
    """
    count, height, width, _ = pictures.shape
    block = -(-max(height, width) // SIZE_PX)
    rows, columns = max(height // block, 1), max(width // block, 1)
    cut = pictures[:, : rows * block, : columns * block]
    blocks = cut.reshape(count, rows, cut.shape[1] // rows, columns, cut.shape[2] // columns, 3)
    means: Floats = blocks.mean(axis=(2, 4), dtype=np.float64) / 255
    return means


def diversity(pictures: Floats) -> float:
    """Mean over pairs of G pictures (G, h, w, 3) of 0 to 1 of their RMS difference: 0 where all are alike.

    0 also of a single picture.
    """
    distances = [np.sqrt(np.mean((a - b) ** 2)) for a, b in combinations(pictures, 2)]
    return float(np.mean(distances)) if distances else 0.0


def looks(pictures: Floats) -> Floats:
    """LOOKS of pictures (G, h, w, 3) of 0 to 1; contrast is the deviation of L* within a picture."""
    colours = lab(pictures)
    high, low = pictures.max(axis=-1), pictures.min(axis=-1)
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
