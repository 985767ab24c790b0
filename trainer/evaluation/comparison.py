"""Paired comparison of the tuned policy with the base policy, and the measurements that it compares.

Both policies generate images of the same prompts from the same random streams; images and scores of one
policy are a `Measurement`, kept as a .npz file. Intervals resample prompts, those of one group together:
images of one prompt share its difficulty, prompts of one group are variants of each other, and a new prompt
is what a user will bring.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self
from zipfile import BadZipFile

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from trainer.config import EvaluationConfig
from trainer.evaluation.intervals import Groups, Interval, bootstrap_interval, count_groups
from trainer.rl.rewards import Floats, Images, composite
from trainer.runtime.errors import StorageError
from trainer.runtime.files import write_atomically

COMPOSITE = "composite"


# -------------------------------------------------------------------------------------- measurements


class Measurement(NamedTuple):
    """Images of P prompts, G each, and their scores from K evaluators."""

    prompts: tuple[str, ...]
    images: Images  # (P, G, H, W, 3)
    raw: Floats  # (P, G, K)
    z: Floats  # (P, G, K)

    def first(self, prompts: int | None) -> Self:
        """Return the measurement of the first `prompts` prompts; None for all of them."""
        cut = slice(prompts)
        return type(self)(self.prompts[cut], self.images[cut], self.raw[cut], self.z[cut])

    def encode(self) -> bytes:
        """Return the content of a .npz file: everything but the prompts."""
        buffer = io.BytesIO()
        np.savez(buffer, pictures=self.images, raw=self.raw, z=self.z)  # the names in the file stay
        return buffer.getvalue()

    @classmethod
    def decode(cls, content: bytes, prompts: Sequence[str]) -> Self:
        """Parse the content of a .npz file for these prompts. Raises ValueError if it does not fit them."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                images, raw, z = (arrays[name] for name in ("pictures", "raw", "z"))
        except (LookupError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"is not a measurement, or is damaged ({error})") from error
        groups = (len(prompts), *images.shape[1:2])
        whole = images.ndim == 5 and images.shape[4] == 3 and images.dtype == np.uint8
        if not whole or raw.ndim != 3 or raw.shape != z.shape:
            raise ValueError("is not a measurement: its arrays are not images with their scores")
        if images.shape[:2] != groups or raw.shape[:2] != groups:
            raise ValueError(f"has {len(images)} prompts, expected {len(prompts)}")
        return cls(tuple(prompts), images, raw.astype(np.float64), z.astype(np.float64))

    def save(self, path: Path) -> None:
        """Write the file atomically. The prompts are not in it: a run has them in prompts.json."""
        write_atomically(path, self.encode())

    @classmethod
    def load(cls, path: Path, prompts: Sequence[str]) -> Self:
        """Read the saved measurement of these prompts. Raises StorageError if it is missing or damaged."""
        try:
            return cls.decode(path.read_bytes(), prompts)
        except FileNotFoundError as error:
            raise StorageError(f"{path}: no such file; has this run ended?") from error
        except ValueError as error:
            raise StorageError(f"{path}: {error}; delete it and run the same command again") from error


# --------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Change:
    """A mean over prompts before and after training. `low` and `high` bound the difference."""

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    standard_error: float  # of the difference, over groups of prompts

    @property
    def verdict(self) -> str:
        """Side of 0 that the interval lies on: "rises", "falls", or "unclear" if it contains 0."""
        if self.low > 0:
            return "rises"
        return "falls" if self.high < 0 else "unclear"

    def to_dict(self) -> dict[str, object]:
        """Return JSON values with the verdict; null if a single group of prompts gives no interval."""
        return finite_or_null(asdict(self)) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Gain(Change):
    """Change of one score: a row of the comparison."""

    deviations: float  # the difference in calibrated deviations (z)


@dataclass(frozen=True)
class Comparison:
    """Tuned policy against base policy: a row for each evaluator and one for the composite."""

    evaluators: tuple[Gain, ...]  # raw scores
    composite: Gain  # weighted mean of z
    prompts: int
    images_per_prompt: int
    confidence: float
    groups: int  # number of independent groups of prompts

    def to_dict(self) -> dict[str, object]:
        """Return JSON values with verdicts and standard errors; null for what is not finite."""
        return {
            "prompts": self.prompts,
            "groups": self.groups,
            "images_per_prompt": self.images_per_prompt,
            "confidence": self.confidence,
            "rows": self.rows(),
            **finite_or_null({"composite_standard_errors": standard_errors(self.composite)}),
        }

    def rows(self) -> dict[str, object]:
        """Return the JSON values of each row by its name."""
        return {gain.name: gain.to_dict() for gain in (*self.evaluators, self.composite)}


def finite_or_null(values: Mapping[str, object]) -> dict[str, object]:
    """Return the values with None for numbers that are not finite, which JSON cannot hold."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in values.items()
    }


def compare(
    base: Measurement,
    tuned: Measurement,
    evaluators: Sequence[str],
    weights: Mapping[str, float],
    config: EvaluationConfig,
    groups: Groups = None,
) -> Comparison:
    """Return the differences tuned - base, image by image, with intervals over groups of prompts.

    Args:
        evaluators: Names of the K columns of scores.
        weights: Weight of each evaluator in the composite.
        groups: (P,) group of each prompt; None if each prompt is its own group.

    Raises:
        ValueError: The two measured different prompts, or a score is not finite.
    """
    if base.prompts != tuned.prompts:
        raise ValueError("base and tuned measured different prompts: they cannot be compared image by image")
    rows = tuple(evaluator_gain(name, base, tuned, evaluators, config, groups) for name in evaluators)
    total = composite_gain(base, tuned, evaluators, weights, config, groups)
    prompts, images = base.raw.shape[:2]
    return Comparison(rows, total, prompts, images, config.confidence, count_groups(prompts, groups))


def evaluator_gain(
    name: str,
    base: Measurement,
    tuned: Measurement,
    evaluators: Sequence[str],
    config: EvaluationConfig,
    groups: Groups,
    confidence: float | None = None,
) -> Gain:
    """Return the gain of one evaluator in its raw scores, at the configured confidence or another."""
    k = list(evaluators).index(name)
    before, after = base.raw[..., k].mean(axis=1), tuned.raw[..., k].mean(axis=1)
    row = paired_change(name, before, after, config, groups, confidence)
    return Gain(**asdict(row), deviations=float((tuned.z[..., k] - base.z[..., k]).mean()))


def composite_gain(
    base: Measurement,
    tuned: Measurement,
    evaluators: Sequence[str],
    weights: Mapping[str, float],
    config: EvaluationConfig,
    groups: Groups,
) -> Gain:
    """Return the gain of the composite, the weighted mean of z."""
    before, after = (composite(m.z, evaluators, weights).mean(axis=1) for m in (base, tuned))
    row = paired_change(COMPOSITE, before, after, config, groups)
    return Gain(**asdict(row), deviations=row.difference)


def compare_pooled(
    parts: Sequence[tuple[Measurement, Measurement, Groups]],
    evaluators: Sequence[str],
    weights: Mapping[str, float],
    config: EvaluationConfig,
) -> Comparison:
    """Compare over all folds: the validation prompts of every fold, put together.

    Every prompt is scored with the model of its own fold, which was trained neither on it nor on its group:
    each group lies in one fold. The interval is about new prompts and these very models:

    - It leaves out the variance of training: the prompts of a fold share a model, and the models share most
      of their training prompts. The spread of the folds' own gains shows some of it.
    - If each fold took its best checkpoint on these same prompts, or settings were searched on them, the gain
      is optimistic (winner's curse). Only the test prompts, evaluated once, are free of that.

    Args:
        parts: (base, tuned, groups) of the validation prompts of each fold.
    """
    base, tuned = _concatenate([part[0] for part in parts]), _concatenate([part[1] for part in parts])
    groups = _renumber_groups([(len(base.prompts), groups) for base, _, groups in parts])
    return compare(base, tuned, evaluators, weights, config, groups)


def _concatenate(measured: Sequence[Measurement]) -> Measurement:
    """Return one measurement with all scores, without the images, which are not compared."""
    return Measurement(
        tuple(prompt for one in measured for prompt in one.prompts),
        np.empty((0, 0, 0, 0, 3), np.uint8),
        np.concatenate([one.raw for one in measured]),
        np.concatenate([one.z for one in measured]),
    )


def _renumber_groups(parts: Sequence[tuple[int, Groups]]) -> list[int]:
    """Return the groups of all parts in one numbering; no two parts share a group."""
    numbered: list[int] = []
    for prompts, groups in parts:
        start = max(numbered, default=-1) + 1
        _, rows = np.unique(np.arange(prompts) if groups is None else np.asarray(groups), return_inverse=True)
        numbered += (start + rows).tolist()
    return numbered


def paired_change(
    name: str,
    before: Floats,
    after: Floats,
    config: EvaluationConfig,
    groups: Groups,
    confidence: float | None = None,
) -> Change:
    """Return the change of one number per prompt, (P,) each, at the configured confidence or another."""
    bounds = paired_interval(after - before, config, groups, confidence)
    means = float(before.mean()), float(after.mean()), float((after - before).mean())
    return Change(name, *means, *bounds)


def paired_interval(
    differences: Floats, config: EvaluationConfig, groups: Groups = None, confidence: float | None = None
) -> Interval:
    """Return the interval of the mean of one difference per prompt (P,), as configured."""
    confidence = config.confidence if confidence is None else confidence
    # At least ten resamples are expected in the tails.
    resamples = max(config.resamples, int(10 / (1 - confidence)))
    return bootstrap_interval(
        differences, groups, confidence=confidence, resamples=resamples, seed=config.seed
    )


def standard_errors(gain: Change) -> float:
    """Return the difference in its own standard errors.

    0 if nothing changed, infinite if all prompts changed equally, NaN if there is a single group.
    """
    if not np.isfinite(gain.standard_error):
        return float("nan")
    if is_constant(gain):
        return float(np.sign(gain.difference)) * np.inf if gain.difference else 0.0
    return gain.difference / gain.standard_error


def is_constant(gain: Change) -> bool:
    """Return whether all prompts changed by the same amount, up to rounding."""
    return gain.standard_error <= 1e-9 * abs(gain.difference)


# ------------------------------------------------------------------------------------- presentation


def comparison_table(comparison: Comparison) -> Table:
    """Return the comparison as a table for the terminal; σ are the calibrated deviations of z."""
    of_groups = f" in {comparison.groups} groups" if comparison.groups < comparison.prompts else ""
    shown = Table(
        title=f"{comparison.prompts} held-out prompts{of_groups} × {comparison.images_per_prompt} images",
        box=SIMPLE,  # fits 80 columns, where a pipe or a log has no more
        padding=(0, 1, 0, 0),
    )
    bounds = f"{comparison.confidence:.0%} interval"
    for column in ("", "before", "after", "change", bounds, "in σ", ""):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for gain in (*comparison.evaluators, comparison.composite):
        if gain is comparison.composite:
            shown.add_section()
        shown.add_row(
            gain.name,
            f"{gain.before:.4f}",
            f"{gain.after:.4f}",
            f"{gain.difference:+.4f}",
            f"{gain.low:+.4f} {gain.high:+.4f}",
            f"{gain.deviations:+.2f}",
            gain.verdict,
        )
    return shown


def comparison_sentences(comparison: Comparison) -> list[str]:
    """Return the findings in words: the composite, then every evaluator that falls significantly."""
    total = comparison.composite
    verdict = {
        "rises": "rises significantly",
        "falls": "falls significantly",
        "unclear": "does not change clearly",
    }
    change = f"{total.difference:+.3f} deviations, {_significance(total)}"
    lines = [f"The composite {verdict[total.verdict]}: {change}."]
    rising = [gain.name for gain in comparison.evaluators if gain.verdict == "rises"]
    lines.append(f"Rising significantly: {', '.join(rising) or 'none of the evaluators'}.")
    paid = ": the gain elsewhere is partly paid for with it" if rising else ""
    lines += [_warning(gain) + paid + "." for gain in comparison.evaluators if gain.verdict == "falls"]
    return lines


def _significance(gain: Gain) -> str:
    errors = standard_errors(gain)
    if np.isfinite(errors) and not is_constant(gain):
        return f"{errors:+.1f} standard errors"
    return "no standard error: a single group of prompts" if np.isnan(errors) else "the same in every prompt"


def _warning(gain: Gain) -> str:
    return (
        f"Warning: {gain.name} falls significantly, by {-gain.difference:.4f} "
        f"({-gain.deviations:.2f} deviations)"
    )
