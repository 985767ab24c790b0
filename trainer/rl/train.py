"""Training loop of one fold: collect a rollout, then update the policy.

    for each iteration:
        sample G images for each of P prompts with the current policy, and score them
        advantages: center the rewards in their group, divide by the pooled deviation, weight, whiten
        choose K denoising steps of each image, one from each of K strata
        for each micro-batch of (image, step) pairs:
            replay the transitions, accumulate the policy gradient within the trust region
        after each optimizer step: update the moving average of the adapter

Departures from textbook PPO: no value function (the group is the baseline), one pass over the data, the
trust region is a mask on the exact KL of two Gaussians, and the pairs of an image are updated independently.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from reward_service.runtime.progress import progress, track
from trainer.config import TrainerConfig, UpdateConfig
from trainer.rl.diffusion import trainable_steps
from trainer.rl.objective import Advantages, Deviations, group_advantages, initial_deviations
from trainer.rl.policy import DecoderPolicy, MovingAverage
from trainer.rl.replay import (
    Record,
    ReplayStats,
    Transitions,
    advantage_record,
    gather_replay_stats,
    recompute_old_policy,
    recomputes_old_policy,
    replay_loss,
    rollout_record,
    select_transitions,
    update_record,
)
from trainer.rl.rewards import Scorer, weight_vector
from trainer.rl.rollout import DropCount, PooledRollout, Rollout, collect_rollout, group_keys, pool_rollouts
from trainer.rl.sampler import ImageSampler
from trainer.runtime.distributed import ALONE, Processes
from trainer.runtime.errors import DivergenceError
from trainer.runtime.rng import stream_seed

IterationKey = tuple[int, int, int]  # seed, fold, iteration


# -------------------------------------------------------------------------------------------- state


@dataclass
class TrainingState:
    """Everything that changes while a fold is trained."""

    policy: DecoderPolicy
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    deviations: Deviations
    drops: DropCount
    processes: Processes = ALONE
    done: int = 0  # completed iterations


def new_training_state(
    policy: DecoderPolicy, config: TrainerConfig, evaluators: int, processes: Processes = ALONE
) -> TrainingState:
    """Return the state before the first iteration, for a policy that has its adapter."""
    return TrainingState(
        policy=policy,
        average=MovingAverage(policy, config.lora.ema_decay),
        optimizer=torch.optim.AdamW(
            list(policy.lora.values()),
            lr=config.update.learning_rate,
            weight_decay=config.update.weight_decay,
        ),
        deviations=initial_deviations(evaluators),
        drops=DropCount(config.rollout.max_dropped, processes),
        processes=processes,
    )


# --------------------------------------------------------------------------------------------- loop


class Callback:
    """Hooks of `train_fold`, called in every process of a job; by default without effect."""

    def on_evaluation(self, training: TrainingState) -> Record:  # noqa: ARG002 - for subclasses
        """Evaluate the policy if an evaluation is due; return what to add to the iteration's record."""
        return {}

    def on_iteration(self, training: TrainingState, record: Record) -> bool:  # noqa: ARG002 - for subclasses
        """Log and save a completed iteration; return True to end the fold."""
        return False


def train_fold(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    *,
    fold: int = 0,
    processes: Processes = ALONE,
    training: TrainingState | None = None,
    last: int | None = None,
    callback: Callback | None = None,
) -> TrainingState:
    """Train the sampler's policy on `prompts`. Deterministic on the CPU.

    All processes of a job call this with equal arguments.

    Args:
        sampler: samples images with the policy
        scorer: scores the images
        prompts: training prompts of the fold
        config: settings of the run
        fold: number of the fold, part of every random seed
        processes: the processes of the job
        training: state of a resumed fold; a new one by default
        last: iterations after which to end, if before the end of the schedule
        callback: hooks called after each iteration: first `on_evaluation`, then `on_iteration`

    Raises:
        RolloutError: too few images were scored
        DivergenceError: a gradient is not finite
    """
    callback = callback or Callback()
    training = training or new_training_state(sampler.policy, config, len(scorer.evaluators), processes)
    batches = prompt_batches(prompts, config.rollout.prompts_per_iteration, config.seed, fold)
    remaining = range(training.done, config.iterations if last is None else last)
    bar = progress(remaining.stop, "training", "iteration", done=training.done, shown=processes.main)
    for iteration, batch in zip(remaining, islice(batches, training.done, None), strict=False):
        record = train_iteration(training, sampler, scorer, batch, config, fold=fold, iteration=iteration)
        record |= callback.on_evaluation(training)
        ended = callback.on_iteration(training, record)
        bar.set_postfix_str(f"composite {record['composite']:+.2f}", refresh=False)
        bar.update()
        if ended:
            break
    bar.close()
    return training


def train_iteration(
    training: TrainingState,
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    *,
    fold: int,
    iteration: int,
) -> Record:
    """Collect a rollout for a batch of prompts, then update the policy from it.

    Returns:
        metrics of the iteration
    """
    start = time.perf_counter()
    processes = training.processes
    keys = group_keys(
        processes.share(prompts),
        config.rollout.images_per_prompt,
        seed=config.seed,
        fold=fold,
        iteration=iteration,
    )
    with processes.fail_together():
        rollout = collect_rollout(
            sampler, scorer, keys, config.rollout, config.sampling.micro_batch, training.drops
        )
    with processes.fail_together(), sampler.offloaded():
        record = update_policy(training, rollout, scorer.evaluators, config, fold=fold, iteration=iteration)
    training.done = iteration + 1
    seconds = time.perf_counter() - start
    return record | {
        "iteration": iteration,
        "seconds": seconds,
        "exposed_wait_share": rollout.times.exposed_wait_s / seconds,
    }


def update_policy(
    training: TrainingState,
    rollout: Rollout,
    evaluators: Sequence[str],
    config: TrainerConfig,
    *,
    fold: int,
    iteration: int,
) -> Record:
    """Update the policy from the rollout of one iteration.

    Each process passes its own rollout; transitions are chosen among the images of all processes, identically
    in all of them.

    Returns:
        metrics of the iteration
    """
    start = time.perf_counter()
    key = (config.seed, fold, iteration)
    learning_rate = scheduled_learning_rate(config.update, iteration, config.iterations)
    # 1. advantages, from the scores of all groups
    pool = pool_rollouts(rollout, training.processes)
    result = _compute_advantages(pool, evaluators, training.deviations, config, key)
    training.deviations = result.deviations
    # 2. K denoising steps of each image of a kept group
    transitions, shard = _choose_transitions(pool, rollout, result, config, key)
    # 3. replay and optimizer steps
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate
    update_metrics = run_updates(training, transitions, config, _generator(key, "order"), shard)
    return {
        **rollout_record(pool, evaluators, config.objective.weights, trained_steps(config)),
        **advantage_record(result, evaluators, config.objective.advantage_clip),
        **update_metrics,
        "learning_rate": learning_rate,
        "lora_norm": training.policy.lora_norm(),
        "update_s": time.perf_counter() - start,
    }


# --------------------------------------------------------------------- advantages and transitions


class Shard(NamedTuple):
    """Position of one process's transitions among those of all processes."""

    offset: int  # index of the first
    total: int  # number of transitions of all processes


def _compute_advantages(
    pool: PooledRollout,
    evaluators: Sequence[str],
    deviations: Deviations,
    config: TrainerConfig,
    key: IterationKey,
) -> Advantages:
    z = pool.scores.z
    if config.ablation.shuffle_rewards:
        z = z[np.random.default_rng(stream_seed(*key, "shuffle")).permutation(len(z))]
    return group_advantages(
        torch.from_numpy(z),
        torch.from_numpy(pool.group),
        torch.from_numpy(weight_vector(evaluators, config.objective.weights)),
        deviations,
        momentum=config.objective.deviation_momentum,
        clip=config.objective.advantage_clip,
    )


def _choose_transitions(
    pool: PooledRollout, rollout: Rollout, result: Advantages, config: TrainerConfig, key: IterationKey
) -> tuple[Transitions, Shard]:
    """Return the chosen transitions of this process's images, and their position among all."""
    images = result.kept.nonzero().squeeze(1)
    steps = stratified_steps(len(images), config, _generator(key, "steps"))
    end = pool.offset + len(rollout.keys)
    own = (pool.offset <= images) & (images < end)
    transitions = select_transitions(
        rollout, images[own] - pool.offset, steps[own], result.advantages[pool.offset : end]
    )
    return transitions, Shard(int((images < pool.offset).sum()) * steps.shape[1], steps.numel())


def trained_steps(config: TrainerConfig) -> tuple[int, int]:
    """Return the first and last denoising step that are trained."""
    return config.update.train_steps or trainable_steps(config.sampling.decoder_steps)


def stratified_steps(images: int, config: TrainerConfig, generator: torch.Generator) -> Tensor:
    """Sample the denoising steps to train, one from each of K equal parts of the range.

    An image's K steps are equally far apart, with a random start (systematic sampling): they are distinct,
    and every step of the range is equally likely, even if K does not divide it.

    Returns:
        int64, (images, K)
    """
    first, last = trained_steps(config)
    count = min(config.update.steps_per_image, last - first + 1)
    width = (last - first + 1) / count
    start = torch.rand(images, 1, generator=generator, dtype=torch.float64)
    return (first + (torch.arange(count) + start) * width).long().clamp(max=last)


def _generator(key: IterationKey, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(*key, purpose))


# ------------------------------------------------------------------------------------------ updates


def run_updates(
    training: TrainingState,
    transitions: Transitions,
    config: TrainerConfig,
    order: torch.Generator,
    shard: Shard | None = None,
) -> Record:
    """Make one pass over the transitions in random order, with an update every `accumulate` micro-batches.

    Each optimizer batch is chosen among the transitions of all processes. A process replays those of its own
    that are in it, and the gradients are summed. Without transitions, when no reward varies in any group,
    the policy does not change.

    Args:
        training: state to update
        transitions: of this process
        config: settings of the run
        order: generator of the random order, equal in all processes
        shard: position of `transitions` among those of all processes; by default there are no others

    Returns:
        metrics of the replay and of the gradients
    """
    shard = shard or Shard(0, len(transitions.step))
    if not shard.total:
        return {"updates": 0}
    size, accumulate = config.update.micro_batch, config.update.accumulate
    batches = torch.randperm(shard.total, generator=order).split(size * accumulate)
    own_rows = [
        batch[(shard.offset <= batch) & (batch < shard.offset + len(transitions.step))] - shard.offset
        for batch in batches
    ]
    recompute = recomputes_old_policy(config)
    if recompute:
        later = [rows for own in own_rows[1:] for rows in own.split(size) if len(own)]
        transitions = recompute_old_policy(training.policy, transitions, later, config)
    stats: list[ReplayStats] = []
    norms = []
    for i, batch in enumerate(track(batches, "  update", "batch", shown=training.processes.main)):
        for rows in own_rows[i].split(size) if len(own_rows[i]) else ():
            on_policy = recompute and i == 0
            loss, micro = replay_loss(training.policy, transitions.select(rows), config, on_policy=on_policy)
            # Weighted by the share of the optimizer batch, of which the last micro-batch may be smaller.
            (loss * (len(rows) / len(batch))).backward()
            stats.append(micro._replace(update=torch.full_like(micro.step, i)))
        all_reduce_gradients(training)
        norms.append(optimizer_step(training, config.update))
    columns = gather_replay_stats(stats, training.processes)
    return update_record(columns, norms, max_norm=config.update.max_grad_norm)


def all_reduce_gradients(training: TrainingState) -> None:
    """Sum the gradients over all processes; a process without transitions of the batch adds zeros."""
    if training.processes.world_size == 1:
        return
    weights = list(training.policy.lora.values())
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    training.processes.all_reduce([weight.grad for weight in weights if weight.grad is not None])


def optimizer_step(training: TrainingState, config: UpdateConfig) -> float:
    """Clip the gradient, step the optimizer, clear the gradient and update the moving average.

    Returns:
        norm of the gradient before clipping

    Raises:
        DivergenceError: the norm is not finite
    """
    norm = clip_grad_norm_(training.policy.lora.values(), config.max_grad_norm)
    if not norm.isfinite():
        raise DivergenceError(
            "the gradient is not finite, the policy has diverged; "
            "start a new run with a lower update.learning_rate or objective.max_nats"
        )
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.average.update()
    return float(norm)


# ---------------------------------------------------------------------------------------- schedules


def scheduled_learning_rate(update: UpdateConfig, iteration: int, iterations: int) -> float:
    """Return the learning rate of an iteration, a pure function, so that a resumed run has the same.

    The schedule decays over `iterations` from the full rate in the first one towards the floor, which
    would be reached one iteration after the last.
    """
    done = min(iteration / iterations, 1.0)
    height = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    floor = update.learning_rate_floor
    return update.learning_rate * (floor + (1 - floor) * height[update.schedule])


def prompt_batches(prompts: Sequence[str], size: int, seed: int, fold: int) -> Iterator[list[str]]:
    """Yield batches of distinct prompts endlessly; each epoch has a new order and drops its remainder."""
    size = min(size, len(prompts))
    epoch = 0
    while True:
        order = np.random.default_rng(stream_seed(seed, fold, "prompts", epoch)).permutation(len(prompts))
        for start in range(0, len(prompts) - size + 1, size):
            yield [prompts[i] for i in order[start : start + size]]
        epoch += 1
