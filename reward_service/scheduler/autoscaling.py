"""How many replicas a cluster should run, by the pairs that wait. No torch, no web, nothing of Ray's.

Ray hands this module to its controller as it stands, so it imports nothing that the controller may lack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

#: What each replica reports: pairs admitted and not yet answered, whether queued or on the device.
PAIRS = "pairs"


class Scaling(Protocol):
    """What is used of Ray's AutoscalingContext."""

    target_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """Name → replica → its mean over the look-back period."""


class PairsPerReplica:
    """Ray's `policy_function`: as many replicas as it takes that each has so many pairs under way.

    Requests are no measure of work here: one may hold a pair or a thousand. Ray applies its delays, factors
    and bounds to what this asks for.

    Args:
        target_pairs: wanted for each replica; two batches keep a device busy without a long queue

    Raises:
        ValueError: it is not a positive number
    """

    def __init__(self, target_pairs: float = 128) -> None:
        if not (math.isfinite(target_pairs) and target_pairs > 0):
            raise ValueError(f"target_pairs must be a positive number, not {target_pairs}")
        self._target_pairs = target_pairs

    def __call__(self, scaling: Scaling) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted, and no state; as many as there are where nothing was reported."""
        under_way = (scaling.aggregated_metrics or {}).get(PAIRS)
        if not under_way:
            return scaling.target_num_replicas, {}
        return math.ceil(sum(under_way.values()) / self._target_pairs), {}
