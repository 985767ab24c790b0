"""Early stopping: when it stops, what it calls the best, and that an interruption changes nothing."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.intervals import standard_error
from trainer.evaluation.stopping import EarlyStopping

Curve = Sequence[np.ndarray]


def looks(means: Sequence[float], *, noise: float = 0.1, prompts: int = 48, seed: int = 0) -> Curve:
    """Composites of each prompt around each mean; prompts differ far more than evaluations do."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(0, 5, prompts)
    return [difficulty - difficulty.mean() + mean + rng.normal(0, noise, prompts) for mean in means]


def run(stopping: EarlyStopping, curve: Curve, start: int = 0) -> int | None:
    """Index of the evaluation at which it stops; None: it does not."""
    for done in range(start, len(curve)):
        if stopping.heed(done, curve[done]):
            return done
    return None


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_a_planted_overfit_stops_within_patience_and_returns_the_peak(patience: int) -> None:
    """It rises to the sixth evaluation, then falls: the best is the peak, not the last."""
    means = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.9, 0.7, 0.5, 0.3, 0.1]
    stopping = EarlyStopping(patience, 0.5)
    assert run(stopping, looks(means)) == 5 + patience
    assert stopping.best is not None
    assert stopping.best[0] == 5
    assert stopping.best[1] == pytest.approx(1.0, abs=0.1)


def test_a_slow_steady_rise_adds_up_against_the_last_improvement() -> None:
    """Each step is a third of what counts, so every third evaluation or so improves, and nothing stops it."""
    curve = looks(np.arange(60) * 0.02)
    step = standard_error(curve[1] - curve[0])
    assert 2 * step > 0.02
    assert run(EarlyStopping(8, 2.0), curve) is None
    assert run(EarlyStopping(8, 40.0), curve) is not None


def test_a_policy_that_never_beats_the_base_stops_with_the_base_as_its_best() -> None:
    """The base's own composite is the first reference."""
    stopping = EarlyStopping(3, 0.5)
    assert run(stopping, looks([0.0, -0.3, -0.2, -0.4, -0.1])) == 3
    assert stopping.best is not None
    assert stopping.best[0] == 0


def test_noise_alone_is_stopped_soon() -> None:
    """Without any trend, 200 runs of 40 evaluations all stop, most of them within a dozen."""
    ends = [run(EarlyStopping(3, 1.0), looks([0.0] * 40, seed=seed)) for seed in range(200)]
    stopped = [end for end in ends if end is not None]
    assert len(stopped) == 200
    assert np.mean(np.array(stopped) <= 12) > 0.9


def test_prompts_of_one_group_count_once() -> None:
    """A gain of one group of near-duplicates alone is no improvement; prompt by prompt it would be."""
    before, after = np.zeros(24), np.r_[np.full(12, 0.5), np.zeros(12)]
    groups = [0] * 12 + list(range(1, 13))
    alone, together = EarlyStopping(1, 2.0), EarlyStopping(1, 2.0)
    assert not alone.heed(0, before)
    assert not together.heed(0, before, groups)
    assert not alone.heed(1, after)  # an improvement
    assert together.heed(1, after, groups)


def test_equal_gains_in_every_prompt_improve_and_none_do_not() -> None:
    """A standard error of 0 is borne: any gain exceeds it, no gain does not."""
    stopping = EarlyStopping(2, 3.0)
    level = np.arange(4.0)
    assert not stopping.heed(0, level)
    assert not stopping.heed(1, level + 0.25)
    assert stopping.waited == 0
    assert not stopping.heed(2, level + 0.25)
    assert stopping.heed(3, level + 0.25)
    assert stopping.best == (1, 1.75)


def test_a_single_prompt_goes_by_its_difference() -> None:
    """No error is known of one prompt; a trial on one still ends."""
    stopping = EarlyStopping(2, 3.0)
    assert run(stopping, [np.array([value]) for value in (0.0, 0.1, 0.2, 0.1, 0.1)]) == 4
    assert stopping.best == (2, 0.2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    """It would compare as no improvement, and stop a fold for a fault of the service."""
    with pytest.raises(ValueError, match="finite"):
        EarlyStopping(2, 0.5).heed(0, np.array([0.0, value]))


def test_what_makes_no_sense_is_refused() -> None:
    """A patience of 0 means that nobody builds one of these."""
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
def test_going_on_from_a_saved_state_changes_nothing(
    means: list[float], cut: int, patience: int, min_delta: float, seed: int
) -> None:
    """Interrupted after any evaluation and restored from JSON, it decides as if it had not been."""
    curve = looks(means, prompts=5, seed=seed)
    whole = EarlyStopping(patience, min_delta)
    expected = [whole.heed(done, now) for done, now in enumerate(curve)]
    first, second = EarlyStopping(patience, min_delta), EarlyStopping(patience, min_delta)
    decided = [first.heed(done, now) for done, now in enumerate(curve[:cut])]
    second.restore(json.loads(json.dumps(first.state)))
    decided += [second.heed(done, now) for done, now in enumerate(curve[cut:], len(decided))]
    assert decided == expected
    assert json.dumps(second.state) == json.dumps(whole.state)
    assert second.best == whole.best
