"""One iteration's update: from a rollout to optimizer steps, and what there is to say about them.

The loop of one fold. It reads like the algorithm:

    for each iteration:
        draw G images for each of P prompts with the current policy, and have them scored
        advantages: rewards centred in their group, in pooled within-group deviations, weighted, whitened
        choose K denoising steps of each image, one from each of K strata
        for each micro-batch of (image, step) pairs:
            replay the transitions, ascend the importance-weighted policy gradient inside the trust region
            take the adapter into its moving average

Departures from textbook PPO: no value function (the group is the baseline), one pass over the data, the
trust region is a mask on the exact KL of two Gaussians, and the pairs of an image are updated independently.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from trainer.config import TrainerConfig, UpdateConfig
from trainer.rl.diffusion import trainable_steps
from trainer.rl.objective import Advantages, Deviations, group_advantages, no_deviations
from trainer.rl.policy import DecoderPolicy, MovingAverage
from trainer.rl.replay import (
    Record,
    Replayed,
    Transitions,
    advantage_record,
    gather_replayed,
    recomputes_old,
    replay_loss,
    rollout_record,
    select_transitions,
    update_record,
    with_old_replayed,
)
from trainer.rl.rewards import Scorer, weight_vector
from trainer.rl.rollout import DropCount, Pool, Rollout, collect, group_keys, pool_rollouts
from trainer.rl.sampler import ImageSampler
from trainer.runtime.distributed import ALONE, Processes
from trainer.runtime.errors import DivergenceError
from trainer.runtime.progress import progress, track
from trainer.runtime.rng import stream_seed

Key = tuple[int, int, int]  # seed, fold, iteration


class Place(NamedTuple):
    """Where a process's transitions are among those of all processes, which are `total`."""

    first: int
    total: int


@dataclass
class TrainingState:
    """What changes while a fold is trained."""

    policy: DecoderPolicy
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    deviations: Deviations
    drops: DropCount
    processes: Processes = ALONE
    done: int = 0  # iterations behind it


def new_training_state(
    policy: DecoderPolicy, config: TrainerConfig, evaluators: int, processes: Processes = ALONE
) -> TrainingState:
    """A trainer before its first iteration, for a policy that has its adapter."""
    return TrainingState(
        policy=policy,
        average=MovingAverage(policy, config.lora.ema_decay),
        optimizer=torch.optim.AdamW(
            list(policy.lora.values()),
            lr=config.update.learning_rate,
            weight_decay=config.update.weight_decay,
        ),
        deviations=no_deviations(evaluators),
        drops=DropCount(config.rollout.max_dropped, processes),
        processes=processes,
    )


def improve(
    training: TrainingState,
    rollout: Rollout,
    evaluators: Sequence[str],
    config: TrainerConfig,
    *,
    fold: int,
    iteration: int,
) -> Record:
    """One iteration's update from its rollout; returns what there is to say about it.

    Each process brings its own rollout; what is chosen is chosen among all images, by all alike.
    """
    start = time.perf_counter()
    key = (config.seed, fold, iteration)
    rate = scheduled_rate(config.update, iteration, config.iterations)
    # 1. advantages, from the scores of all groups
    pool = pool_rollouts(rollout, training.processes)
    judged = _advantages(pool, evaluators, training.deviations, config, key)
    training.deviations = judged.deviations
    # 2. K denoising steps of each image that is learned from
    transitions, place = _choose(pool, rollout, judged, config, key)
    # 3. replay them, ascend
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    said = update(training, transitions, config, _generator(key, "order"), place)
    return {
        **rollout_record(pool, evaluators, config.objective.weights, trained_steps(config)),
        **advantage_record(judged, evaluators, config.objective.advantage_clip),
        **said,
        "learning_rate": rate,
        "lora_norm": training.policy.lora_norm(),
        "update_s": time.perf_counter() - start,
    }


def _advantages(
    pool: Pool, evaluators: Sequence[str], deviations: Deviations, config: TrainerConfig, key: Key
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


def _choose(
    pool: Pool, rollout: Rollout, judged: Advantages, config: TrainerConfig, key: Key
) -> tuple[Transitions, Place]:
    """The transitions of this process's images, and where they are among all processes' transitions."""
    images = judged.kept.nonzero().squeeze(1)
    steps = stratified_steps(len(images), config, _generator(key, "steps"))
    last = pool.first + len(rollout.keys)
    own = (pool.first <= images) & (images < last)
    transitions = select_transitions(
        rollout, images[own] - pool.first, steps[own], judged.advantages[pool.first : last]
    )
    return transitions, Place(int((images < pool.first).sum()) * steps.shape[1], steps.numel())


def _generator(key: Key, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(*key, what))


def update(
    training: TrainingState,
    transitions: Transitions,
    config: TrainerConfig,
    order: torch.Generator,
    place: Place | None = None,
) -> Record:
    """One pass over the transitions in random order, an optimizer step every `accumulate` micro-batches.

    `place` says where these are among the transitions of all processes; without it they are all there are.
    Each optimizer batch is chosen among all; a process replays what it has of it and the gradients are added.
    Without transitions, where no reward varies in any group, nothing happens.
    """
    place = place or Place(0, len(transitions.step))
    if not place.total:
        return {"updates": 0}
    size, accumulate = config.update.micro_batch, config.update.accumulate
    batches = torch.randperm(place.total, generator=order).split(size * accumulate)
    owned = [
        batch[(place.first <= batch) & (batch < place.first + len(transitions.step))] - place.first
        for batch in batches
    ]
    recompute = recomputes_old(config)
    if recompute:
        later = [rows for own in owned[1:] for rows in own.split(size) if len(own)]
        transitions = with_old_replayed(training.policy, transitions, later, config)
    replayed: list[Replayed] = []
    norms = []
    for i, batch in enumerate(track(batches, "  update", "batch", shown=training.processes.main)):
        for rows in owned[i].split(size) if len(owned[i]) else ():
            on_policy = recompute and i == 0
            loss, seen = replay_loss(training.policy, transitions.select(rows), config, on_policy=on_policy)
            # Each micro-batch counts by its share of the optimizer batch, which the last may have fewer of.
            (loss * (len(rows) / len(batch))).backward()
            replayed.append(seen._replace(update=torch.full_like(seen.step, i)))
        add_gradients(training)
        norms.append(optimizer_step(training, config.update))
    return update_record(
        gather_replayed(replayed, training.processes), norms, max_norm=config.update.max_grad_norm
    )


def add_gradients(training: TrainingState) -> None:
    """Give every process the sum of all processes' gradients; one that had nothing to replay adds zeros."""
    if training.processes.world == 1:
        return
    weights = list(training.policy.lora.values())
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    training.processes.add([weight.grad for weight in weights if weight.grad is not None])


def optimizer_step(training: TrainingState, config: UpdateConfig) -> float:
    """Clip the gradient, step, clear, average. Returns the gradient's norm before clipping.

    Raises DivergenceError where that is not finite.
    """
    norm = clip_grad_norm_(training.policy.lora.values(), config.max_grad_norm)
    if not norm.isfinite():
        raise DivergenceError(
            "the gradient is not finite, the policy has diverged; "
            "begin a new run with a lower update.learning_rate or objective.max_nats"
        )
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.average.update()
    return float(norm)


# ------------------------------------------------------------------------------------------ choosing


def scheduled_rate(update: UpdateConfig, iteration: int, iterations: int) -> float:
    """Learning rate of an iteration: a function of nothing else, so that a resumed run has the same.

    The schedule falls over `iterations` from the full rate in the first towards the floor, which is what one
    iteration more would have.
    """
    done = min(iteration / iterations, 1.0)
    height = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    floor = update.learning_rate_floor
    return update.learning_rate * (floor + (1 - floor) * height[update.schedule])


def trained_steps(config: TrainerConfig) -> tuple[int, int]:
    """First and last denoising step that are trained."""
    return config.update.train_steps or trainable_steps(config.sampling.decoder_steps)


def stratified_steps(images: int, config: TrainerConfig, generator: torch.Generator) -> Tensor:
    """Denoising steps to train, int64 (images, K): the range is cut in K equal parts, one step from each.

    An image's K steps lie equally far apart, from a random start (systematic sampling): they are distinct,
    and each step of the range comes up equally often, also where K does not divide it.
    """
    first, last = trained_steps(config)
    count = min(config.update.steps_per_image, last - first + 1)
    width = (last - first + 1) / count
    start = torch.rand(images, 1, generator=generator, dtype=torch.float64)
    return (first + (torch.arange(count) + start) * width).long().clamp(max=last)


def train_fold(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    *,
    fold: int = 0,
    log: Callable[[Record], object] = dict,
    processes: Processes = ALONE,
    training: TrainingState | None = None,
    last: int | None = None,
    examine: Callable[[TrainingState], Record] = lambda _training: {},
    after: Callable[[TrainingState], bool] = lambda _training: False,
) -> TrainingState:
    """Train the studio's policy on `prompts`; `log` hears of every iteration. Deterministic on the CPU.

    A resumed fold brings its `trainer`; one that is to end before the schedule does names its `last`
    iteration. After each, `examine` and then `after` get the trainer; what `examine` returns is logged with
    the rest, and where `after` says so the fold ends.
    All processes of a job call this alike; the main one's `log` is heard.
    Raises RolloutError where too few scores come back, DivergenceError where a gradient is not finite.
    """
    training = training or new_training_state(sampler.policy, config, len(scorer.evaluators), processes)
    batches = prompt_batches(prompts, config.rollout.prompts_per_iteration, config.seed, fold)
    remaining = range(training.done, config.iterations if last is None else last)
    bar = progress(remaining.stop, "training", "iteration", done=training.done, shown=processes.main)
    for iteration, batch in zip(remaining, islice(batches, training.done, None), strict=False):
        start = time.perf_counter()
        keys = group_keys(
            processes.share(batch),
            config.rollout.images_per_prompt,
            seed=config.seed,
            fold=fold,
            iteration=iteration,
        )
        with processes.one_fate():
            rollout = collect(
                sampler, scorer, keys, config.rollout, config.sampling.micro_batch, training.drops
            )
        with processes.one_fate(), sampler.resting():
            record = improve(training, rollout, scorer.evaluators, config, fold=fold, iteration=iteration)
        training.done = iteration + 1
        seconds = time.perf_counter() - start
        record |= {
            "iteration": iteration,
            "seconds": seconds,
            "exposed_wait_share": rollout.times.exposed_wait_s / seconds,
            **examine(training),
        }
        if processes.main:
            log(record)
        ended = after(training)
        bar.set_postfix_str(f"composite {record['composite']:+.2f}", refresh=False)
        bar.update()
        if ended:
            break
    bar.close()
    return training


# ------------------------------------------------------------------------------------------ choosing


def prompt_batches(prompts: Sequence[str], size: int, seed: int, fold: int) -> Iterator[list[str]]:
    """Endless batches of distinct prompts; each epoch is a new order, its remainder left out."""
    size = min(size, len(prompts))
    epoch = 0
    while True:
        order = np.random.default_rng(stream_seed(seed, fold, "prompts", epoch)).permutation(len(prompts))
        for start in range(0, len(prompts) - size + 1, size):
            yield [prompts[i] for i in order[start : start + size]]
        epoch += 1
