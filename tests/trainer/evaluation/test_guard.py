"""Reward-hacking guard: an evaluator that is not trained on, held out by name or in turn."""

import json

import numpy as np
import pytest

from benchmarks.coverage import as_measurement
from trainer.config import ConfigError, EvaluationConfig, TrainerConfig
from trainer.evaluation.guard import GuardVerdict, check_guard, rotated_guard, with_guard
from trainer.evaluation.intervals import Floats

NAMES = ("dark", "red")


def configured(weights: dict[str, float] | None = None, **guard: object) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {
            "runs_dir": "runs",
            "karlo": {"path": "karlo"},
            "prompts": {"train": "train.txt"},
            "objective": {"weights": weights or {"red": 1.0}},
            "evaluation": EvaluationConfig(resamples=500).model_dump(),
            "guard": guard,
        }
    )


def verdict_of(
    dark: float, red: float, looks: int = 10, spread: float = 0.5, **guard: object
) -> GuardVerdict:
    """Check gains of 24 prompts; "red" is trained on, "dark" is the guard."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(24, 2, 2))
    noise = rng.normal(0, spread, (24, 1, 2))
    gained = base + np.array([dark, red]) + noise - noise.mean(axis=0)
    config = configured(evaluator="dark", **guard)
    return check_guard(as_measurement(base), as_measurement(gained), NAMES, config, None, looks)


def test_guard_trips_on_reward_hacking() -> None:
    """The trained evaluator rises and the guard falls: sentence, JSON and level."""
    verdict = verdict_of(-0.6, 1.0)
    assert verdict.tripped
    assert verdict.sentence.startswith(
        "Guard dark falls significantly (-0.60 deviations) while the composite"
    )
    assert verdict.gain.name == "dark"
    plain = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert plain["tripped"] is True
    assert plain["looks"] == 10
    assert plain["gain"]["verdict"] == "falls"
    assert plain["level"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("dark", "red", "words"),
    [
        (0.6, 1.0, "rises significantly"),
        (0.0, 1.0, "has not fallen clearly"),
        (-0.6, 0.0, "but the composite does not rise"),
        (-0.6, -1.0, "but the composite does not rise"),
    ],
)
def test_guard_does_not_trip_without_hacking(dark: float, red: float, words: str) -> None:
    """A guard that rises, stays, or falls together with the composite does not trip."""
    verdict = verdict_of(dark, red)
    assert not verdict.tripped
    assert words in verdict.sentence


def test_guard_needs_more_evidence_with_more_evaluations() -> None:
    """The same small fall trips at a single evaluation, and not at one of fifty."""
    assert verdict_of(-0.22, 1.0, looks=1).tripped
    assert not verdict_of(-0.22, 1.0, looks=50).tripped


def test_guard_trips_later_at_higher_confidence() -> None:
    """guard.confidence bounds the false alarms of an honest run."""
    assert verdict_of(-0.32, 1.0, looks=5, confidence=0.9).tripped
    assert not verdict_of(-0.32, 1.0, looks=5, confidence=0.999).tripped


def honest_gains(rng: np.random.Generator, looks: int, prompts: int) -> Floats:
    """Return guard gains of an honest run, (looks, prompts): random walks without a true fall."""
    return np.cumsum(rng.normal(size=(looks, prompts)), axis=0)


def stopped_share(share: bool, runs: int = 300, looks: int = 8, prompts: int = 24) -> float:
    """Return the share of honest runs that one of their correlated evaluations stops."""
    rng = np.random.default_rng(0)
    config = configured(evaluator="dark")
    trips = 0
    for _ in range(runs):
        base = rng.normal(size=(prompts, 2, 2))
        for wandered in honest_gains(rng, looks, prompts):
            gained = base + np.stack([wandered, np.ones(prompts)], axis=-1)[:, None]
            verdict = check_guard(
                as_measurement(base), as_measurement(gained), NAMES, config, None, looks if share else 1
            )
            if verdict.tripped:
                trips += 1
                break
    return trips / runs


@pytest.mark.slow
def test_guard_stops_at_most_5_percent_of_honest_runs() -> None:
    """Over all correlated evaluations together; without sharing the level it would stop more."""
    assert stopped_share(share=True) <= 0.05 < stopped_share(share=False)


def test_guard_counts_near_duplicates_once() -> None:
    """One group of prompts that falls is one observation."""
    base = np.random.default_rng(0).normal(size=(24, 2, 2))
    fallen = np.where(np.arange(24) < 16, -0.5, 0.0) + np.random.default_rng(1).normal(0, 0.05, 24)
    gained = base + np.stack([fallen, np.ones(24)], axis=-1)[:, None]
    both = as_measurement(base), as_measurement(gained)
    config = configured(evaluator="dark")
    assert check_guard(*both, NAMES, config, None, 3).tripped
    assert not check_guard(*both, NAMES, config, [0] * 16 + list(range(1, 9)), 3).tripped


def test_guard_unknown_to_the_service_raises_config_error() -> None:
    """The message names the setting and the evaluators of the service."""
    both = as_measurement(np.zeros((3, 2, 2)))
    with pytest.raises(ConfigError, match=r"trainer\.guard\.evaluator: .* blue; it has dark, red"):
        check_guard(both, both, NAMES, configured(evaluator="blue"), None, 1)


def test_guard_does_not_trip_on_one_prompt() -> None:
    """A trial run on one prompt is no evidence, and its JSON is valid."""
    base = np.zeros((1, 2, 2))
    verdict = check_guard(
        as_measurement(base),
        as_measurement(base + np.array([-1.0, 1.0])),
        NAMES,
        configured(evaluator="dark"),
        None,
        0,
    )
    assert not verdict.tripped
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_rotated_guard_holds_out_each_evaluator_in_turn() -> None:
    """Turns are folds or trials from 0."""
    assert [rotated_guard(("a", "b", "c"), turn) for turn in range(5)] == ["a", "b", "c", "a", "b"]


def test_with_guard_removes_the_guard_from_both_composites() -> None:
    """Its weights become 0; the others keep theirs, and the configuration stays valid."""
    weights = {"aesthetic": 1.0, "clip": 3.0, "hpsv2": 0.0, "pickscore": 1.0}
    config = configured(weights, evaluator="rotate", confidence=0.9)
    config = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"weights": {"clip": 1.0, "hpsv2": 1.0}})}
    )
    turned = [with_guard(config, turn) for turn in range(4)]
    assert [one.guard.evaluator for one in turned] == ["aesthetic", "clip", "pickscore", "aesthetic"]
    assert turned[1].objective.weights == weights | {"clip": 0.0}
    assert turned[1].evaluation.weights == {"clip": 0.0, "hpsv2": 1.0}
    assert turned[1].guard.confidence == 0.9
    for one in turned:
        assert TrainerConfig.model_validate(one.model_dump()) == one


def test_with_guard_without_rotation_returns_the_configuration() -> None:
    """A named guard, or none, is the same in every fold."""
    for config in (configured(), configured(evaluator="dark")):
        assert with_guard(config, 3) is config


@pytest.mark.parametrize("reward_evaluators", [None, {"clip": 1.0}])
def test_with_guard_rotation_needs_two_weighted_evaluators(
    reward_evaluators: dict[str, float] | None,
) -> None:
    """Otherwise nothing would be trained on, or reported."""
    weights = {"clip": 1.0} if reward_evaluators is None else {"clip": 1.0, "red": 1.0}
    config = configured(weights, evaluator="rotate")
    evaluation = config.evaluation.model_copy(update={"weights": reward_evaluators})
    with pytest.raises(ConfigError, match=r"trainer\.guard\.evaluator: rotate .* only clip has a weight"):
        with_guard(config.model_copy(update={"evaluation": evaluation}), 0)
