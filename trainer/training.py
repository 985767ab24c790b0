"""The loop of one fold. It reads like the algorithm:

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

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from trainer.config import TrainerConfig
from trainer.diagnostics import Record
from trainer.drawing import Studio
from trainer.processes import ALONE, Processes
from trainer.progress import progress
from trainer.rollout import collect, group_keys
from trainer.scoring import Scorer
from trainer.streams import stream_seed
from trainer.updating import Learner, improve, new_learner


def train_fold(
    studio: Studio,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    *,
    fold: int = 0,
    log: Callable[[Record], object] = dict,
    processes: Processes = ALONE,
    learner: Learner | None = None,
    last: int | None = None,
    examine: Callable[[Learner], Record] = lambda _learner: {},
    after: Callable[[Learner], bool] = lambda _learner: False,
) -> Learner:
    """Train the studio's policy on `prompts`; `log` hears of every iteration. Deterministic on the CPU.

    A resumed fold brings its `learner`; one that is to end before the schedule does names its `last`
    iteration. After each, `examine` and then `after` get the learner; what `examine` returns is logged with
    the rest, and where `after` says so the fold ends.
    All processes of a job call this alike; the main one's `log` is heard.
    Raises RolloutError where too few scores come back, DivergenceError where a gradient is not finite.
    """
    learner = learner or new_learner(studio.policy, config, len(scorer.evaluators), processes)
    batches = prompt_batches(prompts, config.rollout.prompts_per_iteration, config.seed, fold)
    remaining = range(learner.done, config.iterations if last is None else last)
    bar = progress(remaining.stop, "training", "iteration", done=learner.done, shown=processes.main)
    for iteration, batch in zip(remaining, islice(batches, learner.done, None), strict=False):
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
                studio, scorer, keys, config.rollout, config.sampling.micro_batch, learner.drops
            )
        with processes.one_fate(), studio.resting():
            record = improve(learner, rollout, scorer.evaluators, config, fold=fold, iteration=iteration)
        learner.done = iteration + 1
        seconds = time.perf_counter() - start
        record |= {
            "iteration": iteration,
            "seconds": seconds,
            "exposed_wait_share": rollout.times.exposed_wait_s / seconds,
            **examine(learner),
        }
        if processes.main:
            log(record)
        ended = after(learner)
        bar.set_postfix_str(f"composite {record['composite']:+.2f}", refresh=False)
        bar.update()
        if ended:
            break
    bar.close()
    return learner


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
