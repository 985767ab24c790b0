"""Statistics of a recalibration as a calibration table: plain values for JSON, warnings, what is shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from reward_service import __version__
from reward_service.calibrate.score_log import Book, Key, Scored
from reward_service.calibrate.statistics import (
    CHANCE_LOG_LOSS,
    Floats,
    Preference,
    Spread,
    fit_preference,
    spread,
)
from reward_service.settings import ConfigError

Deviation = Literal["within", "total"]
Json = dict[str, Any]

FEWEST_PROMPTS, FEWEST_IMAGES = 200, 4
_DISAGREEMENT = 0.25
_CONSTANT = 1e-6  # of the mean: below it lies float32's rounding
_SHOWN = 3


def tabulate(
    book: Book,
    rows: Sequence[Scored],
    choices: Sequence[tuple[Key, Key, float]],
    *,
    std: Deviation,
    seed: int,
    resamples: int,
) -> Json:
    """A calibration table; its numbers depend on what is scored, not on the order or the files it came in.

    Args:
        rows: the images that mean and deviations are of
        choices: keys of preferred and rejected images with weights

    Raises:
        ConfigError: the scores do not determine a scale
    """
    rows = sorted(rows, key=lambda row: (row.group, row.prompt, row.image))
    raw = np.array([row.raw for row in rows])
    prompt = np.unique([row.group for row in rows], return_inverse=True)[1]
    try:
        found = spread(raw, prompt, seed, resamples)
    except ValueError as error:
        raise ConfigError(f"{error}; give each prompt several images, best {FEWEST_IMAGES} or more") from None
    names = tuple(book.fingerprints)
    chosen = found.within if std == "within" else found.total
    _check_varied(names, found.mean, chosen)
    table = _heading(found, std, seed, resamples)
    table["evaluators"] = {
        name: _row(found, column, float(chosen[column])) | {"fingerprint": book.fingerprints[name]}
        for column, name in enumerate(names)
    }
    table["correlation"] = {
        "within_prompt": _matrix(names, found.within_correlation),
        "total": _matrix(names, found.total_correlation),
    }
    for name, preference in _preferences(book, choices, seed, resamples).items():
        table["evaluators"][name]["preference"] = asdict(preference)
    table["warnings"] = _warnings(names, found, rows)
    return table


def _heading(found: Spread, std: Deviation, seed: int, resamples: int) -> Json:
    kind = "pooled within-prompt deviation" if std == "within" else "deviation over all images"
    counts = f"{found.images} images of {found.prompts} prompts"
    provenance = (
        f"reward-service calibrate {__version__}, {datetime.now(UTC).date()}: {counts}; std is the {kind}"
    )
    return {
        "provisional": False,
        "provenance": provenance,
        "pictures": found.images,
        "prompts": found.prompts,
        "std": "within_prompt" if std == "within" else "total",
        "intervals": f"95 %, percentile cluster bootstrap over prompts, {resamples} resamples, seed {seed}",
    }


def _row(found: Spread, column: int, std: float) -> Json:
    return {
        "mean": float(found.mean[column]),
        "std": std,
        "mean_interval": _ends(found, found.mean_interval, column),
        "std_within_prompt": float(found.within[column]),
        "std_within_prompt_interval": _ends(found, found.within_interval, column),
        "std_within_prompt_robust": float(found.robust_within[column]),
        "std_total": float(found.total[column]),
        "std_total_interval": _ends(found, found.total_interval, column),
    }


def _ends(found: Spread, interval: Floats, column: int) -> list[float] | None:
    """None where resamples say nothing: one prompt is always drawn as itself."""
    low, high = map(float, interval[:, column])
    return [low, high] if found.prompts > 1 and math.isfinite(low) else None


def _matrix(names: Sequence[str], values: Floats) -> dict[str, dict[str, float | None]]:
    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    return {a: {b: number(values[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)}


def _check_varied(names: Sequence[str], mean: Floats, std: Floats) -> None:
    for name, centre, deviation in zip(names, mean, std, strict=True):
        if deviation <= _CONSTANT * abs(centre):
            message = f"every image of a prompt scores {centre:.6g}, so the deviation is 0 and scales nothing"
            raise ConfigError(f"evaluator {name}: {message}; list images that differ")


def _preferences(
    book: Book, choices: Sequence[tuple[Key, Key, float]], seed: int, resamples: int
) -> Mapping[str, Preference]:
    if not choices:
        return {}
    choices = sorted(choices)
    sides = [np.array([book.rows[key].raw for key in keys]) for keys in list(zip(*choices, strict=True))[:2]]
    gaps, weight = sides[0] - sides[1], np.array([choice[2] for choice in choices])
    groups = [book.rows[preferred].group for preferred, _, _ in choices]
    prompt = np.unique(groups, return_inverse=True)[1]
    return {
        name: fit_preference(gaps[:, column], weight, prompt, seed, resamples)
        for column, name in enumerate(book.fingerprints)
    }


def _warnings(names: Sequence[str], found: Spread, rows: Sequence[Scored]) -> list[str]:
    images = Counter(row.group for row in rows)
    single = [group for group, count in images.items() if count == 1]
    few = sum(count < FEWEST_IMAGES for count in images.values())
    cut = sum(row.truncated for row in rows)
    lines = []
    if found.prompts < FEWEST_PROMPTS:
        lines.append(f"{found.prompts} prompts; {FEWEST_PROMPTS} or more make the scale steady")
    if few:
        lines.append(f"{few} of {found.prompts} prompts have fewer than {FEWEST_IMAGES} images")
    if single:
        shown = ", ".join(repr(group[:60]) for group in single[:_SHOWN]) + (
            " ..." if len(single) > _SHOWN else ""
        )
        lines.append(f"{len(single)} prompts have one image and add nothing to the within-prompt σ: {shown}")
    if cut:
        lines.append(
            f"the prompts of {cut} images are longer than an evaluator reads; their ends were cut off"
        )
    for name, plain, robust in zip(names, found.within, found.robust_within, strict=True):
        if abs(robust / plain - 1) > _DISAGREEMENT if plain else robust:
            reason = "a few images or prompts dominate, or many score alike"
            lines.append(f"{name}: robust within-prompt σ {robust:.4g} against plain {plain:.4g}: {reason}")
    return lines


# What a person sees -----------------------------------------------------------------------------------


def print_table(table: Json) -> None:
    """Print scales, correlations, and preferences if there are any."""
    rows: dict[str, Json] = table["evaluators"]
    console = Console()
    console.print(_scales(rows))
    console.print(_correlations(table["correlation"]))
    if any("preference" in row for row in rows.values()):
        console.print(_agreement(rows))


def _scales(rows: Mapping[str, Json]) -> Table:
    scales = Table(
        "evaluator", "mean", "σ within prompts", "robust", "σ total", title="Raw scores, 95 % intervals"
    )
    for name, row in rows.items():
        scales.add_row(
            name,
            f"{row['mean']:.4f} {_span(row['mean_interval'])}",
            f"{row['std_within_prompt']:.4f} {_span(row['std_within_prompt_interval'])}",
            f"{row['std_within_prompt_robust']:.4f}",
            f"{row['std_total']:.4f} {_span(row['std_total_interval'])}",
        )
    return scales


def _correlations(matrices: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Table:
    names = list(matrices["total"])
    shown = Table("", *names, title="Correlation within prompts (total)")
    for a in names:
        cells = [(matrices["within_prompt"][a][b], matrices["total"][a][b]) for b in names]
        shown.add_row(a, *(f"{_signed(within)} ({_signed(total)})" for within, total in cells))
    return shown


def _agreement(rows: Mapping[str, Json]) -> Table:
    title = f"People's choices (a coin: accuracy 50 %, log-loss {CHANCE_LOG_LOSS:.3f})"
    shown = Table("evaluator", "accuracy", "log-loss", "scale τ", title=title)
    for name, row in rows.items():
        found = row["preference"]
        low, high = found["accuracy_interval"]
        log_loss = "" if found["log_loss"] is None else f"{found['log_loss']:.3f}"
        scale = found["note"] or f"{found['scale']:.4f} {_span(found['scale_interval'])}"
        shown.add_row(name, f"{found['accuracy']:.1%} [{low:.1%}, {high:.1%}]", log_loss, scale)
    return shown


def _span(interval: Sequence[float | None] | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"[{'0' if low is None else f'{low:.3g}'}, {'∞' if high is None else f'{high:.3g}'}]"


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:+.2f}"
