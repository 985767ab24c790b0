"""Inputs, outputs and exceptions of the engine. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reward_service.images import Pixels
from reward_service.settings import ConfigError


class ModelError(ConfigError):
    """A model that cannot be used; the message is one line: the file, what is expected, what was found."""


class ScoringError(Exception):
    """A pair that an evaluator cannot score; `evaluator` is the evaluator's name, None if unknown."""

    def __init__(self, message: str, evaluator: str | None = None) -> None:
        super().__init__(message)
        self.evaluator = evaluator


class PromptError(ScoringError):
    """A prompt that cannot be tokenized: no evaluator is at fault."""


class OutOfMemoryError(Exception):
    """The device has no memory for a batch of this size; a smaller batch may fit."""


class FatalDeviceError(Exception):
    """The device is broken for this process: every later computation may fail, so restart the process."""


@dataclass(frozen=True)
class Pair:
    """One prompt and one image.

    Attributes:
        prompt: the prompt, not yet tokenized
        image: uint8 RGB of shape (H, W, 3)
        preprocessed: the image's input tensors by `Preprocessing`, as far as `RewardEngine.prepare` made them
        tokens: the prompt's tokens by tower, as far as `RewardEngine.tokenize` made them
    """

    prompt: str
    image: Pixels
    preprocessed: Mapping[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    tokens: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class PairScores:
    """Scores of one pair.

    Attributes:
        raw: finite raw score by evaluator
        truncated_prompt: whether the prompt was too long for at least one tower
        failed: reason by evaluator that is out of service; `raw` has no score of it
    """

    raw: dict[str, float]
    truncated_prompt: bool
    failed: Mapping[str, str] = field(default_factory=dict)
