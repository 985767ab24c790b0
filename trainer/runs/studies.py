"""Studies of a configuration's noise: variance removed by shared random numbers, and scores across stages.

Sharing. An advantage compares the images of one prompt. Two groups of G images are generated for each of P
prompts by the current policy: one with independent random numbers, one that shares them. With v the variance
of a score within a group, sharing removes 1 - (sum of v, shared) / (sum of v, independent), both pooled over
prompts. Images of both groups have the same random streams where nothing is shared: the comparison is paired.

Stages. Rank correlations (Spearman) of scores before and after super-resolution, with cluster-bootstrap
intervals over prompts. The trainer compares the images of one prompt, so the correlation within prompts is
the one that decides: the mean over prompts.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap, spearmanr

from reward_service.runtime.progress import progress, track
from trainer.config import EvaluationConfig, Sharing, TrainerConfig
from trainer.evaluation.comparison import COMPOSITE, paired_interval
from trainer.rl.karlo import to_uint8
from trainer.rl.rewards import Floats, Scorer, Scores, ScoringError, composite
from trainer.rl.rollout import ScoringPipeline, group_keys, micro_batches, sample_and_score
from trainer.rl.sampler import NOTHING_SHARED, ImageSampler
from trainer.runs.folder import RunFolder
from trainer.runs.setup import check_evaluators, load_sampler
from trainer.runtime.distributed import Processes
from trainer.runtime.errors import EvaluationError
from trainer.runtime.rng import ImageKey

# ---------------------------------------------------------------------------------- sharing of noise

SHARING_PROMPTS = 32  # with 8 images each, a share of 0.5 is known to about ±0.1


class VarianceRemoved(NamedTuple):
    """Share of the within-prompt variance of a score that sharing removes; negative if it adds."""

    share: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return JSON values, with null for NaN."""
        return {name: value if np.isfinite(value) else None for name, value in self._asdict().items()}


@dataclass(frozen=True)
class SharingReport:
    """Variance removed, for each way of sharing, by evaluator and for the composite."""

    removed: Mapping[str, Mapping[str, VarianceRemoved]]
    prompts: int
    images_per_prompt: int
    confidence: float

    def to_dict(self) -> dict[str, object]:
        """Return JSON values; null if nothing varies."""
        removed = {
            way: {name: share.to_dict() for name, share in columns.items()}
            for way, columns in self.removed.items()
        }
        return asdict(self) | {"removed": removed}


def measure_sharing(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    *,
    each: bool = False,
) -> SharingReport:
    """Measure the variance that the configured sharing removes for these prompts.

    Args:
        each: Measure every shared stage alone as well.

    Raises:
        EvaluationError: A batch could not be scored.
    """
    ways = {"as configured": config.rollout.share} | (_stages_alone(config.rollout.share) if each else {})
    independent = _variances(sampler, scorer, prompts, config, NOTHING_SHARED, "independent")
    removed = {}
    for name, sharing in ways.items():
        shared = _variances(sampler, scorer, prompts, config, sharing, name)
        columns = (*scorer.evaluators, COMPOSITE)
        removed[name] = {
            column: variance_removed(shared[:, k], independent[:, k], config.evaluation.confidence)
            for k, column in enumerate(columns)
        }
    return SharingReport(
        removed, len(prompts), config.rollout.images_per_prompt, config.evaluation.confidence
    )


def variance_removed(shared: Floats, independent: Floats, confidence: float = 0.95) -> VarianceRemoved:
    """Return the share removed, from within-group variances of P prompts with and without sharing, (P,) each.

    All groups have the same size. The interval is a paired percentile bootstrap over prompts. NaN if nothing
    varies.
    """
    if len(independent) < 2 or not independent.any():
        return VarianceRemoved(np.nan, np.nan, np.nan)

    def removed(one: Floats, other: Floats, axis: int = -1) -> Floats:
        share: Floats = 1 - one.sum(axis=axis) / np.maximum(other.sum(axis=axis), 1e-300)
        return share

    interval = bootstrap(
        (shared, independent),
        removed,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return VarianceRemoved(float(removed(shared, independent)), float(interval.low), float(interval.high))


def _stages_alone(sharing: Sharing) -> dict[str, Sharing]:
    """Return, for each stage that is shared, a configuration that shares it alone."""
    return {
        f"{stage} alone": NOTHING_SHARED.model_copy(update={stage: share})
        for stage, share in sharing.model_dump().items()
        if share != "image"
    }


def _variances(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    sharing: Sharing,
    description: str,
) -> Floats:
    """Return the within-group variance of each evaluator's z and of the composite, (P, K + 1)."""
    count, size = config.rollout.images_per_prompt, config.sampling.micro_batch
    keys = [ImageKey(config.seed, 0, -1, prompt, image) for prompt in prompts for image in range(count)]
    with progress(len(keys), f"variance, {description}", "image", inner=True) as bar:
        scored = sample_and_score(
            sampler,
            scorer,
            [keys[start : start + size] for start in range(0, len(keys), size)],
            sharing,
            config.rollout.reward_stage,
            config.rollout,
            stop_when=lambda scoring: scoring.failed,
            keep=lambda _sampled: None,
            on_sampled=bar.update,
        )
    scores = []
    for outcome in scored.outcomes:
        if isinstance(outcome, ScoringError):
            raise EvaluationError(f"measuring the variance stopped: {outcome}") from outcome
        scores.append(outcome.z)
    z = np.concatenate(scores).reshape(len(prompts), count, -1)
    total = composite(z, scorer.evaluators, config.objective.weights)
    variances: Floats = np.concatenate([z, total[..., None]], axis=2).var(axis=1, ddof=1)
    return variances


def sharing_table(report: SharingReport) -> Table:
    """Return the report as a table for the terminal."""
    shown = Table(
        title="Within-prompt variance that sharing removes",
        caption=f"{report.prompts} prompts × {report.images_per_prompt} images, "
        f"{report.confidence:.0%} intervals over prompts",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for title in ("shared", "score", "removed", "from", "to"):
        shown.add_column(title, justify="left" if title in ("shared", "score") else "right", no_wrap=True)
    for way, columns in report.removed.items():
        shown.add_section()
        for first, (column, removed) in zip([way, *[""] * len(columns)], columns.items(), strict=False):
            shown.add_row(first, column, *(f"{value:.0%}" for value in removed))
    return shown


def record_sharing(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    run: RunFolder,
    processes: Processes,
) -> None:
    """Write sharing.json, once per run: the base policy's within-prompt variance that sharing removes."""
    with processes.fail_together(), sampler.policy.base():
        if processes.main and not (run.path / "sharing.json").exists():
            report = measure_sharing(sampler, scorer, prompts[:SHARING_PROMPTS], config)
            run.write_json("sharing.json", report.to_dict())


def variance_run(config: TrainerConfig, prompts: Sequence[str], scorer: Scorer, console: Console) -> None:
    """Print the within-prompt variance that the configured sharing removes, and each stage of it alone."""
    check_evaluators(config, scorer)
    console.print(sharing_table(measure_sharing(load_sampler(config), scorer, prompts, config, each=True)))


# ------------------------------------------------------------------------- scores of different stages

RESAMPLES = 1000  # of the correlation over all images, which is slow to compute


class Correlation(NamedTuple):
    """Rank correlation and the bounds of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} {self.high:+.2f})"


class StageRow(NamedTuple):
    """Agreement of one evaluator's scores before and after super-resolution."""

    name: str
    overall: Correlation
    within: Correlation


class StageReport(NamedTuple):
    """Agreement of each evaluator and of the composite, and the time of each stage."""

    rows: tuple[StageRow, ...]
    prompts: int
    images_per_prompt: int
    confidence: float
    decoder_s: float  # prior and text encoder included
    super_resolution_s: float

    @property
    def saved(self) -> float:
        """Share of the time of sampling that super-resolution takes."""
        return self.super_resolution_s / (self.decoder_s + self.super_resolution_s)


def compare_stages(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    images_per_prompt: int,
    config: TrainerConfig,
) -> StageReport:
    """Generate images as in training, and score each before and after super-resolution.

    Args:
        prompts: P >= 2 prompts.
        images_per_prompt: G >= 2 images of each.

    Raises:
        EvaluationError: A batch could not be scored.
    """
    keys = group_keys(prompts, images_per_prompt, seed=config.evaluation.seed, fold=0, iteration=-1)
    share = config.rollout.share
    small_s = large_s = 0.0
    bounds = micro_batches(len(keys), config.sampling.micro_batch)
    with ScoringPipeline(scorer, config.rollout) as scoring:
        for first, last in track(bounds, "sampling and scoring both", "batch"):
            batch = keys[first:last]
            start = time.perf_counter()
            sampled = sampler.sample(batch, share, "decoder")
            sampled_at = time.perf_counter()
            small = sampled.trajectory.latents[:, -1].clamp(-1, 1)
            enlarged = to_uint8(sampler.upscale(small, batch, share)).numpy()
            small_s += sampled_at - start
            large_s += time.perf_counter() - sampled_at
            for images in (sampled.images, enlarged):
                scoring.submit([key.prompt for key in batch], images)
        scores = [_score_of(outcome) for outcome in scoring.finish()]
    shape = (len(prompts), images_per_prompt, len(scorer.evaluators))
    before, after = (
        np.concatenate([s.z for s in half]).reshape(shape) for half in (scores[::2], scores[1::2])
    )
    return StageReport(
        _rows(before, after, scorer.evaluators, config),
        len(prompts),
        images_per_prompt,
        config.evaluation.confidence,
        small_s,
        large_s,
    )


def _score_of(outcome: Scores | ScoringError) -> Scores:
    if isinstance(outcome, ScoringError):
        raise EvaluationError(f"the comparison of stages stopped: {outcome}") from outcome
    return outcome


def _rows(
    before: Floats, after: Floats, evaluators: Sequence[str], config: TrainerConfig
) -> tuple[StageRow, ...]:
    columns = {name: (before[..., k], after[..., k]) for k, name in enumerate(evaluators)}
    weights = config.objective.weights
    columns[COMPOSITE] = (composite(before, evaluators, weights), composite(after, evaluators, weights))
    return tuple(
        StageRow(
            name, overall_correlation(x, y, config.evaluation), within_correlation(x, y, config.evaluation)
        )
        for name, (x, y) in columns.items()
    )


def overall_correlation(before: Floats, after: Floats, config: EvaluationConfig) -> Correlation:
    """Return Spearman's rho over all images, (P, G) each; the interval resamples prompts."""
    value = _spearman(before.ravel(), after.ravel())
    if np.isnan(value):
        return Correlation(value, value, value)
    result = bootstrap(
        (np.arange(len(before)),),
        lambda rows: _spearman(before[rows].ravel(), after[rows].ravel()),
        confidence_level=config.confidence,
        n_resamples=min(RESAMPLES, config.resamples),
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(config.seed),
    )
    return Correlation(value, *map(float, result.confidence_interval))


def within_correlation(before: Floats, after: Floats, config: EvaluationConfig) -> Correlation:
    """Return the mean over prompts of Spearman's rho of its images, (P, G) each.

    A prompt whose images all score the same has no order, and is left out.
    """
    varied = (np.ptp(before, axis=1) > 0) & (np.ptp(after, axis=1) > 0)
    by_prompt = np.array([_spearman(x, y) for x, y in zip(before[varied], after[varied], strict=True)])
    if not len(by_prompt):
        return Correlation(np.nan, np.nan, np.nan)
    low, high, _ = paired_interval(by_prompt, config)
    return Correlation(float(by_prompt.mean()), low, high)


def _spearman(x: Floats, y: Floats) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def stage_table(report: StageReport) -> Table:
    """Return the report as a table for the terminal."""
    table = Table(
        title=f"Rank correlation of scores before and after super-resolution\n"
        f"{report.prompts} prompts × {report.images_per_prompt} images, {report.confidence:.0%} intervals",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in ("", "over all images", "within prompts"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in report.rows:
        if row.name == COMPOSITE:
            table.add_section()
        table.add_row(row.name, str(row.overall), str(row.within))
    return table


def stage_sentences(report: StageReport, images: int) -> list[str]:
    """Return the findings in words, for iterations of `images` images."""
    within = report.rows[-1].within
    saved_s = report.super_resolution_s / (report.prompts * report.images_per_prompt) * images
    agreement = (
        "Within a prompt, as the trainer compares, the composite's order before super-resolution "
        f"correlates {within} with the order after it."
    )
    saving = (
        f"rollout.reward_stage=decoder would save {saved_s:.2f} s an iteration of {images} images "
        f"({report.saved:.0%} of sampling). Evaluation would still score the final images."
    )
    return [agreement, saving]


def stages_run(
    config: TrainerConfig, prompts: Sequence[str], images_per_prompt: int, scorer: Scorer, console: Console
) -> None:
    """Print the agreement of scores before and after super-resolution, and the time saved without it."""
    check_evaluators(config, scorer)
    report = compare_stages(load_sampler(config), scorer, prompts, images_per_prompt, config)
    console.print(stage_table(report))
    groups = min(config.rollout.prompts_per_iteration, len(prompts))
    for line in stage_sentences(report, groups * config.rollout.images_per_prompt):
        console.print(line)
