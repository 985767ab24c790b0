"""Training on the miniature raises the reward; training on shuffled rewards does not."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from reward_service.config import load_config
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair
from reward_service.scoring.calibration import Calibration, load_calibration
from trainer.config import load_trainer_config
from trainer.data.splits import read_splits
from trainer.evaluation.comparison import Comparison, Measurement, compare, standard_errors
from trainer.evaluation.evaluate import measure
from trainer.rl.rewards import Images, Scores
from trainer.rl.train import train_fold
from trainer.runs.folder import RunFolder
from trainer.runs.setup import load_sampler
from trainer.runs.train import RunResult, train_run

CONFIG = Path(__file__).parents[2] / "configs" / "miniature.yaml"
SHORT = ("iterations=16", "threads=1")


class EngineScorer:
    """Scorer of the service's engine and scales, without HTTP."""

    def __init__(self, engine: RewardEngine, table: Calibration) -> None:
        self._engine, self._scales = engine, table.evaluators
        self.evaluators: tuple[str, ...] = tuple(sorted(engine.evaluators))
        self.identity: Mapping[str, str] = {}

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        pairs = [Pair(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        results = self._engine.score(pairs)
        raw = np.array([[result.raw[name] for name in self.evaluators] for result in results])
        z = np.array(
            [[self._scales[name].apply(result.raw[name]).z for name in self.evaluators] for result in results]
        )
        return Scores(raw, z)


@pytest.fixture(scope="module")
def scorer() -> EngineScorer:
    service = load_config(CONFIG)
    engine = build_engine(service)
    return EngineScorer(engine, load_calibration(service.calibration, list(engine.evaluators)))


@pytest.fixture(scope="module")
def before(scorer: EngineScorer) -> Measurement:
    """Return the base policy's measurement on the held-out prompts."""
    config = load_trainer_config(CONFIG, SHORT)
    return measure(
        load_sampler(config), scorer, read_splits(config.prompts).validation, config.evaluation, "base"
    )


def train_and_compare(scorer: EngineScorer, before: Measurement, *overrides: str) -> Comparison:
    """Return the comparison on held-out prompts after a short training."""
    config = load_trainer_config(CONFIG, [*SHORT, *overrides])
    train, validation, _ = read_splits(config.prompts)
    sampler = load_sampler(config)
    sampler.policy.add_lora(config.lora, seed=1)
    training = train_fold(sampler, scorer, train, config)
    with training.average.applied():
        after = measure(sampler, scorer, validation, config.evaluation, "tuned")
    return compare(before, after, scorer.evaluators, config.objective.weights, config.evaluation)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_reward_on_held_out_prompts_rises(scorer: EngineScorer, before: Measurement) -> None:
    found = train_and_compare(scorer, before, "iterations=26")
    assert found.composite.verdict == "rises"
    assert standard_errors(found.composite) > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_composite_does_not_rise_with_shuffled_rewards(scorer: EngineScorer, before: Measurement) -> None:
    # With shuffled rewards the policy drifts randomly, and a single evaluator may rise or fall a little.
    assert train_and_compare(scorer, before, "ablation.shuffle_rewards=true").composite.verdict != "rises"


def train_with_guard(scorer: EngineScorer, folder: Path, *overrides: str) -> RunResult:
    """Run a short training with a reward-hacking guard that checks twice."""
    short = ["iterations=12", "threads=1", "evaluation.every=6", "prompts.validation_limit=40"]
    config = load_trainer_config(CONFIG, [*short, *overrides])
    run = RunFolder.create(config, folder)
    return train_run(config, read_splits(config.prompts), scorer, run, Console(quiet=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_on_one_evaluator_trips_the_guard(scorer: EngineScorer, tmp_path: Path) -> None:
    """With the aesthetic as the only reward, images no longer match their prompts, and clip falls."""
    aesthetic_only = "objective.weights={aesthetic: 1.0}"
    result = train_with_guard(scorer, tmp_path / "run", aesthetic_only, "guard.evaluator=clip")
    assert result.ending is not None
    assert (result.ending.by, result.reached) == ("guard", 6)
    assert result.reward_hacking_reason is not None
    assert "Guard clip falls significantly" in result.reward_hacking_reason


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_balanced_reward_does_not_trip_the_guard(scorer: EngineScorer, tmp_path: Path) -> None:
    """As in `crossval`: three evaluators in the objective, the fourth is the guard."""
    result = train_with_guard(scorer, tmp_path / "run", "objective.weights.hpsv2=0", "guard.evaluator=hpsv2")
    assert (result.ending, result.reached) == (None, 12)
    assert result.reward_hacking_reason is None
    assert result.evaluation.guard is not None
