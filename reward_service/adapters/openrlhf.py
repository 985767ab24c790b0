"""Adapter for OpenRLHF: remote reward function `reward_func(queries, prompts, labels) -> dict`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np

from reward_service.adapters.common import (
    AdapterOptions,
    as_tensor,
    extract_image,
    extract_text,
    read_column,
    request_scores,
    rewards_of,
    scores_of,
)
from reward_service.client import RewardClient

OpenRlhfReward = Callable[..., dict[str, Any]]


def openrlhf_reward(
    client: RewardClient,
    *,
    pictures: str = "queries",
    texts: str = "prompts",
    **options: Unpack[AdapterOptions],
) -> OpenRlhfReward:
    """Return the `reward_func` for the file of `--remote_rm_url`.

    It returns `rewards` (N,) for training, `scores` (N,) in (0, 1) for dynamic filtering (the mean of the
    evaluators' unit scores), and `extra_logs` with each evaluator's scores; tensors if torch is imported.
    OpenRLHF calls it with one pair at a time from many threads; the service batches the requests.

    Args:
        client: the client of the reward service
        pictures: argument with the images: `queries`, `labels` or the name of another one; the entries are
            paths, or data: URLs in base64
        texts: argument with the prompts of the images: `prompts`, `labels`, `queries`, or `responses` for the
            queries without their prompts
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward_func(queries: Any, prompts: Any, labels: Any = None, **columns: Any) -> dict[str, Any]:
        columns |= {"queries": queries, "prompts": prompts, "labels": labels}
        if texts == "responses":
            columns["responses"] = _responses(queries, prompts)
        image_prompts = list(map(extract_text, read_column(columns, texts)))
        images = list(map(extract_image, read_column(columns, pictures)))
        response = request_scores(client, image_prompts, images, options)
        units = np.mean(list(scores_of(response, "unit").values()), axis=0)
        logs = {name: as_tensor(values) for name, values in scores_of(response, normalization).items()}
        return {"rewards": as_tensor(rewards_of(response)), "scores": as_tensor(units), "extra_logs": logs}

    return reward_func


def _responses(queries: Sequence[str], prompts: Sequence[str]) -> list[str]:
    return [query.removeprefix(prompt) for query, prompt in zip(queries, prompts, strict=True)]
