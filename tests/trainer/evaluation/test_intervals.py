"""Interval of a mean over groups of prompts: its coverage, and its edge cases."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.coverage import CONFIG, EFFECTS, GROUPINGS, as_measurement, experiment, miss_rates
from trainer.evaluation.comparison import compare, compare_pooled
from trainer.evaluation.intervals import Groups, Interval, bootstrap_interval, count_groups, standard_error

ALONE, UNEQUAL, CORRELATED = GROUPINGS
NORMAL, HEAVY, SKEWED, VERY_SKEWED = EFFECTS


def interval_of(values: object, groups: Groups = None, confidence: float = 0.95) -> Interval:
    return bootstrap_interval(np.array(values, float), groups, confidence=confidence, resamples=2000, seed=0)


@pytest.mark.parametrize(
    ("effect", "grouping", "count"),
    [
        (NORMAL, ALONE, 8),
        (NORMAL, CORRELATED, 8),
        (NORMAL, CORRELATED, 20),
        (HEAVY, CORRELATED, 5),
        (HEAVY, ALONE, 50),
        (SKEWED, CORRELATED, 12),
        (SKEWED, UNEQUAL, 20),
        (VERY_SKEWED, CORRELATED, 20),
        (VERY_SKEWED, ALONE, 8),
    ],
)
def test_interval_misses_at_most_75_of_1000_null_experiments(effect: str, grouping: str, count: int) -> None:
    """Through `compare`, for few, unequal, skewed and correlated groups."""
    ours, _ = miss_rates(EFFECTS[effect], GROUPINGS[grouping], count, 500, seed=1)
    assert ours <= 0.075


def test_interval_beats_the_percentile_bootstrap() -> None:
    """The experiments distinguish a good interval from an overconfident one."""
    ours, plain = miss_rates(EFFECTS[NORMAL], GROUPINGS[CORRELATED], 8, 500, seed=1)
    assert ours <= 0.075 < plain


def test_interval_is_not_too_wide() -> None:
    """It misses now and then, and for 50 normal prompts it is within a tenth of Student's."""
    rng = np.random.default_rng(0)
    ours, _ = miss_rates(EFFECTS[NORMAL], GROUPINGS[ALONE], 50, 500, seed=2)
    assert ours > 0.02
    widths = []
    for _ in range(100):
        found = interval_of(rng.normal(size=50))
        widths.append((found.high - found.low) / (2 * 2.0096 * found.standard_error))
    assert 1.0 <= np.median(widths) < 1.1


def test_compare_pooled_covers_over_folds() -> None:
    """500 null cross-validations of 4 folds, 6 groups each, numbered from 0 in every fold."""
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(500):
        parts = [experiment(rng, EFFECTS[NORMAL], GROUPINGS[CORRELATED], 6) for _ in range(4)]
        missed += compare_pooled(parts, ("clip",), {"clip": 1.0}, CONFIG).composite.verdict != "unclear"
    assert 0.01 < missed / 500 <= 0.075


def test_compare_pooled_keeps_groups_of_folds_apart() -> None:
    """Equal group numbers in two folds are different groups; without groups each prompt is its own."""
    rng = np.random.default_rng(0)
    parts = [experiment(rng, EFFECTS[NORMAL], GROUPINGS[CORRELATED], count) for count in (3, 5)]
    found = compare_pooled([parts[0], (*parts[1][:2], None)], ("clip",), {"clip": 1.0}, CONFIG)
    effects = np.concatenate([(tuned.z - base.z).mean(axis=(1, 2)) for base, tuned, _ in parts])
    assert found.prompts == len(effects)
    assert found.groups == 3 + len(parts[1][2])
    assert found.composite.difference == pytest.approx(effects.mean())
    labels = [*parts[0][2], *range(100, 100 + len(parts[1][2]))]
    assert found.composite.standard_error == pytest.approx(standard_error(effects, labels))


def test_interval_counts_copies_in_a_group_once() -> None:
    """Ten copies of each prompt are as much evidence as the prompts; if independent, they would be more."""
    values = np.random.default_rng(0).normal(size=12)
    once, copied = interval_of(values), interval_of(np.repeat(values, 10), np.repeat(np.arange(12), 10))
    mistaken = interval_of(np.repeat(values, 10))
    assert copied == pytest.approx(once)
    assert mistaken.standard_error < once.standard_error / 3


def test_interval_of_groups_of_one_prompt_equals_no_groups() -> None:
    """For any labels in any order."""
    values = np.random.default_rng(0).normal(size=20)
    assert interval_of(values, list(range(7, 27))) == interval_of(values)


def test_interval_of_one_group_is_infinite_and_of_two_is_wide() -> None:
    """One prompt, or many of one group, say nothing about a new one; two say little."""
    for found in (interval_of([3.0]), interval_of([1.0, 2.0, 3.0], [5, 5, 5])):
        assert found == (-np.inf, np.inf, np.inf)
    low, high, error = interval_of([1.0, 2.0])
    assert error == pytest.approx(0.5)
    assert low <= 1.5 - 12.7 * error
    assert high >= 1.5 + 12.7 * error
    assert np.isfinite([low, high]).all()


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 1, 2, 2]])
def test_interval_of_equal_values_has_no_width(groups: list[int] | None) -> None:
    """0.1 is not exact in binary; the interval is a point all the same."""
    low, high, error = interval_of([0.1] * 7, groups)
    assert low == high == pytest.approx(0.1)
    assert error == 0


def test_interval_with_an_outlier_is_bounded() -> None:
    """Resamples without the outlier have almost no spread, and must not inflate the bounds."""
    values = np.r_[np.linspace(0.01, 0.02, 9), 5.0]
    low, high, error = interval_of(values)
    assert low < 0 < high
    assert high - low < 2 * 3 * 2.3 * error


@pytest.mark.parametrize("values", [[1.0, np.nan, 2.0], [np.inf, 1.0], []])
def test_interval_refuses_values_without_a_mean(values: list[float]) -> None:
    """A missing score must not count as a number."""
    with pytest.raises(ValueError, match=r"finite|no values"):
        interval_of(values)


def test_interval_refuses_groups_of_another_length() -> None:
    """One group per value is expected."""
    with pytest.raises(ValueError, match="2 groups for 3 values"):
        interval_of([1.0, 2.0, 3.0], [0, 1])


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30),
    labels=st.lists(st.integers(0, 6), min_size=30, max_size=30),
    shift=st.floats(-100, 100),
)
def test_interval_is_equivariant(values: list[float], labels: list[int], shift: float) -> None:
    """Bounds contain the mean, swap with the sign and move with a constant, for any data."""
    array, groups = np.array(values), labels[: len(values)]
    low, high, error = interval_of(array, groups)
    assert low <= array.mean() <= high
    assert error >= 0
    moved, turned = interval_of(array + shift, groups), interval_of(-array, groups)
    if 1e-6 < error < np.inf:
        assert moved == pytest.approx((low + shift, high + shift, error), rel=1e-4, abs=1e-4)
        assert (turned.low, turned.high) == pytest.approx((-high, -low), rel=0.2, abs=1e-4)


def test_standard_error_matches_the_textbook() -> None:
    """s/√P for independent prompts; the deviation of the group means for groups of equal size."""
    values = np.random.default_rng(0).normal(size=12)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / 12**0.5)
    groups = np.repeat(np.arange(4), 3)
    means = values.reshape(4, 3).mean(axis=1)
    assert standard_error(values, groups) == pytest.approx(means.std(ddof=1) / 2)
    assert (count_groups(12), count_groups(12, groups)) == (12, 4)


def test_interval_depends_little_on_the_seed() -> None:
    """The same seed gives the same interval; the noise of resampling is small beside its width."""
    rng = np.random.default_rng(0)
    base, tuned, groups = experiment(rng, EFFECTS[NORMAL], GROUPINGS[CORRELATED], 30)
    first, again, other = (
        compare(
            base,
            tuned,
            ("clip",),
            {"clip": 1},
            CONFIG.model_copy(update={"seed": seed, "resamples": 5000}),
            groups,
        ).composite
        for seed in (1, 1, 2)
    )
    assert first == again
    assert (other.low, other.high) != (first.low, first.high)
    assert other.high == pytest.approx(first.high, abs=0.1 * (first.high - first.low))


def test_compare_of_400_prompts_is_fast() -> None:
    """Eight rows with 5000 resamples: statistics do not slow an evaluation down."""
    z = np.random.default_rng(0).normal(size=(400, 4, 7))
    names = tuple("abcdefg")
    config = CONFIG.model_copy(update={"resamples": 5000})
    start = time.process_time()
    compare(as_measurement(z), as_measurement(z + z[::-1]), names, dict.fromkeys(names, 1.0), config)
    assert time.process_time() - start < 1.5
