"""Bradley-Terry scales fitted to human preferences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from reward_service.calibrate.statistics import CHANCE_LOG_LOSS, Floats, PreferenceFit, fit_preference

TAU = 0.7


def gaps(count: int = 2000, seed: int = 0, unit: float = 1.0) -> Floats:
    """Return score differences of pairs sampled from the model with τ = TAU · unit."""
    rng = np.random.default_rng(seed)
    gap = rng.normal(0, 1, count)
    ordered = rng.random(count) < 1 / (1 + np.exp(-gap / TAU))
    return unit * np.where(ordered, gap, -gap)


def fit(gap: Floats, weight: Floats | None = None, resamples: int = 200) -> PreferenceFit:
    weight = np.ones(len(gap)) if weight is None else weight
    return fit_preference(gap, weight, np.arange(len(gap)) // 4, resamples=resamples)


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e3])
def test_the_fit_recovers_a_known_scale(unit: float) -> None:
    """The scale is in the scores' unit and inside its interval, which is narrow for 2,000 pairs."""
    fitted = fit(gaps(unit=unit))
    assert fitted.scale is not None
    assert fitted.scale_interval is not None
    low, high = fitted.scale_interval
    assert low is not None
    assert high is not None
    assert low < TAU * unit < high
    assert low < fitted.scale < high
    assert high - low < 0.3 * TAU * unit
    assert fitted.log_loss is not None
    assert fitted.log_loss < CHANCE_LOG_LOSS
    assert (fitted.pairs, fitted.prompts, fitted.note) == (2000, 500, "")


def test_scale_intervals_have_the_nominal_coverage() -> None:
    """Of 100 sets of preferences, about 95 intervals contain the true scale."""
    hits = 0
    for seed in range(100):
        interval = fit(gaps(400, seed)).scale_interval
        assert interval is not None
        hits += (interval[0] or 0.0) < TAU < (interval[1] or np.inf)
    assert 86 <= hits <= 99


def test_the_fit_maximizes_the_likelihood() -> None:
    """Scale and log loss equal those of scipy's optimizer."""
    gap = gaps(300)
    loss = minimize_scalar(lambda tau: np.logaddexp(0, -gap / tau).mean(), bounds=(0.05, 5), method="bounded")
    fitted = fit(gap)
    assert fitted.scale == pytest.approx(loss.x, rel=1e-3)
    assert fitted.log_loss == pytest.approx(loss.fun, abs=1e-9)


def test_a_weight_counts_as_repetitions() -> None:
    """A pair with weight 3 equals three rows."""
    gap = gaps(100)
    weight = np.where(np.arange(100) < 50, 3.0, 1.0)
    repeated = np.concatenate([gap, gap[:50], gap[:50]])
    one, other = fit(gap, weight), fit(repeated)
    assert one.scale == pytest.approx(other.scale)
    assert one.accuracy == pytest.approx(other.accuracy)


def test_reversed_preferences_have_no_scale() -> None:
    """The note gives the reason, and the accuracy is below one half."""
    fitted = fit(-gaps())
    assert fitted.scale is None
    assert fitted.scale_interval is None
    assert fitted.accuracy < 0.3
    assert "no positive scale" in fitted.note


def test_large_errors_outweigh_small_correct_gaps() -> None:
    """More than half of the pairs are correct, yet the likelihood falls for every β > 0."""
    fitted = fit(np.where(np.arange(20) % 4 == 0, -9.0, 1.0))
    assert (fitted.scale, fitted.accuracy) == (None, 0.75)
    assert "larger differences" in fitted.note


def test_perfectly_ordered_pairs_have_no_scale() -> None:
    """Every smaller τ would fit better."""
    fitted = fit(np.abs(gaps(40)))
    assert (fitted.scale, fitted.accuracy) == (None, 1.0)
    assert "more pairs" in fitted.note


def test_an_unbounded_end_is_none() -> None:
    """If resamples are perfectly ordered, the interval of the scale has no lower bound."""
    gap = np.abs(gaps(24))
    gap[0] = -gap[0]
    fitted = fit(gap)
    assert fitted.scale is not None
    assert fitted.scale_interval is not None
    assert fitted.scale_interval[0] is None
    assert fitted.scale_interval[1] is not None


def test_ties_count_half() -> None:
    """Only ties give an accuracy of one half and a note instead of a scale."""
    fitted = fit(np.zeros(20))
    assert (fitted.scale, fitted.accuracy) == (None, 0.5)
    assert "score the same" in fitted.note


def test_slight_agreement_gives_a_large_scale() -> None:
    """Near chance the log-likelihood is a parabola in 1/τ with a known maximum, 2 Σd / Σd²."""
    gap = np.random.default_rng(1).normal(0.05, 1, 5000)
    fitted = fit(gap)
    assert fitted.scale is not None
    assert fitted.scale == pytest.approx((gap**2).sum() / (2 * gap.sum()), rel=0.02)
    assert fitted.log_loss == pytest.approx(CHANCE_LOG_LOSS, abs=1e-2)
