"""Training loop: learns a planted reward, is deterministic, and has exact micro-batch updates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from tests.support.trainer.fitted_karlo import LEARNABLE
from tests.support.trainer.recording import RecordingCallback
from tests.trainer.conftest import PROMPTS, SAMPLING, FakeScorer, make_policy
from trainer.config import EvaluationConfig, LoraSettings, ModelSource, TrainerConfig
from trainer.evaluation.evaluate import measure
from trainer.rl.karlo import load_karlo
from trainer.rl.replay import replay_loss, select_transitions
from trainer.rl.rewards import Scorer
from trainer.rl.rollout import DropCount, collect_rollout, group_keys
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import new_training_state, prompt_batches, run_updates, stratified_steps, train_fold


def with_changes(config: TrainerConfig, **changes: Any) -> TrainerConfig:
    """Return the configuration with `section__key=value` changes, validated again."""
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
    callback = RecordingCallback()
    train_fold(sampler, scorer or FakeScorer(), PROMPTS, config, callback=callback)
    return sampler, callback.records


def redness_gained(folder: Path, config: TrainerConfig) -> float:
    """Return the gain in held-out redness of the tuned over the base policy, same random streams.

    In within-prompt standard deviations.
    """
    sampler, records = trained(folder, config)
    evaluation = EvaluationConfig(images_per_prompt=16)
    tuned = measure(sampler, FakeScorer(), ["held out", "another"], evaluation, "tuned").z[..., 1]
    with sampler.policy.base():
        base = measure(sampler, FakeScorer(), ["held out", "another"], evaluation, "base").z[..., 1]
    return float((tuned - base).mean() / records[0]["deviation"]["red"])


@pytest.mark.slow
def test_planted_reward_rises_and_shuffled_null_does_not(
    fitted_karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Redness is learned in ten iterations; with scores shuffled across images it is not.

    The run is the statistical unit, because the images of a run drift together. Four paired seeds.
    """
    config = with_changes(trainer_config, **LEARNABLE)
    null_config = with_changes(config, ablation__shuffle_rewards=True)
    gains = [redness_gained(fitted_karlo_folder, with_changes(config, seed=seed)) for seed in range(4)]
    nulls = [redness_gained(fitted_karlo_folder, with_changes(null_config, seed=seed)) for seed in range(4)]
    assert t_interval(np.subtract(gains, nulls))[0] > 0
    assert t_interval(np.array(gains))[0] > 0.5  # within-prompt deviations
    assert t_interval(np.array(nulls))[0] < 0, "the null does not rise significantly"


def t_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's confidence interval for the mean of independent runs."""
    interval = ttest_1samp(values, 0.0).confidence_interval(confidence)
    return float(interval.low), float(interval.high)


def test_ratio_is_one_before_first_update_of_every_iteration(
    karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Replay equals sampling in every iteration, also after updates.

    Sampling and update have the same batch size: another one rounds differently.
    """
    _, records = trained(karlo_folder, with_changes(trainer_config, iterations=3, update__micro_batch=8))
    for record in records:
        assert record["first_ratio"] == pytest.approx(1, abs=1e-5)
        assert record["mean_ratio"] != 1.0


def test_training_is_deterministic(karlo_folder: Path, trainer_config: TrainerConfig) -> None:
    """The same seed gives the same adapter, bit for bit on the CPU; another seed another one."""
    config = with_changes(trainer_config, iterations=2)
    runs = [trained(karlo_folder, with_changes(config, seed=seed))[0] for seed in (0, 0, 1)]
    first, again, other = (torch.cat([w.flatten() for w in s.policy.lora.values()]) for s in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_evaluators_of_weight_zero_have_no_influence(
    karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Changing the scores of an evaluator without weight changes no parameter."""

    class InvertedScorer(FakeScorer):
        def score(self, prompts, images):
            scores = super().score(prompts, images)
            return type(scores)(scores.raw * [-1, 1], scores.z * [-1, 1])

    config = with_changes(trainer_config, iterations=1)
    a, _ = trained(karlo_folder, config)
    b, _ = trained(karlo_folder, config, InvertedScorer())
    for x, y in zip(a.policy.lora.values(), b.policy.lora.values(), strict=True):
        assert torch.equal(x, y)


@pytest.fixture
def state_and_transitions(sampler: ImageSampler, trainer_config: TrainerConfig):
    """Training state with a new adapter, and the transitions of one small rollout."""
    sampler.policy.add_lora(LoraSettings(rank=2), seed=0)
    training = new_training_state(sampler.policy, trainer_config, 2)
    keys = group_keys(PROMPTS[:2], 4, seed=0, fold=0, iteration=0)
    rollout = collect_rollout(sampler, FakeScorer(), keys, trainer_config.rollout, 8, DropCount(0.05))
    steps = stratified_steps(8, trainer_config, torch.Generator().manual_seed(0))
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(0))
    return training, select_transitions(rollout, torch.arange(8), steps, advantages)


def test_accumulated_micro_batches_equal_whole_batch(
    state_and_transitions, trainer_config: TrainerConfig
) -> None:
    """The micro-batch size does not change the step: four of 4 equal one of 16, also uneven ones."""
    training, transitions = state_and_transitions
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
        record = run_updates(training, transitions, config, torch.Generator().manual_seed(0))
        assert record["updates"] == 1
        found.append(torch.cat([(w.detach() - start[n]).flatten() for n, w in training.policy.lora.items()]))
    assert found[0].abs().max() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


def test_equal_rewards_change_nothing(karlo_folder: Path, trainer_config: TrainerConfig) -> None:
    """If all rewards are equal there is no update, and the run continues."""

    class ConstantScorer(FakeScorer):
        def score(self, prompts, images):
            scores = super().score(prompts, images)
            return type(scores)(0 * scores.raw, 0 * scores.z)

    sampler, records = trained(karlo_folder, with_changes(trainer_config, iterations=2), ConstantScorer())
    assert [record["updates"] for record in records] == [0, 0]
    assert [record["zero_variance_groups"] for record in records] == [2, 2]
    assert all(not w.any() for name, w in sampler.policy.lora.items() if "lora_B" in name)


def test_kl_penalty_is_zero_at_base_and_positive_away(
    state_and_transitions, trainer_config: TrainerConfig
) -> None:
    """The penalty is 0 at the base policy and increases the loss of a changed policy."""
    training, transitions = state_and_transitions
    config = with_changes(trainer_config, objective__kl_to_base=1.0)
    at_base = replay_loss(training.policy, transitions, config)[0]
    torch.testing.assert_close(at_base, replay_loss(training.policy, transitions, trainer_config)[0])
    for weight in training.policy.lora.values():
        weight.data += 0.05
    away, _ = replay_loss(training.policy, transitions, config)
    plain, _ = replay_loss(training.policy, transitions, trainer_config)
    assert away > plain


def test_selected_transitions_are_neighbours_in_chain(state_and_transitions) -> None:
    """x_p follows x_t, and the stored mean and sigma are those of that step."""
    _, transitions = state_and_transitions
    noise = (transitions.x_p - transitions.mean_old) / transitions.sigma_old
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert abs(noise.mean().item()) < 0.05


def test_stratified_steps_are_within_range(trainer_config: TrainerConfig) -> None:
    """Each image has one step of each part of the range, and every step occurs."""
    config = with_changes(trainer_config, update__train_steps=(1, 4))
    steps = stratified_steps(500, config, torch.Generator().manual_seed(0))
    assert steps.shape == (500, 2)
    assert set(steps[:, 0].tolist()) == {1, 2}
    assert set(steps[:, 1].tolist()) == {3, 4}
    every = with_changes(config, update__steps_per_image=99)
    assert stratified_steps(3, every, torch.Generator()).tolist() == [[1, 2, 3, 4]] * 3


def test_prompt_batches_cover_every_epoch_in_seeded_order() -> None:
    """An epoch contains every prompt once; the order depends on seed, fold and epoch."""
    batches = prompt_batches(PROMPTS, 2, seed=0, fold=0)
    epochs = [[*next(batches), *next(batches)] for _ in range(6)]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = prompt_batches(PROMPTS, 2, seed=0, fold=0)
    assert [*next(again), *next(again)] == epochs[0]
    assert len(next(prompt_batches(PROMPTS, 99, seed=0, fold=0))) == len(PROMPTS)
