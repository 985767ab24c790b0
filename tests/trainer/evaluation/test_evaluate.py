"""The paired comparison: its numbers, its intervals and its words."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from tests.trainer.conftest import PROMPTS, FakeScorer
from trainer.config import EvaluationConfig, LoraSettings
from trainer.evaluation.evaluate import (
    Comparison,
    Measurement,
    compare,
    measure,
    sentences,
    standard_errors,
    table,
)
from trainer.rl.rewards import ScoringError
from trainer.rl.sampler import ImageSampler
from trainer.runtime.errors import EvaluationError

NAMES = ("aesthetic", "clip")
WEIGHTS = {"aesthetic": 1.0, "clip": 3.0}
CONFIG = EvaluationConfig(resamples=2000, images_per_prompt=2, micro_batch=3)


def measured(z: np.ndarray) -> Measurement:
    prompts, images, _ = z.shape
    pixels = np.zeros((prompts, images, 4, 4, 3), dtype=np.uint8)
    return Measurement(tuple(f"p{i}" for i in range(prompts)), pixels, z / 10, z)


def compared(gain: tuple[float, float], noise: float = 0.3) -> Comparison:
    """40 prompts of very different difficulty; each evaluator gains a constant plus noise."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 20, (40, 1, 1))
    base = difficulty + rng.normal(0, noise, (40, 4, 2))
    tuned = base + np.array(gain) + rng.normal(0, noise, (40, 4, 2))
    return compare(measured(base), measured(tuned), NAMES, WEIGHTS, CONFIG)


def test_pairing_removes_the_difficulty_of_prompts() -> None:
    """A gain far smaller than the spread between prompts is found, in raw units and in deviations."""
    comparison = compared((0.5, 0.0))
    gain = comparison.evaluators[0]
    assert gain.verdict == "rises"
    assert gain.deviations == pytest.approx(0.5, abs=0.1)
    assert gain.difference == pytest.approx(gain.deviations / 10)
    assert gain.low < gain.difference < gain.high
    assert comparison.evaluators[1].verdict == "unclear"


def test_the_composite_is_the_weighted_mean_of_z() -> None:
    """Weights 1 and 3: a gain of 0.8 in the light evaluator counts 0.2."""
    composite = compared((0.8, 0.0), noise=0.01).composite
    assert composite.difference == pytest.approx(0.2, abs=0.01)
    assert standard_errors(composite) > 5


def test_a_fall_is_said_in_words() -> None:
    """Nobody has to read an interval to learn that an evaluator was sacrificed."""
    said = "\n".join(sentences(compared((1.0, -0.5))))
    assert "clip falls significantly" in said
    assert "aesthetic falls" not in said
    assert "Rising significantly: aesthetic" in said


def test_no_change_at_all_is_no_gain_and_no_crash() -> None:
    """Two equal measurements: difference 0, verdict unclear, finite JSON."""
    same = measured(np.ones((5, 2, 2)))
    comparison = compare(same, same, NAMES, WEIGHTS, CONFIG)
    assert comparison.composite.difference == 0
    assert comparison.composite.verdict == "unclear"
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_the_table_fits_80_columns_and_names_everything() -> None:
    """Piped into a log, nothing is cut off."""
    console = Console(width=80, file=io.StringIO())
    console.print(table(compared((1.0, -0.5))))
    text = console.file.getvalue()
    for word in ("aesthetic", "clip", "composite", "before", "after", "95% interval", "rises", "falls"):
        assert word in text
    assert "…" not in text


def test_base_and_tuned_draw_from_the_same_streams(sampler: ImageSampler) -> None:
    """With an adapter that changes nothing the two measurements are equal, image by image."""
    sampler.policy.add_lora(LoraSettings(rank=2), seed=0)
    tuned = measure(sampler, FakeScorer(), PROMPTS, CONFIG, "tuned")
    with sampler.policy.base():
        base = measure(sampler, FakeScorer(), PROMPTS, CONFIG, "base")
    np.testing.assert_array_equal(tuned.images, base.images)
    assert tuned.images.shape[:2] == tuned.z.shape[:2] == (4, 2)
    expected = FakeScorer().score(["x"] * 2, tuned.images[3])
    np.testing.assert_array_equal(tuned.raw[3], expected.raw)


def test_a_failed_score_ends_the_evaluation(sampler: ImageSampler) -> None:
    """A comparison with holes is none."""

    def fault(prompts: object) -> None:
        raise ScoringError("no answer", retryable=True)

    with pytest.raises(EvaluationError, match="no answer"):
        measure(sampler, FakeScorer(fault), PROMPTS, CONFIG, "base")


def test_one_prompt_gives_numbers_without_an_interval() -> None:
    """A trial run on one prompt ends well: its JSON says null where infinity is not allowed."""
    values = np.arange(4.0).reshape(1, 2, 2)
    base, tuned = (
        Measurement(("x",), np.zeros((1, 2, 8, 8, 3), np.uint8), v, v) for v in (values, values + 1)
    )
    comparison = compare(base, tuned, NAMES, WEIGHTS, CONFIG)
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert plain["rows"]["composite"] | {"low": None, "high": None} == plain["rows"]["composite"]
    assert plain["rows"]["composite"]["difference"] == 1
    assert comparison.composite.verdict == "unclear"


def test_nothing_is_paid_for_where_nothing_rises() -> None:
    """A fall is no price of a gain that is not there."""
    fallen = np.random.default_rng(0).normal(size=(8, 2, 2))
    base, tuned = (
        Measurement(tuple("abcdefgh"), np.zeros((8, 2, 8, 8, 3), np.uint8), v, v)
        for v in (fallen, fallen - 1 - 0.01 * fallen)
    )
    said = " ".join(sentences(compare(base, tuned, NAMES, WEIGHTS, CONFIG)))
    assert "falls significantly" in said
    assert "paid for" not in said


def test_equal_gains_in_every_prompt_are_said_to_be_equal() -> None:
    """No standard error is no "+0.0 standard errors"; JSON says null for what is no number."""
    base = np.random.default_rng(0).normal(size=(6, 2, 2))
    comparison = compare(measured(base), measured(base + 0.3), NAMES, WEIGHTS, CONFIG)
    assert comparison.composite.verdict == "rises"
    assert sentences(comparison)[0] == (
        "The composite rises significantly: +0.300 deviations, the same in every prompt."
    )
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["composite_standard_errors"] is None
    fallen = compare(measured(base), measured(base - 0.3), NAMES, WEIGHTS, CONFIG)
    assert standard_errors(fallen.composite) == -np.inf


def test_nothing_changed_is_said_so() -> None:
    """The same measurement twice: 0, and the same in every prompt."""
    same = measured(np.random.default_rng(0).normal(size=(6, 2, 2)))
    comparison = compare(same, same, NAMES, WEIGHTS, CONFIG)
    assert "does not change clearly: +0.000 deviations, the same in every prompt" in sentences(comparison)[0]
    assert standard_errors(comparison.composite) == 0


def test_of_one_group_no_error_is_told() -> None:
    """Five prompts of one user say as little of others as one prompt does."""
    base = np.random.default_rng(0).normal(size=(5, 2, 2))
    tuned = base + np.random.default_rng(1).normal(size=(5, 1, 1))
    comparison = compare(measured(base), measured(tuned), NAMES, WEIGHTS, CONFIG, [3] * 5)
    assert comparison.groups == 1
    assert comparison.composite.verdict == "unclear"
    assert "one group of prompts tells no error" in sentences(comparison)[0]
    assert comparison.to_dict()["composite_standard_errors"] is None


def test_groups_of_prompts_are_shown_and_make_the_interval_honest() -> None:
    """Prompts of one user count once: wider, the same difference, and the table says how many groups."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 5)
    base = rng.normal(size=(40, 2, 2))
    tuned = base + rng.normal(0.2, 0.5, 8)[groups][:, None, None] + rng.normal(0, 0.05, (40, 2, 2))
    both = measured(base), measured(tuned)
    alone, grouped = (compare(*both, NAMES, WEIGHTS, CONFIG, those).composite for those in (None, groups))
    assert grouped.difference == alone.difference
    assert grouped.standard_error > 1.5 * alone.standard_error
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
    console = Console(width=80, file=io.StringIO())
    console.print(table(compare(*both, NAMES, WEIGHTS, CONFIG, groups)))
    assert "40 held-out prompts in 8 groups × 2 images" in console.file.getvalue()


def test_other_prompts_are_not_compared() -> None:
    """A pair is one prompt drawn twice."""
    one = measured(np.zeros((3, 2, 2)))
    with pytest.raises(ValueError, match="different prompts"):
        compare(one, one._replace(prompts=("a", "b", "c")), NAMES, WEIGHTS, CONFIG)
