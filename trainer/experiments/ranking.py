"""Who wins a search, and what to say of it: from the rows of search.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

Row = dict[str, Any]

# In deviations. What the null trial may gain by rounding, and so may each of its prompts.
ROUNDING = 1e-3
GUARD = "guard"
ORDER = ("complete", "pruned", "failed", "running", "waiting")


def choose(trials: Sequence[Row]) -> Row | None:
    """The best complete trial that did not trip the guard and gains more than nothing, and than the null."""
    least = max(0.0, *(row["value"] for row in trials if row["null"] and row["value"] is not None), 0.0)
    able = [row for row in trials if _can_win(row) and row["value"] > least]
    return max(able, key=lambda row: (row["value"], -row["number"]), default=None)


def _can_win(row: Row) -> bool:
    return row["state"] == "complete" and not row["null"] and row["reason"] != GUARD


def sentences(trials: Sequence[Row], winner: Row | None, null: Row | None) -> list[str]:
    """What the search came to, in words; `winner` as search.json has it, `null` the null trial's gain."""
    if any(row["state"] in ("running", "waiting") for row in trials):
        return [_counted(trials)]
    said = [_counted(trials)]
    said += [] if null is None else [_null_sentence(null)]
    said += _winner_sentences(trials, winner)
    hacked = [str(row["number"]) for row in trials if row["reason"] == GUARD]
    if hacked:
        which = f"Trial {hacked[0]}" if len(hacked) == 1 else f"Trials {', '.join(hacked)}"
        said.append(f"{which} cannot win: the guard fell while the composite rose.")
    said += [f"Trial {row['number']} failed: {row['reason']}." for row in trials if row["state"] == "failed"]
    return said


def _counted(trials: Sequence[Row]) -> str:
    tried = [row["state"] for row in trials if not row["null"]]
    counts = ", ".join(f"{tried.count(state)} {state}" for state in ORDER if state in tried)
    return f"{len(tried)} trials: {counts}."


def _null_sentence(null: Mapping[str, Any]) -> str:
    gain, error = null["difference"], null["standard_error"] or 0.0
    if max(abs(gain), error) <= ROUNDING:
        return "The null trial, which trains nothing, gains nothing: what is measured is repeatable."
    return (
        f"Warning: the null trial, which trains nothing, gains {gain:+.3f} (standard error {error:.3f}): "
        "measuring is not repeatable (a reward service that is not deterministic, or random streams that drift), and "
        "gains of that size mean nothing."
    )


def _winner_sentences(trials: Sequence[Row], winner: Row | None) -> list[str]:
    if winner is None:
        return ["No trial gains anything: there is no winner, and the experiment's own settings stay."]
    complete = sum(map(_can_win, trials))
    won = (
        f"Trial {winner['number']} wins, the best of {complete}, with {_gain(winner['selected'])} deviations"
    )
    said = [f"{won}: {listed(winner['params'])}."]
    fresh = winner["fresh"]
    if fresh is not None:
        lost = winner["selected"]["difference"] - fresh["difference"]
        curse = (
            f"{lost:.3f} less than it was chosen for (the winner's curse)"
            if lost > 0
            else "no less than it was chosen for"
        )
        doubt = "" if fresh["verdict"] == "rises" else "; the interval does not exclude that it gains nothing"
        said.append(f"On fresh random streams it gains {_gain(fresh)}, {curse}{doubt}.")
    return said


def _gain(row: Mapping[str, Any]) -> str:
    return f"{row['difference']:+.3f}{_bounds(row)}"


def _bounds(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f" ({row['low']:+.3f} to {row['high']:+.3f})"


def listed(params: Mapping[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{key}={_short(value)}" for key, value in params.items()) or "as configured"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(trials: Sequence[Row], winner: Row | None) -> Group:
    """The trials, best first, and under that what each of them tried."""
    shown = Table(title="Search: gain of the composite", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("trial", "gain", "interval", "iterations", "state", ""):
        shown.add_column(column, justify="left" if column in ("state", "") else "right", no_wrap=True)
    for row in sorted(trials, key=_rank):
        remark = "winner" if winner and row["number"] == winner["number"] else _remark(row)
        value = "" if row["value"] is None else f"{row['value']:+.3f}"
        interval = "" if row["low"] is None else f"{row['low']:+.3f} {row['high']:+.3f}"
        shown.add_row(str(row["number"]), value, interval, str(row["iterations"]), row["state"], remark)
    tried = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    tried.add_column(justify="right")
    for row in sorted(trials, key=_rank):
        tried.add_row(str(row["number"]), "trains nothing" if row["null"] else listed(row["params"]))
    return Group(shown, tried)


def _remark(row: Row) -> str:
    if row["null"]:
        return "trains nothing"
    return row["reason"] if row["reason"] in (GUARD, "patience") else ""


def _rank(row: Row) -> tuple[int, float, int]:
    value = row["value"]
    return ORDER.index(row["state"]), -value if value is not None else 0.0, row["number"]
