"""Report of a run or an experiment: one HTML page from the files in its folder.

No model is loaded and no service is called. The page is one file without scripts that fetches nothing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from trainer.evaluation.comparison import COMPOSITE
from trainer.report import charts
from trainer.report.charts import Bar, Line, Point
from trainer.report.page import (
    Chart,
    FoldRow,
    GainTable,
    GuardResult,
    Report,
    attempt,
    cases,
    image_uri,
    write_page,
)
from trainer.report.provenance import provenance
from trainer.report.run_data import (
    GainRow,
    Json,
    RunData,
    composite_of,
    counted,
    ended,
    gain_sentence,
    items,
    mapping,
    number,
    open_run_data,
    others,
    row,
    rows,
    signed,
    texts,
    whole,
)
from trainer.report.trials import read_search

# Titles of the training curves, by their key in metrics.jsonl.
TRAINING = {
    "composite": "Composite of the training prompts (z)",
    "approx_kl": "KL of an iteration, nats per transition",
    "kl_to_base": "KL to the base, nats per transition",
    "clip_fraction": "Share of transitions outside the trust region",
    "lora_norm": "Norm of the LoRA's change of the weights",
    "grad_norm": "Norm of the gradient, before clipping",
    "entropy": "Entropy of the transitions, nats per dimension",
    "clamp_fraction": "Share of saturated pixels",
}


def gains_over_time(run: RunData) -> dict[str, list[Point]]:
    """Return the gain of each row over the base, at each evaluation and at the end."""
    found: dict[str, dict[int, Point]] = {}
    evaluations = [(int(it["iteration"]) + 1, mapping(it.get("evaluation"))) for it in run.metrics]
    if (done := whole(run.finished.get("done"))) is not None:
        evaluations.append((done, mapping(run.evaluation.get("rows"))))
    for done, held in evaluations:
        for gain in rows(held):
            point = Point(done, gain.difference or 0.0, gain.low, gain.high)
            found.setdefault(gain.name, {0: Point(0, 0.0, 0.0, 0.0)})[done] = point
    return {name: [points[key] for key in sorted(points)] for name, points in found.items()}


def add_curves(report: Report, run_data: RunData, final: RunData) -> None:
    """Add curves over iterations: gains on held-out prompts, drift and training diagnostics."""
    if report.kind == "experiment":
        lines = [
            Line(f"fold {place}", points)
            for place, run in run_data.folds.items()
            if (points := gains_over_time(run).get(COMPOSITE))
        ]
        if lines:
            alt = f"Composite gain of {counted(len(lines), 'fold')} over the iterations, with intervals."
            report.curves.append(
                Chart("Composite gain of each fold (σ)", charts.curves("fold-curves", alt, lines))
            )
    else:
        _add_run_curves(report, run_data)
    for key, title in TRAINING.items():
        points = [
            Point(int(it["iteration"]) + 1, value)
            for it in final.metrics
            if (value := number(it.get(key))) is not None
        ]
        if len(points) > 1:
            alt = f"{title}: {points[0].y:.3g} at first, {points[-1].y:.3g} at the end."
            svg = charts.curves(f"training-{key}", alt, [Line(title, points)], zero=key == "composite")
            report.training.append(Chart(title, svg))


def _add_run_curves(report: Report, run: RunData) -> None:
    gains = gains_over_time(run)
    best = whole(run.finished.get("done")) if run.finished else None
    for name in sorted(gains, key=lambda it: it != COMPOSITE):
        last = gains[name][-1]
        title = "Composite gain (σ)" if name == COMPOSITE else f"{name}, gain in raw scores"
        alt = f"{title} over the iterations: {signed(last.y)} after {last.x:g}."
        svg = charts.curves(f"gain-{len(report.curves)}", alt, [Line(name, gains[name])], mark=best)
        report.curves.append(Chart(title, svg))
    limit = whole(mapping(run.config.get("evaluation")).get("every_limit"))
    report.curve_note = "Change against the base on the validation prompts; the band is the interval"
    report.curve_note += "" if best is None else "; the dotted line marks the policy that was saved"
    report.curve_note += f". During training only the first {limit} prompts were evaluated." if limit else "."
    report.drift_curves = [Chart(title, svg) for title, svg in _drift_curves(run)]


def _drift_curves(run: RunData) -> list[tuple[str, Markup]]:
    found: dict[str, list[Point]] = {}
    for record in run.metrics:
        drift = mapping(record.get("drift"))
        for gain in rows(drift.get("rows")):
            point = Point(int(record["iteration"]) + 1, gain.difference or 0.0, gain.low, gain.high)
            found.setdefault(gain.name, [Point(0, 0.0, 0.0, 0.0)]).append(point)
    return [
        (
            f"{key}, change",
            charts.curves(f"drift-{i}", f"{key}: {signed(points[-1].y)} at the end.", [Line(key, points)]),
        )
        for i, (key, points) in enumerate(found.items())
    ]


def add_results(report: Report, run_data: RunData, _: RunData) -> None:
    """Add tables of gains: of the test prompts, of all folds together, or of the run."""
    test = run_data.json("test.json") if report.kind == "experiment" else {}
    if held := rows(test.get("rows")):
        note = "Measured once, after everything else was decided; these prompts were never used before."
        report.tables.append(GainTable(f"On {_of_prompts(test, 'test')}", note, held))
        report.tested = True
    crossval = run_data.json("crossval.json") if report.kind == "experiment" else {}
    pooled = mapping(crossval.get("pooled"))
    if held := rows(pooled.get("rows")):
        note = (
            "Each prompt is measured with the model of its own fold, which was not trained on it. If a fold "
            "chose its best checkpoint on these same prompts, its gain is optimistic; the test gain is not."
        )
        report.tables.append(GainTable(f"Over all folds, {_of_prompts(pooled, 'held-out')}", note, held))
    if report.kind == "run" and (held := rows(run_data.evaluation.get("rows"))):
        patience = whole(mapping(run_data.config.get("early_stopping")).get("patience"))
        note = (
            "The checkpoint was chosen on these same prompts (early stopping): the gain is optimistic."
            if patience
            else "Base and tuned policy generate each prompt from the same random streams."
        )
        report.tables.append(GainTable(f"On {_of_prompts(run_data.evaluation, 'held-out')}", note, held))
    if report.tables:
        first = report.tables[0]
        if bars := [as_bar(it) for one in first.rows if (it := one.in_deviations()) is not None]:
            alt = "Gains in deviations: " + "; ".join(f"{it.label} {signed(it.value)}" for it in bars) + "."
            svg = charts.forest("gains", alt, bars, "change in calibrated deviations (σ)")
            report.forest.append(Chart(first.title, svg))


def _of_prompts(found: Json, what: str) -> str:
    prompts, images = whole(found.get("prompts")), whole(found.get("images_per_prompt"))
    text = f"{what} prompts" if prompts is None else counted(prompts, f"{what} prompt")
    return text if images is None else f"{text} × {images} images"


def as_bar(gain: GainRow, label: str = "", *, summary: bool | None = None) -> Bar:
    """Return a row of a forest plot; by default the composite is the summary."""
    whole_row = gain.name == COMPOSITE if summary is None else summary
    return Bar(label or gain.name, gain.difference or 0.0, gain.low, gain.high, gain.verdict, whole_row)


def add_folds(report: Report, run_data: RunData, _: RunData) -> None:
    """Add a row for each fold, from crossval.json or, for a fold that is not in it yet, from its folder."""
    if report.kind == "run":
        return
    crossval = run_data.json("crossval.json")
    held = [mapping(it) for it in items(crossval.get("folds"))]
    report.chosen = whole(crossval.get("chosen_iterations"))
    report.folds = [_fold(it) for it in held]
    listed = {fold.name for fold in report.folds}
    started = run_data.folds
    configured = whole(mapping(run_data.config.get("crossval")).get("folds")) or 0
    if started or held:
        for place in sorted({*started, *range(configured)} - {whole(it.get("fold")) for it in held}):
            if f"fold {place}" not in listed:
                report.folds.append(_fold_from(place, started.get(place), report.notes))
    bars = [as_bar(fold.gain, fold.name, summary=False) for fold in report.folds if fold.gain]
    for label, name in (("all folds", "pooled"), ("test", "test.json")):
        found = run_data.json(name) if "." in name else mapping(crossval.get(name))
        if total := composite_of(rows(found.get("rows"))):
            bars.append(as_bar(total, label, summary=True))
    if report.folds and bars:
        alt = "Composite gains: " + "; ".join(f"{it.label} {signed(it.value)}" for it in bars) + "."
        report.forest.append(Chart("Folds", charts.forest("folds", alt, bars, "gain of the composite (σ)")))


def _fold(held: Json) -> FoldRow:
    several = rows(held.get("rows"))
    return FoldRow(
        name=f"fold {held.get('fold', '?')}",
        prompts=whole(held.get("prompts")),
        iterations=whole(held.get("iterations")),
        best=whole(held.get("best")),
        gain=composite_of(several),
        rows=several,
        stopped=ended(held.get("stopped")),
        guard=guard_word(mapping(held.get("guard"))),
    )


def _fold_from(place: int, run: RunData | None, notes: list[str]) -> FoldRow:
    """Return the row of a fold that is not in crossval.json yet."""
    if run is None:
        return FoldRow(f"fold {place}", None, None, None, None, (), "not started", "")
    notes += [f"folds/{place}/{note}" for note in run.notes]
    several = rows(run.evaluation.get("rows"))
    wanted = whole(run.config.get("iterations"))
    ending = "" if run.finished else f"unfinished: {run.done} of {wanted or '?'} iterations"
    return FoldRow(
        name=f"fold {place}",
        prompts=whole(run.evaluation.get("prompts")) or len(texts(run.prompts.get("validation"))) or None,
        iterations=whole(run.finished.get("reached")) or run.done,
        best=whole(run.finished.get("done")),
        gain=composite_of(several),
        rows=several,
        stopped=ending or ended(run.evaluation.get("ending")),
        guard=guard_word(mapping(run.evaluation.get("guard"))),
    )


def add_search(report: Report, run_data: RunData, _: RunData) -> None:
    """Add the search from search.json."""
    found = run_data.json("search.json") if report.kind == "experiment" else {}
    if found:
        report.search = read_search(found, mapping(mapping(run_data.config.get("search")).get("space")))


# --------------------------------------------------------------------------------- guard and drift


def guard_word(guard: Json) -> str:
    """Return the guard's name and verdict."""
    if not guard:
        return ""
    gain = row("guard", guard.get("gain"))
    verdict = "tripped" if guard.get("tripped") is True else gain.verdict if gain else "unknown"
    return f"{guard.get('name', 'guard')}: {verdict}"


def add_guard(report: Report, run_data: RunData, final: RunData) -> None:
    """Add the guards' verdicts and the drift of the images."""
    if report.kind == "experiment":
        crossval = mapping(run_data.json("crossval.json"))
        found = [(f"fold {it.get('fold')}", it) for it in map(mapping, items(crossval.get("folds")))]
        held = mapping(run_data.json("test.json"))
        found.append(("test", held))
    else:
        held = final.evaluation or _newest(final.metrics, "guard") or _newest(final.metrics, "drift")
        found = [("", held)]
    verdicts = [(where, mapping(it.get("guard"))) for where, it in found]
    report.guards = [_guard(where, guard) for where, guard in verdicts if guard]
    drift = mapping(held.get("drift"))
    report.drift = rows(drift.get("rows"))
    report.drift_sentences = texts(drift.get("sentences"))


def _guard(where: str, guard: Json) -> GuardResult:
    name = str(guard.get("name") or "guard")
    looks, level = whole(guard.get("looks")), number(guard.get("level"))
    note = ""
    if looks is not None and level is not None:
        shared = "one look" if looks == 1 else f"each of {looks} looks"
        note = f"{1 - 2 * level:.1%} interval: {shared} may raise a false alarm with a chance of {level:.2%}."
    sentence = str(guard.get("sentence") or "")
    return GuardResult(where, guard.get("tripped") is True, sentence, row(name, guard.get("gain")), note)


def _newest(metrics: Sequence[Json], key: str) -> Json:
    return next((record for record in reversed(metrics) if record.get(key)), {})


REPORT_FILE = "report.html"
GRID_PX = 1400


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run or an experiment and return its path.

    The page lists files that are missing, unfinished or damaged.

    Raises:
        StorageError: the folder is not that of a run or an experiment
    """
    target = out or run / REPORT_FILE
    write_page(target, "report.html.jinja", report=collect(run))
    return target


def collect(path: Path) -> Report:
    """Collect the content of the page.

    Raises:
        StorageError: the folder is not that of a run or an experiment
    """
    run_data = open_run_data(path)
    final = (run_data.within("final") or run_data) if run_data.is_experiment else run_data
    report = Report(
        name=run_data.name,
        path=path.resolve().name,
        kind="experiment" if run_data.is_experiment else "run",
        state="",
        headline="",
        tone="none",
        sentences=[],
        facts=[],
        notes=run_data.notes,
        provenance=provenance(run_data, final),
        settings=run_data.settings,
        confidence=run_data.confidence,
    )
    parts: list[tuple[str, Callable[[Report, RunData, RunData], None]]] = [
        ("cross-validation", add_folds),
        ("search", add_search),
        ("results", add_results),
        ("guard", add_guard),
        ("curves", add_curves),
        ("images", _add_images),
        ("events", _add_events),
        ("summary", _add_summary),
    ]
    for what, add in parts:
        attempt(report.notes, what, add, report, run_data, final)
    if final is not run_data:
        report.notes += [f"final/{note}" for note in final.notes]
    return report


# ------------------------------------------------------------------------------- images and events


def _add_images(report: Report, _: RunData, final: RunData) -> None:
    base, tuned = final.measurement("base.npz"), final.measurement("tuned.npz")
    if base is not None and tuned is not None:
        report.cases = cases(base, tuned, final.evaluators, final.weights)
    else:
        report.grid = _newest_grid(final.path)
    report.karlo = _karlo(mapping(final.config.get("karlo")))
    if (final.path / "lora").is_dir():
        report.lora = "final/lora" if report.kind == "experiment" else "lora"


def _karlo(source: Json) -> str:
    """Return the Python arguments that load the base model."""
    revision = f", revision={source['revision']!r}" if source.get("revision") else ""
    return f"{str(source.get('repo') or source.get('path') or 'kakaobrain/karlo-v1-alpha')!r}{revision}"


def _newest_grid(path: Path) -> tuple[str, str] | None:
    """Return title and data URI of the newest before/after grid of an unfinished run."""
    for found in sorted((path / "grids").glob("iteration-*.png"), reverse=True):
        with Image.open(found) as image:
            done = int(found.stem.rpartition("-")[2])
            return f"After {counted(done, 'iteration')}", image_uri(image, GRID_PX)
    return None


def _add_events(report: Report, _: RunData, final: RunData) -> None:
    metrics = final.metrics
    events = []
    for key, what in (
        ("dropped_groups", "were dropped because their scores were missing even after retries"),
        (
            "zero_variance_groups",
            "had equal rewards for all images: nothing to learn",
        ),
    ):
        total = int(sum(number(it.get(key)) or 0 for it in metrics))
        if total:
            events.append(f"{counted(total, 'group')} of images {what}.")
    ratios = [value for it in metrics if (value := number(it.get("first_ratio"))) is not None]
    if ratios and (worst := float(np.max(np.abs(np.array(ratios) - 1)))) > 1e-3:
        events.append(
            f"Before the first update of an iteration the ratio differed from 1 by up to {worst:.2g}: replay "
            "differs from sampling (rounding, in half precision)."
        )
    clipped = [value for it in metrics if (value := number(it.get("grad_clip_fraction"))) is not None]
    if clipped:
        events.append(f"{np.mean(clipped):.0%} of the updates had their gradient clipped.")
    if ending := ended(final.evaluation.get("ending")):
        events.append(f"It ended early ({ending}).")
    report.events = events


# ------------------------------------------------------------------------------------------- summary


def _add_summary(report: Report, run_data: RunData, final: RunData) -> None:
    total = composite_of(report.tables[0].rows) if report.tables else None
    wanted = whole(final.config.get("iterations"))
    report.state = _state(report, run_data, final, wanted)
    last = gains_over_time(final).get(COMPOSITE, []) if report.kind == "run" else []
    if total is not None:
        where = report.tables[0].title
        report.headline = gain_sentence(total, where[0].lower() + where[1:], report.confidence)
        report.tone = total.verdict
        report.sentences += others(report.tables[0].rows)
    elif len(last) > 1:
        gain = GainRow(COMPOSITE, None, None, last[-1].y, last[-1].low, last[-1].high, last[-1].y)
        report.headline = "Not finished. " + gain_sentence(
            gain, f"at the last evaluation, after {counted(int(last[-1].x), 'iteration')}", report.confidence
        )
        report.sentences.append(
            "The gain of an unfinished run is not a result: it was observed during training."
        )
    elif report.search and report.search.fresh:
        where = "with the settings that the search chose, measured on fresh random streams"
        report.headline = gain_sentence(report.search.fresh, where, report.confidence)
        report.tone = report.search.fresh.verdict
    else:
        report.headline = "Not finished: nothing has been compared with the base yet."
    if tripped := [guard.where for guard in report.guards if guard.tripped]:
        report.tone = "warning"
        where = f" in {', '.join(tripped)}" if tripped[0] else ""
        report.headline = (
            f"The guard tripped{where}: rewards were gamed, images not improved. {report.headline}"
        )
    if report.search and report.search.curse:
        report.sentences.append(f"Search: {report.search.curse}")
    report.facts = [
        ("state", report.state),
        *([("folds", str(len(report.folds)))] if report.folds else []),
        *([("trials", str(len(report.search.trials)))] if report.search else []),
        *report.provenance.facts,
    ]


def _state(report: Report, run_data: RunData, final: RunData, wanted: int | None) -> str:
    if report.kind == "experiment":
        return "finished" if report.tested else "not finished: the test prompts have not been measured"
    if not run_data.finished:
        return f"not finished: {run_data.done} of {wanted or '?'} iterations"
    done, reached = (whole(run_data.finished.get(key)) for key in ("done", "reached"))
    if reached is not None and done is not None and done < reached:
        return f"finished after {reached} iterations; the best, after {done}, was saved"
    return f"finished, {counted(reached or done or final.done, 'iteration')}"
