"""Calibration: raw, z and unit values, and the reward computed from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from reward_service.scoring.calibration import Scale, compute_reward, load_calibration
from reward_service.settings import ConfigError

SCALE = Scale(mean=21.5, std=1.2)


@given(st.floats(-10, 60))
def test_z_and_unit_follow_their_formulas(raw: float) -> None:
    """The formulas are z = (raw − mean)/std, unit = Φ(z)."""
    score = SCALE.apply(raw)
    assert score.raw == raw
    assert score.z == pytest.approx((raw - 21.5) / 1.2)
    assert score.unit == pytest.approx(norm.cdf(score.z))


@given(st.floats(-30, 6), st.floats(1e-2, 1))
def test_unit_is_strictly_increasing(z: float, step: float) -> None:
    """There is no clipping: a higher score has a higher unit value, also far below the mean."""
    scale = Scale(mean=0.0, std=1.0)
    low, high = scale.apply(z).unit, scale.apply(z + step).unit
    assert 0.0 < low < high < 1.0


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 9), min_size=1), st.floats(0.1, 100))
def test_reward_depends_on_the_ratio_of_weights_only(weights: dict[str, float], factor: float) -> None:
    """The reward is a weighted mean: within the range of the scores, and independent of a common factor."""
    scores = {name: SCALE.apply(20 + ord(name) - 97) for name in weights}
    reward = compute_reward(scores, weights, "unit")
    scaled = {name: weight * factor for name, weight in weights.items()}
    units = [score.unit for score in scores.values()]
    assert compute_reward(scores, scaled, "unit") == pytest.approx(reward)
    assert min(units) - 1e-12 <= reward <= max(units) + 1e-12


@pytest.mark.parametrize("weight", [5e-324, 1.0, 1.7e308])
def test_extreme_weights_give_a_finite_reward(weight: float) -> None:
    """Nothing overflows or underflows: with a single weight the reward is the score itself."""
    assert compute_reward({"a": SCALE.apply(30.0)}, {"a": weight}, "raw") == 30.0


def test_identity_depends_on_mean_and_std() -> None:
    """A scale with another mean or standard deviation has another identity."""
    found = {scale.identity for scale in (SCALE, Scale(mean=21.5, std=1.3), Scale(mean=21.4, std=1.2))}
    assert len(found) == 3
    assert Scale(mean=21.5, std=1.2).identity == SCALE.identity


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "Invalid JSON"),
        ({"provisional": True, "provenance": "x", "evaluators": {}}, "no scale for evaluator clip"),
        (
            {"provisional": True, "provenance": "x", "evaluators": {"clip": {"mean": 0, "std": 0}}},
            "evaluators.clip.std",
        ),
        (
            {"provisional": True, "provenance": "x", "evaluators": {"clip": {"mean": 0, "std": 1e-320}}},
            "evaluators.clip.std",  # z would be infinite
        ),
        ({"evaluators": {}}, "provisional"),
        (
            (
                '{"provisional": true, "provenance": "x", "evaluators": '
                '{"clip": {"mean": 0, "std": 1}, "clip": {"mean": 0, "std": 2}}}'
            ),
            "the key 'clip' is there twice",
        ),
    ],
)
def test_unusable_table_is_reported_in_one_line(tmp_path: Path, content: object, expected: str) -> None:
    """The error names the file and the problem."""
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=expected) as error:
        load_calibration(path, ["clip"])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
