"""`reward-trainer report --compare`: runs side by side, as far as they can be compared.

Gains of two runs say something about each other only where the same service scored the same prompts, drawn in
the same way from the same base. Runs that differ in any of these are shown apart, with a notice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.config import ConfigError, EvaluationConfig
from trainer.evaluation.comparison import Measurement, compare
from trainer.report import charts
from trainer.report.charts import Line
from trainer.report.page import Chart, Report, Shot, attempt, choose, judged, shots, write_page
from trainer.report.provenance import PLACES
from trainer.report.report import as_bar, collect, gains_over_time
from trainer.report.run_data import (
    COMPOSITE,
    Remains,
    Row,
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
EACH = 2  # prompts of a kind whose images are shown
DRAWING = ("stage", "seed", "images_per_prompt")  # of the evaluation: what decides on the images


@dataclass
class Entry:
    """One run or experiment."""

    label: str
    report: Report
    remains: Remains  # of what was measured: an experiment's final fit
    basis: dict[str, Any]
    base: Measurement | None = None
    tuned: Measurement | None = None

    @property
    def rows(self) -> dict[str, Row]:
        """Its gains by name."""
        return {it.name: it for it in self.report.tables[0].rows} if self.report.tables else {}


class Shown(NamedTuple):
    """A prompt's images by the base and by each run."""

    prompt: str
    rows: tuple[tuple[str, tuple[Shot, ...]], ...]


@dataclass
class Comparable:
    """Runs that may be set against each other."""

    entries: list[Entry]
    evaluators: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    against: str = ""
    differences: list[Row] = field(default_factory=list)
    images: list[tuple[str, list[Shown]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Page:
    """All that the page says."""

    headline: str
    notices: list[str]
    parts: list[Comparable]
    settings: list[tuple[str, list[str]]]
    labels: list[str]
    unread: list[str]


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write the page and say where. Raises ConfigError for fewer than two runs, StorageError for no run."""
    if len({run.resolve() for run in runs}) < 2:
        raise ConfigError("report --compare: name two different runs at least")
    write_page(out, "compare.html.jinja", page=side_by_side(runs))
    return out


def side_by_side(runs: Sequence[Path]) -> Page:
    """Read the runs. Raises StorageError where one is none."""
    labels = _labels(runs)
    entries = [_entry(path, label) for path, label in zip(runs, labels, strict=True)]
    parts = [_part(number, members) for number, members in enumerate(_alike(entries))]
    return Page(
        headline=_headline(parts),
        notices=_notices(parts),
        parts=parts,
        settings=_settings(entries),
        labels=labels,
        unread=[f"{it.label}: {note}" for it in entries for note in it.report.notes],
    )


def _labels(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in runs]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(it[-length:]) for it in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _entry(path: Path, label: str) -> Entry:
    report = collect(path)
    outer = Remains(path)
    remains = (outer.within("final") or outer) if outer.is_experiment else outer
    entry = Entry(label, report, remains, _basis(outer, remains))
    entry.base, entry.tuned = remains.measurement("base.npz"), remains.measurement("tuned.npz")
    return entry


# ------------------------------------------------------------------------------------ what is alike


def _basis(outer: Remains, remains: Remains) -> dict[str, Any]:
    """What two runs must have in common for their gains to be compared; what is not known is like nothing."""
    unknown = f"not known ({outer.path})"
    config = remains.config or outer.config
    evaluation, karlo = mapping(config.get("evaluation")), mapping(config.get("karlo"))
    model = {key: Path(str(it)).name if key == "path" else it for key, it in karlo.items()}
    sampling = {key: it for key, it in mapping(config.get("sampling")).items() if key != "micro_batch"}
    drawing = {key: evaluation.get(key) for key in DRAWING}
    return {
        "the service": remains.identity or outer.identity or unknown,
        "the prompts": list(texts(remains.prompts.get("validation"))) or unknown,
        "the weights of the composite": remains.weights or unknown,
        "the base model": model or unknown,
        "how images are drawn": sampling | drawing if config else unknown,
    }


def _alike(entries: Sequence[Entry]) -> list[list[Entry]]:
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
    said = []
    for one, other in combinations(parts, 2):
        a, b = one.entries[0], other.entries[0]
        aspects = [aspect for aspect in a.basis if a.basis[aspect] != b.basis[aspect]]
        names = [" and ".join(it.label for it in part.entries) for part in (one, other)]
        details = [_detail(aspect, a.basis[aspect], b.basis[aspect]) for aspect in aspects]
        said.append(f"{names[0]} against {names[1]}: not the same are {'; '.join(details)}.")
    return said


def _detail(aspect: str, a: object, b: object) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        return (
            f"{aspect} ({', '.join(f'{key}: {shown(a.get(key))} and {shown(b.get(key))}' for key in keys)})"
        )
    if isinstance(a, list) and isinstance(b, list):
        return f"{aspect} ({len(a)} and {len(b)}, {len(set(a) & set(b))} of them in both)"
    return f"{aspect} ({', '.join(it for it in (a, b) if isinstance(it, str)) or 'not known of one'})"


def _headline(parts: Sequence[Comparable]) -> str:
    if len(parts) > 1:
        return "These runs cannot all be compared: they are shown apart, and the notice says why."
    clear = [it for it in parts[0].differences if it.verdict != "unclear"]
    if not parts[0].differences:
        return "The same service, prompts and random streams: these runs can be compared."
    if not clear:
        return f"No clear difference from {parts[0].against}: every interval includes 0."
    best = max(clear, key=lambda it: it.difference or 0.0)
    first, size = parts[0].against, f"{abs(best.difference or 0.0):.3f}"
    if best.verdict == "falls":
        return f"None is better than {first}; {best.name} is worse by {size}\u00a0σ ({best.interval})."
    return f"{best.name} is better than {first}, by {size}\u00a0σ ({best.interval})."


def _settings(entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all, but for where runs lie."""
    held = [it.report.settings for it in entries]
    keys = dict.fromkeys(key for settings in held for key in settings)
    lines = [(key, [shown(it[key]) if key in it else "not set" for it in held]) for key in keys]
    places = ("name", "runs_dir", *(it for it in PLACES if it == "logging"))
    return [line for line in lines if len(set(line[1])) > 1 and line[0].split(".")[0] not in places]


# ----------------------------------------------------------------------------------- what they share


def _part(number: int, entries: list[Entry]) -> Comparable:
    part = Comparable(entries)
    part.evaluators = list(dict.fromkeys(name for it in entries for name in it.rows if name != COMPOSITE))
    attempt(part.notes, "charts", _add_charts, part, number)
    attempt(part.notes, "differences between the runs", _add_differences, part, number)
    attempt(part.notes, "pictures", _add_images, part)
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
        if (points := gains_over_time(it.remains).get(COMPOSITE))
    ]
    if lines:
        alt = f"Composite gain of {len(lines)} runs over their iterations, with intervals."
        svg = charts.curves(f"compare-{number}-curves", alt, lines)
        part.charts.append(Chart("Composite gain over iterations (σ)", svg))


def _measured(part: Comparable) -> list[Entry]:
    found = [it for it in part.entries if it.base is not None and it.tuned is not None]
    return [it for it in found if it.tuned.z.shape == found[0].tuned.z.shape]  # type: ignore[union-attr]


def _add_differences(part: Comparable, number: int) -> None:
    """Every run against the first, image by image: tighter than two gains beside each other."""
    found = _measured(part)
    if len(found) < 2:
        return
    first = found[0]
    groups = [whole(it) for it in items(first.remains.prompts.get("groups"))]
    known = len(groups) == len(first.base.prompts) and None not in groups  # type: ignore[union-attr]
    config = EvaluationConfig(confidence=first.report.confidence)
    for entry in found[1:]:
        total = compare(
            first.tuned,  # type: ignore[arg-type]
            entry.tuned,  # type: ignore[arg-type]
            first.remains.evaluators,
            first.remains.weights,
            config,
            groups if known else None,  # type: ignore[arg-type]
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
    names, weights = first.remains.evaluators, first.remains.weights
    totals = {it.label: judged(it.base, it.tuned, names, weights) for it in found}  # type: ignore[arg-type]
    change = (totals[last.label][1] - totals[first.label][1]).mean(axis=1)
    for title, _, places in choose(np.nan_to_num(change), EACH):
        chosen = []
        for place in places:
            base = ("base", shots(first.base, totals[first.label][0], place))  # type: ignore[arg-type]
            tuned = ((it.label, shots(it.tuned, totals[it.label][1], place)) for it in found)  # type: ignore[arg-type]
            chosen.append(Shown(first.base.prompts[place], (base, *tuned)))  # type: ignore[union-attr]
        heading = f"{title} for {last.label} against {first.label}" if title != "Not selected" else title
        part.images.append((heading, chosen))
