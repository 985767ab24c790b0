"""The parts of a report that hold gains: tables, folds, search, guard and drift."""

from collections.abc import Sequence

from trainer import charts
from trainer.charts import Bar
from trainer.findings import Chart, Fold, Guard, Report, Table
from trainer.remains import Json, Remains, items, mapping, number, texts, whole
from trainer.rows import COMPOSITE, Row, composite_of, counted, ended, row, rows, signed
from trainer.trials import read_search


def add_results(report: Report, remains: Remains, _: Remains) -> None:
    """Gains of the test, of all folds together, or of the run."""
    test = remains.json("test.json") if report.kind == "experiment" else {}
    if held := rows(test.get("rows")):
        note = "Measured once, after everything else was decided; nothing had looked at these prompts before."
        report.tables.append(Table(f"On {_of_prompts(test, 'test')}", note, held))
        report.tested = True
    crossval = remains.json("crossval.json") if report.kind == "experiment" else {}
    pooled = mapping(crossval.get("pooled"))
    if held := rows(pooled.get("rows")):
        note = (
            "Each prompt is judged by the model of its own fold, which was not trained on it. Where a fold "
            "took its best checkpoint on these same prompts, the gain flatters; the test gain does not."
        )
        report.tables.append(Table(f"Over all folds, {_of_prompts(pooled, 'held-out')}", note, held))
    if report.kind == "run" and (held := rows(remains.evaluation.get("rows"))):
        patience = whole(mapping(remains.config.get("early_stopping")).get("patience"))
        note = (
            "The checkpoint was chosen on these same prompts (early stopping), so the gain flatters a little."
            if patience
            else "Base and tuned policy draw each prompt from the same random streams."
        )
        report.tables.append(Table(f"On {_of_prompts(remains.evaluation, 'held-out')}", note, held))
    if report.tables:
        first = report.tables[0]
        if bars := [as_bar(it) for one in first.rows if (it := one.in_deviations()) is not None]:
            alt = "Gains in deviations: " + "; ".join(f"{it.label} {signed(it.value)}" for it in bars) + "."
            svg = charts.forest("gains", alt, bars, "change in calibrated deviations (σ)")
            report.forest.append(Chart(first.title, svg))


def _of_prompts(found: Json, what: str) -> str:
    prompts, images = whole(found.get("prompts")), whole(found.get("images_per_prompt"))
    said = f"{what} prompts" if prompts is None else counted(prompts, f"{what} prompt")
    return said if images is None else f"{said} × {images} pictures"


def as_bar(gain: Row, label: str = "", *, summary: bool | None = None) -> Bar:
    """A row of a forest plot; the composite is a summary unless told otherwise."""
    whole_row = gain.name == COMPOSITE if summary is None else summary
    return Bar(label or gain.name, gain.difference or 0.0, gain.low, gain.high, gain.verdict, whole_row)


def add_folds(report: Report, remains: Remains, _: Remains) -> None:
    """A line for each fold, from crossval.json; where that does not speak of one yet, from its folder."""
    if report.kind == "run":
        return
    crossval = remains.json("crossval.json")
    held = [mapping(it) for it in items(crossval.get("folds"))]
    report.chosen = whole(crossval.get("chosen_iterations"))
    report.folds = [_fold(it) for it in held]
    known = {fold.name for fold in report.folds}
    begun = remains.folds
    configured = whole(mapping(remains.config.get("crossval")).get("folds")) or 0
    if begun or held:
        for place in sorted({*begun, *range(configured)} - {whole(it.get("fold")) for it in held}):
            if f"fold {place}" not in known:
                report.folds.append(_fold_from(place, begun.get(place), report.notes))
    bars = [as_bar(fold.gain, fold.name, summary=False) for fold in report.folds if fold.gain]
    for label, name in (("all folds", "pooled"), ("test", "test.json")):
        found = remains.json(name) if "." in name else mapping(crossval.get(name))
        if total := composite_of(rows(found.get("rows"))):
            bars.append(as_bar(total, label, summary=True))
    if report.folds and bars:
        alt = "Composite gains: " + "; ".join(f"{it.label} {signed(it.value)}" for it in bars) + "."
        report.forest.append(Chart("Folds", charts.forest("folds", alt, bars, "gain of the composite (σ)")))


def _fold(held: Json) -> Fold:
    several = rows(held.get("rows"))
    return Fold(
        name=f"fold {held.get('fold', '?')}",
        prompts=whole(held.get("prompts")),
        iterations=whole(held.get("iterations")),
        best=whole(held.get("best")),
        gain=composite_of(several),
        rows=several,
        stopped=ended(held.get("stopped")),
        guard=guard_word(mapping(held.get("guard"))),
    )


def _fold_from(place: int, run: Remains | None, notes: list[str]) -> Fold:
    """A fold that crossval.json does not speak of yet, from its own folder."""
    if run is None:
        return Fold(f"fold {place}", None, None, None, None, (), "not begun", "")
    notes += [f"folds/{place}/{note}" for note in run.notes]
    several = rows(run.evaluation.get("rows"))
    wanted = whole(run.config.get("iterations"))
    ending = "" if run.finished else f"unfinished: {run.done} of {wanted or '?'} iterations"
    return Fold(
        name=f"fold {place}",
        prompts=whole(run.evaluation.get("prompts")) or len(texts(run.prompts.get("validation"))) or None,
        iterations=whole(run.finished.get("reached")) or run.done,
        best=whole(run.finished.get("done")),
        gain=composite_of(several),
        rows=several,
        stopped=ending or ended(run.evaluation.get("ending")),
        guard=guard_word(mapping(run.evaluation.get("guard"))),
    )


def add_search(report: Report, remains: Remains, _: Remains) -> None:
    """What search.json says."""
    found = remains.json("search.json") if report.kind == "experiment" else {}
    if found:
        report.search = read_search(found, mapping(mapping(remains.config.get("search")).get("space")))


# --------------------------------------------------------------------------------- guard and drift


def guard_word(guard: Json) -> str:
    """The guard's name and verdict."""
    if not guard:
        return ""
    gain = row("guard", guard.get("gain"))
    verdict = "tripped" if guard.get("tripped") is True else gain.verdict if gain else "unknown"
    return f"{guard.get('name', 'guard')}: {verdict}"


def add_guard(report: Report, remains: Remains, final: Remains) -> None:
    """What the guards say, and how the pictures have drifted."""
    if report.kind == "experiment":
        crossval = mapping(remains.json("crossval.json"))
        found = [(f"fold {it.get('fold')}", it) for it in map(mapping, items(crossval.get("folds")))]
        held = mapping(remains.json("test.json"))
        found.append(("test", held))
    else:
        held = final.evaluation or _newest(final.metrics, "guard") or _newest(final.metrics, "drift")
        found = [("", held)]
    said = [(where, mapping(it.get("guard"))) for where, it in found]
    report.guards = [_guard(where, guard) for where, guard in said if guard]
    drift = mapping(held.get("drift"))
    report.drift = rows(drift.get("rows"))
    report.drift_said = texts(drift.get("sentences"))


def _guard(where: str, guard: Json) -> Guard:
    name = str(guard.get("name") or "guard")
    looks, level = whole(guard.get("looks")), number(guard.get("level"))
    note = ""
    if looks is not None and level is not None:
        shared = "one look" if looks == 1 else f"each of {looks} looks"
        note = f"{1 - 2 * level:.1%} interval: {shared} may raise a false alarm with a chance of {level:.2%}."
    sentence = str(guard.get("sentence") or "")
    return Guard(where, guard.get("tripped") is True, sentence, row(name, guard.get("gain")), note)


def _newest(metrics: Sequence[Json], key: str) -> Json:
    return next((record for record in reversed(metrics) if record.get(key)), {})
