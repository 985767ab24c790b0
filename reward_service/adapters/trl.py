"""Adapter for TRL's GRPO and its descendants: `reward(prompts, completions, **columns) -> list[float]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from reward_service.adapters.common import (
    AdapterOptions,
    extract_image,
    extract_text,
    read_column,
    request_scores,
    rewards_of,
    scores_of,
)
from reward_service.adapters.special_tokens import plain_prompts, strip_special_tokens
from reward_service.client import RewardClient

TrlReward = Callable[..., list[float]]


def trl_reward(
    client: RewardClient,
    *,
    pictures: str = "completions",
    texts: str = "prompts",
    name: str = "reward_service",
    **options: Unpack[AdapterOptions],
) -> TrlReward:
    """Return a reward function for `reward_funcs`.

    The trainer passes prompts, completions and its data set's columns by name. For conversations, the text or
    the only image of the last message is used. Special tokens and roles at the ends of a text are removed. If
    the trainer passes `log_metric`, each evaluator's mean is logged.

    Args:
        client: the client of the reward service
        pictures: column with the images; `image` or `images` to score completions against given images
        texts: column with the prompts of the images; `completions` for a policy that writes prompts
        name: name of the function, which the trainer uses for logging
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward(prompts: Any = None, completions: Any = None, **columns: Any) -> list[float]:
        columns |= {"prompts": prompts, "completions": completions}
        found = map(extract_text, read_column(columns, texts))
        # A completion is what the policy has written, which may be anything.
        image_prompts = (
            list(map(strip_special_tokens, found)) if texts == "completions" else plain_prompts(found)
        )
        images = list(map(extract_image, read_column(columns, pictures)))
        response = request_scores(client, image_prompts, images, options)
        if log_metric := columns.get("log_metric"):
            for evaluator, values in scores_of(response, normalization).items():
                log_metric(f"{name}/{evaluator}", float(values.mean()))
        return rewards_of(response)

    reward.__name__ = reward.__qualname__ = name
    return reward
