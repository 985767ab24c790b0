"""`reward-trainer report`: one page about a run or an experiment, from the files that it left.

Nothing is loaded and nobody is asked. The page is one file without scripts, that fetches nothing.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.cases import cases, image_uri
from trainer.findings import Report, attempt
from trainer.page import write_page
from trainer.progression import add_curves, gains_over_time
from trainer.provenance import provenance
from trainer.remains import Json, Remains, mapping, number, open_remains, whole
from trainer.results import add_folds, add_guard, add_results, add_search
from trainer.rows import COMPOSITE, Row, composite_of, counted, ended, gain_sentence, others

REPORT_FILE = "report.html"
GRID_PX = 1400


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run or an experiment, and say where. Raises StorageError where the folder is none.

    What is missing, unfinished or damaged is said on the page.
    """
    target = out or run / REPORT_FILE
    write_page(target, "report.html.jinja", report=collect(run))
    return target


def collect(path: Path) -> Report:
    """Read the folder. Raises StorageError where it is no run."""
    remains = open_remains(path)
    final = (remains.within("final") or remains) if remains.is_experiment else remains
    report = Report(
        name=remains.name,
        path=path.resolve().name,
        kind="experiment" if remains.is_experiment else "run",
        state="",
        headline="",
        tone="none",
        sentences=[],
        facts=[],
        notes=remains.notes,
        provenance=provenance(remains, final),
        settings=remains.settings,
        confidence=remains.confidence,
    )
    parts: list[tuple[str, Callable[[Report, Remains, Remains], None]]] = [
        ("cross-validation", add_folds),
        ("search", add_search),
        ("results", add_results),
        ("guard", add_guard),
        ("curves", add_curves),
        ("pictures", _add_pictures),
        ("events", _add_events),
        ("summary", _add_summary),
    ]
    for what, add in parts:
        attempt(report.notes, what, add, report, remains, final)
    if final is not remains:
        report.notes += [f"final/{note}" for note in final.notes]
    return report


# ------------------------------------------------------------------------------- pictures and events


def _add_pictures(report: Report, _: Remains, final: Remains) -> None:
    base, tuned = final.measurement("base.npz"), final.measurement("tuned.npz")
    if base is not None and tuned is not None:
        report.cases = cases(base, tuned, final.evaluators, final.weights)
    else:
        report.grid = _newest_grid(final.path)
    report.karlo = _karlo(mapping(final.config.get("karlo")))
    if (final.path / "lora").is_dir():
        report.lora = "final/lora" if report.kind == "experiment" else "lora"


def _karlo(source: Json) -> str:
    """Arguments that load the base model, as Python."""
    revision = f", revision={source['revision']!r}" if source.get("revision") else ""
    return f"{str(source.get('repo') or source.get('path') or 'kakaobrain/karlo-v1-alpha')!r}{revision}"


def _newest_grid(path: Path) -> tuple[str, str] | None:
    """Of a run that has not ended: the newest grid, before and after."""
    for found in sorted((path / "grids").glob("iteration-*.png"), reverse=True):
        with Image.open(found) as image:
            done = int(found.stem.rpartition("-")[2])
            return f"After {counted(done, 'iteration')}", image_uri(image, GRID_PX)
    return None


def _add_events(report: Report, _: Remains, final: Remains) -> None:
    metrics = final.metrics
    said = []
    for key, what in (
        ("dropped_groups", "were dropped because their scores did not come back, even when asked for again"),
        (
            "zero_variance_groups",
            "had no difference between their pictures: there was nothing to learn",
        ),
    ):
        total = int(sum(number(it.get(key)) or 0 for it in metrics))
        if total:
            said.append(f"{counted(total, 'group')} of pictures {what}.")
    ratios = [value for it in metrics if (value := number(it.get("first_ratio"))) is not None]
    if ratios and (worst := float(np.max(np.abs(np.array(ratios) - 1)))) > 1e-3:
        said.append(
            f"Before the first update of an iteration the ratio was off 1 by up to {worst:.2g}: replay is "
            "not exactly what was sampled (rounding, in half precision)."
        )
    clipped = [value for it in metrics if (value := number(it.get("grad_clip_fraction"))) is not None]
    if clipped:
        said.append(f"{np.mean(clipped):.0%} of the updates had their gradient clipped.")
    if ending := ended(final.evaluation.get("ending")):
        said.append(f"It ended early ({ending}).")
    report.events = said


# ------------------------------------------------------------------------------------------- summary


def _add_summary(report: Report, remains: Remains, final: Remains) -> None:
    total = composite_of(report.tables[0].rows) if report.tables else None
    wanted = whole(final.config.get("iterations"))
    report.state = _state(report, remains, final, wanted)
    last = gains_over_time(final).get(COMPOSITE, []) if report.kind == "run" else []
    if total is not None:
        where = report.tables[0].title
        report.headline = gain_sentence(total, where[0].lower() + where[1:], report.confidence)
        report.tone = total.verdict
        report.sentences += others(report.tables[0].rows)
    elif len(last) > 1:
        gain = Row(COMPOSITE, None, None, last[-1].y, last[-1].low, last[-1].high, last[-1].y)
        report.headline = "Not finished. " + gain_sentence(
            gain, f"at the last evaluation, after {counted(int(last[-1].x), 'iteration')}", report.confidence
        )
        report.sentences.append(
            "What an unfinished run has gained is no result: it was looked at on the way."
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
            f"The guard tripped{where}: rewards were gamed, pictures not improved. {report.headline}"
        )
    if report.search and report.search.curse:
        report.sentences.append(f"Search: {report.search.curse}")
    report.facts = [
        ("state", report.state),
        *([("folds", str(len(report.folds)))] if report.folds else []),
        *([("trials", str(len(report.search.trials)))] if report.search else []),
        *report.provenance.facts,
    ]


def _state(report: Report, remains: Remains, final: Remains, wanted: int | None) -> str:
    if report.kind == "experiment":
        return "finished" if report.tested else "not finished: the test prompts have not been looked at"
    if not remains.finished:
        return f"not finished: {remains.done} of {wanted or '?'} iterations"
    done, reached = (whole(remains.finished.get(key)) for key in ("done", "reached"))
    if reached is not None and done is not None and done < reached:
        return f"finished after {reached} iterations; the best, after {done}, was saved"
    return f"finished, {counted(reached or done or final.done, 'iteration')}"
