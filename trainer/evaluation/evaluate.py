"""Measure a policy: generate images of prompts from fixed random streams, and score them."""

from collections.abc import Sequence

import numpy as np

from reward_service.runtime.progress import progress
from trainer.config import EvaluationConfig
from trainer.evaluation.comparison import Measurement
from trainer.rl.rewards import Floats, Images, Scorer, Scores, ScoringError
from trainer.rl.rollout import sample_and_score
from trainer.rl.sampler import NOTHING_SHARED, ImageSampler
from trainer.runtime.distributed import ALONE, Processes
from trainer.runtime.errors import EvaluationError
from trainer.runtime.rng import ImageKey


def measure(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: EvaluationConfig,
    description: str,
    processes: Processes = ALONE,
) -> Measurement:
    """Generate and score `images_per_prompt` images of every prompt with the sampler's current policy.

    Each process takes its share of the prompts; all of them return the whole measurement.

    Args:
        prompts: P prompts; their order is kept.
        description: Words for the progress bar, such as "base".

    Raises:
        EvaluationError: A batch could not be scored.
    """
    keys = [
        ImageKey(config.seed, 0, -1, prompt, image)
        for prompt in processes.share(prompts)
        for image in range(config.images_per_prompt)
    ]
    with processes.fail_together():
        own = _sample_and_score(sampler, scorer, keys, config, description, processes)
    # A process without a share has no image, hence no shape to concatenate.
    parts = [[rows for rows in processes.gather_rows(field) if len(rows)] for field in own]
    images, raw, z = (
        np.concatenate(part).reshape(len(prompts), config.images_per_prompt, *part[0].shape[1:])
        for part in parts
    )
    return Measurement(tuple(prompts), images, raw, z)


def _sample_and_score(
    sampler: ImageSampler,
    scorer: Scorer,
    keys: Sequence[ImageKey],
    config: EvaluationConfig,
    description: str,
    processes: Processes,
) -> tuple[Images, Floats, Floats]:
    """Return images (N, H, W, 3) of N keys, raw and z (N, K); all three empty without keys."""
    if not keys:
        return np.empty(0, np.uint8), np.empty(0), np.empty(0)
    size = config.micro_batch
    # The bar counts this process's own images.
    with progress(len(keys), f"evaluating {description}", "image", shown=processes.main, inner=True) as bar:
        scored = sample_and_score(
            sampler,
            scorer,
            [keys[start : start + size] for start in range(0, len(keys), size)],
            NOTHING_SHARED,
            config.stage,
            config,
            stop_when=lambda scoring: scoring.failed,
            keep=lambda sampled: sampled.images,
            on_sampled=bar.update,
        )
    scores = [outcome for outcome in scored.outcomes if isinstance(outcome, Scores)]
    for outcome in scored.outcomes:
        if isinstance(outcome, ScoringError):
            raise EvaluationError(f"evaluation stopped: {outcome}") from outcome
    raw, z = (np.concatenate(field) for field in zip(*scores, strict=True))
    return np.concatenate(scored.batches), raw, z
