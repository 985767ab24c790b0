"""Trials of a search for a report: table, importance of settings, winner's curse."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from markupsafe import Markup
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from trainer.report import charts
from trainer.report.charts import Bar, Line, Point, Strand
from trainer.report.run_data import GainRow, Json, interval, items, mapping, number, row, shown, signed, whole

FEW, TOO_FEW = 10, 4  # complete trials below which importance is a hint only, or is not computed


@dataclass(frozen=True)
class ReportedTrial:
    """One trial, as far as search.json could be read."""

    number: int
    state: str
    params: dict[str, Any]
    value: float | None
    low: float | None
    high: float | None
    iterations: int | None
    reason: str
    null: bool
    curve: tuple[Point, ...]
    winner: bool = False

    @property
    def complete(self) -> bool:
        """True for a complete trial with a value."""
        return self.state == "complete" and self.value is not None

    @property
    def remark(self) -> str:
        """Special role of the trial, and why it ended."""
        parts = ("chosen" if self.winner else "", "null: changes nothing" if self.null else "", self.reason)
        return "; ".join(it for it in parts if it)


@dataclass(frozen=True)
class SearchReport:
    """Content of search.json with its charts."""

    trials: tuple[ReportedTrial, ...]
    settings: tuple[str, ...]
    states: dict[str, int]
    selected: GainRow | None
    fresh: GainRow | None
    winner: Json
    sampler: str
    pruner: str
    charts: dict[str, Markup] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def curse(self) -> str:
        """Sentence on the winner's curse; empty without a second measurement."""
        if self.selected is None or self.fresh is None:
            return ""
        old, new = self.selected.difference or 0.0, self.fresh.difference or 0.0
        text = (
            f"Chosen for {signed(old)} σ; measured again on fresh random streams it gains {signed(new)} σ "
            f"({self.fresh.interval})."
        )
        if old > 0 and new < old:
            share = min(1.0, (old - new) / old)
            return f"{text} {share:.0%} of the first value was selection luck (the winner's curse)."
        return f"{text} Selection did not inflate it."


def read_search(found: Json, space: Json) -> SearchReport:
    """Read search.json as far as possible, with the configured space."""
    winner = mapping(found.get("winner"))
    chosen = whole(winner.get("number"))
    trials = tuple(
        sorted(
            (it for held in items(found.get("trials")) if (it := _trial(mapping(held), chosen)) is not None),
            key=lambda it: it.number,
        )
    )
    settings = tuple(dict.fromkeys(key for trial in trials for key in trial.params))
    states = {
        state: sum(it.state == state for it in trials) for state in dict.fromkeys(it.state for it in trials)
    }
    remarks: list[str] = []
    try:
        made = _charts(trials, settings, space, remarks) | _curse_chart(winner)
    except (ValueError, TypeError, ArithmeticError) as error:
        made = {}
        remarks.append(f"The charts are left out: the trials have unexpected content ({error}).")
    return SearchReport(
        trials=trials,
        settings=settings,
        states=states,
        selected=row("composite", winner.get("selected")),
        fresh=row("composite", winner.get("fresh")),
        winner=winner,
        sampler=str(found.get("sampler") or "random"),
        pruner=str(found.get("pruner") or "none"),
        charts=made,
        remarks=tuple(remarks),
    )


def _trial(held: Json, winner: int | None) -> ReportedTrial | None:
    place = whole(held.get("number"))
    if place is None:
        return None
    pairs = [[number(end) for end in items(pair)[:2]] for pair in items(held.get("curve"))]
    curve = tuple(Point(*pair) for pair in pairs if len(pair) == 2 and None not in pair)  # type: ignore[arg-type]
    return ReportedTrial(
        number=place,
        state=str(held.get("state") or "unknown"),
        params={str(key): value for key, value in mapping(held.get("params")).items()},
        value=number(held.get("value")),
        low=number(held.get("low")),
        high=number(held.get("high")),
        iterations=whole(held.get("iterations")),
        reason=str(held.get("reason") or ""),
        null=held.get("null") is True,
        curve=curve,
        winner=place == winner,
    )


# -------------------------------------------------------------------------------------------- charts


def _charts(
    trials: Sequence[ReportedTrial], settings: Sequence[str], space: Json, remarks: list[str]
) -> dict[str, Markup]:
    made = {}
    lines = [Line(_curve_label(it), (Point(0, 0), *it.curve)) for it in trials if it.curve and not it.null]
    if lines:
        alt = f"Composite gain of {len(lines)} trials over their iterations."
        chosen = next((_curve_label(it) for it in trials if it.winner), "none chosen yet")
        made["curves"] = charts.curves("search-curves", alt, lines, chosen=chosen)
    tried = [it for it in trials if it.params and not it.null]
    if settings and len(tried) > 1:
        made["parallel"] = _parallel(tried, settings, space)
    shares = importance([it for it in tried if it.complete], settings, space, remarks)
    if shares:
        alt = "Importance: " + ", ".join(f"{key} {share:.0%}" for key, share in shares) + "."
        made["importance"] = charts.bars(
            "search-importance", alt, shares, "share of the variance between trials"
        )
    return made


def _curve_label(trial: ReportedTrial) -> str:
    return f"trial {trial.number}{', chosen' if trial.winner else ''}"


def _curse_chart(winner: Json) -> dict[str, Markup]:
    """Return the chart of the chosen trial's gain, when chosen and when measured again."""
    kinds = (("when chosen", "selected"), ("on fresh streams", "fresh"))
    found = [(label, it) for label, key in kinds if (it := row("composite", winner.get(key))) is not None]
    if not found:
        return {}
    alt = "; ".join(f"{label} {signed(it.difference)} ({it.interval})" for label, it in found)
    several = [Bar(label, it.difference or 0.0, it.low, it.high, it.verdict) for label, it in found]
    return {"curse": charts.forest("search-curse", alt, several, "gain of the composite (σ)")}


def importance(
    complete: Sequence[ReportedTrial], settings: Sequence[str], space: Json, remarks: list[str]
) -> list[tuple[str, float]]:
    """Return the share of the trials' variance that each setting explains (fANOVA).

    Adds a remark on its reliability to `remarks`.
    """
    varied = [key for key in settings if len({shown(it.params.get(key)) for it in complete}) > 1]
    if len(complete) < TOO_FEW or not varied:
        remarks.append(f"Importance of settings is not shown: {len(complete)} complete trials are too few.")
        return []
    if len(complete) < FEW:
        remarks.append(f"With {len(complete)} complete trials, importance is only a hint.")
    spread = {key: _distribution(key, complete, space) for key in varied}
    try:
        shares = _fanova([_frozen(it, spread) for it in complete if all(key in it.params for key in varied)])
    except (ValueError, RuntimeError, TypeError) as error:
        remarks.append(f"Importance of settings could not be computed: {error}")
        return []
    return [(key, share) for key, share in shares.items() if number(share) is not None]


def _fanova(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction="maximize")
            study.add_trials(trials)
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            return optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _frozen(trial: ReportedTrial, spread: Mapping[str, BaseDistribution]) -> FrozenTrial:
    params = {
        key: shown(trial.params[key]) if isinstance(kind, CategoricalDistribution) else trial.params[key]
        for key, kind in spread.items()
    }
    return create_trial(
        state=TrialState.COMPLETE, params=params, distributions=dict(spread), value=trial.value
    )


def _distribution(key: str, trials: Sequence[ReportedTrial], space: Json) -> BaseDistribution:
    """Return the configured distribution, widened to the tried values, or one inferred from the values."""
    values = [it.params.get(key) for it in trials]
    numbers = [it for value in values if (it := number(value)) is not None]
    if len(numbers) < len(values) or mapping(space.get(key)).get("choices") is not None:
        return CategoricalDistribution(sorted({shown(value) for value in values}))
    low, high, log = _range(key, numbers, space)
    return FloatDistribution(low, high, log=log)


def _range(key: str, numbers: Sequence[float], space: Json) -> tuple[float, float, bool]:
    configured = mapping(space.get(key))
    ends = [it for end in ("low", "high") if (it := number(configured.get(end))) is not None]
    low, high = min(*numbers, *ends), max(*numbers, *ends)
    return low, high, configured.get("log") is True and low > 0


def _parallel(trials: Sequence[ReportedTrial], settings: Sequence[str], space: Json) -> Markup:
    labels, columns = [], []
    for key in settings:
        label, column = _axis(key, trials, space)
        labels.append(label)
        columns.append(column)
    values = [it.value if it.complete else None for it in trials]
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    labels.append(("gain", signed(low, 2), signed(high, 2)))
    columns.append([_height(value, low, high) for value in values])
    strands = [
        Strand(str(it.number), heights, heights[-1], it.winner)
        for it, heights in zip(trials, zip(*columns, strict=True), strict=True)
    ]
    alt = f"Settings and gain of {len(trials)} trials, a line each; the chosen one is bold."
    return charts.parallel("search-parallel", alt, labels, strands)


def _axis(
    key: str, trials: Sequence[ReportedTrial], space: Json
) -> tuple[tuple[str, str, str], list[float | None]]:
    """Return the axis of a setting, and each trial's height on it."""
    values = [it.params.get(key) for it in trials]
    numbers = [it for value in values if (it := number(value)) is not None]
    if values and len(numbers) == len(values):
        low, high, log = _range(key, numbers, space)
        scale = np.log if log else float
        heights = [_height(float(scale(it)), float(scale(low)), float(scale(high))) for it in numbers]
        return (key, shown(low), shown(high)), heights
    names = sorted({shown(value) for value in values})
    places = [_height(names.index(shown(value)), 0, len(names) - 1) for value in values]
    return (key, names[0][:14], names[-1][:14]), places


def _height(value: float | None, low: float, high: float) -> float | None:
    if value is None:
        return None
    return (value - low) / (high - low) if high > low else 0.5


def value_text(trial: ReportedTrial) -> str:
    """Format a trial's gain with its interval."""
    if trial.value is None:
        return "–"
    bounds = "" if trial.low is None else f" ({interval(trial.low, trial.high)})"
    return signed(trial.value) + bounds
