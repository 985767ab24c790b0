"""What goes into the engine and what comes out. No torch.

What can be wrong with the device rather than with a pair. No torch, no web.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reward_service.images import Pixels


class OutOfMemoryError(Exception):
    """The device had no room for a batch of this size; a smaller one may fit."""


class FatalDeviceError(Exception):
    """The device can't be trusted any more, whatever it is given: only a new process helps."""


class ScoringError(Exception):
    """An evaluator gave no number for some pair; `evaluator` is its name, if it is known."""

    def __init__(self, message: str, evaluator: str | None = None) -> None:
        super().__init__(message)
        self.evaluator = evaluator


@dataclass(frozen=True)
class Pair:
    """One prompt and one image, uint8 RGB (H, W, 3).

    `inputs`: the image as towers take it, by preprocessing, as far as the engine has prepared it.
    """

    prompt: str
    image: Pixels
    inputs: Mapping[Any, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class PairScores:
    """Raw scores of one pair by evaluator, all finite, and whether a prompt had to be cut for one of them.

    `failed` says of each evaluator that is out of service why; there is no score of it.
    """

    raw: dict[str, float]
    truncated_prompt: bool
    failed: Mapping[str, str] = field(default_factory=dict)
