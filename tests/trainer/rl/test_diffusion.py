"""The transition against diffusers' scheduler and against torch.distributions."""

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
def test_every_step_equals_the_scheduler(steps: int) -> None:
    """Mean plus sigma times the same noise is what UnCLIPScheduler.step returns, also in the last step."""
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


def test_rows_of_a_batch_may_be_at_different_steps() -> None:
    """A replay batch mixes denoising steps; each row is computed as if it were alone."""
    _, schedule = schedule_of(6)
    x_t, eps, v = torch.randn(3, *SHAPE)
    steps = torch.tensor([4, 0, 5])
    together = transition(schedule, steps, x_t, eps, v)
    for row in range(3):
        alone = transition(schedule, steps[[row]], x_t[[row]], eps[[row]], v[[row]])
        assert torch.equal(together.mean[[row]], alone.mean)
        assert torch.equal(together.sigma[[row]], alone.sigma)


def test_the_last_step_is_deterministic_and_only_it() -> None:
    """At t = 0 there is no noise and so no log-probability."""
    _, schedule = schedule_of(6)
    x = torch.randn(6, 3, 4, 4)
    sigma = transition(schedule, torch.arange(6), x, x, torch.zeros_like(x)).sigma
    assert (sigma[:5] > 0).all()
    assert (sigma[5] == 0).all()


def test_clamp_fraction_counts_saturated_x0() -> None:
    """The diagnostic is the share of pixels that carry no gradient."""
    _, schedule = schedule_of(6)
    x_t = torch.randn(1, 3, 4, 4)
    eps = (0.5 * torch.randn_like(x_t)).requires_grad_()
    move = transition(schedule, torch.tensor([3]), 2 * x_t, eps, torch.zeros_like(x_t))
    move.mean.sum().backward()
    assert 0 < move.clamp_fraction.item() < 1
    assert move.clamp_fraction.item() == pytest.approx((eps.grad == 0).float().mean().item())


def test_mean_log_prob_is_the_normal_density_averaged() -> None:
    """A mean is called a mean, and agrees with torch.distributions."""
    x, mean = torch.randn(2, *SHAPE)
    sigma = torch.rand(SHAPE) + 0.1
    expected = torch.distributions.Normal(mean, sigma).log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(mean_log_prob(x, mean, sigma), expected)


def two_gaussians(variance: str) -> tuple[torch.Tensor, ...]:
    """Mean and sigma of a new and an old transition, float64; sigma differs where the variance is learned."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64)
    sigma_old = torch.rand(old.shape, generator=generator, dtype=torch.float64) + 0.5
    new = old + 0.05 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    change = 0.05 * torch.randn(old.shape, generator=generator, dtype=torch.float64)
    return new, sigma_old * change.exp() if variance == "learned" else sigma_old, old, sigma_old


@pytest.mark.parametrize("variance", ["frozen", "learned"])
def test_log_ratio_is_the_difference_of_log_probs_in_nats(variance: str) -> None:
    """The trust region's unit is nats per transition: D times the mean."""
    new, sigma, old, sigma_old = two_gaussians(variance)
    x = old + sigma_old * torch.randn(5, *old.shape[1:], dtype=torch.float64)
    expected = x[0].numel() * (mean_log_prob(x, new, sigma) - mean_log_prob(x, old, sigma_old))
    torch.testing.assert_close(log_ratio(x, new, sigma, old, sigma_old), expected)


def test_log_ratio_keeps_its_digits_in_float32() -> None:
    """At Karlo's 12,288 dimensions and a policy that has barely moved, the error is far below the ratio."""
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
def test_closed_form_kl_equals_torch_and_the_sampled_estimate(variance: str) -> None:
    """The trust region's KL is exact: equal to torch's, and to the mean log ratio of samples."""
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


def test_equal_gaussians_have_no_ratio_and_no_kl() -> None:
    """Exactly 0, whatever the numbers: before the first update nothing may look like a change."""
    x, mean = torch.randn(2, *SHAPE)
    sigma = torch.rand(SHAPE) + 1e-3
    assert (log_ratio(x, mean, sigma, mean, sigma) == 0).all()
    assert (transition_kl(mean, sigma, mean, sigma) == 0).all()


def test_entropy_is_the_normal_s_averaged() -> None:
    """In nats per dimension, as torch has it."""
    sigma = torch.rand(SHAPE) + 0.1
    expected = torch.distributions.Normal(torch.zeros(SHAPE), sigma).entropy().mean(dim=(1, 2, 3))
    torch.testing.assert_close(entropy(sigma), expected)


def test_guidance_of_one_is_the_conditional_prediction() -> None:
    """Scale 1 leaves the conditional prediction, scale 0 the unconditional one."""
    empty, told = torch.randn(2, *SHAPE)
    torch.testing.assert_close(guide(empty, told, 1.0), told)
    torch.testing.assert_close(guide(empty, told, 0.0), empty)


@pytest.mark.parametrize("steps", [5, 6, 7, 10, 15, 25])
def test_no_trainable_step_outweighs_the_others(steps: int) -> None:
    """The same error in eps moves the mean by like numbers of sigmas, whatever the variance head says."""
    _, schedule = schedule_of(steps)
    first, last = trainable_steps(steps)
    moves = schedule.x0_weight * schedule.sqrt_one_minus_abar / schedule.sqrt_abar
    for log_variance in (schedule.log_beta, schedule.log_beta_tilde):
        sensitivity = (moves / (0.5 * log_variance).exp())[first : last + 1]
        assert sensitivity.max() / sensitivity.min() < 4


def test_trainable_steps_leave_out_the_ends() -> None:
    """25 steps train 1-20 as measured; shorter chains the same share, never the first or the last two."""
    assert trainable_steps(25) == (1, 20)
    assert trainable_steps(7) == (1, 4)
    for steps in range(4, 60):
        first, last = trainable_steps(steps)
        assert 1 <= first <= last <= steps - 3
    with pytest.raises(ValueError, match="at least 4"):
        trainable_steps(3)
