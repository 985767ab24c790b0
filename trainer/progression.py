"""The parts of a report that go over iterations."""

from markupsafe import Markup

from trainer import charts
from trainer.charts import Line, Point
from trainer.findings import Chart, Report
from trainer.remains import Remains, mapping, number, whole
from trainer.rows import COMPOSITE, counted, rows, signed

# What a training curve is called, by its name in metrics.jsonl; drawn where it was logged.
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


def gains_over_time(run: Remains) -> dict[str, list[Point]]:
    """Gain of each row over the base, at each evaluation; the end included."""
    found: dict[str, dict[int, Point]] = {}
    moments = [(int(it["iteration"]) + 1, mapping(it.get("evaluation"))) for it in run.metrics]
    if (done := whole(run.finished.get("done"))) is not None:
        moments.append((done, mapping(run.evaluation.get("rows"))))
    for done, held in moments:
        for gain in rows(held):
            point = Point(done, gain.difference or 0.0, gain.low, gain.high)
            found.setdefault(gain.name, {0: Point(0, 0.0, 0.0, 0.0)})[done] = point
    return {name: [points[key] for key in sorted(points)] for name, points in found.items()}


def add_curves(report: Report, remains: Remains, final: Remains) -> None:
    """Gains on held-out prompts, drift and what training said of itself, over iterations."""
    if report.kind == "experiment":
        lines = [
            Line(f"fold {place}", points)
            for place, run in remains.folds.items()
            if (points := gains_over_time(run).get(COMPOSITE))
        ]
        if lines:
            alt = f"Composite gain of {counted(len(lines), 'fold')} over the iterations, with intervals."
            report.curves.append(
                Chart("Composite gain of each fold (σ)", charts.curves("fold-curves", alt, lines))
            )
    else:
        _add_run_curves(report, remains)
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


def _add_run_curves(report: Report, run: Remains) -> None:
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
    report.curve_note += f". On the way only the first {limit} prompts were looked at." if limit else "."
    report.drift_curves = [Chart(title, svg) for title, svg in _drift_curves(run)]


def _drift_curves(run: Remains) -> list[tuple[str, Markup]]:
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
