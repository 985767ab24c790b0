"""A response's numbers in the containers that trainers use. No torch is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from reward_service.client import ImageLike, InputError, RewardClient
from reward_service.protocol import Normalization, ScoreResponse

Floats = NDArray[np.float32]


class Options(TypedDict, total=False):
    """What every adapter hands on to ``RewardClient.score``."""

    evaluators: Sequence[str] | None
    weights: Mapping[str, float] | None
    normalization: Normalization
    deterministic: bool
    deadline_s: float | None


def score(
    client: RewardClient, prompts: Iterable[str], images: Iterable[ImageLike], options: Options
) -> ScoreResponse:
    """A complete response: a trainer has no use for a pair without a reward.

    :raises RewardClientError: there is none
    """
    if "allow_partial" in options:
        raise InputError("a reward function needs every score: allow_partial is for client.score")
    return client.score(prompts, images, **options)


def rewards(response: ScoreResponse) -> list[float]:
    """The rewards of a complete response: of that, each pair has one."""
    return [cast("float", result.reward) for result in response.results]


def scores(response: ScoreResponse, normalization: Normalization) -> dict[str, Floats]:
    """Evaluator to its scores (N,) in one normalization."""
    return {
        name: as_array([getattr(it.scores[name], normalization) for it in response.results])
        for name in response.evaluators
    }


def as_array(values: Any) -> Floats:
    """Numbers (N,) in float32, as trainers reckon."""
    return np.array(values, np.float32)


def as_tensor(values: Any) -> Any:
    """Numbers (N,) as a float32 tensor if the calling program has torch loaded, else as an array."""
    torch = sys.modules.get("torch")
    return as_array(values) if torch is None else torch.from_numpy(as_array(values))
