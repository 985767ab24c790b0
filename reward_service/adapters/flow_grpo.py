"""Adapter for Flow-GRPO and its descendants: `reward_fn(images, prompts, metadata) -> (scores, {})`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from reward_service.adapters.common import (
    AdapterOptions,
    Floats,
    as_array,
    request_scores,
    rewards_of,
    scores_of,
)
from reward_service.client import ImageLike, RewardClient

#: Key of the scores that these trainers use as the reward.
REWARD_KEY = "avg"

FlowGrpoReward = Callable[..., tuple[dict[str, Floats], dict[str, Any]]]


def flow_grpo_reward(client: RewardClient, **options: Unpack[AdapterOptions]) -> FlowGrpoReward:
    """Return a reward function that replaces the one of Flow-GRPO's `multi_score`.

    It takes images as a float tensor (N, 3, H, W) in [0, 1] or a uint8 array (N, H, W, 3). It returns each
    evaluator's scores (N,) under the evaluator's name, and the reward under `avg`. Thread-safe.

    Args:
        client: the client of the reward service
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward_fn(
        images: Iterable[ImageLike], prompts: Iterable[str], *_metadata: object, **_ignored: object
    ) -> tuple[dict[str, Floats], dict[str, Any]]:
        response = request_scores(client, prompts, images, options)
        return {**scores_of(response, normalization), REWARD_KEY: as_array(rewards_of(response))}, {}

    return reward_fn
