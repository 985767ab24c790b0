"""Autoscaling policy: number of replicas by the pairs in progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from reward_service.ray_scaling import PairsPerReplica
from reward_service.scheduler.autoscaling import PAIRS


@dataclass
class State:
    """Part of Ray's AutoscalingContext that the policy reads."""

    pairs: dict[str, float] | None
    target_num_replicas: int = 3
    aggregated_metrics: Any = field(init=False)

    def __post_init__(self) -> None:
        self.aggregated_metrics = None if self.pairs is None else {PAIRS: self.pairs}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (None, 3),
        ({}, 3),
        ({"a": 0.0, "b": 0.0}, 0),
        ({"a": 1.0}, 1),
        ({"a": 100.0}, 1),
        ({"a": 100.0, "b": 0.5}, 2),
        ({"a": 1000.0, "b": 1.0}, 11),
    ],
)
def test_replicas_follow_the_pairs_in_progress(pairs: dict[str, float] | None, expected: int) -> None:
    """It is the sum of all pairs over the target per replica; without a report nothing changes."""
    assert PairsPerReplica(100)(State(pairs)) == (expected, {})


@pytest.mark.parametrize("target", [0, -1, float("nan"), float("inf")])
def test_target_must_be_a_positive_number(target: float) -> None:
    """Zero, negative and non-finite targets are refused."""
    with pytest.raises(ValueError, match="target_pairs must be a positive number"):
        PairsPerReplica(target)
