"""Transition and density compared with diffusers' scheduler and torch.distributions."""

import pytest
import torch
from diffusers.schedulers import UnCLIPScheduler

from trainer.rl.diffusion import (
    entropy,
    guide,
    log_ratio,
    make_schedule,
    mean_log_prob,
    trainable_steps,
    transition,
    transition_kl,
)

SHAPE = (3, 3, 4, 4)


def schedule_of(steps: int):
    scheduler = UnCLIPScheduler(variance_type="learned_range")
    scheduler.set_timesteps(steps)
    return scheduler, make_schedule(scheduler.betas, scheduler.alphas_cumprod, scheduler.timesteps)


@pytest.mark.parametrize("steps", [2, 6, 25, 1000])
def test_transition_equals_scheduler_step(steps: int) -> None:
    """Mean plus sigma times the same noise equals UnCLIPScheduler.step, also in the last step."""
    scheduler, schedule = schedule_of(steps)
    torch.manual_seed(0)
    for i in range(0, steps, max(1, steps // 25)):
        for step in {i, steps - 1 - i}:
            x_t, eps, v = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(SHAPE) * 2.4 - 1.2
            noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
            following = scheduler.timesteps[step + 1] if step + 1 < steps else None
            expected = scheduler.step(
                torch.cat([eps, v], dim=1),
                scheduler.timesteps[step],
                x_t,
                prev_timestep=following,
                generator=torch.Generator().manual_seed(step),
            ).prev_sample
            move = transition(schedule, torch.full((3,), step), x_t, eps, v)
            torch.testing.assert_close(move.mean + move.sigma * noise, expected, atol=2e-6, rtol=0)


def test_transition_batches_may_mix_steps() -> None:
    """A replay batch mixes denoising steps; each row equals the row computed alone."""
    _, schedule = schedule_of(6)
    x_t, eps, v = torch.randn(3, *SHAPE)
    steps = torch.tensor([4, 0, 5])
    together = transition(schedule, steps, x_t, eps, v)
    for row in range(3):
        alone = transition(schedule, steps[[row]], x_t[[row]], eps[[row]], v[[row]])
        assert torch.equal(together.mean[[row]], alone.mean)
        assert torch.equal(together.sigma[[row]], alone.sigma)


def test_only_last_step_is_deterministic() -> None:
    """At t = 0 there is no noise, and therefore no log-probability."""
    _, schedule = schedule_of(6)
    x = torch.randn(6, 3, 4, 4)
    sigma = transition(schedule, torch.arange(6), x, x, torch.zeros_like(x)).sigma
    assert (sigma[:5] > 0).all()
    assert (sigma[5] == 0).all()


def test_clamp_fraction_is_share_of_saturated_x0() -> None:
    """The diagnostic equals the share of pixels without gradient."""
    _, schedule = schedule_of(6)
    x_t = torch.randn(1, 3, 4, 4)
    eps = (0.5 * torch.randn_like(x_t)).requires_grad_()
    move = transition(schedule, torch.tensor([3]), 2 * x_t, eps, torch.zeros_like(x_t))
    move.mean.sum().backward()
    assert 0 < move.clamp_fraction.item() < 1
    assert move.clamp_fraction.item() == pytest.approx((eps.grad == 0).float().mean().item())


def test_mean_log_prob_equals_torch_normal() -> None:
    """The mean over dimensions agrees with torch.distributions."""
    x, mean = torch.randn(2, *SHAPE)
    sigma = torch.rand(SHAPE) + 0.1
    expected = torch.distributions.Normal(mean, sigma).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(mean_log_prob(x, mean, sigma), expected)


def two_gaussians(variance: str) -> tuple[torch.Tensor, ...]:
    """Return mean and sigma of a new and an old transition, float64; sigma differs if it is learned."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    sigma_old = torch.rand(old.shape, generator=generator, dtype=torch.float64) + 0.5
    new = old + 0.05 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    change = 0.05 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    return new, sigma_old * change.exp() if variance == "learned" else sigma_old, old, sigma_old


@pytest.mark.parametrize("variance", ["frozen", "learned"])
def test_log_ratio_is_difference_of_log_probs(variance: str) -> None:
    """The log ratio is in nats per transition, D times the mean."""
    new, sigma, old, sigma_old = two_gaussians(variance)
    x = old + sigma_old * torch.randn(5, *old.shape[1:], dtype=torch.float64)
    expected = x[0].numel() * (mean_log_prob(x, new, sigma) - mean_log_prob(x, old, sigma_old))
    torch.testing.assert_close(log_ratio(x, new, sigma, old, sigma_old), expected)


def test_log_ratio_is_accurate_in_float32() -> None:
    """With Karlo's 12,288 dimensions and a small policy change, the error is far below the ratio."""
    torch.manual_seed(0)
    old = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    sigma = 0.05 * torch.ones_like(old)
    new = old + 1e-4 * torch.randn_like(old) * sigma
    x = old + sigma * torch.randn_like(old)
    x, new, old, sigma = (field.float() for field in (x, new, old, sigma))  # as they are stored
    exact = log_ratio(*(field.double() for field in (x, new, sigma, old, sigma)))
    found = log_ratio(x, new, sigma, old, sigma)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("variance", ["frozen", "learned"])
def test_kl_equals_torch_and_sampled_estimate(variance: str) -> None:
    """The trust region's KL is exact: it equals torch's, and the mean log ratio of samples."""
    new, sigma, old, sigma_old = two_gaussians(variance)
    normal = torch.distributions.Normal
    for first, second in (((new, sigma), (old, sigma_old)), ((old, sigma_old), (new, sigma))):
        kl = transition_kl(*first, *second)
        exact = torch.distributions.kl_divergence(normal(*first), normal(*second)).sum()
        torch.testing.assert_close(kl[0], exact)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(20_000, 3, 4, 4, generator=generator, dtype=torch.float64)
        sampled = log_ratio(first[0] + first[1] * noise, *first, *second)
        assert abs(sampled.mean() - kl[0]) < 4 * sampled.std() / 20_000**0.5
        assert sampled.std() / 20_000**0.5 < 0.05 * kl[0]


def test_equal_gaussians_have_zero_log_ratio_and_kl() -> None:
    """Both are exactly 0 for any numbers, as required before the first update."""
    x, mean = torch.randn(2, *SHAPE)
    sigma = torch.rand(SHAPE) + 1e-3
    assert (log_ratio(x, mean, sigma, mean, sigma) == 0).all()
    assert (transition_kl(mean, sigma, mean, sigma) == 0).all()


def test_entropy_equals_torch_normal() -> None:
    """The mean over dimensions agrees with torch.distributions, in nats."""
    sigma = torch.rand(SHAPE) + 0.1
    expected = torch.distributions.Normal(torch.zeros(SHAPE), sigma).entropy().mean(dim=(1, 2, 3))
    torch.testing.assert_close(entropy(sigma), expected)


def test_guidance_scale_one_is_conditional_prediction() -> None:
    """Scale 1 gives the conditional prediction, scale 0 the unconditional one."""
    unconditional, conditional = torch.randn(2, *SHAPE)
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional)
    torch.testing.assert_close(guide(unconditional, conditional, 0.0), unconditional)


@pytest.mark.parametrize("steps", [5, 6, 7, 10, 15, 25])
def test_trainable_steps_have_similar_sensitivity(steps: int) -> None:
    """The same error in eps moves the mean by similar numbers of sigmas, for either bound of the variance."""
    _, schedule = schedule_of(steps)
    first, last = trainable_steps(steps)
    moves = schedule.x0_weight * schedule.sqrt_one_minus_abar / schedule.sqrt_abar
    for log_variance in (schedule.log_beta, schedule.log_beta_tilde):
        sensitivity = (moves / (0.5 * log_variance).exp())[first : last + 1]
        assert sensitivity.max() / sensitivity.min() < 4


def test_trainable_steps_exclude_both_ends() -> None:
    """25 steps train 1-20, shorter chains the same share, never the first or the last two."""
    assert trainable_steps(25) == (1, 20)
    assert trainable_steps(7) == (1, 4)
    for steps in range(4, 60):
        first, last = trainable_steps(steps)
        assert 1 <= first <= last <= steps - 3
    with pytest.raises(ValueError, match="use at least 4"):
        trainable_steps(3)
