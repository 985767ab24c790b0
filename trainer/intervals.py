"""How sure a mean over prompts is, where prompts of one group are not independent."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Groups = Sequence[int] | NDArray[np.int64] | None  # (P,): which group each prompt is of; None: each its own


def standard_error(values: Floats, groups: Groups = None) -> float:
    """Cluster-robust standard error of the mean of values (P,); infinite with fewer than two groups.

    √(C/(C−1) Σ_c (Σ_{i∈c} (x_i − x̄))²) / P over the C groups (Liang and Zeger 1986, "CR1").
    """
    totals, _ = _residuals(values, groups)
    count = len(totals)
    if count < 2:
        return float("inf")
    return float(np.sqrt(count / (count - 1) * (totals**2).sum()) / len(values))


def _residuals(values: Floats, groups: Groups) -> tuple[Floats, Floats]:
    """Sums of x − x̄ over each of the C groups (C,), and how many prompts each has (C,). Raises ValueError."""
    if not np.isfinite(values).all():
        raise ValueError("a mean of values that are not all finite has no interval")
    if not len(values):
        raise ValueError("no values: there is nothing to take the mean of")
    # The mean of equal numbers may miss them by rounding.
    centred = values - values.mean() if np.ptp(values) > 0 else np.zeros(len(values))
    if groups is None:
        return centred, np.ones(len(values))
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values")
    _, rows = np.unique(np.asarray(groups), return_inverse=True)
    totals, sizes = np.bincount(rows, centred), np.bincount(rows)
    return totals.astype(np.float64), sizes.astype(np.float64)
