"""OpenRLHF's remote reward function: `reward_func(queries, prompts, labels) -> dict` of three entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np

from reward_service.adapters.common import (
    Options,
    as_tensor,
    column,
    image_of,
    rewards,
    score,
    scores,
    text_of,
)
from reward_service.client import RewardClient

OpenRlhfReward = Callable[..., dict[str, Any]]


def openrlhf_reward(
    client: RewardClient, *, pictures: str = "queries", texts: str = "prompts", **options: Unpack[Options]
) -> OpenRlhfReward:
    """The `reward_func` of the file that `--remote_rm_url` names.

    It gives `rewards` (N,) to learn from, `scores` (N,) in (0, 1) for dynamic filtering: the mean of the
    evaluators' unit scores, and `extra_logs`: each evaluator's scores; tensors where torch is loaded.
    OpenRLHF calls with one pair a time, from many threads; the service puts them together again.

    Args:
        pictures: where the images are: `queries`, `labels` or the name of another argument; paths, or base64 in
            data: addresses
        texts: what they should show: `prompts`, `labels`, `queries`, or `responses` for the queries without
            their prompts
        options: evaluators, weights, normalization, deterministic, deadline_s: as for `client.score`
    """
    normalization = options.get("normalization", "unit")

    def reward_func(queries: Any, prompts: Any, labels: Any = None, **columns: Any) -> dict[str, Any]:
        given = {**columns, "queries": queries, "prompts": prompts, "labels": labels}
        if texts == "responses":
            given["responses"] = _responses(queries, prompts)
        asked = list(map(text_of, column(given, texts)))
        response = score(client, asked, list(map(image_of, column(given, pictures))), options)
        units = np.mean(list(scores(response, "unit").values()), axis=0)
        logs = {name: as_tensor(values) for name, values in scores(response, normalization).items()}
        return {"rewards": as_tensor(rewards(response)), "scores": as_tensor(units), "extra_logs": logs}

    return reward_func


def _responses(queries: Sequence[str], prompts: Sequence[str]) -> list[str]:
    return [query.removeprefix(prompt) for query, prompt in zip(queries, prompts, strict=True)]
