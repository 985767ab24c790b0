"""Calibration tables: built from raw scores as plain values for JSON, and printed for the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from rich.table import Table

from reward_service import __version__
from reward_service.calibrate.inputs import PairKey
from reward_service.calibrate.score_log import ScoredImage, ScoreSet
from reward_service.calibrate.statistics import (
    CHANCE_LOG_LOSS,
    Floats,
    PreferenceFit,
    ScoreStatistics,
    fit_preference,
    score_statistics,
)
from reward_service.runtime.console import open_console
from reward_service.settings import ConfigError

StdKind = Literal["within", "total"]
Json = dict[str, Any]

_MIN_PROMPTS, _MIN_IMAGES_PER_PROMPT = 200, 4
_MAX_ROBUST_DIFFERENCE = 0.25
_MIN_RELATIVE_STD = 1e-6  # of the mean: smaller deviations are rounding errors of float32
_SHOWN_PROMPTS, _SHOWN_CHARS = 3, 60


def build_table(
    scores: ScoreSet,
    rows: Sequence[ScoredImage],
    preferences: Sequence[tuple[PairKey, PairKey, float]],
    *,
    std: StdKind,
    seed: int,
    resamples: int,
) -> Json:
    """Return a calibration table; it does not depend on the order of the images or on their split into files.

    Args:
        scores: all scored images
        rows: those that mean and deviations are computed from
        preferences: keys of the preferred and of the rejected image, and the weight
        std: which deviation becomes `std`
        seed: seed of the bootstrap
        resamples: number of resamples

    Raises:
        ConfigError: the scores do not determine a scale
    """
    rows = sorted(rows, key=lambda row: (row.group, row.prompt, row.image))
    raw = np.array([row.raw for row in rows])
    prompt = np.unique([row.group for row in rows], return_inverse=True)[1]
    try:
        statistics = score_statistics(raw, prompt, seed, resamples)
    except ValueError as error:
        raise ConfigError(
            f"{error}; give each prompt several images, preferably {_MIN_IMAGES_PER_PROMPT} or more"
        ) from None
    names = tuple(scores.fingerprints)
    stds = statistics.within if std == "within" else statistics.total
    _check_variation(names, statistics.mean, stds)
    table = _heading(statistics, std, seed, resamples)
    table["evaluators"] = {
        name: _row(statistics, column, float(stds[column])) | {"fingerprint": scores.fingerprints[name]}
        for column, name in enumerate(names)
    }
    table["correlation"] = {
        "within_prompt": _matrix(names, statistics.within_correlation),
        "total": _matrix(names, statistics.total_correlation),
    }
    for name, preference in _fit_preferences(scores, preferences, seed, resamples).items():
        table["evaluators"][name]["preference"] = asdict(preference)
    table["warnings"] = _warnings(names, statistics, rows)
    return table


def _heading(statistics: ScoreStatistics, std: StdKind, seed: int, resamples: int) -> Json:
    kind = "pooled within-prompt deviation" if std == "within" else "deviation over all images"
    counts = f"{statistics.images} images of {statistics.prompts} prompts"
    provenance = (
        f"reward-service calibrate {__version__}, {datetime.now(UTC).date()}: {counts}; std is the {kind}"
    )
    return {
        "provisional": False,
        "provenance": provenance,
        "pictures": statistics.images,
        "prompts": statistics.prompts,
        "std": "within_prompt" if std == "within" else "total",
        "intervals": f"95 %, percentile cluster bootstrap over prompts, {resamples} resamples, seed {seed}",
    }


def _row(statistics: ScoreStatistics, column: int, std: float) -> Json:
    return {
        "mean": float(statistics.mean[column]),
        "std": std,
        "mean_interval": _ends(statistics, statistics.mean_interval, column),
        "std_within_prompt": float(statistics.within[column]),
        "std_within_prompt_interval": _ends(statistics, statistics.within_interval, column),
        "std_within_prompt_robust": float(statistics.robust_within[column]),
        "std_total": float(statistics.total[column]),
        "std_total_interval": _ends(statistics, statistics.total_interval, column),
    }


def _ends(statistics: ScoreStatistics, interval: Floats, column: int) -> list[float] | None:
    """Return low and high, or None if there are none: one prompt gives only one resample."""
    low, high = map(float, interval[:, column])
    return [low, high] if statistics.prompts > 1 and math.isfinite(low) else None


def _matrix(names: Sequence[str], values: Floats) -> dict[str, dict[str, float | None]]:
    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    return {a: {b: number(values[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}


def _check_variation(names: Sequence[str], means: Floats, stds: Floats) -> None:
    for name, mean, std in zip(names, means, stds, strict=True):
        if std <= _MIN_RELATIVE_STD * abs(mean):
            message = f"every image of a prompt scores {mean:.6g}, so the deviation is 0 and cannot scale z"
            raise ConfigError(f"evaluator {name}: {message}; list images that differ")


def _fit_preferences(
    scores: ScoreSet, preferences: Sequence[tuple[PairKey, PairKey, float]], seed: int, resamples: int
) -> Mapping[str, PreferenceFit]:
    if not preferences:
        return {}
    preferred, rejected, weights = zip(*sorted(preferences), strict=True)
    gaps = np.array([scores.rows[key].raw for key in preferred])
    gaps -= np.array([scores.rows[key].raw for key in rejected])
    groups = [scores.rows[key].group for key in preferred]
    prompt = np.unique(groups, return_inverse=True)[1]
    return {
        name: fit_preference(gaps[:, column], np.array(weights), prompt, seed, resamples)
        for column, name in enumerate(scores.fingerprints)
    }


def _warnings(names: Sequence[str], statistics: ScoreStatistics, rows: Sequence[ScoredImage]) -> list[str]:
    images = Counter(row.group for row in rows)
    single = [group for group, count in images.items() if count == 1]
    few = sum(count < _MIN_IMAGES_PER_PROMPT for count in images.values())
    truncated = sum(row.truncated for row in rows)
    lines = []
    if statistics.prompts < _MIN_PROMPTS:
        lines.append(f"{statistics.prompts} prompts; {_MIN_PROMPTS} or more make the scale reliable")
    if few:
        lines.append(f"{few} of {statistics.prompts} prompts have fewer than {_MIN_IMAGES_PER_PROMPT} images")
    if single:
        shown = ", ".join(repr(group[:_SHOWN_CHARS]) for group in single[:_SHOWN_PROMPTS])
        more = " ..." if len(single) > _SHOWN_PROMPTS else ""
        lines.append(
            f"{len(single)} prompts have one image and add nothing to the within-prompt σ: {shown}{more}"
        )
    if truncated:
        lines.append(
            f"the prompts of {truncated} images exceed an evaluator's limit; their ends were cut off"
        )
    for name, plain, robust in zip(names, statistics.within, statistics.robust_within, strict=True):
        if abs(robust / plain - 1) > _MAX_ROBUST_DIFFERENCE if plain else robust:
            reason = "a few images or prompts dominate, or many score alike"
            lines.append(f"{name}: robust within-prompt σ {robust:.4g}, plain {plain:.4g}: {reason}")
    return lines


def print_table(table: Json) -> None:
    """Print scales, correlations, and preferences if there are any."""
    rows: dict[str, Json] = table["evaluators"]
    console = open_console()
    console.print(_scale_table(rows))
    console.print(_correlation_table(table["correlation"]))
    if any("preference" in row for row in rows.values()):
        console.print(_preference_table(rows))


def _scale_table(rows: Mapping[str, Json]) -> Table:
    table = Table(
        "evaluator", "mean", "σ within prompts", "robust", "σ total", title="Raw scores, 95 % intervals"
    )
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['mean']:.4f} {_bounds(row['mean_interval'])}",
            f"{row['std_within_prompt']:.4f} {_bounds(row['std_within_prompt_interval'])}",
            f"{row['std_within_prompt_robust']:.4f}",
            f"{row['std_total']:.4f} {_bounds(row['std_total_interval'])}",
        )
    return table


def _correlation_table(matrices: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Table:
    names = list(matrices["total"])
    table = Table("", *names, title="Correlation within prompts (total)")
    for a in names:
        cells = [(matrices["within_prompt"][a][b], matrices["total"][a][b]) for b in names]
        table.add_row(a, *(f"{_signed(within)} ({_signed(total)})" for within, total in cells))
    return table


def _preference_table(rows: Mapping[str, Json]) -> Table:
    title = f"Human preferences (chance: accuracy 50 %, log loss {CHANCE_LOG_LOSS:.3f})"
    table = Table("evaluator", "accuracy", "log loss", "scale τ", title=title)
    for name, row in rows.items():
        fit = row["preference"]
        low, high = fit["accuracy_interval"]
        log_loss = "" if fit["log_loss"] is None else f"{fit['log_loss']:.3f}"
        scale = fit["note"] or f"{fit['scale']:.4f} {_bounds(fit['scale_interval'])}"
        table.add_row(name, f"{fit['accuracy']:.1%} [{low:.1%}, {high:.1%}]", log_loss, scale)
    return table


def _bounds(interval: Sequence[float | None] | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"[{'0' if low is None else f'{low:.3g}'}, {'∞' if high is None else f'{high:.3g}'}]"


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:+.2f}"
