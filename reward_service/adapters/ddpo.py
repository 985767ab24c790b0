"""Adapter for ddpo-pytorch and TRL's DDPO: `reward_fn(images, prompts, metadata) -> (rewards, scores)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from reward_service.adapters.common import (
    AdapterOptions,
    Floats,
    as_tensor,
    request_scores,
    rewards_of,
    scores_of,
)
from reward_service.client import ImageLike, RewardClient

DdpoReward = Callable[..., tuple[Any, dict[str, Floats]]]


def ddpo_reward(client: RewardClient, **options: Unpack[AdapterOptions]) -> DdpoReward:
    """Return a reward function for trainers that use one number per image.

    It takes images as a float tensor (N, 3, H, W) in [0, 1]. It returns the rewards (N,), as a tensor if
    torch is imported, and each evaluator's scores as the metadata. Thread-safe.

    Args:
        client: the client of the reward service
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward_fn(
        images: Iterable[ImageLike], prompts: Iterable[str], *_metadata: object, **_ignored: object
    ) -> tuple[Any, dict[str, Floats]]:
        response = request_scores(client, prompts, images, options)
        return as_tensor(rewards_of(response)), scores_of(response, normalization)

    return reward_fn
