"""Comparison of runs side by side, as far as they can be compared.

Gains of two runs are comparable only if the same evaluators scored the same prompts, generated in the same
way from the same base. Runs that differ in any of these are shown apart, with a notice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.config import ConfigError, EvaluationConfig
from trainer.evaluation.comparison import COMPOSITE, Measurement, compare
from trainer.report import charts
from trainer.report.charts import Line
from trainer.report.page import Chart, Report, Shot, attempt, choose, composites, shots, write_page
from trainer.report.provenance import PLACES
from trainer.report.report import as_bar, collect, gains_over_time
from trainer.report.run_data import (
    GainRow,
    RunData,
    composite_of,
    items,
    mapping,
    row,
    shown,
    signed,
    texts,
    whole,
)

COMPARE_FILE = "compare.html"
EACH = 2  # prompts of each kind
GENERATION = ("stage", "seed", "images_per_prompt")  # settings of the evaluation that decide on the images


@dataclass
class Entry:
    """One run or experiment."""

    label: str
    report: Report
    run_data: RunData  # the measured run: an experiment's final fit
    basis: dict[str, Any]
    base: Measurement | None = None
    tuned: Measurement | None = None

    @property
    def rows(self) -> dict[str, GainRow]:
        """Gains by name."""
        return {it.name: it for it in self.report.tables[0].rows} if self.report.tables else {}


class PromptImages(NamedTuple):
    """Images of a prompt by the base and by each run."""

    prompt: str
    rows: tuple[tuple[str, tuple[Shot, ...]], ...]


@dataclass
class Comparable:
    """Runs that can be compared with each other."""

    entries: list[Entry]
    evaluators: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    against: str = ""
    differences: list[GainRow] = field(default_factory=list)
    images: list[tuple[str, list[PromptImages]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class ComparisonPage:
    """Content of the page."""

    headline: str
    notices: list[str]
    parts: list[Comparable]
    settings: list[tuple[str, list[str]]]
    labels: list[str]
    unread: list[str]


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write the page and return its path.

    Raises:
        ConfigError: fewer than two runs
        StorageError: a folder is not that of a run or an experiment
    """
    if len({run.resolve() for run in runs}) < 2:
        raise ConfigError("report --compare: name at least two different runs")
    write_page(out, "compare.html.jinja", page=side_by_side(runs))
    return out


def side_by_side(runs: Sequence[Path]) -> ComparisonPage:
    """Read and compare the runs.

    Raises:
        StorageError: a folder is not that of a run or an experiment
    """
    labels = _labels(runs)
    entries = [_entry(path, label) for path, label in zip(runs, labels, strict=True)]
    parts = [_part(number, members) for number, members in enumerate(_comparable_groups(entries))]
    return ComparisonPage(
        headline=_headline(parts),
        notices=_notices(parts),
        parts=parts,
        settings=_settings(entries),
        labels=labels,
        unread=[f"{it.label}: {note}" for it in entries for note in it.report.notes],
    )


def _labels(runs: Sequence[Path]) -> list[str]:
    """Return the shortest suffixes of the paths that are distinct."""
    parts = [path.resolve().parts for path in runs]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(it[-length:]) for it in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _entry(path: Path, label: str) -> Entry:
    report = collect(path)
    outer = RunData(path)
    run_data = (outer.within("final") or outer) if outer.is_experiment else outer
    entry = Entry(label, report, run_data, _basis(outer, run_data))
    entry.base, entry.tuned = run_data.measurement("base.npz"), run_data.measurement("tuned.npz")
    return entry


# ------------------------------------------------------------------------------------- comparability


def _basis(outer: RunData, run_data: RunData) -> dict[str, Any]:
    """Return what two runs must share for their gains to be comparable; an unknown equals nothing."""
    unknown = f"unknown ({outer.path})"
    config = run_data.config or outer.config
    evaluation, karlo = mapping(config.get("evaluation")), mapping(config.get("karlo"))
    model = {key: Path(str(it)).name if key == "path" else it for key, it in karlo.items()}
    sampling = {key: it for key, it in mapping(config.get("sampling")).items() if key != "micro_batch"}
    generation = {key: evaluation.get(key) for key in GENERATION}
    return {
        "the evaluators": run_data.identity or outer.identity or unknown,
        "the prompts": list(texts(run_data.prompts.get("validation"))) or unknown,
        "the weights of the composite": run_data.weights or unknown,
        "the base model": model or unknown,
        "how images are generated": sampling | generation if config else unknown,
    }


def _comparable_groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    groups: list[list[Entry]] = []
    for entry in entries:
        for group in groups:
            if group[0].basis == entry.basis:
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _notices(parts: Sequence[Comparable]) -> list[str]:
    notices = []
    for one, other in combinations(parts, 2):
        a, b = one.entries[0], other.entries[0]
        aspects = [aspect for aspect in a.basis if a.basis[aspect] != b.basis[aspect]]
        names = [" and ".join(it.label for it in part.entries) for part in (one, other)]
        details = [_detail(aspect, a.basis[aspect], b.basis[aspect]) for aspect in aspects]
        notices.append(f"{names[0]} against {names[1]}: different are {'; '.join(details)}.")
    return notices


def _detail(aspect: str, a: object, b: object) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        return (
            f"{aspect} ({', '.join(f'{key}: {shown(a.get(key))} and {shown(b.get(key))}' for key in keys)})"
        )
    if isinstance(a, list) and isinstance(b, list):
        return f"{aspect} ({len(a)} and {len(b)}, {len(set(a) & set(b))} in both)"
    return f"{aspect} ({', '.join(it for it in (a, b) if isinstance(it, str)) or 'unknown for one'})"


def _headline(parts: Sequence[Comparable]) -> str:
    if len(parts) > 1:
        return "These runs cannot all be compared: they are shown apart, and the notice says why."
    clear = [it for it in parts[0].differences if it.verdict != "unclear"]
    if not parts[0].differences:
        return "The same evaluators, prompts and random streams: these runs can be compared."
    if not clear:
        return f"No clear difference from {parts[0].against}: every interval includes 0."
    best = max(clear, key=lambda it: it.difference or 0.0)
    first, size = parts[0].against, f"{abs(best.difference or 0.0):.3f}"
    if best.verdict == "falls":
        return f"None is better than {first}; {best.name} is worse by {size}\u00a0σ ({best.interval})."
    return f"{best.name} is better than {first}, by {size}\u00a0σ ({best.interval})."


def _settings(entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ, apart from paths and logging."""
    held = [it.report.settings for it in entries]
    keys = dict.fromkeys(key for settings in held for key in settings)
    lines = [(key, [shown(it[key]) if key in it else "not set" for it in held]) for key in keys]
    places = ("name", "runs_dir", *(it for it in PLACES if it == "logging"))
    return [line for line in lines if len(set(line[1])) > 1 and line[0].split(".")[0] not in places]


# ------------------------------------------------------------------------------------------- sections


def _part(number: int, entries: list[Entry]) -> Comparable:
    part = Comparable(entries)
    part.evaluators = list(dict.fromkeys(name for it in entries for name in it.rows if name != COMPOSITE))
    attempt(part.notes, "charts", _add_charts, part, number)
    attempt(part.notes, "differences between the runs", _add_differences, part, number)
    attempt(part.notes, "images", _add_images, part)
    return part


def _add_charts(part: Comparable, number: int) -> None:
    totals = [(it.label, total) for it in part.entries if (total := composite_of(it.rows.values()))]
    if totals:
        bars = [as_bar(total, label, summary=False) for label, total in totals]
        alt = "Composite gains: " + "; ".join(f"{it.label} {signed(it.value)}" for it in bars) + "."
        svg = charts.forest(f"compare-{number}-forest", alt, bars, "gain of the composite over the base (σ)")
        part.charts.append(Chart("Gain over the base", svg))
    lines = [
        Line(it.label, points)
        for it in part.entries
        if (points := gains_over_time(it.run_data).get(COMPOSITE))
    ]
    if lines:
        alt = f"Composite gain of {len(lines)} runs over their iterations, with intervals."
        svg = charts.curves(f"compare-{number}-curves", alt, lines)
        part.charts.append(Chart("Composite gain over iterations (σ)", svg))


def _measured(part: Comparable) -> list[Entry]:
    found = [it for it in part.entries if it.base is not None and it.tuned is not None]
    return [it for it in found if it.tuned.z.shape == found[0].tuned.z.shape]  # type: ignore[union-attr]


def _add_differences(part: Comparable, number: int) -> None:
    """Add the paired differences of every run from the first, which are tighter than two separate gains."""
    found = _measured(part)
    if len(found) < 2:
        return
    first = found[0]
    groups = [whole(it) for it in items(first.run_data.prompts.get("groups"))]
    complete = len(groups) == len(first.base.prompts) and None not in groups  # type: ignore[union-attr]
    config = EvaluationConfig(confidence=first.report.confidence)
    for entry in found[1:]:
        total = compare(
            first.tuned,  # type: ignore[arg-type]
            entry.tuned,  # type: ignore[arg-type]
            first.run_data.evaluators,
            first.run_data.weights,
            config,
            groups if complete else None,  # type: ignore[arg-type]
        ).composite
        if gain := row(entry.label, total.to_dict() | {"name": COMPOSITE}):
            part.differences.append(gain)
    part.against = first.label
    bars = [as_bar(it, it.name, summary=False) for it in part.differences]
    alt = f"Against {first.label}: " + "; ".join(f"{it.label} {signed(it.value)}" for it in bars) + "."
    svg = charts.forest(f"compare-{number}-pairs", alt, bars, f"composite, less that of {first.label} (σ)")
    part.charts.insert(0, Chart(f"Against {first.label}, image by image", svg))


def _add_images(part: Comparable) -> None:
    found = _measured(part)
    if len(found) < 2:
        part.notes.append("Images are not shown side by side: fewer than two of these runs have ended.")
        return
    first, last = found[0], found[-1]
    if any(not np.array_equal(first.base.images, it.base.images) for it in found[1:]):  # type: ignore[union-attr]
        part.notes.append(
            "The base's own images are not the same to the bit in these runs (another machine or other "
            "versions); those of the first are shown."
        )
    names, weights = first.run_data.evaluators, first.run_data.weights
    totals = {it.label: composites(it.base, it.tuned, names, weights) for it in found}  # type: ignore[arg-type]
    change = (totals[last.label][1] - totals[first.label][1]).mean(axis=1)
    for title, _, places in choose(np.nan_to_num(change), EACH):
        chosen = []
        for place in places:
            base = ("base", shots(first.base, totals[first.label][0], place))  # type: ignore[arg-type]
            tuned = ((it.label, shots(it.tuned, totals[it.label][1], place)) for it in found)  # type: ignore[arg-type]
            chosen.append(PromptImages(first.base.prompts[place], (base, *tuned)))  # type: ignore[union-attr]
        heading = f"{title} for {last.label} against {first.label}" if title != "Not selected" else title
        part.images.append((heading, chosen))
