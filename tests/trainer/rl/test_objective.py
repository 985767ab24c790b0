"""Invariances of the advantages and the shape of the trust region."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.rl.diffusion import log_ratio, transition_kl
from trainer.rl.objective import Advantages, group_advantages, no_deviations, policy_loss

GROUP = torch.arange(4).repeat_interleave(6)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def advantages_of(rewards: torch.Tensor, weights: torch.Tensor = WEIGHTS, clip: float = 5.0) -> Advantages:
    start = no_deviations(rewards.shape[1])
    return group_advantages(rewards, GROUP, weights, start, momentum=0.9, clip=clip)


def some_rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(-100, 100), st.integers(0, 3))
def test_a_constant_added_to_a_group_changes_nothing(seed: int, constant: float, group: int) -> None:
    """A prompt that is easier for an evaluator is not thereby better drawn."""
    rewards = some_rewards(seed)
    shifted = rewards + constant * (group == GROUP)[:, None]
    torch.testing.assert_close(
        advantages_of(shifted).advantages, advantages_of(rewards).advantages, atol=1e-5, rtol=1e-5
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.integers(0, 2))
def test_scaling_one_reward_changes_nothing(seed: int, factor: float, reward: int) -> None:
    """Weights are weights: an evaluator on a larger scale counts no more."""
    rewards = some_rewards(seed)
    scaled = rewards.clone()
    scaled[:, reward] *= factor
    torch.testing.assert_close(
        advantages_of(scaled).advantages, advantages_of(rewards).advantages, atol=1e-5, rtol=1e-5
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(24)))
def test_the_order_of_the_images_changes_nothing(seed: int, order: list[int]) -> None:
    """An image's advantage is its own, wherever in the batch it stands and whatever its group is called."""
    rewards, names = some_rewards(seed), torch.tensor([7, 3, 11, 5])
    shuffled = group_advantages(
        rewards[order], names[GROUP[order]], WEIGHTS, no_deviations(3), momentum=0.9, clip=5.0
    )
    torch.testing.assert_close(
        shuffled.advantages, advantages_of(rewards).advantages[order], atol=1e-5, rtol=1e-5
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 3.0), st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_advantages_are_bounded_centred_and_ordered_as_the_reward(
    seed: int, clip: float, sizes: list[int]
) -> None:
    """For one reward and groups of any size: within +-clip, and the better image of a group never less."""
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(group), 1, generator=generator, dtype=torch.float64)
    result = group_advantages(rewards, group, torch.ones(1), no_deviations(1), momentum=0.9, clip=clip)
    assert result.advantages.abs().max() <= clip
    for g in range(len(sizes)):
        mine = result.advantages[group == g][rewards[group == g, 0].argsort()]
        assert (mine.diff() >= 0).all()
        if mine.abs().max() < clip:
            assert mine.mean().abs() < 1e-5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10.0))
def test_scaling_all_weights_changes_nothing(seed: int, factor: float) -> None:
    """Weights are shares."""
    rewards = some_rewards(seed)
    torch.testing.assert_close(
        advantages_of(rewards, factor * WEIGHTS).advantages, advantages_of(rewards).advantages
    )


def test_equal_weights_balance_rewards_of_any_scale_and_noise() -> None:
    """Two independent rewards of equal weight have an equal say, with scales a thousandfold apart."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(4000, 2, generator=generator, dtype=torch.float64) * torch.tensor([1000.0, 1.0])
    group = torch.arange(500).repeat_interleave(8)
    result = group_advantages(rewards, group, torch.ones(2), no_deviations(2), momentum=0.9, clip=5.0)
    columns = torch.stack([result.advantages.double(), *rewards.T])
    correlation = torch.corrcoef(columns)[0, 1:]
    assert correlation.tolist() == pytest.approx([0.5**0.5] * 2, abs=0.05)


def test_advantages_are_centred_whitened_and_follow_the_weights() -> None:
    """Mean 0 in each group, variance 1 over the batch, and a reward of weight 0 has no say."""
    rewards = some_rewards()
    advantages = advantages_of(rewards).advantages
    for group in range(4):
        assert advantages[group == GROUP].mean().abs() < 1e-6
    assert advantages.square().mean() == pytest.approx(1, abs=1e-5)
    silent = torch.tensor([1.0, 0.0, 0.0])
    other = rewards.clone()
    other[:, 1:] = some_rewards(9)[:, 1:]
    assert torch.equal(advantages_of(rewards, silent).advantages, advantages_of(other, silent).advantages)


def test_the_deviation_is_pooled_within_groups() -> None:
    """Differences between prompts are no part of the denominator: a group far off leaves it as it is."""
    rewards = some_rewards() + 1000.0 * GROUP[:, None]
    pooled = advantages_of(rewards).deviations.deviation
    within = torch.stack([rewards[g == GROUP].var(dim=0) for g in range(4)]).mean(dim=0).sqrt()
    torch.testing.assert_close(pooled, within)


def test_the_moving_average_starts_without_bias_and_forgets() -> None:
    """After one batch the deviation is that batch's; after many of another scale it is that scale."""
    rewards = some_rewards()
    result = advantages_of(rewards)
    first = result.deviations.deviation
    for _ in range(100):
        result = group_advantages(3 * rewards, GROUP, WEIGHTS, result.deviations, momentum=0.9, clip=5.0)
    torch.testing.assert_close(result.deviations.deviation, 3 * first, rtol=1e-3, atol=0)


def test_groups_without_variance_are_dropped_and_counted() -> None:
    """A group in which all rewards are equal teaches nothing and does not shrink the deviation."""
    rewards = some_rewards()
    rewards[GROUP == 1] = 0.3
    result = advantages_of(rewards)
    assert result.dropped_groups == 1
    assert not result.kept[GROUP == 1].any()
    assert (result.advantages[GROUP == 1] == 0).all()
    others = torch.stack([rewards[g == GROUP].var(dim=0) for g in (0, 2, 3)]).mean(dim=0).sqrt()
    torch.testing.assert_close(result.deviations.deviation, others)


def test_a_reward_that_is_no_number_is_an_error() -> None:
    """It would compare as a group without variance, and be passed over in silence."""
    rewards = torch.tensor([[0.0], [float("nan")], [1.0], [2.0]])
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(
            rewards,
            torch.tensor([0, 0, 1, 1]),
            torch.ones(1),
            no_deviations(1),
            momentum=0.9,
            clip=5.0,
        )


def test_all_groups_without_variance_leave_everything_as_it_was() -> None:
    """No division by zero and no update where there is nothing to learn."""
    start = no_deviations(3)
    result = group_advantages(torch.ones(24, 3), GROUP, WEIGHTS, start, momentum=0.9, clip=5.0)
    assert result.dropped_groups == 4
    assert (result.advantages == 0).all()
    assert result.deviations is start


def test_advantages_are_clipped() -> None:
    """One extraordinary image cannot dominate an update."""
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


def test_before_the_first_update_the_gradient_is_minus_the_advantage() -> None:
    """At ratio 1 the loss is the plain policy gradient, whatever the trust region."""
    for region in ("kl", "clip"):
        gradient = gradient_of([0.0, 0.0], [1.0, -3.0], trust_region=region, max_nats=0.5)
        torch.testing.assert_close(gradient, torch.tensor([-0.5, 1.5]))


def test_clip_region_equals_ppo() -> None:
    """Silencing outward transitions has exactly the gradient of PPO's min of clipped and unclipped."""
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
def test_kl_region_silences_exactly_what_would_raise_the_kl_further(
    seed: int, advantage: float, reach: float
) -> None:
    """Beyond the limit a transition may come back but not go on: checked by a small step of its mean."""
    generator = torch.Generator().manual_seed(seed)
    old, noise, way = torch.randn(3, 1, 1, 3, 3, generator=generator, dtype=torch.float64)
    sigma = torch.full_like(old, 0.7)
    mean = (old + sigma * reach * way / way.norm()).requires_grad_()
    x_p = old + sigma * noise
    nats = log_ratio(x_p, mean, sigma, old, sigma)
    kl = transition_kl(old, sigma, mean, sigma)
    (upwards,) = torch.autograd.grad(advantage * nats.sum(), mean)
    after = transition_kl(old, sigma, mean + 1e-7 * upwards, sigma)
    rising = after - kl
    if rising.abs() < 1e-10 * reach:  # along the region's edge
        return
    silenced = policy_loss(nats, kl, torch.tensor([advantage]), trust_region="kl", max_nats=1e-6).silenced
    assert bool(silenced) == bool(rising > 0)


def test_within_the_kl_region_nothing_is_silenced() -> None:
    """The limit is the KL alone: a large ratio within it keeps its gradient."""
    for kl, silenced in ((0.49, False), (0.51, True)):
        gradient = gradient_of([2.0], [1.0], kl=[kl], trust_region="kl", max_nats=0.5)
        assert (gradient == 0).item() == silenced


def test_the_penalty_is_the_mean_kl_to_the_base_in_its_weight() -> None:
    """Loss and gradient of the penalty, beside the surrogate."""
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


def test_the_loss_gradient_agrees_with_finite_differences() -> None:
    """The formula that is differentiated is the one that is written."""
    x = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return policy_loss(value, value.detach() ** 2, advantages, trust_region="kl", max_nats=0.5).loss

    assert torch.autograd.gradcheck(loss, (x,))
