"""Invariances of the advantages, and gradients at the trust region."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.rl.diffusion import log_ratio, transition_kl
from trainer.rl.objective import Advantages, group_advantages, initial_deviations, policy_loss

GROUP = torch.arange(4).repeat_interleave(6)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def advantages_of(rewards: torch.Tensor, weights: torch.Tensor = WEIGHTS, clip: float = 5.0) -> Advantages:
    start = initial_deviations(rewards.shape[1])
    return group_advantages(rewards, GROUP, weights, start, momentum=0.9, clip=clip)


def some_rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(-100, 100), st.integers(0, 3))
def test_advantages_ignore_constant_added_to_group(seed: int, constant: float, group: int) -> None:
    """A prompt with higher scores throughout gets no larger advantages."""
    rewards = some_rewards(seed)
    shifted = rewards + constant * (group == GROUP)[:, None]
    torch.testing.assert_close(
        advantages_of(shifted).advantages, advantages_of(rewards).advantages, atol=1e-5, rtol=1e-5
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.integers(0, 2))
def test_advantages_ignore_scale_of_a_reward(seed: int, factor: float, reward: int) -> None:
    """An evaluator with a larger scale has no larger influence; only its weight counts."""
    rewards = some_rewards(seed)
    scaled = rewards.clone()
    scaled[:, reward] *= factor
    torch.testing.assert_close(
        advantages_of(scaled).advantages, advantages_of(rewards).advantages, atol=1e-5, rtol=1e-5
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(24)))
def test_advantages_ignore_order_of_images(seed: int, order: list[int]) -> None:
    """An advantage depends neither on the position in the batch nor on the group's number."""
    rewards, numbers = some_rewards(seed), torch.tensor([7, 3, 11, 5])
    shuffled = group_advantages(
        rewards[order], numbers[GROUP[order]], WEIGHTS, initial_deviations(3), momentum=0.9, clip=5.0
    )
    torch.testing.assert_close(
        shuffled.advantages, advantages_of(rewards).advantages[order], atol=1e-5, rtol=1e-5
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 3.0), st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_advantages_are_bounded_centered_and_ordered(seed: int, clip: float, sizes: list[int]) -> None:
    """For one reward and any group sizes: within +-clip, and ordered like the rewards of a group."""
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(group), 1, generator=generator, dtype=torch.float64)
    result = group_advantages(rewards, group, torch.ones(1), initial_deviations(1), momentum=0.9, clip=clip)
    assert result.advantages.abs().max() <= clip
    for g in range(len(sizes)):
        sorted_advantages = result.advantages[group == g][rewards[group == g, 0].argsort()]
        assert (sorted_advantages.diff() >= 0).all()
        if sorted_advantages.abs().max() < clip:
            assert sorted_advantages.mean().abs() < 1e-5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10.0))
def test_advantages_ignore_scale_of_weights(seed: int, factor: float) -> None:
    """Weights are relative."""
    rewards = some_rewards(seed)
    torch.testing.assert_close(
        advantages_of(rewards, factor * WEIGHTS).advantages, advantages_of(rewards).advantages
    )


def test_equal_weights_balance_rewards_of_any_scale() -> None:
    """Two independent rewards of equal weight have equal influence, with scales that differ by 1000."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(4000, 2, generator=generator, dtype=torch.float64) * torch.tensor([1000.0, 1.0])
    group = torch.arange(500).repeat_interleave(8)
    result = group_advantages(rewards, group, torch.ones(2), initial_deviations(2), momentum=0.9, clip=5.0)
    columns = torch.stack([result.advantages.double(), *rewards.T])
    correlation = torch.corrcoef(columns)[0, 1:]
    assert correlation.tolist() == pytest.approx([0.5**0.5] * 2, abs=0.05)


def test_advantages_are_centered_whitened_and_weighted() -> None:
    """Mean 0 in each group, variance 1 over the batch, and no influence of a reward of weight 0."""
    rewards = some_rewards()
    advantages = advantages_of(rewards).advantages
    for group in range(4):
        assert advantages[group == GROUP].mean().abs() < 1e-6
    assert advantages.square().mean() == pytest.approx(1, abs=1e-5)
    weights = torch.tensor([1.0, 0.0, 0.0])
    other = rewards.clone()
    other[:, 1:] = some_rewards(9)[:, 1:]
    assert torch.equal(advantages_of(rewards, weights).advantages, advantages_of(other, weights).advantages)


def test_deviation_is_pooled_within_groups() -> None:
    """Differences between prompts do not affect the denominator."""
    rewards = some_rewards() + 1000.0 * GROUP[:, None]
    pooled = advantages_of(rewards).deviations.deviation
    within = torch.stack([rewards[g == GROUP].var(dim=0) for g in range(4)]).mean(dim=0).sqrt()
    torch.testing.assert_close(pooled, within)


def test_deviation_average_is_unbiased_and_adapts() -> None:
    """After one batch it equals that batch's deviation; after many of another scale it has that scale."""
    rewards = some_rewards()
    result = advantages_of(rewards)
    first = result.deviations.deviation
    for _ in range(100):
        result = group_advantages(3 * rewards, GROUP, WEIGHTS, result.deviations, momentum=0.9, clip=5.0)
    torch.testing.assert_close(result.deviations.deviation, 3 * first, rtol=1e-3, atol=0)


def test_groups_without_variance_are_dropped() -> None:
    """A group with equal rewards is counted, gets advantage 0 and does not shrink the deviation."""
    rewards = some_rewards()
    rewards[GROUP == 1] = 0.3
    result = advantages_of(rewards)
    assert result.dropped_groups == 1
    assert not result.kept[GROUP == 1].any()
    assert (result.advantages[GROUP == 1] == 0).all()
    others = torch.stack([rewards[g == GROUP].var(dim=0) for g in (0, 2, 3)]).mean(dim=0).sqrt()
    torch.testing.assert_close(result.deviations.deviation, others)


def test_non_finite_reward_is_an_error() -> None:
    """NaN would look like a group without variance and be ignored silently."""
    rewards = torch.tensor([[0.0], [float("nan")], [1.0], [2.0]])
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(
            rewards,
            torch.tensor([0, 0, 1, 1]),
            torch.ones(1),
            initial_deviations(1),
            momentum=0.9,
            clip=5.0,
        )


def test_no_group_with_variance_changes_nothing() -> None:
    """Without any variance there is no division by zero and no change of the deviations."""
    start = initial_deviations(3)
    result = group_advantages(torch.ones(24, 3), GROUP, WEIGHTS, start, momentum=0.9, clip=5.0)
    assert result.dropped_groups == 4
    assert (result.advantages == 0).all()
    assert result.deviations is start


def test_advantages_are_clipped() -> None:
    """An outlier image cannot dominate an update."""
    rewards = torch.zeros(24, 3, dtype=torch.float64)
    rewards[0] = 100.0
    advantages = advantages_of(rewards, clip=1.5).advantages
    assert advantages.max() == 1.5


def gradient_of(log_ratio: list[float], advantages: list[float], **options: object) -> torch.Tensor:
    x = torch.tensor(log_ratio, requires_grad=True)
    kl = torch.tensor(options.pop("kl", [0.0] * len(log_ratio)))
    policy_loss(x, kl, torch.tensor(advantages), **options).loss.backward()
    assert x.grad is not None
    return x.grad


def test_gradient_at_ratio_one_is_minus_advantage() -> None:
    """At ratio 1 the loss is the plain policy gradient, for either trust region."""
    for region in ("kl", "clip"):
        gradient = gradient_of([0.0, 0.0], [1.0, -3.0], trust_region=region, max_nats=0.5)
        torch.testing.assert_close(gradient, torch.tensor([-0.5, 1.5]))


def test_clip_region_equals_ppo_clipping() -> None:
    """Masking outward transitions gives exactly the gradient of PPO's min of clipped and unclipped."""
    torch.manual_seed(0)
    x = torch.randn(64, requires_grad=True)
    advantages = torch.randn(64)
    ratio, bound = x.exp(), torch.tensor(0.5)
    ppo = -torch.min(ratio * advantages, ratio.clamp((-bound).exp(), bound.exp()) * advantages).mean()
    (expected,) = torch.autograd.grad(ppo, x)
    loss = policy_loss(x, torch.zeros(64), advantages, trust_region="clip", max_nats=0.5).loss
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 100_000), st.sampled_from([-1.0, 1.0]), st.floats(0.01, 3.0))
def test_kl_region_masks_transitions_that_would_raise_kl(seed: int, advantage: float, reach: float) -> None:
    """Beyond the limit a transition may return but not move further; verified by a small step of its mean."""
    generator = torch.Generator().manual_seed(seed)
    old, noise, direction = torch.randn(3, 1, 1, 3, 3, generator=generator, dtype=torch.float64)
    sigma = torch.full_like(old, 0.7)
    mean = (old + sigma * reach * direction / direction.norm()).requires_grad_()
    x_p = old + sigma * noise
    nats = log_ratio(x_p, mean, sigma, old, sigma)
    kl = transition_kl(old, sigma, mean, sigma)
    (upwards,) = torch.autograd.grad(advantage * nats.sum(), mean)
    after = transition_kl(old, sigma, mean + 1e-7 * upwards, sigma)
    rising = after - kl
    if rising.abs() < 1e-10 * reach:  # moves along the boundary
        return
    masked = policy_loss(nats, kl, torch.tensor([advantage]), trust_region="kl", max_nats=1e-6).masked
    assert bool(masked) == bool(rising > 0)


def test_kl_region_masks_nothing_inside() -> None:
    """Only the KL is limited: a large ratio within the limit keeps its gradient."""
    for kl, masked in ((0.49, False), (0.51, True)):
        gradient = gradient_of([2.0], [1.0], kl=[kl], trust_region="kl", max_nats=0.5)
        assert (gradient == 0).item() == masked


def test_base_penalty_adds_weighted_mean_kl() -> None:
    """The penalty adds its coefficient times the mean KL to the loss, with the matching gradient."""
    base = torch.tensor([1.0, 3.0], requires_grad=True)
    options: dict = {"trust_region": "kl", "max_nats": 0.5}
    zeros = torch.zeros(2)
    plain = policy_loss(zeros, zeros, torch.tensor([1.0, -2.0]), **options).loss
    loss = policy_loss(
        zeros, zeros, torch.tensor([1.0, -2.0]), kl_to_base=base, base_penalty=0.1, **options
    ).loss
    assert (loss - plain).item() == pytest.approx(0.2)
    loss.backward()
    assert base.grad is not None
    torch.testing.assert_close(base.grad, torch.tensor([0.05, 0.05]))


def test_loss_gradient_agrees_with_finite_differences() -> None:
    """Autograd's gradient of the surrogate agrees with finite differences."""
    x = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return policy_loss(value, value.detach() ** 2, advantages, trust_region="kl", max_nats=0.5).loss

    assert torch.autograd.gradcheck(loss, (x,))
