"""A response's numbers in the containers that trainers use. No torch is imported.

Prompts and images out of the columns of text trainers: plain, in messages, or as data: addresses.
"""

from __future__ import annotations

import binascii
import sys
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from reward_service.client import ImageLike, InputError, RewardClient
from reward_service.protocol import Normalization, ScoreResponse


def column(given: Mapping[str, Any], name: str) -> Sequence[Any]:
    """The column of that name.

    Raises:
        InputError: the trainer passed none
    """
    if given.get(name) is None:
        there = ", ".join(sorted(key for key, value in given.items() if isinstance(value, (list, tuple))))
        raise InputError(f"the trainer passed no column {name!r}, only {there}; name one of these")
    values: Sequence[Any] = given[name]
    return values


def text_of(entry: Any) -> Any:
    """A string, or the text of a conversation's last message."""
    if not _is_conversation(entry):
        return entry
    content = entry[-1].get("content")
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content or () if part.get("type") == "text")


def image_of(entry: Any) -> ImageLike:
    """An image, the only one of a list, or the only one of a conversation's last message.

    Raises:
        InputError: there is none, or more than one
    """
    if _is_conversation(entry):
        content = entry[-1].get("content")
        parts = () if isinstance(content, str) else content or ()
        entry = [part.get("image") for part in parts if part.get("type") == "image"]
    if isinstance(entry, (list, tuple)):
        if len(entry) != 1:
            raise InputError(f"a completion must hold one image, not {len(entry)}")
        entry = entry[0]
    return _decoded(entry) if isinstance(entry, str) and entry.startswith("data:") else entry


def _is_conversation(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and bool(entry) and isinstance(entry[-1], Mapping)


def _decoded(address: str) -> bytes:
    head, _, body = address.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        raise InputError("a data: address must hold an image in base64") from None


Floats = NDArray[np.float32]


class Options(TypedDict, total=False):
    """What every adapter hands on to `RewardClient.score`."""

    evaluators: Sequence[str] | None
    weights: Mapping[str, float] | None
    normalization: Normalization
    deterministic: bool
    deadline_s: float | None


def score(
    client: RewardClient, prompts: Iterable[str], images: Iterable[ImageLike], options: Options
) -> ScoreResponse:
    """A complete response: a trainer has no use for a pair without a reward.

    Raises:
        RewardClientError: there is none
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
