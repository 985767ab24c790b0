"""Do scores before super-resolution order pictures as scores after it do? Measured on the user's own prompts.

Rank correlations (Spearman), with cluster-bootstrap intervals over prompts. What the learner compares are the
pictures of one prompt, so the correlation within prompts is the one that decides: the mean over prompts.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from scipy.stats import bootstrap, spearmanr

from trainer.comparing import COMPOSITE, paired_interval
from trainer.config import EvaluationConfig, TrainerConfig
from trainer.drawing import Studio
from trainer.errors import EvaluationError
from trainer.judging import Judging
from trainer.karlo import to_uint8
from trainer.progress import track
from trainer.rollout import group_keys, micro_batches
from trainer.scoring import Floats, Scorer, Scores, ScoringError, composite

RESAMPLES = 1000  # of the correlation over all pictures, which has to be computed anew for each


class Correlation(NamedTuple):
    """A rank correlation and the bounds of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} {self.high:+.2f})"


class StageRow(NamedTuple):
    """How far one evaluator's scores before and after super-resolution agree."""

    name: str
    overall: Correlation
    within: Correlation


class StageReport(NamedTuple):
    """The agreement of K evaluators and of the composite, and what each stage took."""

    rows: tuple[StageRow, ...]
    prompts: int
    images_per_prompt: int
    confidence: float
    decoder_s: float  # of drawing, prior and text included
    super_resolution_s: float

    @property
    def saved(self) -> float:
        """Share of the time of drawing that super-resolution takes."""
        return self.super_resolution_s / (self.decoder_s + self.super_resolution_s)


def compare_stages(
    studio: Studio, scorer: Scorer, prompts: Sequence[str], images_per_prompt: int, config: TrainerConfig
) -> StageReport:
    """Draw G >= 2 pictures of each of P >= 2 prompts as in training, and score each before and after.

    Raises EvaluationError where scores are missing.
    """
    keys = group_keys(prompts, images_per_prompt, seed=config.evaluation.seed, fold=0, iteration=-1)
    share = config.rollout.share
    small_s = large_s = 0.0
    bounds = micro_batches(len(keys), config.sampling.micro_batch)
    with Judging(scorer, config.rollout) as judging:
        for first, last in track(bounds, "drawing and scoring both", "batch"):
            batch = keys[first:last]
            start = time.perf_counter()
            drawing = studio.draw(batch, share, "decoder")
            drawn = time.perf_counter()
            small = drawing.trajectory.latents[:, -1].clamp(-1, 1)
            enlarged = to_uint8(studio.enlarge(small, batch, share)).numpy()
            small_s, large_s = small_s + drawn - start, large_s + time.perf_counter() - drawn
            for pictures in (drawing.pictures, enlarged):
                judging.ask([key.prompt for key in batch], pictures)
        scores = [_score_of(outcome) for outcome in judging.finish()]
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
    """Spearman's rho of all pictures, (P, G) each; the interval resamples prompts."""
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
    """Mean over prompts of Spearman's rho of its pictures, (P, G) each.

    A prompt whose pictures all score the same has no order, and is left out.
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


# --------------------------------------------------------------------------------------------- words


def stage_table(report: StageReport) -> Table:
    """The report as a person reads it."""
    table = Table(
        title=f"Rank correlation of scores before and after super-resolution\n"
        f"{report.prompts} prompts × {report.images_per_prompt} pictures, {report.confidence:.0%} intervals",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in ("", "over all pictures", "within prompts"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in report.rows:
        if row.name == COMPOSITE:
            table.add_section()
        table.add_row(row.name, str(row.overall), str(row.within))
    return table


def stage_sentences(report: StageReport, pictures: int) -> list[str]:
    """What the report says, in words, for iterations of so many pictures."""
    within = report.rows[-1].within
    saved_s = report.super_resolution_s / (report.prompts * report.images_per_prompt) * pictures
    agreement = (
        "Within a prompt, which is what the learner compares, the composite's order before super-resolution "
        f"correlates {within} with the order after it."
    )
    saving = (
        f"rollout.reward_stage=decoder would save {saved_s:.2f} s an iteration of {pictures} pictures "
        f"({report.saved:.0%} of drawing). Evaluation would still look at the final pictures."
    )
    return [agreement, saving]
