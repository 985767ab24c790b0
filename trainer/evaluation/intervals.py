"""How sure a mean over prompts is, where prompts of one group are not independent.

docs/statistics.md says why this interval and not a plainer one, with its measured coverage.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

Floats = NDArray[np.float64]
Groups = Sequence[int] | NDArray[np.int64] | None  # (P,): which group each prompt is of; None: each its own

WIDEST = 3.0  # times Student's interval: a few resamples almost without spread may not blow it up further
BLOCK = 1 << 22  # numbers drawn at a time


class Interval(NamedTuple):
    """Bounds of a mean, and its cluster-robust standard error."""

    low: float
    high: float
    standard_error: float


def interval(
    values: Floats, groups: Groups = None, *, confidence: float, resamples: int, seed: int
) -> Interval:
    """Cluster-bootstrap interval of the mean of values (P,); the prompts of a group are resampled together.

    The mean is the ratio of the groups' sums to their sizes. Bootstrap-t with its linearised standard error
    (Efron and Tibshirani 1993, ch. 12), and never narrower than Student's interval with C−1 degrees of
    freedom: the first answers to skewness, the second to heavy tails. For few groups the level is expanded as
    Hesterberg expands percentiles (2015, Am. Stat. 69:371), with 2(C−1) degrees of freedom for his C−1, as
    simulation chose. Without limits where there is but one group; of no width where the error is 0.
    Raises ValueError for a value that is not finite.
    """
    totals, sizes = _residuals(values, groups)
    mean, error = float(np.mean(values)), standard_error(values, groups)
    if not 0 < error < np.inf:
        return Interval(mean - error, mean + error, error)
    count = len(totals)
    tail = (1 - confidence) / 2
    least = student.isf(tail, count - 1)
    tail = norm.sf(student.isf(tail, 2 * (count - 1)) * np.sqrt(count / (count - 1)))
    drawn = np.concatenate(list(_studentized(totals, sizes, resamples, seed)))
    below, above = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (0.0, 0.0)
    low = mean - error * np.clip(above, least, WIDEST * least)
    high = mean + error * np.clip(-below, least, WIDEST * least)
    return Interval(float(low), float(high), error)


def _studentized(totals: Floats, sizes: Floats, resamples: int, seed: int) -> Iterator[Floats]:
    """(x̄* − x̄) / its standard error of each resample, less those that have drawn no spread at all."""
    rng = np.random.default_rng(seed)
    count = len(totals)
    spread = np.abs(totals).max()
    while resamples > 0:
        rows = min(resamples, max(1, BLOCK // count))
        resamples -= rows
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        size = times @ sizes
        shift = times @ totals / size
        # Σ_c times (total − shift · size)²
        squares = times @ totals**2 - 2 * shift * (times @ (totals * sizes)) + shift**2 * (times @ sizes**2)
        error = np.sqrt(np.maximum(squares, 0) * count / (count - 1)) / size
        some = error > 1e-6 * spread / size
        yield shift[some] / error[some]


def standard_error(values: Floats, groups: Groups = None) -> float:
    """Cluster-robust standard error of the mean of values (P,); infinite with fewer than two groups.

    √(C/(C−1) Σ_c (Σ_{i∈c} (x_i − x̄))²) / P over the C groups (Liang and Zeger 1986).
    """
    totals, _ = _residuals(values, groups)
    count = len(totals)
    if count < 2:
        return float("inf")
    return float(np.sqrt(count / (count - 1) * (totals**2).sum()) / len(values))


def clusters(prompts: int, groups: Groups = None) -> int:
    """How many groups so many prompts are of."""
    return prompts if groups is None else len(np.unique(np.asarray(groups)))


def _residuals(values: Floats, groups: Groups) -> tuple[Floats, Floats]:
    """Sums of x − x̄ over each of the C groups (C,), and how many prompts each has (C,). Raises ValueError."""
    if not len(values):
        raise ValueError("no values: there is nothing to take the mean of")
    if not np.isfinite(values).all():
        raise ValueError("a mean of values that are not all finite has no interval")
    # The mean of equal numbers may miss them by rounding.
    centred = values - values.mean() if np.ptp(values) > 0 else np.zeros(len(values))
    if groups is None:
        return centred, np.ones(len(values))
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values")
    _, rows = np.unique(np.asarray(groups), return_inverse=True)
    totals, sizes = np.bincount(rows, centred), np.bincount(rows)
    return totals.astype(np.float64), sizes.astype(np.float64)
