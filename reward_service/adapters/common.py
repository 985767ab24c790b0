"""Shared parts of the adapters: read columns, request scores, return arrays or tensors. Imports no torch."""

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

Floats = NDArray[np.float32]


class AdapterOptions(TypedDict, total=False):
    """Options that every adapter passes to `RewardClient.score`."""

    evaluators: Sequence[str] | None
    weights: Mapping[str, float] | None
    normalization: Normalization
    deterministic: bool
    deadline_s: float | None


def request_scores(
    client: RewardClient, prompts: Iterable[str], images: Iterable[ImageLike], options: AdapterOptions
) -> ScoreResponse:
    """Return a response in which every pair has a reward.

    Raises:
        RewardClientError: a pair cannot be scored, or `options` allow partial responses
    """
    if "allow_partial" in options:
        raise InputError("a reward function needs every score: allow_partial is for client.score")
    return client.score(prompts, images, **options)


def rewards_of(response: ScoreResponse) -> list[float]:
    """Return the reward of each pair."""
    # Only partial responses have pairs without a reward, and `request_scores` refuses these.
    return [cast("float", result.reward) for result in response.results]


def scores_of(response: ScoreResponse, normalization: Normalization) -> dict[str, Floats]:
    """Return the scores (N,) of each evaluator in one normalization."""
    return {
        name: as_array([getattr(result.scores[name], normalization) for result in response.results])
        for name in response.evaluators
    }


def as_array(values: Any) -> Floats:
    """Return numbers (N,) as a float32 array."""
    return np.array(values, np.float32)


def as_tensor(values: Any) -> Any:
    """Return numbers (N,) as a float32 tensor if the process has imported torch, otherwise as an array."""
    torch = sys.modules.get("torch")
    return as_array(values) if torch is None else torch.from_numpy(as_array(values))


def read_column(columns: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return one of the columns that a trainer passed.

    Raises:
        InputError: there is no such column
    """
    if columns.get(name) is None:
        found = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, (list, tuple))))
        raise InputError(f"the trainer passed no column {name!r}, only {found}; name one of these")
    values: Sequence[Any] = columns[name]
    return values


def extract_text(entry: Any) -> Any:
    """Return a string unchanged, or the text of a conversation's last message."""
    if not _is_conversation(entry):
        return entry
    content = entry[-1].get("content")
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content or () if part.get("type") == "text")


def extract_image(entry: Any) -> ImageLike:
    """Return an image, the only image of a list, or the only image of a conversation's last message.

    Raises:
        InputError: there is no image, or more than one
    """
    if _is_conversation(entry):
        content = entry[-1].get("content")
        parts = () if isinstance(content, str) else content or ()
        entry = [part.get("image") for part in parts if part.get("type") == "image"]
    if isinstance(entry, (list, tuple)):
        if len(entry) != 1:
            raise InputError(f"a completion must have one image, not {len(entry)}")
        entry = entry[0]
    return _decode_data_url(entry) if isinstance(entry, str) and entry.startswith("data:") else entry


def _is_conversation(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and bool(entry) and isinstance(entry[-1], Mapping)


def _decode_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        raise InputError("a data: URL must contain an image in base64") from None
