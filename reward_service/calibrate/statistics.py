"""Raw scores of images, grouped by prompt, to means and deviations with intervals. Pure numpy.

=========  ============================================================================================
symbol     meaning
=========  ============================================================================================
s_pi       raw score of image i of prompt p; n_p images, N in all, P prompts
μ          Σ s_pi / N
σ_within   √( Σ (s_pi − s̄_p)² / Σ (n_p − 1) ), pooled over prompts: what an advantage is measured against
σ_total    √( Σ (s_pi − μ)² / (N − 1) )
robust     1.4826 · median |s_pi − s̄_p| √(n_p / (n_p − 1)): equals σ_within where scores are normal
interval   2.5 % to 97.5 % of the statistic over resamples of whole prompts (percentile cluster bootstrap)
=========  ============================================================================================

The Bradley–Terry scale of an evaluator from people's choices between two images. Pure numpy.

P(preferred ≻ rejected) = σ(β d),  d = s_preferred − s_rejected,  β = 1/τ,  σ(x) = 1/(1 + e^(−x))

β maximises Σ w log σ(β d), a concave function. τ, in raw units, is how much better an image must score for
people to choose it 73 % of the time. β ≤ 0, or every pair ordered rightly, has no τ: that is told in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 2000
QUANTILES = (2.5, 97.5)
_MAD_TO_STD = 1.482602218505602  # 1 / Φ⁻¹(3/4)
_CHUNK_ENTRIES = 4_000_000


@dataclass(frozen=True)
class Spread:
    """What E evaluators' scores look like; intervals are (2, E): low, high; NaN where one prompt gives none.

    `within_correlation` and `total_correlation`: (E, E), of the deviations that the σ are made of.
    """

    images: int
    prompts: int
    mean: Floats
    mean_interval: Floats
    within: Floats
    within_interval: Floats
    robust_within: Floats
    total: Floats
    total_interval: Floats
    within_correlation: Floats
    total_correlation: Floats


def spread(scores: Floats, prompt: Ints, seed: int = 0, resamples: int = RESAMPLES) -> Spread:
    """Mean, deviations, their intervals and the correlations of E evaluators.

    Args:
        scores: (N, E)
        prompt: (N,) the prompt of each row, numbered 0 … P − 1 without gaps
        seed: of the resamples, which all evaluators share

    Raises:
        ValueError: no prompt has two images
    """
    counts = np.bincount(prompt).astype(np.float64)
    mean = scores.mean(axis=0)
    centred = scores - mean
    offset = _sums(centred, prompt) / counts[:, None]
    inner = centred - offset[prompt]
    freedom = float((counts - 1).sum())
    if freedom == 0:
        raise ValueError("no prompt has two images, so nothing is known about deviations within one")
    within = inner.T @ inner / freedom
    total = centred.T @ centred / (len(scores) - 1)
    shifts = _resampled(counts, offset, _sums(inner**2, prompt), seed, resamples)
    low_high = [_interval(values) for values in shifts]
    return Spread(
        images=len(scores),
        prompts=len(counts),
        mean=mean,
        mean_interval=mean + low_high[0],
        within=_deviations(within),
        within_interval=low_high[1],
        robust_within=_robust(inner, counts[prompt]),
        total=_deviations(total),
        total_interval=low_high[2],
        within_correlation=correlation(within),
        total_correlation=correlation(total),
    )


def correlation(covariance: Floats) -> Floats:
    """A covariance matrix (E, E) as Pearson correlations; NaN beside an evaluator that does not vary."""
    deviation = _deviations(covariance)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.clip(covariance / np.outer(deviation, deviation), -1.0, 1.0)
    np.fill_diagonal(found, np.where(deviation > 0, 1.0, np.nan))  # rounding left 1 − 1e-16
    return found


def resampled_counts(prompts: int, seed: int, resamples: int, width: int | None = None) -> Iterator[Floats]:
    """How often each prompt is drawn when `prompts` are drawn with replacement: (chunk, prompts) at a time.

    Args:
        width: numbers of one resample that the caller holds at once; it bounds the chunk's memory
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, _CHUNK_ENTRIES // max(prompts, width or 0, 1)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        flat = np.bincount(drawn.ravel(), minlength=size * prompts)
        yield flat.reshape(size, prompts).astype(np.float64)


def _resampled(
    counts: Floats, offset: Floats, inner_squares: Floats, seed: int, resamples: int
) -> tuple[Floats, Floats, Floats]:
    """Mean (relative to μ), within and total deviation of each resample, (B, E) each.

    Everything is linear in per-prompt sums, so a resample is a row of counts times a matrix.
    """
    sums = counts[:, None] * offset
    squares = inner_squares + sums * offset
    size = offset.shape[1]
    columns = np.column_stack([counts, counts - 1, sums, inner_squares, squares])
    means, withins, totals = [], [], []
    for drawn in resampled_counts(len(counts), seed, resamples):
        summed = drawn @ columns
        number, freedom = summed[:, :1], summed[:, 1:2]
        first, inner, second = np.split(summed[:, 2:], [size, 2 * size], axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold single images only
            means.append(first / number)
            withins.append(np.sqrt(inner / freedom))
            totals.append(np.sqrt(np.maximum(second - first**2 / number, 0.0) / (number - 1)))
    return np.concatenate(means), np.concatenate(withins), np.concatenate(totals)


def _interval(values: Floats) -> Floats:
    """(B, E) → (2, E); NaN where no resample had the statistic."""
    found = [column[np.isfinite(column)] for column in values.T]
    nothing = np.full(2, np.nan)
    return np.column_stack([np.percentile(part, QUANTILES) if len(part) else nothing for part in found])


def _robust(inner: Floats, count: Floats) -> Floats:
    several = count > 1
    factor = np.sqrt(count[several] / (count[several] - 1))[:, None]
    middle: Floats = np.median(np.abs(inner[several]) * factor, axis=0)
    return _MAD_TO_STD * middle


def _sums(values: Floats, prompt: Ints) -> Floats:
    """(N, E) → (P, E), summed by prompt."""
    return np.column_stack([np.bincount(prompt, weights=column) for column in values.T])


def _deviations(covariance: Floats) -> Floats:
    return np.sqrt(np.diag(covariance))


CHANCE_LOG_LOSS = float(np.log(2.0))
_STEPS = 100
_TOLERANCE = 1e-7
_SHALLOW = 1e-2  # β of gaps scaled to unit size; below it σ(β d) is a coin
_CHOICES_PER_CHUNK = 8


@dataclass(frozen=True)
class Preference:
    """How one evaluator agrees with people.

    `scale` is τ in raw units, or None, and `note` then says why. An end of `scale_interval` that is
    None has no bound. `accuracy`: share of the pairs ordered as people did, a tie counting half.
    `log_loss` in nats a pair; a coin has `CHANCE_LOG_LOSS`.
    """

    scale: float | None
    scale_interval: tuple[float | None, float | None] | None
    accuracy: float
    accuracy_interval: tuple[float, float]
    log_loss: float | None
    pairs: int
    prompts: int
    note: str


def fit_preference(
    gap: Floats, weight: Floats, prompt: Ints, seed: int = 0, resamples: int = RESAMPLES
) -> Preference:
    """Fit τ by maximum likelihood, with a cluster bootstrap over prompts.

    Args:
        gap: (M,) score of the preferred image less that of the rejected one
        weight: (M,) positive
        prompt: (M,) numbered 0 … P − 1 without gaps
    """
    right = (gap > 0) + 0.5 * (gap == 0)
    accuracy = float(weight @ right / weight.sum())
    unit = float(np.sqrt(weight @ gap**2 / weight.sum())) or 1.0
    scaled = gap / unit
    note = _why_no_scale(scaled, weight, accuracy)
    steepness = 0.0 if note else float(_steepness(scaled, weight[None], 1.0)[0])
    inverse, accuracies = [], []
    for drawn in resampled_counts(int(prompt.max()) + 1, seed, resamples, _CHOICES_PER_CHUNK * len(gap)):
        weights = drawn[:, prompt] * weight
        accuracies.append(weights @ right / weights.sum(axis=1))
        if not note:
            inverse.append(_steepness(scaled, weights, steepness))
    low, high = np.percentile(np.concatenate(accuracies), QUANTILES)
    return Preference(
        scale=None if note else unit / steepness,
        scale_interval=None if note else _scale_interval(np.concatenate(inverse), unit),
        accuracy=accuracy,
        accuracy_interval=(float(low), float(high)),
        log_loss=None if note else float(weight @ np.logaddexp(0.0, -steepness * scaled) / weight.sum()),
        pairs=len(gap),
        prompts=len(np.unique(prompt)),
        note=note,
    )


def _why_no_scale(gap: Floats, weight: Floats, accuracy: float) -> str:
    if not gap.any():
        return "both images of every pair score the same: there is nothing to fit"
    if accuracy <= 0.5:
        return f"no positive scale: it agrees with {accuracy:.1%} of the choices, no better than a coin"
    if weight @ gap <= 0:
        return "no positive scale: where it sees the larger differences, people chose the other image"
    if (gap >= 0).all():
        return "every pair is ordered as people chose: the scale has no lower bound; more pairs are needed"
    return ""


def _steepness(gap: Floats, weights: Floats, start: float) -> Floats:
    """β of each row of weights (B, M) over gaps (M,): 0 where it is not positive, inf where unbounded.

    Newton's method inside a bracket: a step that leaves it halves the bracket, or doubles β while it is open.
    """
    unbounded = weights @ (gap < 0) == 0
    positive = weights @ gap > 0
    low, high = np.zeros(len(weights)), np.full(len(weights), np.inf)
    beta = np.full(len(weights), max(start, _TOLERANCE))
    for _ in range(_STEPS):
        chance = 0.5 * (1.0 - np.tanh(0.5 * beta[:, None] * gap))  # σ(−β d) without overflow
        slope = (weights * chance) @ gap
        curvature = (weights * chance * (1.0 - chance)) @ gap**2
        low, high = np.where(slope > 0, beta, low), np.where(slope > 0, high, beta)
        newton = slope / np.maximum(curvature, np.finfo(float).tiny)
        settled = (np.abs(newton) <= _TOLERANCE * np.maximum(beta, _SHALLOW)) | unbounded | ~positive
        if settled.all():
            break
        step = beta + newton
        inside = (step > low) & (step < high) & (step < 10 * beta)
        bounded = np.isfinite(high)
        middle = np.where(bounded, 0.5 * (low + np.where(bounded, high, 0.0)), 2 * beta)
        beta = np.where(settled, beta, np.where(inside, step, middle))
    return np.where(positive, np.where(unbounded, np.inf, beta), 0.0)


def _scale_interval(inverse: Floats, unit: float) -> tuple[float | None, float | None]:
    # Nearest ranks: between a number and infinity there is nothing to interpolate.
    low, high = np.percentile(inverse, QUANTILES, method="nearest")
    return (unit / float(high) if np.isfinite(high) else None, unit / float(low) if low > 0 else None)
