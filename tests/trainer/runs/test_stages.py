"""Agreement of scores before and after super-resolution, on known data."""

import io

import numpy as np
import pytest
from rich.console import Console

from tests.trainer.conftest import PROMPTS, FakeScorer
from trainer.config import EvaluationConfig, TrainerConfig
from trainer.rl.rewards import ScoringError
from trainer.rl.sampler import ImageSampler
from trainer.runs.studies import (
    compare_stages,
    overall_correlation,
    stage_sentences,
    stage_table,
    within_correlation,
)
from trainer.runtime.errors import EvaluationError

CONFIG = EvaluationConfig(resamples=300)
RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(24, 8))


def test_correlation_of_equal_and_reversed_orders() -> None:
    """A strictly increasing change of the scores keeps a correlation of 1, a decreasing one gives -1."""
    for correlation in (overall_correlation, within_correlation):
        assert correlation(SCORES, np.exp(SCORES), CONFIG) == pytest.approx((1, 1, 1))
        assert correlation(SCORES, -SCORES, CONFIG) == pytest.approx((-1, -1, -1))


def test_within_correlation_ignores_prompt_difficulty() -> None:
    """Prompts that differ make scores correlate over all images without any order within a prompt."""
    difficulty = np.arange(24)[:, None] * 10.0
    before, after = difficulty + SCORES, difficulty + RNG.normal(size=SCORES.shape)
    assert overall_correlation(before, after, CONFIG).value > 0.95
    within = within_correlation(before, after, CONFIG)
    assert abs(within.value) < 0.3
    assert within.low < 0 < within.high


def test_correlation_interval_covers_the_true_value() -> None:
    """For Gaussian scores of correlation 0.8, rho is 6/pi arcsin(0.4) = 0.786; the interval has it."""
    after = 0.8 * SCORES + 0.6 * RNG.normal(size=SCORES.shape)
    found = overall_correlation(SCORES, after, CONFIG)
    assert found.low < 0.786 < found.high
    assert found.high - found.low < 0.2


def test_within_correlation_skips_prompts_of_equal_scores() -> None:
    """Images that all score the same have no order, and raise nothing."""
    flat = SCORES.copy()
    flat[:3] = 1.0
    assert within_correlation(flat, SCORES, CONFIG).value == pytest.approx(1)
    assert np.isnan(within_correlation(np.ones((3, 4)), np.ones((3, 4)), CONFIG).value)
    assert np.isnan(overall_correlation(np.ones((3, 4)), np.ones((3, 4)), CONFIG).value)


def test_compare_stages_scores_the_same_images_twice(
    sampler: ImageSampler, trainer_config: TrainerConfig
) -> None:
    """Each evaluator and the composite get a row that fits 80 columns; the time saved is reported."""
    report = compare_stages(sampler, FakeScorer(), PROMPTS, 4, trainer_config)
    assert [row.name for row in report.rows] == ["dark", "red", "composite"]
    assert report.rows[1].within == report.rows[2].within  # the composite is the one weighted evaluator
    assert 0 < report.saved < 1
    console = Console(width=80, file=io.StringIO())
    console.print(stage_table(report))
    text = console.file.getvalue()
    assert "4 prompts × 4 images" in text
    assert "…" not in text
    assert f"({report.saved:.0%} of sampling)" in stage_sentences(report, 16)[1]


def test_compare_stages_raises_if_scoring_fails(sampler: ImageSampler, trainer_config: TrainerConfig) -> None:
    """No correlation is computed from incomplete scores."""

    def fault(_: object) -> None:
        raise ScoringError("no response", retryable=False)

    with pytest.raises(EvaluationError, match="no response"):
        compare_stages(sampler, FakeScorer(fault), PROMPTS, 2, trainer_config)
