"""The loop: it learns what it is rewarded for, and nothing from shuffled rewards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from tests.support.trainer.painter import PLANTED
from tests.trainer.conftest import PROMPTS, SAMPLING, FakeScorer, make_policy
from trainer.config import EvaluationConfig, LoraSettings, ModelSource, TrainerConfig
from trainer.evaluation.evaluate import measure
from trainer.rl.karlo import load_karlo
from trainer.rl.replay import replay_loss, select_transitions
from trainer.rl.rewards import Scorer
from trainer.rl.rollout import DropCount, collect, group_keys
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import new_training_state, prompt_batches, stratified_steps, train_fold, update


def with_changes(config: TrainerConfig, **changes: Any) -> TrainerConfig:
    """The configuration with `section__key=value` changes, validated again."""
    values = config.model_dump()
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = values
        for section in sections:
            target = target[section]
        target[key] = value
    return TrainerConfig.model_validate(values)


def trained(
    folder: Path, config: TrainerConfig, scorer: Scorer | None = None
) -> tuple[ImageSampler, list[Any]]:
    karlo = load_karlo(ModelSource(path=folder))
    sampler = ImageSampler(karlo, make_policy(karlo), SAMPLING)
    sampler.policy.add_lora(config.lora, seed=config.seed)
    records: list[Any] = []
    train_fold(sampler, scorer or FakeScorer(), PROMPTS, config, log=records.append)
    return sampler, records


def redness_gained(folder: Path, config: TrainerConfig) -> float:
    """Held-out redness of the tuned policy over the base's, same streams, in within-prompt deviations."""
    sampler, records = trained(folder, config)
    evaluation = EvaluationConfig(images_per_prompt=16)
    tuned = measure(sampler, FakeScorer(), ["held out", "another"], evaluation, "tuned").z[..., 1]
    with sampler.policy.base():
        base = measure(sampler, FakeScorer(), ["held out", "another"], evaluation, "base").z[..., 1]
    return float((tuned - base).mean() / records[0]["deviation"]["red"])


@pytest.mark.slow
def test_a_planted_reward_rises_and_the_shuffled_null_does_not(
    painter_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Redness is learned in ten iterations; with scores shuffled across images it is not.

    A run is the unit: each drifts somewhere, and all its images with it. Four seeds, in pairs.
    """
    config = with_changes(trainer_config, **PLANTED)
    null_config = with_changes(config, ablation__shuffle_rewards=True)
    gains = [redness_gained(painter_folder, with_changes(config, seed=seed)) for seed in range(4)]
    nulls = [redness_gained(painter_folder, with_changes(null_config, seed=seed)) for seed in range(4)]
    assert t_interval(np.subtract(gains, nulls))[0] > 0
    assert t_interval(np.array(gains))[0] > 0.5  # within-prompt deviations
    assert t_interval(np.array(nulls))[0] < 0, "the null does not rise significantly"


def t_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval for the mean of independent runs."""
    interval = ttest_1samp(values, 0.0).confidence_interval(confidence)
    return float(interval.low), float(interval.high)


def test_the_ratio_is_one_before_the_first_update_of_every_iteration(
    karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Replay never drifts from sampling, also after updates.

    The ratio is that of whole transitions. Batches are of one size: another rounds differently.
    """
    _, records = trained(karlo_folder, with_changes(trainer_config, iterations=3, update__micro_batch=8))
    for record in records:
        assert record["first_ratio"] == pytest.approx(1, abs=1e-5)
        assert record["mean_ratio"] != 1.0


def test_training_is_deterministic(karlo_folder: Path, trainer_config: TrainerConfig) -> None:
    """Same seed, same adapter, bit for bit on the CPU; another seed, another adapter."""
    config = with_changes(trainer_config, iterations=2)
    runs = [trained(karlo_folder, with_changes(config, seed=seed))[0] for seed in (0, 0, 1)]
    first, again, other = (torch.cat([w.flatten() for w in s.policy.lora.values()]) for s in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_evaluators_of_weight_zero_do_not_teach(karlo_folder: Path, trainer_config: TrainerConfig) -> None:
    """Only weighted evaluators move the policy: changing another's scores changes no weight."""

    class Inverted(FakeScorer):
        def score(self, prompts, images):
            scores = super().score(prompts, images)
            return type(scores)(scores.raw * [-1, 1], scores.z * [-1, 1])

    config = with_changes(trainer_config, iterations=1)
    a, _ = trained(karlo_folder, config)
    b, _ = trained(karlo_folder, config, Inverted())
    for x, y in zip(a.policy.lora.values(), b.policy.lora.values(), strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def learning(sampler: ImageSampler, trainer_config: TrainerConfig):
    """A trainer with its adapter and the transitions of one small rollout."""
    sampler.policy.add_lora(LoraSettings(rank=2), seed=0)
    training = new_training_state(sampler.policy, trainer_config, 2)
    keys = group_keys(PROMPTS[:2], 4, seed=0, fold=0, iteration=0)
    rollout = collect(sampler, FakeScorer(), keys, trainer_config.rollout, 8, DropCount(0.05))
    steps = stratified_steps(8, trainer_config, torch.Generator().manual_seed(0))
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(0))
    return training, select_transitions(rollout, torch.arange(8), steps, advantages)


def test_accumulated_micro_batches_take_the_step_of_the_whole(
    learning, trainer_config: TrainerConfig
) -> None:
    """Memory decides the micro-batch, not the result: four of four equal one of sixteen, uneven ones too."""
    training, transitions = learning
    assert len(transitions.step) == 16
    start = {name: weight.detach().clone() for name, weight in training.policy.lora.items()}
    found = []
    for size, accumulate in ((16, 1), (4, 4), (6, 3)):
        for name, weight in training.policy.lora.items():
            weight.data.copy_(start[name])
        training.optimizer = torch.optim.SGD(list(training.policy.lora.values()), lr=1e-3)
        config = with_changes(
            trainer_config, update__micro_batch=size, update__accumulate=accumulate, update__max_grad_norm=1e9
        )
        record = update(training, transitions, config, torch.Generator().manual_seed(0))
        assert record["updates"] == 1
        found.append(torch.cat([(w.detach() - start[n]).flatten() for n, w in training.policy.lora.items()]))
    assert found[0].abs().max() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


def test_an_iteration_without_differences_changes_nothing(
    karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Where every image gets the same reward there is nothing to learn, and the run goes on."""

    class Indifferent(FakeScorer):
        def score(self, prompts, images):
            scores = super().score(prompts, images)
            return type(scores)(0 * scores.raw, 0 * scores.z)

    sampler, records = trained(karlo_folder, with_changes(trainer_config, iterations=2), Indifferent())
    assert [record["updates"] for record in records] == [0, 0]
    assert [record["zero_variance_groups"] for record in records] == [2, 2]
    assert all(not w.any() for name, w in sampler.policy.lora.items() if "lora_B" in name)


def test_the_kl_penalty_pulls_towards_the_base(learning, trainer_config: TrainerConfig) -> None:
    """Away from the base the penalty adds to the loss; at the base it adds nothing."""
    training, transitions = learning
    config = with_changes(trainer_config, objective__kl_to_base=1.0)
    at_base = replay_loss(training.policy, transitions, config)[0]
    torch.testing.assert_close(at_base, replay_loss(training.policy, transitions, trainer_config)[0])
    for weight in training.policy.lora.values():
        weight.data += 0.05
    away, _ = replay_loss(training.policy, transitions, config)
    plain, _ = replay_loss(training.policy, transitions, trainer_config)
    assert away > plain


def test_transitions_are_the_stored_neighbours(learning) -> None:
    """x_p follows x_t in the chain, and the stored mean and sigma are those of that step."""
    _, transitions = learning
    noise = (transitions.x_p - transitions.mean_old) / transitions.sigma_old
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert abs(noise.mean().item()) < 0.05


def test_steps_are_stratified_and_within_range(trainer_config: TrainerConfig) -> None:
    """Each image trains one step of each part of the range, and every step comes up."""
    config = with_changes(trainer_config, update__train_steps=(1, 4))
    steps = stratified_steps(500, config, torch.Generator().manual_seed(0))
    assert steps.shape == (500, 2)
    assert set(steps[:, 0].tolist()) == {1, 2}
    assert set(steps[:, 1].tolist()) == {3, 4}
    every = with_changes(config, update__steps_per_image=99)
    assert stratified_steps(3, every, torch.Generator()).tolist() == [[1, 2, 3, 4]] * 3


def test_prompt_batches_are_distinct_seeded_and_go_round() -> None:
    """An epoch shows every prompt once; the order depends on seed, fold and epoch."""
    batches = prompt_batches(PROMPTS, 2, seed=0, fold=0)
    epochs = [[*next(batches), *next(batches)] for _ in range(6)]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = prompt_batches(PROMPTS, 2, seed=0, fold=0)
    assert [*next(again), *next(again)] == epochs[0]
    assert len(next(prompt_batches(PROMPTS, 99, seed=0, fold=0))) == len(PROMPTS)
