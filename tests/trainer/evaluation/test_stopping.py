"""Early stopping: the evaluation at which it stops, the best one, and resuming from a saved state."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.intervals import standard_error
from trainer.evaluation.stopping import EarlyStopping

Curve = Sequence[np.ndarray]


def evaluations(means: Sequence[float], *, noise: float = 0.1, prompts: int = 48, seed: int = 0) -> Curve:
    """Return composites of each prompt around each mean; prompts differ far more than evaluations do."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 5, prompts)
    return [difficulty - difficulty.mean() + mean + rng.normal(0, noise, prompts) for mean in means]


def stop_index(stopping: EarlyStopping, curve: Curve, start: int = 0) -> int | None:
    """Return the index of the evaluation at which it stops; None if it does not."""
    for done in range(start, len(curve)):
        if stopping.update(done, curve[done]):
            return done
    return None


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_early_stopping_finds_the_peak_of_an_overfit(patience: int) -> None:
    """It rises to the sixth evaluation, then falls: the best is the peak, not the last."""
    means = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.9, 0.7, 0.5, 0.3, 0.1]
    stopping = EarlyStopping(patience, 0.5)
    assert stop_index(stopping, evaluations(means)) == 5 + patience
    assert stopping.best is not None
    assert stopping.best[0] == 5
    assert stopping.best[1] == pytest.approx(1.0, abs=0.1)


def test_early_stopping_adds_up_a_slow_rise() -> None:
    """Each step is below the threshold, but the sum since the last improvement exceeds it."""
    curve = evaluations(np.arange(60) * 0.02)
    step = standard_error(curve[1] - curve[0])
    assert 2 * step > 0.02
    assert stop_index(EarlyStopping(8, 2.0), curve) is None
    assert stop_index(EarlyStopping(8, 40.0), curve) is not None


def test_early_stopping_keeps_the_base_as_the_best() -> None:
    """The base's own composite is the first reference."""
    stopping = EarlyStopping(3, 0.5)
    assert stop_index(stopping, evaluations([0.0, -0.3, -0.2, -0.4, -0.1])) == 3
    assert stopping.best is not None
    assert stopping.best[0] == 0


def test_early_stopping_stops_on_noise() -> None:
    """Without any trend, 200 runs of 40 evaluations all stop, most of them within a dozen."""
    ends = [stop_index(EarlyStopping(3, 1.0), evaluations([0.0] * 40, seed=seed)) for seed in range(200)]
    stopped = [end for end in ends if end is not None]
    assert len(stopped) == 200
    assert np.mean(np.array(stopped) <= 12) > 0.9


def test_early_stopping_counts_a_group_once() -> None:
    """A gain of one group of near-duplicates is no improvement; for independent prompts it would be."""
    before, after = np.zeros(24), np.r_[np.full(12, 0.5), np.zeros(12)]
    groups = [0] * 12 + list(range(1, 13))
    alone, together = EarlyStopping(1, 2.0), EarlyStopping(1, 2.0)
    assert not alone.update(0, before)
    assert not together.update(0, before, groups)
    assert not alone.update(1, after)  # an improvement
    assert together.update(1, after, groups)


def test_early_stopping_handles_a_standard_error_of_zero() -> None:
    """Any equal gain is an improvement, no gain is not."""
    stopping = EarlyStopping(2, 3.0)
    level = np.arange(4.0)
    assert not stopping.update(0, level)
    assert not stopping.update(1, level + 0.25)
    assert stopping.waited == 0
    assert not stopping.update(2, level + 0.25)
    assert stopping.update(3, level + 0.25)
    assert stopping.best == (1, 1.75)


def test_early_stopping_works_with_a_single_prompt() -> None:
    """Without a standard error any gain counts; a trial on one prompt still ends."""
    stopping = EarlyStopping(2, 3.0)
    assert stop_index(stopping, [np.array([value]) for value in (0.0, 0.1, 0.2, 0.1, 0.1)]) == 4
    assert stopping.best == (2, 0.2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_early_stopping_refuses_non_finite_composites(value: float) -> None:
    """They would count as no improvement, and stop a fold because of a fault of the service."""
    with pytest.raises(ValueError, match="finite"):
        EarlyStopping(2, 0.5).update(0, np.array([0.0, value]))


def test_early_stopping_refuses_invalid_settings() -> None:
    """A patience of 0 means no early stopping at all."""
    for patience, min_delta in ((0, 0.5), (1, -0.1)):
        with pytest.raises(ValueError, match="patience"):
            EarlyStopping(patience, min_delta)


@given(
    means=st.lists(st.floats(-1, 1), min_size=2, max_size=12),
    cut=st.integers(0, 12),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.5, 2.0]),
    seed=st.integers(0, 1000),
)
def test_early_stopping_resumes_from_a_saved_state(
    means: list[float], cut: int, patience: int, min_delta: float, seed: int
) -> None:
    """Interrupted after any evaluation and restored from JSON, it decides as if uninterrupted."""
    curve = evaluations(means, prompts=5, seed=seed)
    whole = EarlyStopping(patience, min_delta)
    expected = [whole.update(done, now) for done, now in enumerate(curve)]
    first, second = EarlyStopping(patience, min_delta), EarlyStopping(patience, min_delta)
    decided = [first.update(done, now) for done, now in enumerate(curve[:cut])]
    second.restore(json.loads(json.dumps(first.state)))
    decided += [second.update(done, now) for done, now in enumerate(curve[cut:], len(decided))]
    assert decided == expected
    assert json.dumps(second.state) == json.dumps(whole.state)
    assert second.best == whole.best
