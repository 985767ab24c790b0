"""Flow-GRPO and its descendants: `reward_fn(images, prompts, metadata) -> ({name: scores}, {})`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from reward_service.adapters.common import Floats, Options, as_array, rewards, score, scores
from reward_service.client import ImageLike, RewardClient

#: The entry that these trainers learn from.
TOTAL = "avg"

FlowGrpoReward = Callable[..., tuple[dict[str, Floats], dict[str, Any]]]


def flow_grpo_reward(client: RewardClient, **options: Unpack[Options]) -> FlowGrpoReward:
    """A reward function in place of what `multi_score` makes.

    It takes images as a float tensor (N, 3, H, W) in [0, 1] or a uint8 array (N, H, W, 3), and gives each
    evaluator's scores (N,) under its name and the reward under `avg`. Safe in a thread pool.

    Args:
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward_fn(
        images: Iterable[ImageLike], prompts: Iterable[str], *_metadata: object, **_more: object
    ) -> tuple[dict[str, Floats], dict[str, Any]]:
        response = score(client, prompts, images, options)
        return {**scores(response, normalization), TOTAL: as_array(rewards(response))}, {}

    return reward_fn
