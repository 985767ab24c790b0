"""The objective as pure functions of tensors: group-relative advantages and the policy-gradient loss.

| here        | paper      | meaning                                                                    |
|-------------|------------|----------------------------------------------------------------------------|
| rewards     | r_k        | one column per evaluator, (N, K)                                           |
| group       | g          | which images share a prompt, int64, (N,)                                   |
| advantages  | A          | one number per image, (N,)                                                 |
| log_ratio   | log rho    | log p_new/p_old of x_p given x_t, nats per transition (a sum over D)       |
| kl          | KL         | of that transition, new against old, nats                                  |

Sources: GRPO (arXiv 2402.03300) for group-relative advantages; GDPO (arXiv 2601.05242) for normalising each
reward before they are added; PPO (arXiv 1707.06347) eq. 7 for ratio clipping. Departures: the deviation that
rewards are divided by is pooled over groups and averaged over iterations (a group of 8 knows its own poorly),
and the trust region is by default a mask on the exact Gaussian KL rather than a clip of the ratio.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

TrustRegion = Literal["kl", "clip"]

# Guards exp() only: inside any sensible trust region |log ratio| stays far below it.
MAX_LOG_RATIO = 10.0


class Deviations(NamedTuple):
    """Moving average of the pooled within-group variance of each reward."""

    variance: Tensor  # (K,) float64
    weight: float  # total weight of the observations so far: 0 at first, towards 1

    @property
    def deviation(self) -> Tensor:
        """Standard deviations (K,), free of the bias towards the average's start at 0."""
        return (self.variance / max(self.weight, 1e-12)).sqrt()


class Advantages(NamedTuple):
    """What `group_advantages` returns."""

    advantages: Tensor  # (N,) float32; 0 where not kept
    kept: Tensor  # (N,) bool; false for groups in which no weighted reward varies
    dropped_groups: int
    deviations: Deviations  # after this batch


class Loss(NamedTuple):
    """A differentiable loss and what it says about the update, all scalars."""

    loss: Tensor
    approx_kl: Tensor  # mean exact KL, nats per transition
    clip_fraction: Tensor  # share of transitions that the trust region silences
    mean_ratio: Tensor


def no_deviations(rewards: int) -> Deviations:
    """The state before the first batch, for K rewards."""
    return Deviations(torch.zeros(rewards, dtype=torch.float64), 0.0)


def group_advantages(
    rewards: Tensor, group: Tensor, weights: Tensor, deviations: Deviations, *, momentum: float, clip: float
) -> Advantages:
    """Centre each reward in its group, divide by its pooled deviation, weigh, add, whiten, clip to +-`clip`.

    A constant added to one group's rewards, or a positive factor on one reward throughout, changes nothing.
    """
    rewards = rewards.double()
    _, index, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), rewards.shape[1], dtype=torch.float64).index_add(0, index, rewards)
    centred = rewards - (sums / sizes[:, None])[index]
    # 1. groups in which nothing that counts varies teach nothing, and must not shrink the deviation
    spread = torch.zeros_like(sums).index_add(0, index, centred.square())
    scale = rewards.abs().amax(dim=0).clamp(min=1e-12)
    varies = ((spread.sqrt() > 1e-9 * scale) & (weights > 0)).any(dim=1)
    kept = varies[index]
    if not kept.any():
        return Advantages(torch.zeros(len(rewards)), kept, len(sizes), deviations)
    # 2. pooled within-group variance of this batch: sum of squares over degrees of freedom
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
    log_ratio: Tensor, kl: Tensor, advantages: Tensor, *, trust_region: TrustRegion, max_nats: float
) -> Loss:
    """Importance-weighted policy gradient over M transitions; each argument is (M,).

    `kl` region: the surrogate rho A, silenced for a transition whose KL exceeds `max_nats` where the gradient
    would push it further out. `clip` region: PPO's min(rho A, clip(rho) A), rho clipped to exp(+-max_nats).
    """
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    outward = (log_ratio.detach() * advantages) > 0
    beyond = (kl if trust_region == "kl" else log_ratio.abs()).detach() > max_nats
    silenced = beyond & outward
    surrogate = torch.where(silenced, 0.0, ratio * advantages)
    return Loss(
        loss=-surrogate.mean(),
        approx_kl=kl.detach().mean(),
        clip_fraction=silenced.float().mean(),
        mean_ratio=ratio.detach().mean(),
    )
