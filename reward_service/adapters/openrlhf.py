"""Adapter for OpenRLHF: remote reward function `reward_func(queries, prompts, labels) -> dict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from reward_service.adapters.special_tokens import plain_prompts, plain_responses, strip_special_tokens
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
    OpenRLHF calls it with one pair at a time from many threads; the service batches the requests. Special
    tokens and roles at the ends of a text, such as `<s>`, padding and `<|im_end|>`, are not scored.

    Args:
        client: the client of the reward service
        pictures: argument with the images: `queries`, `labels` or the name of another one; the entries are
            paths, or data: URLs in base64
        texts: argument with the prompts of the images: `prompts`, `labels`, `queries`, or `responses` for the
            queries without the prompts that they begin with; an empty response is scored as a blank
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward_func(queries: Any, prompts: Any, labels: Any = None, **columns: Any) -> dict[str, Any]:
        columns |= {"queries": queries, "prompts": prompts, "labels": labels}
        images = list(map(extract_image, map(strip_special_tokens, read_column(columns, pictures))))
        image_prompts = _read_texts(columns, texts)
        response = request_scores(client, image_prompts, images, options)
        units = np.mean(list(scores_of(response, "unit").values()), axis=0)
        logs = {name: as_tensor(values) for name, values in scores_of(response, normalization).items()}
        return {"rewards": as_tensor(rewards_of(response)), "scores": as_tensor(units), "extra_logs": logs}

    return reward_func


def _read_texts(columns: Mapping[str, Any], name: str) -> list[Any]:
    if name == "responses":
        return plain_responses(read_column(columns, "queries"), read_column(columns, "prompts"))
    texts = map(extract_text, read_column(columns, name))
    # A query contains what the policy has written, which may be anything.
    return list(map(strip_special_tokens, texts)) if name == "queries" else plain_prompts(texts)
