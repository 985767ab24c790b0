"""The interval of a mean over groups of prompts: how often it is right, and its edges."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.coverage import CONFIG, EFFECTS, GROUPINGS, experiment, measured, misses
from trainer.evaluation.comparison import compare, pooled
from trainer.evaluation.intervals import Groups, Interval, clusters, interval, standard_error

ALONE, UNEQUAL, CORRELATED = GROUPINGS
NORMAL, HEAVY, SKEWED, VERY_SKEWED = EFFECTS


def of(values: object, groups: Groups = None, confidence: float = 0.95) -> Interval:
    return interval(np.array(values, float), groups, confidence=confidence, resamples=2000, seed=0)


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
def test_of_500_null_experiments_at_most_75_in_1000_are_missed(
    effect: str, grouping: str, count: int
) -> None:
    """Through `compare`, as a user would: it holds for few, unequal, skewed and correlated groups."""
    ours, _ = misses(EFFECTS[effect], GROUPINGS[grouping], count, 500, seed=1)
    assert ours <= 0.075


def test_the_plain_percentile_bootstrap_would_not_do() -> None:
    """The experiments can tell a good interval from one that is too sure of itself."""
    ours, plain = misses(EFFECTS[NORMAL], GROUPINGS[CORRELATED], 8, 500, seed=1)
    assert ours <= 0.075 < plain


def test_the_interval_is_no_wider_than_it_has_to_be() -> None:
    """It misses now and then, and of 50 normal prompts it is within a tenth of Student's."""
    rng = np.random.default_rng(0)
    ours, _ = misses(EFFECTS[NORMAL], GROUPINGS[ALONE], 50, 500, seed=2)
    assert ours > 0.02
    widths = []
    for _ in range(100):
        found = of(rng.normal(size=50))
        widths.append((found.high - found.low) / (2 * 2.0096 * found.standard_error))
    assert 1.0 <= np.median(widths) < 1.1


def test_folds_put_together_hold_too() -> None:
    """500 null cross-validations of 4 folds, 6 groups each, numbered anew in every fold."""
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(500):
        parts = [experiment(rng, EFFECTS[NORMAL], GROUPINGS[CORRELATED], 6) for _ in range(4)]
        missed += pooled(parts, ("judge",), {"judge": 1.0}, CONFIG).composite.verdict != "unclear"
    assert 0.01 < missed / 500 <= 0.075


def test_folds_put_together_are_one_comparison_of_all_their_prompts() -> None:
    """Equal numbers of groups in two folds are different groups; without groups each prompt stands alone."""
    rng = np.random.default_rng(0)
    parts = [experiment(rng, EFFECTS[NORMAL], GROUPINGS[CORRELATED], count) for count in (3, 5)]
    found = pooled([parts[0], (*parts[1][:2], None)], ("judge",), {"judge": 1.0}, CONFIG)
    effects = np.concatenate([(tuned.z - base.z).mean(axis=(1, 2)) for base, tuned, _ in parts])
    assert found.prompts == len(effects)
    assert found.groups == 3 + len(parts[1][2])
    assert found.composite.difference == pytest.approx(effects.mean())
    labels = [*parts[0][2], *range(100, 100 + len(parts[1][2]))]
    assert found.composite.standard_error == pytest.approx(standard_error(effects, labels))


def test_what_a_group_shares_counts_once() -> None:
    """Ten copies of each prompt tell no more than the prompts; taken for independent they would."""
    values = np.random.default_rng(0).normal(size=12)
    once, copied = of(values), of(np.repeat(values, 10), np.repeat(np.arange(12), 10))
    mistaken = of(np.repeat(values, 10))
    assert copied == pytest.approx(once)
    assert mistaken.standard_error < once.standard_error / 3


def test_groups_of_one_prompt_are_no_groups() -> None:
    """Whatever they are called and in whatever order they come."""
    values = np.random.default_rng(0).normal(size=20)
    assert of(values, list(range(7, 27))) == of(values)


def test_one_group_has_no_limits_and_two_have_wide_ones() -> None:
    """One prompt, or many of one group, tell nothing of a new one; two tell little."""
    for found in (of([3.0]), of([1.0, 2.0, 3.0], [5, 5, 5])):
        assert found == (-np.inf, np.inf, np.inf)
    low, high, error = of([1.0, 2.0])
    assert error == pytest.approx(0.5)
    assert low <= 1.5 - 12.7 * error
    assert high >= 1.5 + 12.7 * error
    assert np.isfinite([low, high]).all()


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 1, 2, 2]])
def test_equal_values_give_an_interval_of_no_width(groups: list[int] | None) -> None:
    """0.1 has no exact mean in binary; the interval is a point all the same."""
    low, high, error = of([0.1] * 7, groups)
    assert low == high == pytest.approx(0.1)
    assert error == 0


def test_a_single_outlier_makes_it_wide_but_not_endless() -> None:
    """Resamples without the outlier have almost no spread, and may not blow the bounds up."""
    values = np.r_[np.linspace(0.01, 0.02, 9), 5.0]
    low, high, error = of(values)
    assert low < 0 < high
    assert high - low < 2 * 3 * 2.3 * error


@pytest.mark.parametrize("values", [[1.0, np.nan, 2.0], [np.inf, 1.0], []])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    """A score that is missing may not pass for a number."""
    with pytest.raises(ValueError, match=r"finite|nothing"):
        of(values)


def test_groups_of_other_prompts_are_refused() -> None:
    """A group for each value, no more and no less."""
    with pytest.raises(ValueError, match="2 groups for 3 values"):
        of([1.0, 2.0, 3.0], [0, 1])


@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30),
    labels=st.lists(st.integers(0, 6), min_size=30, max_size=30),
    shift=st.floats(-100, 100),
)
def test_it_moves_with_the_data(values: list[float], labels: list[int], shift: float) -> None:
    """Bounds lie around the mean, turn over with the sign and move with a constant, whatever the data."""
    array, groups = np.array(values), labels[: len(values)]
    low, high, error = of(array, groups)
    assert low <= array.mean() <= high
    assert error >= 0
    moved, turned = of(array + shift, groups), of(-array, groups)
    if 1e-6 < error < np.inf:
        assert moved == pytest.approx((low + shift, high + shift, error), rel=1e-4, abs=1e-4)
        assert (turned.low, turned.high) == pytest.approx((-high, -low), rel=0.2, abs=1e-4)


def test_the_standard_error_is_the_textbook_s() -> None:
    """Of prompts alone s/√P; of groups the deviation of the group means where they are equally large."""
    values = np.random.default_rng(0).normal(size=12)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / 12**0.5)
    groups = np.repeat(np.arange(4), 3)
    means = values.reshape(4, 3).mean(axis=1)
    assert standard_error(values, groups) == pytest.approx(means.std(ddof=1) / 2)
    assert (clusters(12), clusters(12, groups)) == (12, 4)


def test_a_seed_gives_the_same_interval_again_and_another_nearly_the_same() -> None:
    """Reports are repeatable; the luck of resampling is small beside the interval."""
    rng = np.random.default_rng(0)
    base, tuned, groups = experiment(rng, EFFECTS[NORMAL], GROUPINGS[CORRELATED], 30)
    first, again, other = (
        compare(
            base,
            tuned,
            ("judge",),
            {"judge": 1},
            CONFIG.model_copy(update={"seed": seed, "resamples": 5000}),
            groups,
        ).composite
        for seed in (1, 1, 2)
    )
    assert first == again
    assert (other.low, other.high) != (first.low, first.high)
    assert other.high == pytest.approx(first.high, abs=0.1 * (first.high - first.low))


def test_five_thousand_resamples_of_400_prompts_take_a_fraction_of_a_second() -> None:
    """Eight rows of a comparison: an evaluation is not held up by its statistics."""
    z = np.random.default_rng(0).normal(size=(400, 4, 7))
    names = tuple("abcdefg")
    config = CONFIG.model_copy(update={"resamples": 5000})
    start = time.process_time()
    compare(measured(z), measured(z + z[::-1]), names, dict.fromkeys(names, 1.0), config)
    assert time.process_time() - start < 1.5
