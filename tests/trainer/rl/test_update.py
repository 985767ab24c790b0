"""Update of the policy: gradient of the objective, micro-batches, learning rate and metrics."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import FakeScorer, make_policy
from tests.trainer.rl.test_policy import condition_of
from tests.trainer.rl.test_train import trained, with_changes
from trainer.config import TrainerConfig, UpdateConfig
from trainer.rl.karlo import Condition, Karlo
from trainer.rl.policy import DecoderPolicy, MovingAverage
from trainer.rl.replay import Transitions, replay_loss
from trainer.rl.train import TrainingState, optimizer_step, scheduled_learning_rate, stratified_steps
from trainer.runtime.errors import DivergenceError

PAIRS = 6  # transitions of the small problem below


class FrozenUnconditional(DecoderPolicy):
    """Policy with a frozen unconditional branch: finite differences of a detached branch."""

    frozen: Tensor | None = None

    def _predict(self, x_t: Tensor, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() or len(x_t) != PAIRS:
            return super()._predict(x_t, *inputs)
        if self.frozen is None:
            self.frozen = super()._predict(x_t, *inputs)
        return self.frozen


def problem(karlo: Karlo, kind: type[DecoderPolicy] = DecoderPolicy) -> tuple[DecoderPolicy, Transitions]:
    """Return a float64 policy, changed since it sampled `PAIRS` transitions; some leave the trust region."""
    policy = make_policy(karlo, lora=True)
    policy.decoder.double()
    policy.__class__ = kind
    condition = Condition(*(f.double() if f.is_floating_point() else f for f in condition_of(karlo, 3)))
    generator = torch.Generator().manual_seed(5)
    image, step = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 2, 3, 4, 4, 1])
    x_t = 0.5 * torch.randn(PAIRS, 3, 8, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        old = policy.replay(x_t, step, condition.select(image))
        for weight in policy.lora.values():
            weight += 0.003 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(x_t.shape, generator=generator, dtype=torch.float64)
    return policy, Transitions(
        x_t=x_t,
        x_p=old.mean + old.sigma * noise,
        mean_old=old.mean,
        sigma_old=old.sigma,
        step=step,
        advantages=torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5, -0.3], dtype=torch.float64),
        condition=condition.select(image),
    )


def gradient(policy: DecoderPolicy) -> Tensor:
    """Return the adapter's gradient as one vector, and clear it."""
    found = torch.cat([weight.grad.flatten() for weight in policy.lora.values()])
    for weight in policy.lora.values():
        weight.grad = None
    return found


def shifted(policy: DecoderPolicy, direction: Tensor) -> Iterator[float]:
    """Shift the adapter by +h and -h along the direction, then restore it; yields h."""
    start = [weight.detach().clone() for weight in policy.lora.values()]
    parts = direction.split([weight.numel() for weight in start])
    for h in (1e-6, -1e-6):
        for weight, origin, part in zip(policy.lora.values(), start, parts, strict=True):
            weight.data = origin + h * part.reshape(origin.shape)
        yield h
    for weight, origin in zip(policy.lora.values(), start, strict=True):
        weight.data = origin


@pytest.mark.parametrize("guidance_gradient", ["both", "conditional"])
@pytest.mark.parametrize("variance", ["frozen", "learned"])
@pytest.mark.parametrize("trust_region", ["kl", "clip"])
def test_objective_gradient_agrees_with_finite_differences(
    karlo: Karlo, trainer_config: TrainerConfig, trust_region: str, variance: str, guidance_gradient: str
) -> None:
    """The gradient is right through decoder, guidance, ratio and the KL to the base."""
    config = with_changes(
        trainer_config,
        objective__trust_region=trust_region,
        objective__variance=variance,
        objective__kl_to_base=0.01,
        objective__max_nats=0.02,
        update__guidance_gradient=guidance_gradient,
    )
    detached = guidance_gradient == "conditional"
    policy, batch = problem(karlo, FrozenUnconditional if detached else DecoderPolicy)
    loss, stats = replay_loss(policy, batch, config)
    assert 0 < stats.masked.sum() < PAIRS, "both masked and unmasked transitions occur"
    loss.backward()
    analytic = gradient(policy)
    generator = torch.Generator().manual_seed(0)
    single = torch.zeros_like(analytic)
    single[analytic.abs().argmax()] = 1.0
    every = torch.randn(analytic.shape, generator=generator, dtype=torch.float64)
    for direction in (single, every, analytic / analytic.norm()):
        ends = {h: replay_loss(policy, batch, config)[0].item() for h in shifted(policy, direction)}
        numeric = (ends[1e-6] - ends[-1e-6]) / 2e-6
        assert numeric == pytest.approx(float(analytic @ direction), rel=1e-6)


def test_variance_and_guidance_options_change_gradient(karlo: Karlo, trainer_config: TrainerConfig) -> None:
    """Every combination of the options gives a different gradient."""
    policy, batch = problem(karlo)
    found = []
    for variance, branches in itertools.product(("frozen", "learned"), ("both", "conditional")):
        config = with_changes(
            trainer_config, objective__variance=variance, update__guidance_gradient=branches
        )
        replay_loss(policy, batch, config)[0].backward()
        found.append(gradient(policy))
    for one, other in itertools.combinations(found, 2):
        assert (one - other).norm() > 1e-2 * one.norm()


@pytest.mark.parametrize("variance", ["frozen", "learned"])
@pytest.mark.parametrize("guidance_gradient", ["both", "conditional"])
def test_micro_batch_gradients_sum_to_whole_gradient(
    karlo: Karlo, trainer_config: TrainerConfig, variance: str, guidance_gradient: str
) -> None:
    """In float64 micro-batches of any size change the gradient by rounding only."""
    config = with_changes(
        trainer_config,
        objective__variance=variance,
        objective__kl_to_base=0.1,
        update__guidance_gradient=guidance_gradient,
    )
    policy, batch = problem(karlo)
    replay_loss(policy, batch, config)[0].backward()
    whole = gradient(policy)
    for size in (1, 4):
        for rows in torch.arange(PAIRS).split(size):
            (replay_loss(policy, batch.select(rows), config)[0] * len(rows) / PAIRS).backward()
        torch.testing.assert_close(gradient(policy), whole, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))


@pytest.mark.parametrize("variance", ["frozen", "learned"])
def test_ratio_of_unchanged_policy_is_exactly_one(
    karlo: Karlo, trainer_config: TrainerConfig, variance: str
) -> None:
    """Equal Gaussians have log ratio 0 and KL 0, without rounding errors."""
    policy, batch = problem(karlo)
    with torch.no_grad():
        now = policy.replay(batch.x_t, batch.step, batch.condition)
    batch = batch._replace(mean_old=now.mean, sigma_old=now.sigma)
    _, stats = replay_loss(policy, batch, with_changes(trainer_config, objective__variance=variance))
    assert (stats.ratio == 1).all()
    assert (stats.kl == 0).all()
    assert (stats.log_sigma_drift == 0).all()


def test_sigma_drift_is_reported_in_both_variance_modes(karlo: Karlo, trainer_config: TrainerConfig) -> None:
    """The drift of the network's sigma is reported against the sampling policy and the base."""
    policy, batch = problem(karlo)
    drifts = []
    for variance in ("frozen", "learned"):
        config = with_changes(trainer_config, objective__variance=variance, objective__kl_to_base=1e-9)
        _, stats = replay_loss(policy, batch, config)
        drifts.append(stats.log_sigma_drift)
        with policy.base(), torch.no_grad():
            base = policy.replay(batch.x_t, batch.step, batch.condition)
        now = policy.replay(batch.x_t, batch.step, batch.condition)
        expected = (now.sigma / base.sigma).log().mean(dim=(1, 2, 3))
        torch.testing.assert_close(stats.log_sigma_drift_base, expected)
    assert torch.equal(*drifts)
    assert (drifts[0] != 0).all()


# ------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_decays_towards_floor(schedule: str) -> None:
    """It starts at the full rate and decreases strictly, without reaching the floor."""
    update = UpdateConfig(learning_rate=2e-3, schedule=schedule, learning_rate_floor=0.1)
    rates = [scheduled_learning_rate(update, iteration, 40) for iteration in range(40)]
    assert rates[0] == 2e-3
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert 2e-4 < rates[-1] < 3.5e-4
    assert rates[20] == pytest.approx(1.1e-3)
    assert scheduled_learning_rate(update, 1000, 40) == pytest.approx(2e-4)


def test_constant_learning_rate_is_constant() -> None:
    """The default schedule does not depend on the iteration."""
    update = UpdateConfig(learning_rate=2e-3)
    assert {scheduled_learning_rate(update, iteration, 7) for iteration in range(7)} == {2e-3}


def test_optimizer_uses_scheduled_learning_rate(karlo_folder: Any, trainer_config: TrainerConfig) -> None:
    """The logged rate is the one applied: AdamW's weight decay alone shrinks the weights by it."""
    config = with_changes(trainer_config, iterations=3, update__schedule="linear", update__weight_decay=0.5)
    _, records = trained(karlo_folder, config)
    assert [record["learning_rate"] for record in records] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])

    class ConstantScorer(FakeScorer):
        def score(self, prompts, images):
            scores = super().score(prompts, images)
            return type(scores)(0 * scores.raw, 0 * scores.z)

    start, _ = trained(karlo_folder, with_changes(config, iterations=1), ConstantScorer())
    decayed, _ = trained(karlo_folder, with_changes(config, iterations=1, update__learning_rate=1e-9))
    for a, b in zip(start.policy.lora.values(), decayed.policy.lora.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_non_finite_gradient_stops_before_the_step(karlo: Karlo) -> None:
    """The adapter does not change, and the message names the settings to lower."""
    policy, _ = problem(karlo)
    before = {name: weight.detach().clone() for name, weight in policy.lora.items()}
    config = UpdateConfig()
    training = TrainingState(policy, MovingAverage(policy, 0.9), None, None, None)  # type: ignore[arg-type]
    for weight in policy.lora.values():
        weight.grad = torch.full_like(weight, torch.nan)
    with pytest.raises(DivergenceError, match=r"lower update\.learning_rate"):
        optimizer_step(training, config)
    assert all(torch.equal(before[name], weight) for name, weight in policy.lora.items())


# ------------------------------------------------------------------------------------------- metrics


def test_iteration_reports_all_diagnostics(karlo_folder: Any, trainer_config: TrainerConfig) -> None:
    """Every diagnostic is present, finite and within the bounds of its definition."""
    config = with_changes(
        trainer_config,
        iterations=2,
        objective__kl_to_base=0.1,
        update__train_steps=(1, 4),
        update__steps_per_image=4,
        update__micro_batch=8,
        update__max_grad_norm=1e-6,
    )
    _, (first, second) = trained(karlo_folder, config)
    assert first["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert first["min_ratio"] <= first["mean_ratio"] <= first["max_ratio"]
    assert first["min_ratio"] < 1 < first["max_ratio"]
    assert first["grad_clip_fraction"] == 1.0
    assert first["grad_norm"] > 1e-6
    assert first["advantage_mean"] == pytest.approx(0, abs=1e-6)
    assert first["advantage_std"] == pytest.approx(1, abs=1e-5)
    assert first["advantage_clip_fraction"] == 0.0
    assert list(first["clamp_fraction_by_step"]) == ["1", "2", "3", "4"]
    assert all(0 <= share <= 1 for share in first["clamp_fraction_by_step"].values())
    assert list(first["approx_kl_by_step"]) == ["1", "2", "3", "4"]
    # a new adapter is the base policy; most transitions are replayed after at least one update
    assert 0 < first["kl_to_base"] < second["kl_to_base"]
    assert abs(second["log_sigma_drift_base"]) > 0
    assert 0 < first["lora_norm"] < second["lora_norm"]
    # x_p is a sample of the Gaussian with that entropy; they differ by chance and a few updates
    assert first["mean_log_prob"] == pytest.approx(-first["entropy"], abs=0.05)
    numbers = [value for record in (first, second) for value in record.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)


def test_kl_to_base_is_absent_without_penalty(karlo_folder: Any, trainer_config: TrainerConfig) -> None:
    """Without a penalty the KL to the base is not computed, so its keys are absent, not 0."""
    _, (record,) = trained(karlo_folder, with_changes(trainer_config, iterations=1))
    assert "kl_to_base" not in record
    assert "log_sigma_drift_base" not in record


def test_lora_norm_is_norm_of_weight_change(karlo: Karlo) -> None:
    """The norm from the factors equals that of the merged difference, with convolutions."""
    from trainer.config import LoraSettings

    policy = make_policy(karlo)
    before = {name: weight.clone() for name, weight in policy.decoder.named_parameters()}
    assert policy.lora_norm() == 0.0
    policy.add_lora(LoraSettings(rank=2, alpha=6, targets=("to_q", "conv1")), seed=0)
    assert policy.lora_norm() == 0.0
    for weight in policy.lora.values():
        torch.nn.init.normal_(weight, std=0.1)
    found = policy.lora_norm()
    policy.decoder.fuse_lora()
    parameters = policy.decoder.named_parameters()
    after = {name.replace(".base_layer", ""): weight for name, weight in parameters}
    change = torch.cat([(after[name] - weight).flatten() for name, weight in before.items()])
    assert found == pytest.approx(float(change.norm()), rel=1e-3)


def test_stratified_steps_are_uniform(trainer_config: TrainerConfig) -> None:
    """Every step is equally likely, even if K does not divide the range, and distinct within an image."""
    config = with_changes(trainer_config, update__train_steps=(1, 4), update__steps_per_image=3)
    steps = stratified_steps(4000, config, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in steps.tolist())
    counts = torch.bincount(steps.flatten(), minlength=5)[1:]
    assert (counts - 3000).abs().max() < 4 * math.sqrt(4000 * 0.75 * 0.25)
