"""Paired comparison: its numbers, its intervals and its sentences."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from tests.trainer.conftest import PROMPTS, FakeScorer
from trainer.config import EvaluationConfig, LoraSettings
from trainer.evaluation.comparison import (
    Comparison,
    Measurement,
    compare,
    comparison_sentences,
    comparison_table,
    standard_errors,
)
from trainer.evaluation.evaluate import measure
from trainer.rl.rewards import ScoringError
from trainer.rl.sampler import ImageSampler
from trainer.runtime.errors import EvaluationError

NAMES = ("aesthetic", "clip")
WEIGHTS = {"aesthetic": 1.0, "clip": 3.0}
CONFIG = EvaluationConfig(resamples=2000, images_per_prompt=2, micro_batch=3)


def measurement_of(z: np.ndarray) -> Measurement:
    prompts, images, _ = z.shape
    pixels = np.zeros((prompts, images, 4, 4, 3), dtype=np.uint8)
    return Measurement(tuple(f"p{i}" for i in range(prompts)), pixels, z / 10, z)


def comparison_of(gain: tuple[float, float], noise: float = 0.3) -> Comparison:
    """Compare 40 prompts of very different difficulty; each evaluator gains a constant plus noise."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 20, (40, 1, 1))
    base = difficulty + rng.normal(0, noise, (40, 4, 2))
    tuned = base + np.array(gain) + rng.normal(0, noise, (40, 4, 2))
    return compare(measurement_of(base), measurement_of(tuned), NAMES, WEIGHTS, CONFIG)


def test_compare_pairing_removes_the_difficulty_of_prompts() -> None:
    """A gain far smaller than the spread between prompts is found, in raw units and in deviations."""
    comparison = comparison_of((0.5, 0.0))
    gain = comparison.evaluators[0]
    assert gain.verdict == "rises"
    assert gain.deviations == pytest.approx(0.5, abs=0.1)
    assert gain.difference == pytest.approx(gain.deviations / 10)
    assert gain.low < gain.difference < gain.high
    assert comparison.evaluators[1].verdict == "unclear"


def test_compare_composite_is_the_weighted_mean_of_z() -> None:
    """Weights 1 and 3: a gain of 0.8 in the light evaluator counts 0.2."""
    composite = comparison_of((0.8, 0.0), noise=0.01).composite
    assert composite.difference == pytest.approx(0.2, abs=0.01)
    assert standard_errors(composite) > 5


def test_comparison_sentences_name_a_fall() -> None:
    """Reading an interval is not needed to see that an evaluator was sacrificed."""
    text = "\n".join(comparison_sentences(comparison_of((1.0, -0.5))))
    assert "clip falls significantly" in text
    assert "aesthetic falls" not in text
    assert "Rising significantly: aesthetic" in text


def test_compare_equal_measurements_gives_no_gain() -> None:
    """Difference 0, verdict unclear, finite JSON."""
    same = measurement_of(np.ones((5, 2, 2)))
    comparison = compare(same, same, NAMES, WEIGHTS, CONFIG)
    assert comparison.composite.difference == 0
    assert comparison.composite.verdict == "unclear"
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_comparison_table_fits_80_columns() -> None:
    """Nothing is cut off in a log, and every row and column has its name."""
    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table(comparison_of((1.0, -0.5))))
    text = console.file.getvalue()
    for word in ("aesthetic", "clip", "composite", "before", "after", "95% interval", "rises", "falls"):
        assert word in text
    assert "…" not in text


def test_measure_base_and_tuned_from_the_same_streams(sampler: ImageSampler) -> None:
    """With an adapter that changes nothing the two measurements are equal, image by image."""
    sampler.policy.add_lora(LoraSettings(rank=2), seed=0)
    tuned = measure(sampler, FakeScorer(), PROMPTS, CONFIG, "tuned")
    with sampler.policy.base():
        base = measure(sampler, FakeScorer(), PROMPTS, CONFIG, "base")
    np.testing.assert_array_equal(tuned.images, base.images)
    assert tuned.images.shape[:2] == tuned.z.shape[:2] == (4, 2)
    expected = FakeScorer().score(["x"] * 2, tuned.images[3])
    np.testing.assert_array_equal(tuned.raw[3], expected.raw)


def test_measure_raises_if_scoring_fails(sampler: ImageSampler) -> None:
    """A comparison with missing scores is not made."""

    def fault(prompts: object) -> None:
        raise ScoringError("no response", retryable=True)

    with pytest.raises(EvaluationError, match="no response"):
        measure(sampler, FakeScorer(fault), PROMPTS, CONFIG, "base")


def test_compare_one_prompt_gives_null_bounds() -> None:
    """A trial run on one prompt ends normally: null in its JSON instead of infinity."""
    values = np.arange(4.0).reshape(1, 2, 2)
    base, tuned = (
        Measurement(("x",), np.zeros((1, 2, 8, 8, 3), np.uint8), v, v) for v in (values, values + 1)
    )
    comparison = compare(base, tuned, NAMES, WEIGHTS, CONFIG)
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert plain["rows"]["composite"] | {"low": None, "high": None} == plain["rows"]["composite"]
    assert plain["rows"]["composite"]["difference"] == 1
    assert comparison.composite.verdict == "unclear"


def test_comparison_sentences_name_no_price_without_a_rise() -> None:
    """A fall is not the price of a gain if there is no gain."""
    fallen = np.random.default_rng(0).normal(size=(8, 2, 2))
    base, tuned = (
        Measurement(tuple("abcdefgh"), np.zeros((8, 2, 8, 8, 3), np.uint8), v, v)
        for v in (fallen, fallen - 1 - 0.01 * fallen)
    )
    text = " ".join(comparison_sentences(compare(base, tuned, NAMES, WEIGHTS, CONFIG)))
    assert "falls significantly" in text
    assert "paid for" not in text


def test_comparison_sentences_name_equal_gains() -> None:
    """A standard error of 0 is not shown as "+0.0 standard errors", and is null in JSON."""
    base = np.random.default_rng(0).normal(size=(6, 2, 2))
    comparison = compare(measurement_of(base), measurement_of(base + 0.3), NAMES, WEIGHTS, CONFIG)
    assert comparison.composite.verdict == "rises"
    assert comparison_sentences(comparison)[0] == (
        "The composite rises significantly: +0.300 deviations, the same in every prompt."
    )
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["composite_standard_errors"] is None
    fallen = compare(measurement_of(base), measurement_of(base - 0.3), NAMES, WEIGHTS, CONFIG)
    assert standard_errors(fallen.composite) == -np.inf


def test_comparison_sentences_name_no_change() -> None:
    """The same measurement twice: 0, and the same in every prompt."""
    same = measurement_of(np.random.default_rng(0).normal(size=(6, 2, 2)))
    comparison = compare(same, same, NAMES, WEIGHTS, CONFIG)
    assert (
        "does not change clearly: +0.000 deviations, the same in every prompt"
        in comparison_sentences(comparison)[0]
    )
    assert standard_errors(comparison.composite) == 0


def test_compare_one_group_has_no_standard_error() -> None:
    """Five prompts of one user are as little evidence as one prompt."""
    base = np.random.default_rng(0).normal(size=(5, 2, 2))
    tuned = base + np.random.default_rng(1).normal(size=(5, 1, 1))
    comparison = compare(measurement_of(base), measurement_of(tuned), NAMES, WEIGHTS, CONFIG, [3] * 5)
    assert comparison.groups == 1
    assert comparison.composite.verdict == "unclear"
    assert "no standard error: a single group of prompts" in comparison_sentences(comparison)[0]
    assert comparison.to_dict()["composite_standard_errors"] is None


def test_compare_groups_widen_the_interval() -> None:
    """Prompts of one user count once; the table shows the number of groups."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 5)
    base = rng.normal(size=(40, 2, 2))
    tuned = base + rng.normal(0.2, 0.5, 8)[groups][:, None, None] + rng.normal(0, 0.05, (40, 2, 2))
    both = measurement_of(base), measurement_of(tuned)
    alone, grouped = (compare(*both, NAMES, WEIGHTS, CONFIG, those).composite for those in (None, groups))
    assert grouped.difference == alone.difference
    assert grouped.standard_error > 1.5 * alone.standard_error
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)
    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table(compare(*both, NAMES, WEIGHTS, CONFIG, groups)))
    assert "40 held-out prompts in 8 groups × 2 images" in console.file.getvalue()


def test_compare_refuses_different_prompts() -> None:
    """A pair is one prompt, measured twice."""
    one = measurement_of(np.zeros((3, 2, 2)))
    with pytest.raises(ValueError, match="different prompts"):
        compare(one, one._replace(prompts=("a", "b", "c")), NAMES, WEIGHTS, CONFIG)
