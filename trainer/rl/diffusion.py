"""The unCLIP transition and its density as pure functions, equivalent to diffusers' `UnCLIPScheduler.step`.

| here        | paper             | meaning                                                         |
|-------------|-------------------|-----------------------------------------------------------------|
| x_t, x_p    | x_t, x_p          | latents before and after the denoising step, (N, C, H, W)       |
| eps         | eps hat           | guided noise prediction, (N, C, H, W)                           |
| v           | v                 | the network's variance channels, not clamped, (N, C, H, W)      |
| abar_t      | bar alpha_t       | cumulative product of 1 - beta at timestep t                    |
| beta        | 1 - abar_t/abar_p | noise added between p and t                                     |
| beta_tilde  | tilde beta        | posterior variance, beta (1 - abar_p) / (1 - abar_t)            |
| mean, sigma | mu, sigma         | of the Gaussian of x_p given x_t                                |

Sources: DDPM (Ho et al. 2020) eq. 6-7 and 15; Improved DDPM (Nichol & Dhariwal 2021) eq. 15 for the variance.
Timesteps are strided as in Karlo, tau = round(linspace(0, 999, N)) reversed, so beta spans a whole stride.
All arithmetic is float32 (float64 if the network is) in the scheduler's own order of operations, so that
results agree with it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOG_2PI = 1.8378770664093453


class Schedule(NamedTuple):
    """Coefficients of the S denoising steps of a chain; each field but `timesteps` is float32, (S,)."""

    timesteps: Tensor  # int64, 999 first, 0 last
    sqrt_abar: Tensor  # of t
    sqrt_one_minus_abar: Tensor  # of t
    x0_weight: Tensor  # of clamped x0 in the mean
    x_weight: Tensor  # of x_t in the mean
    log_beta: Tensor  # upper log variance
    log_beta_tilde: Tensor  # lower log variance

    @property
    def steps(self) -> int:
        """Number of denoising steps S."""
        return self.timesteps.shape[0]

    def to(self, device: torch.device) -> "Schedule":
        """Return the same table on another device."""
        return Schedule(*(field.to(device) for field in self))


class Transition(NamedTuple):
    """p(x_p | x_t) = N(mean, sigma^2), diagonal. `sigma` is 0 if the step is deterministic (t = 0)."""

    mean: Tensor  # (N, C, H, W)
    sigma: Tensor  # (N, C, H, W)
    clamp_fraction: Tensor  # (N,), share of x0 that the clamp saturates: no gradient flows there


def make_schedule(betas: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Schedule:
    """Return the coefficients of a chain.

    Args:
        betas: float32, (T,)
        alphas_cumprod: float32, (T,)
        timesteps: int64, (S,), decreasing to 0
    """
    abar_t = alphas_cumprod[timesteps]
    abar_p = torch.cat([abar_t[1:], torch.ones(1)])
    # With a stride of one, use the tabulated beta: 1 - abar_0 has lost three digits to rounding, and the
    # scheduler's last step divides one by the other.
    single = timesteps - torch.cat([timesteps[1:], torch.tensor([-1])]) == 1
    beta = torch.where(single, betas[timesteps], 1 - abar_t / abar_p)
    beta_tilde = (1 - abar_p) / (1 - abar_t) * beta
    return Schedule(
        timesteps=timesteps,
        sqrt_abar=abar_t**0.5,
        sqrt_one_minus_abar=(1 - abar_t) ** 0.5,
        x0_weight=(abar_p**0.5 * beta) / (1 - abar_t),
        x_weight=(1 - beta) ** 0.5 * (1 - abar_p) / (1 - abar_t),
        log_beta=beta.log(),
        log_beta_tilde=beta_tilde.log(),
    )


def guide(eps_unconditional: Tensor, eps_conditional: Tensor, scale: float) -> Tensor:
    """Return the noise prediction under classifier-free guidance, eps_u + w (eps_c - eps_u)."""
    return eps_unconditional + scale * (eps_conditional - eps_unconditional)


def transition(schedule: Schedule, step: Tensor, x_t: Tensor, eps: Tensor, v: Tensor) -> Transition:
    """Return the Gaussian of x_p given x_t at denoising steps `step` (int64, (N,)); x0 is clipped to +-1."""

    def at(table: Tensor) -> Tensor:
        return table[step].reshape(-1, 1, 1, 1)

    # 1. predicted x_0 (DDPM eq. 15), clipped as the scheduler clips it
    x0 = (x_t - at(schedule.sqrt_one_minus_abar) * eps) / at(schedule.sqrt_abar)
    clamp_fraction = (x0.detach().abs() > 1).float().mean(dim=(1, 2, 3))
    x0 = x0.clamp(-1, 1)
    # 2. posterior mean (DDPM eq. 7)
    mean = at(schedule.x0_weight) * x0 + at(schedule.x_weight) * x_t
    # 3. learned-range variance (Improved DDPM eq. 15); the last step is deterministic
    frac = (v + 1) / 2
    last = (step == schedule.steps - 1).reshape(-1, 1, 1, 1)
    log_low = torch.where(
        last, at(schedule.log_beta), at(schedule.log_beta_tilde)
    )  # log 0 would make 0 * inf
    sigma = (0.5 * (frac * at(schedule.log_beta) + (1 - frac) * log_low)).exp()
    return Transition(mean, torch.where(last, 0.0, sigma), clamp_fraction)


def mean_log_prob(x_p: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Return log N(x_p; mean, sigma^2) averaged over the D = C H W dimensions, nats per dimension, (N,)."""
    z = (x_p - mean) / sigma
    return (-0.5 * z.square() - sigma.log() - 0.5 * LOG_2PI).mean(dim=(1, 2, 3))


def log_ratio(x_p: Tensor, mean: Tensor, sigma: Tensor, mean_old: Tensor, sigma_old: Tensor) -> Tensor:
    """Return log p_new(x_p)/p_old(x_p), nats per transition (a sum over D), (N,); 0 if both are equal.

    With z, d = (x_p, mean) - mean_old in units of sigma_old, and s = log sigma_old/sigma:
    s - (e^2s - 1) z^2/2 + e^2s (z d - d^2/2). The difference of two log-probabilities is equal in exact
    arithmetic, but loses the significant digits in float32.
    """
    z = (x_p - mean_old) / sigma_old
    d = (mean - mean_old) / sigma_old
    s = (sigma_old / sigma).log()
    terms = s - torch.expm1(2 * s) * z.square() / 2 + (2 * s).exp() * (z * d - d.square() / 2)
    return terms.sum(dim=(1, 2, 3))


def transition_kl(mean: Tensor, sigma: Tensor, mean_other: Tensor, sigma_other: Tensor) -> Tensor:
    """Return the exact KL(N(mean, sigma^2) || N(mean_other, sigma_other^2)), nats per transition, (N,)."""
    d = (mean - mean_other) / sigma_other
    s = (sigma / sigma_other).log()
    return ((torch.expm1(2 * s) - 2 * s + d.square()) / 2).sum(dim=(1, 2, 3))


def entropy(sigma: Tensor) -> Tensor:
    """Return the entropy of N(., sigma^2) averaged over the D dimensions, nats per dimension, (N,)."""
    return sigma.log().mean(dim=(1, 2, 3)) + 0.5 * (LOG_2PI + 1)


def trainable_steps(steps: int) -> tuple[int, int]:
    """Return the first and last denoising step (inclusive) to train in a chain of `steps` >= 4.

    Step 0 is clamped almost everywhere and unstable elsewhere; the last step is deterministic. The one before
    produces the image itself: its lower variance is almost 0, sigma spans an order of magnitude, and alone it
    would outweigh all others. 25 steps give 1-20, shorter chains the same share.

    Raises:
        ValueError: fewer than 4 steps
    """
    if steps < 4:
        raise ValueError(f"no trainable step among {steps} denoising steps; use at least 4")
    return 1, min(steps - 3, round((steps - 1) * 20 / 24))
