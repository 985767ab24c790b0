"""Paired evaluation: base and tuned policy draw the same validation prompts from the same random streams."""

from collections.abc import Sequence

import numpy as np

from trainer.config import EvaluationConfig
from trainer.evaluation.comparison import (
    COMPOSITE,
    Change,
    Comparison,
    Gain,
    Measurement,
    compare,
    pooled,
    sentences,
    standard_errors,
    table,
)
from trainer.rl.rewards import Floats, Images, Scorer, Scores, ScoringError
from trainer.rl.rollout import sample_and_score
from trainer.rl.sampler import NOTHING_SHARED, ImageSampler
from trainer.runtime.distributed import ALONE, Processes
from trainer.runtime.errors import EvaluationError
from trainer.runtime.progress import progress
from trainer.runtime.rng import ImageKey

__all__ = [
    "COMPOSITE",
    "Change",
    "Comparison",
    "Gain",
    "Measurement",
    "compare",
    "measure",
    "pooled",
    "sentences",
    "standard_errors",
    "table",
]


def measure(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: EvaluationConfig,
    what: str,
    processes: Processes = ALONE,
) -> Measurement:
    """Draw and score every prompt `images_per_prompt` times from fixed streams. Raises EvaluationError.

    Each process takes its share of the prompts; all of them get the whole.
    """
    keys = [
        ImageKey(config.seed, 0, -1, prompt, image)
        for prompt in processes.share(prompts)
        for image in range(config.images_per_prompt)
    ]
    with processes.one_fate():
        drawn = _sample_and_score(sampler, scorer, keys, config, what, processes)
    # A process without a share has no image to tell the size of one.
    parts = [[rows for rows in processes.gather_rows(field) if len(rows)] for field in drawn]
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
    what: str,
    processes: Processes,
) -> tuple[Images, Floats, Floats]:
    """Images (N, H, W, 3) of N keys, raw and z (N, K); all three empty without keys."""
    if not keys:
        return np.empty(0, np.uint8), np.empty(0), np.empty(0)
    size = config.micro_batch
    # The bar counts this process's own images.
    with progress(len(keys), f"evaluating {what}", "picture", shown=processes.main, inner=True) as bar:
        judged = sample_and_score(
            sampler,
            scorer,
            [keys[start : start + size] for start in range(0, len(keys), size)],
            NOTHING_SHARED,
            config.stage,
            config,
            enough=lambda judging: judging.failed,
            keep=lambda drawing: drawing.images,
            on_drawn=bar.update,
        )
    scored = [outcome for outcome in judged.outcomes if isinstance(outcome, Scores)]
    for outcome in judged.outcomes:
        if isinstance(outcome, ScoringError):
            raise EvaluationError(f"evaluation stopped: {outcome}") from outcome
    raw, z = (np.concatenate(field) for field in zip(*scored, strict=True))
    return np.concatenate(judged.drawn), raw, z
