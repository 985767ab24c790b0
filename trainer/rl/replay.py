"""Replay of stored transitions under the current policy: loss and diagnostics.

An iteration's record in metrics.jsonl contains these diagnostics, among others:

| key                  | meaning                                                                             |
|----------------------|-------------------------------------------------------------------------------------|
| first_ratio          | before the first optimizer step, the ratio furthest from 1; 1 if replay = sampling  |
| approx_kl            | mean exact KL(sampling policy, policy), nats per transition                         |
| kl_to_base           | mean exact KL(policy, base), nats per transition; only if it is penalised           |
| clip_fraction        | share of transitions that the trust region masks                                    |
| entropy              | of the sampled transitions at the trained steps, nats per dimension                 |
| mean_log_prob        | of the sampled x_p under the policy, nats per dimension                             |
| log_sigma_drift      | mean log sigma/sigma_old, of the network's sigma against the sampling policy's      |
| log_sigma_drift_base | the same against the base policy's; only if kl_to_base is penalised                 |
| clamp_fraction       | share of predicted x0 that saturates, which has gradient 0                          |
| grad_norm            | mean over updates, before clipping; grad_clip_fraction: the share that was clipped  |
| lora_norm            | Frobenius norm of the change of the decoder's weights                               |

The first sampling policy is the base policy, so in either variance mode the change of `entropy` over a run is
the drift of log sigma against the base. Every number is the mean over transitions (or images, or updates),
independent of the micro-batches.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.config import TrainerConfig
from trainer.rl.diffusion import Transition, log_ratio, mean_log_prob, transition_kl
from trainer.rl.karlo import Condition
from trainer.rl.objective import Advantages, Loss, policy_loss
from trainer.rl.policy import DecoderPolicy
from trainer.rl.rewards import Floats, composite
from trainer.rl.rollout import PooledRollout, Rollout
from trainer.runtime.distributed import Processes

Record = dict[str, object]  # one line of metrics.jsonl


# -------------------------------------------------------------------------------------- transitions


class Transitions(NamedTuple):
    """Training data of an update: M pairs of an image and one of its denoising steps."""

    x_t: Tensor  # (M, C, H, W)
    x_p: Tensor  # (M, C, H, W)
    mean_old: Tensor  # (M, C, H, W) of the policy that sampled
    sigma_old: Tensor  # (M, C, H, W) of the policy that sampled
    step: Tensor  # (M,) int64
    advantages: Tensor  # (M,)
    condition: Condition  # M rows

    def select(self, rows: Tensor) -> "Transitions":
        """Return these pairs (int64 index)."""
        return Transitions(
            self.x_t[rows],
            self.x_p[rows],
            self.mean_old[rows],
            self.sigma_old[rows],
            self.step[rows],
            self.advantages[rows],
            self.condition.select(rows),
        )


def select_transitions(rollout: Rollout, images: Tensor, steps: Tensor, advantages: Tensor) -> Transitions:
    """Return the transitions of some images at some of their denoising steps, M = n K, image by image.

    Args:
        rollout: N images
        images: rows of the rollout, int64, (n,)
        steps: denoising steps of each, int64, (n, K)
        advantages: (N,)
    """
    image = images.repeat_interleave(steps.shape[1])
    step = steps.flatten()
    trajectory = rollout.trajectory
    device = trajectory.latents.device
    image, step = image.to(device), step.to(device)
    return Transitions(
        x_t=trajectory.latents[image, step],
        x_p=trajectory.latents[image, step + 1],
        mean_old=trajectory.means[image, step],
        sigma_old=trajectory.sigmas[image, step],
        step=step,
        advantages=advantages.to(device)[image],
        condition=rollout.condition.select(image),
    )


# ------------------------------------------------------------------------------------------- replay


class ReplayStats(NamedTuple):
    """Diagnostics of M replayed transitions; each field (M,), without gradient, NaN if not computed."""

    ratio: Tensor
    kl: Tensor  # KL(p_old || p_new), nats
    masked: Tensor  # bool
    mean_log_prob: Tensor  # nats per dimension
    log_sigma_drift: Tensor
    kl_to_base: Tensor  # nats
    log_sigma_drift_base: Tensor
    step: Tensor  # int64
    update: Tensor  # int64, index of the optimizer step within the iteration

    def table(self) -> Tensor:
        """Return the fields as the columns of one float32 table (M, F)."""
        return torch.stack([field.float() for field in self], dim=1)


def recomputes_old_policy(config: TrainerConfig) -> bool:
    """Return whether the old mean and sigma come from a replay rather than from sampling."""
    setting = config.update.recompute_old
    return config.policy_precision != "float32" if setting is None else setting


def recompute_old_policy(
    policy: DecoderPolicy, transitions: Transitions, batches: Sequence[Tensor], config: TrainerConfig
) -> Transitions:
    """Return the transitions with old mean and sigma recomputed for the rows of `batches`.

    In half precision a network's output depends on the other rows of the batch, by more than a small update
    changes it. The replay therefore uses the same micro-batches as the update, with gradient, so that the
    same kernels run.
    """
    mean, sigma = transitions.mean_old.clone(), transitions.sigma_old.clone()
    for rows in batches:
        batch = transitions.select(rows)
        move = policy.replay(batch.x_t, batch.step, batch.condition, config.update.guidance_gradient)
        mean[rows], sigma[rows] = move.mean.detach(), move.sigma.detach()
    return transitions._replace(mean_old=mean, sigma_old=sigma)


def replay_loss(
    policy: DecoderPolicy, batch: Transitions, config: TrainerConfig, *, on_policy: bool = False
) -> tuple[Tensor, ReplayStats]:
    """Return the loss of M transitions under the current policy, and its diagnostics.

    Args:
        policy: the current policy
        batch: M transitions
        config: settings `trainer.objective` and `trainer.update`
        on_policy: use this replay itself as the old policy: the ratio is exactly 1, with its gradient

    Returns:
        the loss, a scalar that is differentiable in the adapter, and the diagnostics
    """
    objective = config.objective
    base = None
    if objective.kl_to_base > 0:  # first, before activations are kept for the backward pass
        with torch.no_grad(), policy.base():
            base = policy.replay(batch.x_t, batch.step, batch.condition)
    move = policy.replay(batch.x_t, batch.step, batch.condition, config.update.guidance_gradient)
    if on_policy:
        batch = batch._replace(mean_old=move.mean.detach(), sigma_old=move.sigma.detach())
    learned = objective.variance == "learned"
    sigma = move.sigma if learned else batch.sigma_old
    nats = log_ratio(batch.x_p, move.mean, sigma, batch.mean_old, batch.sigma_old)
    kl = transition_kl(batch.mean_old, batch.sigma_old, move.mean, sigma)
    kl_to_base = None
    if base is not None:
        kl_to_base = transition_kl(move.mean, sigma, base.mean, base.sigma if learned else sigma)
    loss = policy_loss(
        nats,
        kl,
        batch.advantages,
        trust_region=objective.trust_region,
        max_nats=objective.max_nats,
        kl_to_base=kl_to_base,
        base_penalty=objective.kl_to_base,
    )
    return loss.loss, _replay_stats(loss, batch, move, sigma, base, kl, kl_to_base)


@torch.no_grad()
def _replay_stats(
    loss: Loss,
    batch: Transitions,
    move: Transition,
    sigma: Tensor,
    base: Transition | None,
    kl: Tensor,
    kl_to_base: Tensor | None,
) -> ReplayStats:
    log_sigma = move.sigma.log().mean(dim=(1, 2, 3))
    not_computed = torch.full_like(log_sigma, torch.nan)
    drift_base = not_computed if base is None else log_sigma - base.sigma.log().mean(dim=(1, 2, 3))
    return ReplayStats(
        ratio=loss.ratio,
        kl=kl.detach(),
        masked=loss.masked,
        mean_log_prob=mean_log_prob(batch.x_p, move.mean, sigma),
        log_sigma_drift=log_sigma - batch.sigma_old.log().mean(dim=(1, 2, 3)),
        kl_to_base=not_computed if kl_to_base is None else kl_to_base.detach(),
        log_sigma_drift_base=drift_base,
        step=batch.step,
        update=torch.zeros_like(batch.step),
    )


def gather_replay_stats(stats: Sequence[ReplayStats], processes: Processes) -> dict[str, Floats]:
    """Return the micro-batches of all processes as columns by name, copied from the device once."""
    tables = [np.empty((0, len(ReplayStats._fields))), *(micro.table().cpu().numpy() for micro in stats)]
    rows = np.concatenate(processes.gather_rows(np.concatenate(tables))).astype(np.float64)
    return dict(zip(ReplayStats._fields, rows.T, strict=True))


# ------------------------------------------------------------------------------------------ records


def rollout_record(
    pool: PooledRollout, evaluators: Sequence[str], weights: Mapping[str, float], steps: tuple[int, int]
) -> Record:
    """Return scores, times, and saturation and entropy of the trained steps (first and last)."""
    trained = slice(steps[0], steps[1] + 1)
    clamp_fraction = pool.clamp_fraction[:, trained].mean(axis=0).tolist()
    return {
        "composite": float(composite(pool.scores.z, evaluators, weights).mean()),
        "z": _column_means(pool.scores.z, evaluators),
        "raw": _column_means(pool.scores.raw, evaluators),
        "images": len(pool.group),
        "dropped_groups": pool.dropped_groups,
        "clamp_fraction": float(pool.clamp_fraction.mean()),
        "clamp_fraction_by_step": {str(steps[0] + i): share for i, share in enumerate(clamp_fraction)},
        "entropy": float(pool.entropy[:, trained].mean()),
        "draw_s": pool.times.sample_s,
        "score_s": pool.times.score_s,
        "hidden_wait_s": pool.times.hidden_wait_s,
        "exposed_wait_s": pool.times.exposed_wait_s,
    }


def advantage_record(result: Advantages, evaluators: Sequence[str], clip: float) -> Record:
    """Return the deviations, and the moments of the advantages of kept groups."""
    kept = result.advantages[result.kept]
    record: Record = {
        "zero_variance_groups": result.dropped_groups,
        "deviation": dict(zip(evaluators, result.deviations.deviation.tolist(), strict=True)),
    }
    if len(kept):
        record |= {
            "advantage_mean": float(kept.mean()),
            "advantage_std": float(kept.std(correction=0)),
            "advantage_clip_fraction": float((kept.abs() >= clip).float().mean()),
        }
    return record


def update_record(stats: Mapping[str, Floats], norms: Sequence[float], max_norm: float) -> Record:
    """Return the diagnostics of all replayed transitions and of the gradient norms, one per update."""
    ratio, kl, step = stats["ratio"], stats["kl"], stats["step"]
    first = ratio[stats["update"] == 0]
    record: Record = {
        "updates": len(norms),
        "first_ratio": float(first[np.abs(first - 1).argmax()]),
        "mean_ratio": float(ratio.mean()),
        "min_ratio": float(ratio.min()),
        "max_ratio": float(ratio.max()),
        "approx_kl": float(kl.mean()),
        "approx_kl_by_step": {str(int(it)): float(kl[step == it].mean()) for it in np.unique(step)},
        "clip_fraction": float(stats["masked"].mean()),
        "mean_log_prob": float(stats["mean_log_prob"].mean()),
        "log_sigma_drift": float(stats["log_sigma_drift"].mean()),
        "grad_norm": float(np.mean(norms)),
        "grad_clip_fraction": float(np.mean(np.array(norms) > max_norm)),
    }
    if not np.isnan(stats["kl_to_base"]).any():
        record |= {name: float(stats[name].mean()) for name in ("kl_to_base", "log_sigma_drift_base")}
    return record


def _column_means(values: Floats, evaluators: Sequence[str]) -> dict[str, float]:
    return dict(zip(evaluators, values.mean(axis=0).tolist(), strict=True))
