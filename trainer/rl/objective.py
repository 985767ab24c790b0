"""Group-relative advantages and the policy-gradient loss, as pure functions of tensors.

| here        | paper      | meaning                                                                    |
|-------------|------------|----------------------------------------------------------------------------|
| rewards     | r_k        | one column per evaluator, (N, K)                                           |
| group       | g          | index of the image's prompt, int64, (N,)                                   |
| advantages  | A          | one number per image, (N,)                                                 |
| log_ratio   | log rho    | log p_new/p_old of x_p given x_t, nats per transition (a sum over D)       |
| kl          | KL         | of that transition, KL(p_old || p_new), nats                               |
| kl_to_base  | KL_base    | of that transition, KL(p_new || p_base), nats                              |

Sources: GRPO (arXiv 2402.03300) for group-relative advantages; GDPO (arXiv 2601.05242) for normalising each
reward before they are added; PPO (arXiv 1707.06347) eq. 7 for ratio clipping; TRPO (arXiv 1502.05477) for the
direction of the trust region's KL. Departures:

- The standard deviation that rewards are divided by is pooled over groups and averaged over iterations: the
  estimate of a single group of 8 is noisy, and would give groups of near-equal images the same weight as
  others.
- Whitening divides by the root mean square over the batch and subtracts nothing: each group has mean 0.
- The trust region is by default a mask on the exact Gaussian KL rather than a clip of the ratio.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

TrustRegion = Literal["kl", "clip"]

# Prevents overflow of exp() only: within any sensible trust region |log ratio| is far smaller.
MAX_LOG_RATIO = 10.0


class Deviations(NamedTuple):
    """Moving average of the pooled within-group variance of each reward."""

    variance: Tensor  # (K,) float64
    weight: float  # total weight of the observations so far: starts at 0, approaches 1

    @property
    def deviation(self) -> Tensor:
        """Standard deviations (K,), corrected for the average's start at 0."""
        return (self.variance / max(self.weight, 1e-12)).sqrt()


class Advantages(NamedTuple):
    """Advantages of N images and the updated deviations."""

    advantages: Tensor  # (N,) float32; 0 where not kept
    kept: Tensor  # (N,) bool; False for groups in which no weighted reward varies
    dropped_groups: int
    deviations: Deviations  # after this batch


class Loss(NamedTuple):
    """Differentiable loss over M transitions, and diagnostics of each."""

    loss: Tensor  # scalar
    ratio: Tensor  # (M,), no gradient
    masked: Tensor  # (M,) bool: outside the trust region, no gradient


def initial_deviations(rewards: int) -> Deviations:
    """Return the deviations before the first batch, for K rewards."""
    return Deviations(torch.zeros(rewards, dtype=torch.float64), 0.0)


def group_advantages(
    rewards: Tensor, group: Tensor, weights: Tensor, deviations: Deviations, *, momentum: float, clip: float
) -> Advantages:
    """Centre each reward in its group, divide by its pooled deviation, weigh, add, whiten, clip to +-`clip`.

    Adding a constant to one group's rewards, or scaling one reward by a positive factor, changes nothing.

    Args:
        rewards: (N, K)
        group: index of the image's prompt, int64, (N,)
        weights: (K,)
        deviations: moving average before this batch
        momentum: of the moving average
        clip: bound of the absolute advantage

    Raises:
        ValueError: a reward is not finite
    """
    rewards = rewards.double()
    if not rewards.isfinite().all():
        raise ValueError("a reward is not finite")  # its group would seem to have no variance
    _, index, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), rewards.shape[1], dtype=torch.float64).index_add(0, index, rewards)
    centred = rewards - (sums / sizes[:, None])[index]
    # 1. groups in which no weighted reward varies have no signal and must not shrink the deviation
    spread = torch.zeros_like(sums).index_add(0, index, centred.square())
    scale = rewards.abs().amax(dim=0).clamp(min=1e-12)
    varies = ((spread.sqrt() > 1e-9 * scale) & (weights > 0)).any(dim=1)
    kept = varies[index]
    if not kept.any():
        return Advantages(torch.zeros(len(rewards)), kept, len(sizes), deviations)
    # 2. pooled within-group variance of this batch: sum of squares / degrees of freedom
    pooled = spread[varies].sum(dim=0) / (sizes[varies] - 1).sum().clamp(min=1)
    deviations = Deviations(
        momentum * deviations.variance + (1 - momentum) * pooled,
        momentum * deviations.weight + (1 - momentum),
    )
    # 3. weigh in units of the deviation, whiten over the batch, clip
    unit = centred / deviations.deviation.clamp(min=1e-12 * scale)
    advantages = (unit * weights.double()).sum(dim=1) / weights.double().sum()
    advantages = advantages / advantages[kept].square().mean().sqrt().clamp(min=1e-12)
    advantages = torch.where(kept, advantages, 0.0).clamp(-clip, clip).float()
    return Advantages(advantages, kept, int((~varies).sum()), deviations)


def policy_loss(
    log_ratio: Tensor,
    kl: Tensor,
    advantages: Tensor,
    *,
    trust_region: TrustRegion,
    max_nats: float,
    kl_to_base: Tensor | None = None,
    base_penalty: float = 0.0,
) -> Loss:
    """Return the importance-weighted policy-gradient loss over M transitions.

    Args:
        log_ratio: (M,), nats
        kl: (M,), nats
        advantages: (M,)
        trust_region: "kl": the surrogate rho A, masked for a transition whose KL exceeds `max_nats` if the
            gradient would raise it further; "clip": PPO's min(rho A, clip(rho) A), rho clipped to
            exp(+-max_nats)
        max_nats: size of the trust region
        kl_to_base: (M,), nats; its mean is added to the loss
        base_penalty: coefficient of `kl_to_base`
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    masked = _leaves_trust_region(log_ratio.detach(), kl.detach(), advantages, trust_region, max_nats)
    loss = -torch.where(masked, 0.0, ratio * advantages).mean()
    if kl_to_base is not None:
        loss = loss + base_penalty * kl_to_base.mean()
    return Loss(loss, ratio.detach(), masked)


def _leaves_trust_region(
    log_ratio: Tensor, kl: Tensor, advantages: Tensor, trust_region: TrustRegion, max_nats: float
) -> Tensor:
    """Return, bool (M,), which transitions are outside the trust region and would move further out."""
    if trust_region == "clip":
        return (log_ratio.abs() > max_nats) & (log_ratio * advantages > 0)
    # In units of sigma, the gradients of log rho and of the KL with respect to the mean are z - d and d, and
    # their product is log rho - KL: a ratio slightly above 1 may belong to a mean that is already beyond the
    # sampled x_p. (With a learned variance this holds to first order.)
    return (kl > max_nats) & ((log_ratio - kl) * advantages > 0)
