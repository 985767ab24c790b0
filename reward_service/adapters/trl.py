"""TRL's GRPO and what follows it: `reward(prompts, completions, **columns) -> list[float]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from reward_service.adapters.common import Options, column, image_of, rewards, score, scores, text_of
from reward_service.client import RewardClient

TrlReward = Callable[..., list[float]]


def trl_reward(
    client: RewardClient,
    *,
    pictures: str = "completions",
    texts: str = "prompts",
    name: str = "reward_service",
    **options: Unpack[Options],
) -> TrlReward:
    """A reward function for `reward_funcs`.

    The trainer passes prompts, completions and its data set's columns by name. Conversations are understood:
    the last message's text, or the one image in it. Where the trainer offers `log_metric`, each
    evaluator's mean is logged.

    Args:
        pictures: the column that holds the images; `image` or `images` to judge a text by one
        texts: the column that holds what the images should show; `completions` for a writer of prompts
        name: the function's name, under which the trainer logs it
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward(prompts: Any = None, completions: Any = None, **columns: Any) -> list[float]:
        given = {**columns, "prompts": prompts, "completions": completions}
        asked = list(map(text_of, column(given, texts)))
        response = score(client, asked, list(map(image_of, column(given, pictures))), options)
        if log_metric := columns.get("log_metric"):
            for evaluator, values in scores(response, normalization).items():
                log_metric(f"{name}/{evaluator}", float(values.mean()))
        return rewards(response)

    reward.__name__ = reward.__qualname__ = name
    return reward
