"""ddpo-pytorch and TRL's DDPO trainer: `reward_fn(images, prompts, metadata) -> (rewards, {...})`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from reward_service.adapters.common import Floats, Options, as_tensor, rewards, score, scores
from reward_service.client import ImageLike, RewardClient

DdpoReward = Callable[..., tuple[Any, dict[str, Floats]]]


def ddpo_reward(client: RewardClient, **options: Unpack[Options]) -> DdpoReward:
    """A reward function for trainers that take one number an image.

    It takes images as a float tensor (N, 3, H, W) in [0, 1], and gives the rewards (N,), a tensor where
    torch is loaded, and each evaluator's scores as the metadata. Safe in a thread pool.

    Args:
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward_fn(
        images: Iterable[ImageLike], prompts: Iterable[str], *_metadata: object, **_more: object
    ) -> tuple[Any, dict[str, Floats]]:
        response = score(client, prompts, images, options)
        return as_tensor(rewards(response)), scores(response, normalization)

    return reward_fn
