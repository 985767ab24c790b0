"""Means, deviations and intervals, against their definitions and against known distributions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from reward_service.calibrate.statistics import Floats, Ints, correlation, resampled_counts, score_statistics

COUNTS = st.lists(st.integers(1, 5), min_size=1, max_size=8).filter(lambda counts: max(counts) > 1)


def normal_scores(prompts: int, each: int, within: float = 0.5, seed: int = 0) -> tuple[Floats, Ints]:
    """Return scores of two evaluators: deviation 2 between prompts, `within` inside a prompt."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), each)
    return rng.normal(20, 2, (prompts, 2))[prompt] + rng.normal(0, within, (len(prompt), 2)), prompt


@given(COUNTS, st.integers(0, 99))
def test_statistics_follow_their_definitions(counts: list[int], seed: int) -> None:
    """Groups may have any size; single images count for the total deviation only."""
    prompt = np.repeat(np.arange(len(counts)), counts)
    scores = np.random.default_rng(seed).normal(5, 3, (len(prompt), 3))
    found = score_statistics(scores, prompt, resamples=100)
    groups = [scores[prompt == p] for p in range(len(counts))]
    pooled = sum(((g - g.mean(0)) ** 2).sum(0) for g in groups) / sum(len(g) - 1 for g in groups)
    assert found.within == pytest.approx(np.sqrt(pooled))
    assert found.mean == pytest.approx(scores.mean(0))
    assert found.total == pytest.approx(scores.std(0, ddof=1))
    assert found.total_correlation == pytest.approx(np.corrcoef(scores.T), abs=1e-9)
    assert (found.images, found.prompts) == (len(prompt), len(counts))


def test_a_constant_per_prompt_leaves_within_unchanged() -> None:
    """A constant added to one prompt's scores changes the total deviation only."""
    scores, prompt = normal_scores(30, 4)
    shifted = scores + 5.0 * (prompt == 3)[:, None]
    one, other = score_statistics(scores, prompt), score_statistics(shifted, prompt)
    assert other.within == pytest.approx(one.within)
    assert other.within_interval == pytest.approx(one.within_interval)
    assert other.within_correlation == pytest.approx(one.within_correlation)
    assert (other.total > one.total).all()


def test_intervals_have_the_nominal_coverage() -> None:
    """Of 200 data sets of 60 prompts, about 95 % of the intervals contain the true σ."""
    hits = []
    for seed in range(200):
        found = score_statistics(*normal_scores(60, 4, seed=seed), resamples=400)
        hits.append((found.within_interval[0] < 0.5) & (found.within_interval[1] > 0.5))
    assert 0.87 < np.mean(hits) < 0.99


def test_intervals_match_scipys_cluster_bootstrap() -> None:
    """The interval of each statistic agrees with scipy's bootstrap of whole prompts."""
    scores, prompt = normal_scores(50, 4)
    groups = scores[:, 0].reshape(50, 4)

    def within(index: Ints) -> float:
        return float(np.sqrt(groups[index].var(axis=1, ddof=1).mean()))

    def mean(index: Ints) -> float:
        return float(groups[index].mean())

    found = score_statistics(scores, prompt, resamples=4000)
    options = {"n_resamples": 4000, "vectorized": False, "method": "percentile", "rng": 1}
    for statistic, interval in ((within, found.within_interval), (mean, found.mean_interval)):
        low, high = bootstrap((np.arange(50),), statistic, **options).confidence_interval
        assert interval[:, 0] == pytest.approx([low, high], abs=0.08 * (high - low))


def test_evaluators_share_the_resamples_of_a_seed() -> None:
    """An evaluator's interval does not depend on the others; it depends on the seed."""
    scores, prompt = normal_scores(40, 4)
    both = score_statistics(np.column_stack([scores[:, 0], scores]), prompt, seed=3)
    assert both.within_interval[:, 0] == pytest.approx(both.within_interval[:, 1])
    alone = score_statistics(scores[:, :1], prompt, seed=3)
    assert alone.within_interval[:, 0] == pytest.approx(both.within_interval[:, 0])
    assert not np.allclose(score_statistics(scores, prompt, seed=4).within_interval, alone.within_interval)


@pytest.mark.parametrize("each", [2, 4, 9])
def test_the_robust_deviation_is_unbiased_for_normal_scores(each: int) -> None:
    """It is unbiased for small groups too, and a few outliers hardly change it."""
    scores, prompt = normal_scores(4000, each)
    assert score_statistics(scores, prompt, resamples=100).robust_within == pytest.approx(0.5, rel=0.06)
    scores[:: 50 * each] += 30.0
    found = score_statistics(scores, prompt, resamples=100)
    assert found.robust_within == pytest.approx(0.5, rel=0.1)
    assert (found.within > 1.0).all()


def test_single_images_have_no_deviation_within_prompts() -> None:
    """The deviation is an error rather than 0."""
    with pytest.raises(ValueError, match="no prompt has two images"):
        score_statistics(np.ones((3, 1)), np.arange(3))


def test_a_constant_evaluator_has_no_correlation() -> None:
    """The correlation with a constant is NaN."""
    found = correlation(np.array([[4.0, 0.0], [0.0, 0.0]]))
    assert found[0, 0] == 1.0
    assert np.isnan(found[0, 1])
    assert np.isnan(found[1, 1])


def test_chunks_do_not_change_the_resamples() -> None:
    """Every resample has as many prompts as the data, whatever the size of the chunks."""
    whole = np.concatenate(list(resampled_counts(30, seed=5, resamples=70)))
    parts = list(resampled_counts(30, seed=5, resamples=70, width=400_000))
    assert len(parts) == 7
    assert (np.concatenate(parts) == whole).all()
    assert (whole.sum(axis=1) == 30).all()
