"""Estimates of a batch's duration and size limit."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.scheduler.batching import BatchSize, BatchTime


def test_batch_size_backs_off_after_a_failed_increase() -> None:
    """The limit returns to the size that is known to fit, and the next attempt is later each time."""
    sizes = BatchSize(64)
    attempts = []
    sizes.record_oom(64)
    for batch in range(2000):
        if sizes.current > 40:
            attempts.append(batch)
            sizes.record_oom(sizes.current)
            assert sizes.current == 40
        sizes.record_success(sizes.current)
    gaps = [later - earlier for earlier, later in pairwise(attempts)]
    assert len(gaps) >= 4
    assert gaps == sorted(set(gaps))


def test_batch_time_estimates_fixed_and_per_pair_seconds() -> None:
    """Batches of several sizes determine both coefficients, which follow a device that changes."""
    times = BatchTime(guess_s=0.5)
    assert times.coefficients == (0.0, 0.5)
    times.add(64, 6.4)
    assert times.coefficients == pytest.approx((0.0, 0.1))
    rng = random.Random(1)
    for fixed, per_pair in ((0.3, 0.01), (0.1, 0.05), (0.0, 0.002)):
        for _ in range(150):
            pairs = rng.randint(1, 64)
            times.add(pairs, fixed + per_pair * pairs)
        assert times.coefficients == pytest.approx((fixed, per_pair), rel=0.1, abs=0.01)
    assert times.seconds(130, 64) == pytest.approx(0.26, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 1024), st.floats(0, 1e4)), min_size=1, max_size=30))
def test_batch_time_is_never_negative(batches: list[tuple[int, float]]) -> None:
    """For any measurements, more pairs are not estimated to take less time."""
    times = BatchTime(0.01)
    for pairs, seconds in batches:
        times.add(pairs, seconds)
    fixed, per_pair = times.coefficients
    assert fixed >= 0
    assert per_pair >= 0
