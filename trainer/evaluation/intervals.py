"""Confidence intervals of a mean over prompts, if prompts of one group are not independent.

docs/statistics.md explains the choice of this interval over a plainer one, and reports its measured coverage.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

Floats = NDArray[np.float64]
Groups = Sequence[int] | NDArray[np.int64] | None  # (P,) group of each prompt; None: each its own

MAX_WIDTH = 3.0  # times Student's interval: bounds the effect of resamples almost without spread
MAX_DRAWS = 1 << 22  # random numbers in memory at a time


class Interval(NamedTuple):
    """Bounds of a mean, and its cluster-robust standard error."""

    low: float
    high: float
    standard_error: float


def bootstrap_interval(
    values: Floats, groups: Groups = None, *, confidence: float, resamples: int, seed: int
) -> Interval:
    """Return the cluster-bootstrap interval of the mean of values (P,); groups are resampled as a whole.

    The mean is the ratio of the groups' sums to their sizes. Bootstrap-t with its linearised standard error
    (Efron and Tibshirani 1993, ch. 12), and never narrower than Student's interval with C−1 degrees of
    freedom: the first handles skewness, the second heavy tails. For few groups the level is expanded as
    Hesterberg expands percentiles (2015, Am. Stat. 69:371), with 2(C−1) degrees of freedom for his C−1, as
    simulation chose. Infinite for a single group; of no width if the error is 0.

    Args:
        values: (P,) one value per prompt.
        groups: (P,) group of each prompt.
        confidence: Probability that the interval covers the true mean.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: There are no values, or one is not finite.
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
    low = mean - error * np.clip(above, least, MAX_WIDTH * least)
    high = mean + error * np.clip(-below, least, MAX_WIDTH * least)
    return Interval(float(low), float(high), error)


def _studentized(totals: Floats, sizes: Floats, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield (x̄* − x̄) / its standard error of each resample, except those without any spread."""
    rng = np.random.default_rng(seed)
    count = len(totals)
    spread = np.abs(totals).max()
    while resamples > 0:
        rows = min(resamples, max(1, MAX_DRAWS // count))
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
    """Return the cluster-robust standard error of the mean of values (P,); infinite for a single group.

    √(C/(C−1) Σ_c (Σ_{i∈c} (x_i − x̄))²) / P over the C groups (Liang and Zeger 1986).
    """
    totals, _ = _residuals(values, groups)
    count = len(totals)
    if count < 2:
        return float("inf")
    return float(np.sqrt(count / (count - 1) * (totals**2).sum()) / len(values))


def count_groups(prompts: int, groups: Groups = None) -> int:
    """Return the number of groups of `prompts` prompts."""
    return prompts if groups is None else len(np.unique(np.asarray(groups)))


def _residuals(values: Floats, groups: Groups) -> tuple[Floats, Floats]:
    """Return the sum of x − x̄ in each of the C groups (C,), and the sizes of the groups (C,)."""
    if not len(values):
        raise ValueError("no values: there is no mean to compute")
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite: the mean has no interval")
    # The mean of equal numbers may miss them by rounding.
    centred = values - values.mean() if np.ptp(values) > 0 else np.zeros(len(values))
    if groups is None:
        return centred, np.ones(len(values))
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values")
    _, rows = np.unique(np.asarray(groups), return_inverse=True)
    totals, sizes = np.bincount(rows, centred), np.bincount(rows)
    return totals.astype(np.float64), sizes.astype(np.float64)
