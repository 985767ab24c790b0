"""The Bradley–Terry scale from people's choices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from reward_service.calibrate.statistics import CHANCE_LOG_LOSS, Floats, Preference, fit_preference

TAU = 0.7


def gaps(count: int = 2000, seed: int = 0, unit: float = 1.0) -> Floats:
    """Score differences of pairs chosen by the model with τ = TAU · unit."""
    rng = np.random.default_rng(seed)
    gap = rng.normal(0, 1, count)
    chosen = rng.random(count) < 1 / (1 + np.exp(-gap / TAU))
    return unit * np.where(chosen, gap, -gap)


def fit(gap: Floats, weight: Floats | None = None, resamples: int = 200) -> Preference:
    weight = np.ones(len(gap)) if weight is None else weight
    return fit_preference(gap, weight, np.arange(len(gap)) // 4, resamples=resamples)


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e3])
def test_a_known_scale_is_found(unit: float) -> None:
    """Inside its interval, narrow for 2,000 pairs, and in the scores' own unit."""
    found = fit(gaps(unit=unit))
    assert found.scale is not None
    assert found.scale_interval is not None
    low, high = found.scale_interval
    assert low is not None
    assert high is not None
    assert low < TAU * unit < high
    assert low < found.scale < high
    assert high - low < 0.3 * TAU * unit
    assert found.log_loss is not None
    assert found.log_loss < CHANCE_LOG_LOSS
    assert (found.pairs, found.prompts, found.note) == (2000, 500, "")


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Over 100 sets of choices."""
    hits = 0
    for seed in range(100):
        interval = fit(gaps(400, seed)).scale_interval
        assert interval is not None
        hits += (interval[0] or 0.0) < TAU < (interval[1] or np.inf)
    assert 86 <= hits <= 99


def test_it_is_the_maximum_of_the_likelihood() -> None:
    """As scipy's own search finds it."""
    gap = gaps(300)
    loss = minimize_scalar(lambda tau: np.logaddexp(0, -gap / tau).mean(), bounds=(0.05, 5), method="bounded")
    found = fit(gap)
    assert found.scale == pytest.approx(loss.x, rel=1e-3)
    assert found.log_loss == pytest.approx(loss.fun, abs=1e-9)


def test_a_weight_counts_a_choice_several_times() -> None:
    """Weight 3 equals three rows."""
    gap = gaps(100)
    weight = np.where(np.arange(100) < 50, 3.0, 1.0)
    repeated = np.concatenate([gap, gap[:50], gap[:50]])
    one, other = fit(gap, weight), fit(repeated)
    assert one.scale == pytest.approx(other.scale)
    assert one.accuracy == pytest.approx(other.accuracy)


def test_turned_choices_have_no_scale() -> None:
    """Told in words, with the accuracy that says why."""
    found = fit(-gaps())
    assert found.scale is None
    assert found.scale_interval is None
    assert found.accuracy < 0.3
    assert "no positive scale" in found.note


def test_large_mistakes_outweigh_small_hits() -> None:
    """More than half the pairs right, yet the likelihood falls with every steeper scale."""
    found = fit(np.where(np.arange(20) % 4 == 0, -9.0, 1.0))
    assert (found.scale, found.accuracy) == (None, 0.75)
    assert "larger differences" in found.note


def test_perfect_order_has_no_scale() -> None:
    """Any smaller τ would fit better still."""
    found = fit(np.abs(gaps(40)))
    assert (found.scale, found.accuracy) == (None, 1.0)
    assert "more pairs" in found.note


def test_an_end_without_bound_is_none() -> None:
    """Where resamples are perfectly ordered the scale may be as small as one likes."""
    gap = np.abs(gaps(24))
    gap[0] = -gap[0]
    found = fit(gap)
    assert found.scale is not None
    assert found.scale_interval is not None
    assert found.scale_interval[0] is None
    assert found.scale_interval[1] is not None


def test_ties_count_half_and_nothing_but_ties_is_told() -> None:
    """An evaluator that sees no difference is right by half."""
    found = fit(np.zeros(20))
    assert (found.scale, found.accuracy) == (None, 0.5)
    assert "score the same" in found.note


def test_a_hair_of_agreement_is_a_large_scale() -> None:
    """Near a coin the likelihood is a parabola in 1/τ, whose top is known: 2 Σd / Σd²."""
    gap = np.random.default_rng(1).normal(0.05, 1, 5000)
    found = fit(gap)
    assert found.scale is not None
    assert found.scale == pytest.approx((gap**2).sum() / (2 * gap.sum()), rel=0.02)
    assert found.log_loss == pytest.approx(CHANCE_LOG_LOSS, abs=1e-2)
