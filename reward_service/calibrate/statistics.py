"""Statistics of a calibration: spread of raw scores, and scales fitted to human preferences. Pure numpy.

Spread of scores that are grouped by prompt:

=========  ============================================================================================
symbol     meaning
=========  ============================================================================================
s_pi       raw score of image i of prompt p; n_p images, N in total, P prompts
μ          Σ s_pi / N
σ_within   √( Σ (s_pi − s̄_p)² / Σ (n_p − 1) ), pooled over prompts: the unit of advantages
σ_total    √( Σ (s_pi − μ)² / (N − 1) )
robust     1.4826 · median |s_pi − s̄_p| √(n_p / (n_p − 1)): equals σ_within for normal scores
interval   2.5 % to 97.5 % of the statistic over resamples of whole prompts (percentile cluster bootstrap)
=========  ============================================================================================

Bradley-Terry scale of an evaluator from human preferences between two images:

P(preferred ≻ rejected) = σ(β d),  d = s_preferred − s_rejected,  β = 1/τ,  σ(x) = 1/(1 + e^(−x))

β maximizes Σ w log σ(β d), a concave function. τ, in raw units, is the score difference at which people
choose the better image 73 % of the time. Without a finite β > 0 there is no τ, and a note gives the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 2000
#: Log loss of random choices, in nats.
CHANCE_LOG_LOSS = float(np.log(2.0))
_QUANTILES = (2.5, 97.5)
_MAD_TO_STD = 1.482602218505602  # 1 / Φ⁻¹(3/4)
_CHUNK_ENTRIES = 4_000_000
_ENTRIES_PER_GAP = 8  # arrays that the fit holds at once, per resample and preference
_MAX_NEWTON_STEPS = 100
_TOLERANCE = 1e-7
_FLAT_BETA = 1e-2  # for gaps scaled to unit size: at smaller β, σ(β d) is close to 1/2


@dataclass(frozen=True)
class ScoreStatistics:
    """Statistics of E evaluators' scores, (E,) each.

    Intervals are (2, E): low, high; NaN if one prompt alone determines none. `within_correlation` and
    `total_correlation`: (E, E), of the deviations behind σ_within and σ_total.
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


def score_statistics(
    scores: Floats, prompt: Ints, seed: int = 0, resamples: int = RESAMPLES
) -> ScoreStatistics:
    """Return mean, deviations, their intervals and the correlations of E evaluators.

    Args:
        scores: raw scores (N, E)
        prompt: (N,) the prompt of each row, numbered 0 … P − 1 without gaps
        seed: seed of the resamples, which all evaluators share
        resamples: number of resamples

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
        raise ValueError("no prompt has two images, so the deviation within prompts is undefined")
    within = inner.T @ inner / freedom
    total = centred.T @ centred / (len(scores) - 1)
    resampled = _resampled_statistics(counts, offset, _sums(inner**2, prompt), seed, resamples)
    mean_shift, within_interval, total_interval = map(_interval, resampled)
    return ScoreStatistics(
        images=len(scores),
        prompts=len(counts),
        mean=mean,
        mean_interval=mean + mean_shift,
        within=_deviations(within),
        within_interval=within_interval,
        robust_within=_robust(inner, counts[prompt]),
        total=_deviations(total),
        total_interval=total_interval,
        within_correlation=correlation(within),
        total_correlation=correlation(total),
    )


def correlation(covariance: Floats) -> Floats:
    """Return the Pearson correlations of a covariance matrix (E, E); NaN for a constant evaluator."""
    deviation = _deviations(covariance)
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.clip(covariance / np.outer(deviation, deviation), -1.0, 1.0)
    np.fill_diagonal(matrix, np.where(deviation > 0, 1.0, np.nan))  # rounding left 1 − 1e-16
    return matrix


def resampled_counts(prompts: int, seed: int, resamples: int, width: int | None = None) -> Iterator[Floats]:
    """Yield the number of occurrences of each prompt in bootstrap resamples: (chunk, prompts) at a time.

    Args:
        prompts: number of prompts, also in each resample
        seed: seed of the resamples, which do not depend on the size of the chunks
        resamples: number of resamples in all chunks
        width: numbers per resample that the calling code holds at once; bounds the chunk's memory
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, _CHUNK_ENTRIES // max(prompts, width or 0, 1)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        sampled = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        flat = np.bincount(sampled.ravel(), minlength=size * prompts)
        yield flat.reshape(size, prompts).astype(np.float64)


def _resampled_statistics(
    counts: Floats, offset: Floats, inner_squares: Floats, seed: int, resamples: int
) -> tuple[Floats, Floats, Floats]:
    """Return mean (relative to μ), σ_within and σ_total of each of B resamples, (B, E) each.

    All sums are linear in per-prompt sums, so a resample is a row of counts times a matrix.
    """
    sums = counts[:, None] * offset
    squares = inner_squares + sums * offset
    evaluators = offset.shape[1]
    columns = np.column_stack([counts, counts - 1, sums, inner_squares, squares])
    means, withins, totals = [], [], []
    for weights in resampled_counts(len(counts), seed, resamples):
        summed = weights @ columns
        number, freedom = summed[:, :1], summed[:, 1:2]
        first, inner, second = np.split(summed[:, 2:], [evaluators, 2 * evaluators], axis=1)
        with np.errstate(
            invalid="ignore", divide="ignore"
        ):  # a resample may have prompts with single images only
            means.append(first / number)
            withins.append(np.sqrt(inner / freedom))
            totals.append(np.sqrt(np.maximum(second - first**2 / number, 0.0) / (number - 1)))
    return np.concatenate(means), np.concatenate(withins), np.concatenate(totals)


def _interval(values: Floats) -> Floats:
    """Return the interval (2, E) of B resamples (B, E); NaN if the statistic is undefined in all."""
    finite = [column[np.isfinite(column)] for column in values.T]
    undefined = np.full(2, np.nan)
    return np.column_stack([np.percentile(part, _QUANTILES) if len(part) else undefined for part in finite])


def _robust(inner: Floats, count: Floats) -> Floats:
    grouped = count > 1
    factor = np.sqrt(count[grouped] / (count[grouped] - 1))[:, None]
    median: Floats = np.median(np.abs(inner[grouped]) * factor, axis=0)
    return _MAD_TO_STD * median


def _sums(values: Floats, prompt: Ints) -> Floats:
    """Return the sums by prompt (P, E) of values (N, E)."""
    return np.column_stack([np.bincount(prompt, weights=column) for column in values.T])


def _deviations(covariance: Floats) -> Floats:
    return np.sqrt(np.diag(covariance))


@dataclass(frozen=True)
class PreferenceFit:
    """Agreement of one evaluator with human preferences.

    Attributes:
        scale: τ in raw units; None if there is none, and `note` gives the reason
        scale_interval: its interval; an end that is None is unbounded
        accuracy: share of the pairs ordered as people did; a tie counts half
        accuracy_interval: its interval
        log_loss: in nats per pair; random choices have `CHANCE_LOG_LOSS`
        pairs: number of pairs
        prompts: number of prompts
        note: reason for a missing scale; empty otherwise
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
) -> PreferenceFit:
    """Fit τ by maximum likelihood, with a cluster bootstrap over prompts.

    Args:
        gap: (M,) score of the preferred image minus that of the rejected one
        weight: (M,) positive
        prompt: (M,) numbered 0 … P − 1 without gaps
        seed: seed of the resamples
        resamples: number of resamples
    """
    correct = (gap > 0) + 0.5 * (gap == 0)
    accuracy = float(weight @ correct / weight.sum())
    unit = float(np.sqrt(weight @ gap**2 / weight.sum())) or 1.0
    scaled = gap / unit
    note = _reason_for_no_scale(scaled, weight, accuracy)
    beta = 0.0 if note else float(_fit_beta(scaled, weight[None], 1.0)[0])
    betas, accuracies = [], []
    for counts in resampled_counts(int(prompt.max()) + 1, seed, resamples, _ENTRIES_PER_GAP * len(gap)):
        weights = counts[:, prompt] * weight
        accuracies.append(weights @ correct / weights.sum(axis=1))
        if not note:
            betas.append(_fit_beta(scaled, weights, beta))
    low, high = np.percentile(np.concatenate(accuracies), _QUANTILES)
    return PreferenceFit(
        scale=None if note else unit / beta,
        scale_interval=None if note else _scale_interval(np.concatenate(betas), unit),
        accuracy=accuracy,
        accuracy_interval=(float(low), float(high)),
        log_loss=None if note else float(weight @ np.logaddexp(0.0, -beta * scaled) / weight.sum()),
        pairs=len(gap),
        prompts=len(np.unique(prompt)),
        note=note,
    )


def _reason_for_no_scale(gap: Floats, weight: Floats, accuracy: float) -> str:
    if not gap.any():
        return "no scale: both images of every pair score the same"
    if accuracy <= 0.5:
        return f"no positive scale: it agrees with {accuracy:.1%} of the preferences, no better than chance"
    if weight @ gap <= 0:
        return "no positive scale: for the larger differences in score, people preferred the other image"
    if (gap >= 0).all():
        return "no scale: every pair is ordered correctly, which gives no lower bound; more pairs are needed"
    return ""


def _fit_beta(gap: Floats, weights: Floats, start: float) -> Floats:
    """Return β of each row of weights (B, M) for gaps (M,): 0 if it is not positive, inf if unbounded.

    Newton's method in a bracket: a step out of it halves the bracket, or doubles β if it has no upper end.
    """
    unbounded = weights @ (gap < 0) == 0
    positive = weights @ gap > 0
    low, high = np.zeros(len(weights)), np.full(len(weights), np.inf)
    beta = np.full(len(weights), max(start, _TOLERANCE))
    for _ in range(_MAX_NEWTON_STEPS):
        chance = 0.5 * (1.0 - np.tanh(0.5 * beta[:, None] * gap))  # σ(−β d) without overflow
        slope = (weights * chance) @ gap
        curvature = (weights * chance * (1.0 - chance)) @ gap**2
        low, high = np.where(slope > 0, beta, low), np.where(slope > 0, high, beta)
        newton = slope / np.maximum(curvature, np.finfo(float).tiny)
        converged = (np.abs(newton) <= _TOLERANCE * np.maximum(beta, _FLAT_BETA)) | unbounded | ~positive
        if converged.all():
            break
        step = beta + newton
        inside = (step > low) & (step < high) & (step < 10 * beta)
        bounded = np.isfinite(high)
        middle = np.where(bounded, 0.5 * (low + np.where(bounded, high, 0.0)), 2 * beta)
        beta = np.where(converged, beta, np.where(inside, step, middle))
    return np.where(positive, np.where(unbounded, np.inf, beta), 0.0)


def _scale_interval(betas: Floats, unit: float) -> tuple[float | None, float | None]:
    # Nearest ranks: nothing can be interpolated between a number and infinity.
    low, high = np.percentile(betas, _QUANTILES, method="nearest")
    return (unit / float(high) if np.isfinite(high) else None, unit / float(low) if low > 0 else None)
