"""Paired evaluation: base and tuned policy draw the same validation prompts from the same random streams.

Intervals are cluster bootstraps over prompts: pictures of one prompt share its difficulty, so they are not
independent, and a prompt is what a user will bring a new one of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from scipy.stats import bootstrap

from trainer.config import EvaluationConfig
from trainer.drawing import NOTHING_SHARED, Studio
from trainer.errors import EvaluationError
from trainer.judging import draw_and_score
from trainer.measurements import Measurement
from trainer.processes import ALONE, Processes
from trainer.progress import progress
from trainer.scoring import Floats, Pictures, Scorer, Scores, ScoringError, composite
from trainer.streams import PictureKey

__all__ = [
    "COMPOSITE",
    "Comparison",
    "Gain",
    "Measurement",
    "compare",
    "measure",
    "prompt_interval",
    "sentences",
    "standard_errors",
    "table",
]

COMPOSITE = "composite"


@dataclass(frozen=True)
class Gain:
    """One row of the comparison. `low` and `high` bound the difference."""

    name: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    standard_error: float  # of the difference, over prompts
    deviations: float  # the difference in calibrated deviations (z)

    @property
    def verdict(self) -> str:
        """ "rises", "falls" or "unclear": which side of 0 the interval lies on."""
        if self.low > 0:
            return "rises"
        return "falls" if self.high < 0 else "unclear"


@dataclass(frozen=True)
class Comparison:
    """Tuned against base: a row for each evaluator and one for the composite."""

    evaluators: tuple[Gain, ...]  # raw scores
    composite: Gain  # weighted mean of z
    prompts: int
    images_per_prompt: int
    confidence: float

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, verdicts and standard errors included; null where one prompt gives none."""
        return {
            "prompts": self.prompts,
            "images_per_prompt": self.images_per_prompt,
            "confidence": self.confidence,
            "rows": self.rows(),
            "composite_standard_errors": standard_errors(self.composite),
        }

    def rows(self) -> dict[str, object]:
        """A row's plain values by its name."""
        return {
            gain.name: _finite(asdict(gain)) | {"verdict": gain.verdict}
            for gain in (*self.evaluators, self.composite)
        }


def _finite(values: dict[str, object]) -> dict[str, object]:
    return {key: None if value in (np.inf, -np.inf) else value for key, value in values.items()}


def measure(
    studio: Studio,
    scorer: Scorer,
    prompts: Sequence[str],
    config: EvaluationConfig,
    what: str,
    processes: Processes = ALONE,
) -> Measurement:
    """Draw and score every prompt `images_per_prompt` times from fixed streams. Raises EvaluationError.

    Each process takes its share of the prompts; all of them get the whole.
    """
    keys = [
        PictureKey(config.seed, 0, -1, prompt, image)
        for prompt in processes.share(prompts)
        for image in range(config.images_per_prompt)
    ]
    with processes.one_fate():
        drawn = _draw_and_score(studio, scorer, keys, config, what, processes)
    # A process without a share has no picture to tell the size of one.
    parts = [[rows for rows in processes.gather_rows(field) if len(rows)] for field in drawn]
    pictures, raw, z = (
        np.concatenate(part).reshape(len(prompts), config.images_per_prompt, *part[0].shape[1:])
        for part in parts
    )
    return Measurement(tuple(prompts), pictures, raw, z)


def _draw_and_score(
    studio: Studio,
    scorer: Scorer,
    keys: Sequence[PictureKey],
    config: EvaluationConfig,
    what: str,
    processes: Processes,
) -> tuple[Pictures, Floats, Floats]:
    """Pictures (N, H, W, 3) of N keys, raw and z (N, K); all three empty without keys."""
    if not keys:
        return np.empty(0, np.uint8), np.empty(0), np.empty(0)
    size = config.micro_batch
    # The bar counts this process's own pictures.
    with progress(len(keys), f"evaluating {what}", "picture", shown=processes.main, inner=True) as bar:
        judged = draw_and_score(
            studio,
            scorer,
            [keys[start : start + size] for start in range(0, len(keys), size)],
            NOTHING_SHARED,
            config.stage,
            config,
            enough=lambda judging: judging.failed,
            keep=lambda drawing: drawing.pictures,
            on_drawn=bar.update,
        )
    scored = [outcome for outcome in judged.outcomes if isinstance(outcome, Scores)]
    for outcome in judged.outcomes:
        if isinstance(outcome, ScoringError):
            raise EvaluationError(f"evaluation stopped: {outcome}") from outcome
    raw, z = (np.concatenate(field) for field in zip(*scored, strict=True))
    return np.concatenate(judged.drawn), raw, z


def compare(
    base: Measurement,
    tuned: Measurement,
    evaluators: Sequence[str],
    weights: Mapping[str, float],
    config: EvaluationConfig,
) -> Comparison:
    """Differences tuned - base, picture by picture, with intervals over prompts."""
    z_gain = (tuned.z - base.z).mean(axis=(0, 1))
    rows = tuple(
        _gain(name, base.raw[..., k], tuned.raw[..., k], float(z_gain[k]), config)
        for k, name in enumerate(evaluators)
    )
    before, after = (composite(m.z, evaluators, weights) for m in (base, tuned))
    total = _gain(COMPOSITE, before, after, float((after - before).mean()), config)
    return Comparison(rows, total, len(base.prompts), base.raw.shape[1], config.confidence)


def _gain(name: str, before: Floats, after: Floats, deviations: float, config: EvaluationConfig) -> Gain:
    by_prompt = (after - before).mean(axis=1)
    low, high, error = prompt_interval(by_prompt, config)
    return Gain(
        name=name,
        before=float(before.mean()),
        after=float(after.mean()),
        difference=float(by_prompt.mean()),
        low=low,
        high=high,
        standard_error=error,
        deviations=deviations,
    )


def prompt_interval(by_prompt: Floats, config: EvaluationConfig) -> tuple[float, float, float]:
    """Bootstrap interval and standard error of the mean of one value a prompt, (P,)."""
    if len(by_prompt) < 2 or np.ptp(by_prompt) == 0:
        mean = float(by_prompt.mean())
        return (mean, mean, 0.0) if len(by_prompt) > 1 else (-np.inf, np.inf, np.inf)
    result = bootstrap(
        (by_prompt,),
        np.mean,
        confidence_level=config.confidence,
        n_resamples=config.resamples,
        method="percentile",
        rng=np.random.default_rng(config.seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high), float(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5)


def standard_errors(gain: Gain) -> float:
    """The difference in its own standard errors; 0 where nothing changed."""
    return gain.difference / gain.standard_error if gain.standard_error > 0 else 0.0


# --------------------------------------------------------------------------------------------- words


def table(comparison: Comparison) -> Table:
    """The comparison as a person reads it; σ are the calibrated deviations of z."""
    shown = Table(
        title=f"{comparison.prompts} held-out prompts × {comparison.images_per_prompt} pictures",
        box=SIMPLE,  # fits 80 columns, where a pipe or a log has no more
        padding=(0, 1, 0, 0),
    )
    interval = f"{comparison.confidence:.0%} interval"
    for column in ("", "before", "after", "change", interval, "in σ", ""):
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
    errors = standard_errors(total)
    change = f"{total.difference:+.3f} deviations, {errors:+.1f} standard errors"
    said = [f"The composite {verdict[total.verdict]}: {change}."]
    rising = [gain.name for gain in comparison.evaluators if gain.verdict == "rises"]
    said.append(f"Rising significantly: {', '.join(rising) or 'none of the evaluators'}.")
    paid = ": the gain elsewhere is partly paid for with it" if rising else ""
    said += [_warning(gain) + paid + "." for gain in comparison.evaluators if gain.verdict == "falls"]
    return said


def _warning(gain: Gain) -> str:
    return (
        f"Warning: {gain.name} falls significantly, by {-gain.difference:.4f} "
        f"({-gain.deviations:.2f} deviations)"
    )
