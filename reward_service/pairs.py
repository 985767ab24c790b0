"""What goes into the engine and what comes out. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from reward_service.images import Pixels


class ScoringError(Exception):
    """Scores that are not numbers."""


@dataclass(frozen=True)
class Pair:
    """One prompt and one picture, uint8 RGB (H, W, 3)."""

    prompt: str
    picture: Pixels


@dataclass(frozen=True)
class PairScores:
    """Raw scores of one pair by evaluator, all finite, and whether a prompt had to be cut for one of them."""

    raw: dict[str, float]
    truncated_prompt: bool
