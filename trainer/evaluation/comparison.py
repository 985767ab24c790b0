"""Paired comparison: base and tuned policy have drawn the same prompts from the same random streams.

Intervals resample prompts, those of one group together: images of one prompt share its difficulty, prompts
of one group are variants of each other, and a new prompt is what a user will bring.

Images and their scores as arrays, and as a file: what one policy does with a set of prompts.
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
from trainer.evaluation.intervals import Groups, Interval, clusters, interval
from trainer.rl.rewards import Floats, Images, composite
from trainer.runtime.errors import StorageError
from trainer.runtime.files import write_atomically


class Measurement(NamedTuple):
    """Images of P prompts, G each, and their scores by K evaluators."""

    prompts: tuple[str, ...]
    images: Images  # (P, G, H, W, 3)
    raw: Floats  # (P, G, K)
    z: Floats  # (P, G, K)

    def first(self, prompts: int | None) -> Self:
        """That of the first so many prompts; None: of all."""
        cut = slice(prompts)
        return type(self)(self.prompts[cut], self.images[cut], self.raw[cut], self.z[cut])

    def encode(self) -> bytes:
        """All but the prompts, as the content of a .npz file."""
        buffer = io.BytesIO()
        np.savez(buffer, pictures=self.images, raw=self.raw, z=self.z)  # the names in the file stay
        return buffer.getvalue()

    @classmethod
    def decode(cls, content: bytes, prompts: Sequence[str]) -> Self:
        """What `encode` returned, of these prompts. Raises ValueError where it is damaged or of others."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                images, raw, z = (arrays[name] for name in ("pictures", "raw", "z"))
        except (LookupError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"is no measurement, or damaged ({error})") from error
        groups = (len(prompts), *images.shape[1:2])
        whole = images.ndim == 5 and images.shape[4] == 3 and images.dtype == np.uint8
        if not whole or raw.ndim != 3 or raw.shape != z.shape:
            raise ValueError("is no measurement: its arrays are not images with their scores")
        if images.shape[:2] != groups or raw.shape[:2] != groups:
            raise ValueError(f"measures {len(images)} prompts, not these {len(prompts)}")
        return cls(tuple(prompts), images, raw.astype(np.float64), z.astype(np.float64))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. The prompts are kept elsewhere, in prompts.json."""
        write_atomically(path, self.encode())

    @classmethod
    def load(cls, path: Path, prompts: Sequence[str]) -> Self:
        """The measurement of these prompts that was saved. Raises StorageError."""
        try:
            return cls.decode(path.read_bytes(), prompts)
        except FileNotFoundError as error:
            raise StorageError(f"{path}: no such file; has this run ended?") from error
        except ValueError as error:
            raise StorageError(f"{path}: {error}; delete it and run the same command again") from error


COMPOSITE = "composite"


@dataclass(frozen=True)
class Change:
    """A mean over prompts before and after. `low` and `high` bound the difference."""

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    standard_error: float  # of the difference, over groups of prompts

    @property
    def verdict(self) -> str:
        """ "rises", "falls" or "unclear": which side of 0 the interval lies on."""
        if self.low > 0:
            return "rises"
        return "falls" if self.high < 0 else "unclear"

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, with the verdict; null where one group of prompts gives no interval."""
        return finite(asdict(self)) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Gain(Change):
    """One row of the comparison."""

    deviations: float  # the difference in calibrated deviations (z)


@dataclass(frozen=True)
class Comparison:
    """Tuned against base: a row for each evaluator and one for the composite."""

    evaluators: tuple[Gain, ...]  # raw scores
    composite: Gain  # weighted mean of z
    prompts: int
    images_per_prompt: int
    confidence: float
    groups: int  # how many independent groups the prompts are of

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, verdicts and standard errors included; null where there is no number."""
        return {
            "prompts": self.prompts,
            "groups": self.groups,
            "images_per_prompt": self.images_per_prompt,
            "confidence": self.confidence,
            "rows": self.rows(),
            **finite({"composite_standard_errors": standard_errors(self.composite)}),
        }

    def rows(self) -> dict[str, object]:
        """A row's plain values by its name."""
        return {gain.name: gain.to_dict() for gain in (*self.evaluators, self.composite)}


def finite(values: Mapping[str, object]) -> dict[str, object]:
    """The values, with None for what is no finite number: JSON knows no other."""
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
    """Differences tuned - base, image by image, with intervals over groups of prompts.

    `groups` (P,) tells which prompts belong together; None: each stands for itself. Raises ValueError where
    the two measured different prompts, or a score is not finite.
    """
    if base.prompts != tuned.prompts:
        raise ValueError("base and tuned measured different prompts: they cannot be compared image by image")
    rows = tuple(evaluator_gain(name, base, tuned, evaluators, config, groups) for name in evaluators)
    total = composite_gain(base, tuned, evaluators, weights, config, groups)
    prompts, images = base.raw.shape[:2]
    return Comparison(rows, total, prompts, images, config.confidence, clusters(prompts, groups))


def evaluator_gain(
    name: str,
    base: Measurement,
    tuned: Measurement,
    evaluators: Sequence[str],
    config: EvaluationConfig,
    groups: Groups,
    confidence: float | None = None,
) -> Gain:
    """Of one evaluator, in its raw scores; at the configured confidence or another."""
    k = list(evaluators).index(name)
    before, after = base.raw[..., k].mean(axis=1), tuned.raw[..., k].mean(axis=1)
    row = change(name, before, after, config, groups, confidence)
    return Gain(**asdict(row), deviations=float((tuned.z[..., k] - base.z[..., k]).mean()))


def composite_gain(
    base: Measurement,
    tuned: Measurement,
    evaluators: Sequence[str],
    weights: Mapping[str, float],
    config: EvaluationConfig,
    groups: Groups,
) -> Gain:
    """Of the weighted mean of z."""
    before, after = (composite(m.z, evaluators, weights).mean(axis=1) for m in (base, tuned))
    row = change(COMPOSITE, before, after, config, groups)
    return Gain(**asdict(row), deviations=row.difference)


def pooled(
    parts: Sequence[tuple[Measurement, Measurement, Groups]],
    evaluators: Sequence[str],
    weights: Mapping[str, float],
    config: EvaluationConfig,
) -> Comparison:
    """Comparison over all folds: (base, tuned, groups) of each one's validation prompts, put together.

    Every prompt is judged by the model of its own fold, which was trained neither on it nor on its group:
    each group lies in one fold. The interval speaks of new prompts and these very models:

    - it leaves out the luck of training: the prompts of a fold share a model, and the models share most of
      their training prompts. The spread of the folds' own gains shows some of it;
    - where each fold took its best checkpoint on these same prompts, or settings were searched on them, the
      gain is optimistic (winner's curse). Only the test prompts, looked at once, are free of that.
    """
    base, tuned = _together([part[0] for part in parts]), _together([part[1] for part in parts])
    groups = _apart([(len(base.prompts), groups) for base, _, groups in parts])
    return compare(base, tuned, evaluators, weights, config, groups)


def _together(measured: Sequence[Measurement]) -> Measurement:
    """Scores of all of them, without the images, which are not compared."""
    return Measurement(
        tuple(prompt for one in measured for prompt in one.prompts),
        np.empty((0, 0, 0, 0, 3), np.uint8),
        np.concatenate([one.raw for one in measured]),
        np.concatenate([one.z for one in measured]),
    )


def _apart(parts: Sequence[tuple[int, Groups]]) -> list[int]:
    """Groups of all parts in one numbering, none of them shared between two parts."""
    numbered: list[int] = []
    for prompts, groups in parts:
        start = max(numbered, default=-1) + 1
        _, rows = np.unique(np.arange(prompts) if groups is None else np.asarray(groups), return_inverse=True)
        numbered += (start + rows).tolist()
    return numbered


def change(
    name: str,
    before: Floats,
    after: Floats,
    config: EvaluationConfig,
    groups: Groups,
    confidence: float | None = None,
) -> Change:
    """Of one number for each prompt, (P,) each; at the configured confidence or another."""
    bounds = paired_interval(after - before, config, groups, confidence)
    means = float(before.mean()), float(after.mean()), float((after - before).mean())
    return Change(name, *means, *bounds)


def paired_interval(
    differences: Floats, config: EvaluationConfig, groups: Groups = None, confidence: float | None = None
) -> Interval:
    """Interval of the mean of one difference for each prompt, (P,), as the configuration has it."""
    confidence = config.confidence if confidence is None else confidence
    # A tail needs some resamples to be seen in.
    resamples = max(config.resamples, int(10 / (1 - confidence)))
    return interval(differences, groups, confidence=confidence, resamples=resamples, seed=config.seed)


def standard_errors(gain: Change) -> float:
    """The difference in its own standard errors.

    0 where nothing changed; infinite where all prompts changed alike; nan where one group tells no error.
    """
    if not np.isfinite(gain.standard_error):
        return float("nan")
    if alike(gain):
        return float(np.sign(gain.difference)) * np.inf if gain.difference else 0.0
    return gain.difference / gain.standard_error


def alike(gain: Change) -> bool:
    """Whether all prompts changed by the same, but for rounding."""
    return gain.standard_error <= 1e-9 * abs(gain.difference)


# --------------------------------------------------------------------------------------------- words


def table(comparison: Comparison) -> Table:
    """The comparison as a person reads it; σ are the calibrated deviations of z."""
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


def sentences(comparison: Comparison) -> list[str]:
    """What the table says, in words: the composite first, then every evaluator that falls significantly."""
    total = comparison.composite
    verdict = {
        "rises": "rises significantly",
        "falls": "falls significantly",
        "unclear": "does not change clearly",
    }
    change = f"{total.difference:+.3f} deviations, {_sureness(total)}"
    said = [f"The composite {verdict[total.verdict]}: {change}."]
    rising = [gain.name for gain in comparison.evaluators if gain.verdict == "rises"]
    said.append(f"Rising significantly: {', '.join(rising) or 'none of the evaluators'}.")
    paid = ": the gain elsewhere is partly paid for with it" if rising else ""
    said += [_warning(gain) + paid + "." for gain in comparison.evaluators if gain.verdict == "falls"]
    return said


def _sureness(gain: Gain) -> str:
    errors = standard_errors(gain)
    if np.isfinite(errors) and not alike(gain):
        return f"{errors:+.1f} standard errors"
    return "one group of prompts tells no error" if np.isnan(errors) else "the same in every prompt"


def _warning(gain: Gain) -> str:
    return (
        f"Warning: {gain.name} falls significantly, by {-gain.difference:.4f} "
        f"({-gain.deviations:.2f} deviations)"
    )
