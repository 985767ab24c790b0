"""Autoscaling policy of Ray Serve: number of replicas by the pairs in progress.

Ray copies this module to its controller, so it imports nothing that the controller may lack: no torch, no web
framework and nothing of Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

#: Metric that each replica reports: pairs that are admitted and not finished, queued or on the device.
PAIRS = "pairs"


class AutoscalingState(Protocol):
    """Part of Ray's AutoscalingContext that the policy reads."""

    target_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """Metric name → replica → mean over the look-back period."""


class PairsPerReplica:
    """Ray's `policy_function`: as many replicas as keep the pairs in progress per replica at the target.

    The number of requests is no measure of work here: a request has one pair or a thousand. Ray applies its
    own delays, factors and bounds to the result.

    Args:
        target_pairs: pairs in progress per replica; two batches keep a device busy without a long queue

    Raises:
        ValueError: `target_pairs` is not a positive number
    """

    def __init__(self, target_pairs: float = 128) -> None:
        if not (math.isfinite(target_pairs) and target_pairs > 0):
            raise ValueError(f"target_pairs must be a positive number, not {target_pairs}")
        self._target_pairs = target_pairs

    def __call__(self, state: AutoscalingState) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, the current one if nothing was reported, and an empty state."""
        pairs = (state.aggregated_metrics or {}).get(PAIRS)
        if not pairs:
            return state.target_num_replicas, {}
        return math.ceil(sum(pairs.values()) / self._target_pairs), {}
