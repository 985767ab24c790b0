"""The agreement of scores before and after super-resolution, on answers that are known."""

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


def test_equal_orders_correlate_perfectly_and_reversed_ones_inversely() -> None:
    """Any strictly increasing change of the scores keeps a correlation of 1, a decreasing one gives -1."""
    for correlation in (overall_correlation, within_correlation):
        assert correlation(SCORES, np.exp(SCORES), CONFIG) == pytest.approx((1, 1, 1))
        assert correlation(SCORES, -SCORES, CONFIG) == pytest.approx((-1, -1, -1))


def test_difficulty_of_prompts_does_not_pass_for_agreement_within_them() -> None:
    """Prompts that differ make scores correlate over all images though no prompt's order is kept."""
    difficulty = np.arange(24)[:, None] * 10.0
    before, after = difficulty + SCORES, difficulty + RNG.normal(size=SCORES.shape)
    assert overall_correlation(before, after, CONFIG).value > 0.95
    within = within_correlation(before, after, CONFIG)
    assert abs(within.value) < 0.3
    assert within.low < 0 < within.high


def test_intervals_hold_the_truth() -> None:
    """For Gaussian scores of correlation 0.8, rho is 6/pi arcsin(0.4) = 0.786; the interval has it."""
    after = 0.8 * SCORES + 0.6 * RNG.normal(size=SCORES.shape)
    found = overall_correlation(SCORES, after, CONFIG)
    assert found.low < 0.786 < found.high
    assert found.high - found.low < 0.2


def test_a_prompt_without_an_order_is_left_out() -> None:
    """Images that all score the same say nothing, and raise nothing."""
    flat = SCORES.copy()
    flat[:3] = 1.0
    assert within_correlation(flat, SCORES, CONFIG).value == pytest.approx(1)
    assert np.isnan(within_correlation(np.ones((3, 4)), np.ones((3, 4)), CONFIG).value)
    assert np.isnan(overall_correlation(np.ones((3, 4)), np.ones((3, 4)), CONFIG).value)


def test_both_stages_of_the_same_images_are_scored(
    sampler: ImageSampler, trainer_config: TrainerConfig
) -> None:
    """Every evaluator and the composite get a row that fits 80 columns, and the time saved is said."""
    report = compare_stages(sampler, FakeScorer(), PROMPTS, 4, trainer_config)
    assert [row.name for row in report.rows] == ["dark", "red", "composite"]
    assert report.rows[1].within == report.rows[2].within  # the composite is the one weighted evaluator
    assert 0 < report.saved < 1
    console = Console(width=80, file=io.StringIO())
    console.print(stage_table(report))
    text = console.file.getvalue()
    assert "4 prompts × 4 images" in text
    assert "…" not in text
    assert f"({report.saved:.0%} of drawing)" in stage_sentences(report, 16)[1]


def test_a_missing_score_ends_the_comparison(sampler: ImageSampler, trainer_config: TrainerConfig) -> None:
    """No correlation is made of what was left."""

    def fault(_: object) -> None:
        raise ScoringError("no answer", retryable=False)

    with pytest.raises(EvaluationError, match="no answer"):
        compare_stages(sampler, FakeScorer(fault), PROMPTS, 2, trainer_config)
