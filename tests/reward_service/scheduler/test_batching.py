"""What batches take, learnt from those that ran."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.scheduler.batching import BatchSize, BatchTime


def test_a_failed_attempt_at_a_larger_batch_costs_little() -> None:
    """It goes back to what is known to fit, not below, and waits longer before the next one."""
    sizes = BatchSize(64)
    attempts = []
    sizes.overflows(64)
    for batch in range(2000):
        if sizes.now > 40:
            attempts.append(batch)
            sizes.overflows(sizes.now)
            assert sizes.now == 40
        sizes.fits(sizes.now)
    gaps = [later - earlier for earlier, later in pairwise(attempts)]
    assert len(gaps) >= 4
    assert gaps == sorted(set(gaps))


def test_the_batch_time_is_learnt() -> None:
    """Fixed and per-pair seconds come out of batches of several sizes, and a changed device is followed."""
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
def test_the_batch_time_is_never_negative(batches: list[tuple[int, float]]) -> None:
    """Whatever was measured, more pairs do not take less time."""
    times = BatchTime(0.01)
    for pairs, seconds in batches:
        times.add(pairs, seconds)
    fixed, per_pair = times.coefficients
    assert fixed >= 0
    assert per_pair >= 0
