"""One update: the gradient of the whole objective, micro-batches, the learning rate, what is said of it."""

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
from trainer.rl.train import TrainingState, optimizer_step, scheduled_rate, stratified_steps
from trainer.runtime.errors import DivergenceError

PAIRS = 6  # transitions of the small problem below


class FrozenUnconditional(DecoderPolicy):
    """Its unconditional branch stays what it was at first: what "detached" means, for finite differences."""

    frozen: Tensor | None = None

    def _predict(self, x_t: Tensor, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() or len(x_t) != PAIRS:
            return super()._predict(x_t, *inputs)
        if self.frozen is None:
            self.frozen = super()._predict(x_t, *inputs)
        return self.frozen


def problem(karlo: Karlo, kind: type[DecoderPolicy] = DecoderPolicy) -> tuple[DecoderPolicy, Transitions]:
    """A policy in float64 that has moved since it sampled `PAIRS` transitions; some are beyond the region."""
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
    """The adapter's gradient as one vector; cleared."""
    found = torch.cat([weight.grad.flatten() for weight in policy.lora.values()])
    for weight in policy.lora.values():
        weight.grad = None
    return found


def moved(policy: DecoderPolicy, direction: Tensor) -> Iterator[float]:
    """Put the adapter at +h and -h along the direction, and back."""
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
def test_the_gradient_of_the_whole_objective_agrees_with_finite_differences(
    karlo: Karlo, trainer_config: TrainerConfig, trust_region: str, variance: str, guidance_gradient: str
) -> None:
    """From the decoder by way of guidance and ratio to the KL to the base, the objective is ascended."""
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
    loss, seen = replay_loss(policy, batch, config)
    assert 0 < seen.silenced.sum() < PAIRS, "both kinds of transition take part"
    loss.backward()
    analytic = gradient(policy)
    generator = torch.Generator().manual_seed(0)
    single = torch.zeros_like(analytic)
    single[analytic.abs().argmax()] = 1.0
    every = torch.randn(analytic.shape, generator=generator, dtype=torch.float64)
    for direction in (single, every, analytic / analytic.norm()):
        ends = {h: replay_loss(policy, batch, config)[0].item() for h in moved(policy, direction)}
        numeric = (ends[1e-6] - ends[-1e-6]) / 2e-6
        assert numeric == pytest.approx(float(analytic @ direction), rel=1e-6)


def test_only_the_learned_variance_and_both_branches_carry_gradient_where_asked(
    karlo: Karlo, trainer_config: TrainerConfig
) -> None:
    """Each option changes the gradient: none of them is without effect."""
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
def test_micro_batches_add_up_to_the_gradient_of_the_whole(
    karlo: Karlo, trainer_config: TrainerConfig, variance: str, guidance_gradient: str
) -> None:
    """In float64 the micro-batch leaves no trace but rounding, uneven ones included."""
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
def test_the_ratio_is_exactly_one_where_nothing_has_moved(
    karlo: Karlo, trainer_config: TrainerConfig, variance: str
) -> None:
    """Equal Gaussians have log ratio 0 and KL 0, without rounding."""
    policy, batch = problem(karlo)
    with torch.no_grad():
        now = policy.replay(batch.x_t, batch.step, batch.condition)
    batch = batch._replace(mean_old=now.mean, sigma_old=now.sigma)
    _, seen = replay_loss(policy, batch, with_changes(trainer_config, objective__variance=variance))
    assert (seen.ratio == 1).all()
    assert (seen.kl == 0).all()
    assert (seen.log_sigma_drift == 0).all()


def test_the_network_s_sigma_is_watched_in_both_variance_modes(
    karlo: Karlo, trainer_config: TrainerConfig
) -> None:
    """Frozen or learned, what the adapter does to sigma is seen, against the sampling policy and the base."""
    policy, batch = problem(karlo)
    drifts = []
    for variance in ("frozen", "learned"):
        config = with_changes(trainer_config, objective__variance=variance, objective__kl_to_base=1e-9)
        _, seen = replay_loss(policy, batch, config)
        drifts.append(seen.log_sigma_drift)
        with policy.base(), torch.no_grad():
            base = policy.replay(batch.x_t, batch.step, batch.condition)
        now = policy.replay(batch.x_t, batch.step, batch.condition)
        expected = (now.sigma / base.sigma).log().mean(dim=(1, 2, 3))
        torch.testing.assert_close(seen.log_sigma_drift_base, expected)
    assert torch.equal(*drifts)
    assert (drifts[0] != 0).all()


# ------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_falls_from_the_full_rate_towards_the_floor(schedule: str) -> None:
    """It starts at the full rate, falls all the way, and neither reaches nor passes the floor."""
    update = UpdateConfig(learning_rate=2e-3, schedule=schedule, learning_rate_floor=0.1)
    rates = [scheduled_rate(update, iteration, 40) for iteration in range(40)]
    assert rates[0] == 2e-3
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert 2e-4 < rates[-1] < 3.5e-4
    assert rates[20] == pytest.approx(1.1e-3)
    assert scheduled_rate(update, 1000, 40) == pytest.approx(2e-4)


def test_a_constant_rate_is_constant() -> None:
    """The default does not depend on the number of iterations."""
    update = UpdateConfig(learning_rate=2e-3)
    assert {scheduled_rate(update, iteration, 7) for iteration in range(7)} == {2e-3}


def test_the_optimizer_takes_the_scheduled_rate(karlo_folder: Any, trainer_config: TrainerConfig) -> None:
    """What is logged is what was applied: with AdamW's decay alone the weights shrink by just that."""
    config = with_changes(trainer_config, iterations=3, update__schedule="linear", update__weight_decay=0.5)
    _, records = trained(karlo_folder, config)
    assert [record["learning_rate"] for record in records] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])

    class Indifferent(FakeScorer):
        def score(self, prompts, images):
            scores = super().score(prompts, images)
            return type(scores)(0 * scores.raw, 0 * scores.z)

    start, _ = trained(karlo_folder, with_changes(config, iterations=1), Indifferent())
    decayed, _ = trained(karlo_folder, with_changes(config, iterations=1, update__learning_rate=1e-9))
    for a, b in zip(start.policy.lora.values(), decayed.policy.lora.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_a_gradient_that_is_no_number_ends_the_run_before_the_step(karlo: Karlo) -> None:
    """The adapter stays what it was, and the message says what to change."""
    policy, _ = problem(karlo)
    before = {name: weight.detach().clone() for name, weight in policy.lora.items()}
    config = UpdateConfig()
    training = TrainingState(policy, MovingAverage(policy, 0.9), None, None, None)  # type: ignore[arg-type]
    for weight in policy.lora.values():
        weight.grad = torch.full_like(weight, torch.nan)
    with pytest.raises(DivergenceError, match=r"lower update\.learning_rate"):
        optimizer_step(training, config)
    assert all(torch.equal(before[name], weight) for name, weight in policy.lora.items())


# ---------------------------------------------------------------------------------------- the record


def test_an_iteration_says_what_a_practitioner_asks(karlo_folder: Any, trainer_config: TrainerConfig) -> None:
    """Every diagnostic is there, finite and within what its definition allows."""
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
    # an untrained adapter is the base; most transitions are replayed after an update or more
    assert 0 < first["kl_to_base"] < second["kl_to_base"]
    assert abs(second["log_sigma_drift_base"]) > 0
    assert 0 < first["lora_norm"] < second["lora_norm"]
    # x_p was drawn from the Gaussian whose entropy it is; they differ by chance and a few updates
    assert first["mean_log_prob"] == pytest.approx(-first["entropy"], abs=0.05)
    numbers = [value for record in (first, second) for value in record.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)


def test_nothing_is_said_that_was_not_computed(karlo_folder: Any, trainer_config: TrainerConfig) -> None:
    """Without a penalty the base is not run, so there is no KL to it: absent, not 0."""
    _, (record,) = trained(karlo_folder, with_changes(trainer_config, iterations=1))
    assert "kl_to_base" not in record
    assert "log_sigma_drift_base" not in record


def test_the_adapter_s_norm_is_that_of_the_change_of_the_weights(karlo: Karlo) -> None:
    """The norm through two small matrices equals that of the merged difference, convolutions included."""
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


def test_every_denoising_step_is_trained_equally_often(trainer_config: TrainerConfig) -> None:
    """Also where the number of strata does not divide the range, and never twice for one image."""
    config = with_changes(trainer_config, update__train_steps=(1, 4), update__steps_per_image=3)
    steps = stratified_steps(4000, config, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in steps.tolist())
    counts = torch.bincount(steps.flatten(), minlength=5)[1:]
    assert (counts - 3000).abs().max() < 4 * math.sqrt(4000 * 0.75 * 0.25)
