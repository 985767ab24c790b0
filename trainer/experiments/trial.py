"""Trials of a search: record of a trial, choice of the winner, summary in words and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

State = Literal["complete", "pruned", "failed", "running", "waiting"]
STATES: tuple[State, ...] = ("complete", "pruned", "failed", "running", "waiting")  # as tables list them

# Composite difference below which the null trial shows rounding only, in standard deviations of the scores.
ROUNDING = 1e-3
GUARD = "guard"  # reason of a trial whose reward-hacking guard tripped

GainRow = Mapping[str, Any]  # a row of a comparison: difference, low, high, standard_error, verdict, ...
TrialSettings = dict[str, Any]  # dotted keys of the configuration to values


@dataclass(frozen=True)
class Trial:
    """One trial of a search. The fields are the keys of its entry in search.json."""

    number: int
    state: State
    params: TrialSettings  # the settings that the trial changes
    value: float | None  # gain of the composite, in standard deviations
    low: float | None  # ends of its interval
    high: float | None
    iterations: int  # that were trained
    reason: str | None  # of its end or failure
    null: bool  # trial 0, which trains nothing
    curve: tuple[tuple[int, float], ...]  # (iterations, gain) at each evaluation

    @property
    def can_win(self) -> bool:
        """True for a complete trial that trained something and did not trip the guard."""
        return self.state == "complete" and not self.null and self.reason != GUARD

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of search.json."""
        return asdict(self) | {"curve": [list(point) for point in self.curve]}


@dataclass(frozen=True)
class Winner:
    """The best trial of a search. The fields are the keys of `winner` in search.json."""

    number: int
    params: TrialSettings
    selected: GainRow  # the gain by which it was chosen
    fresh: GainRow | None  # its gain on fresh random streams, once measured

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of search.json."""
        return {
            "number": self.number,
            "params": self.params,
            "selected": self.selected,
            "fresh": self.fresh,
        }


def choose_winner(trials: Sequence[Trial]) -> Trial | None:
    """Return the best trial that can win and gains more than 0 and more than the null trial, or None."""
    threshold = max([0.0, *(trial.value for trial in trials if trial.null and trial.value is not None)])
    candidates = [
        (trial.value, -trial.number, trial)
        for trial in trials
        if trial.can_win and trial.value is not None and trial.value > threshold
    ]
    return max(candidates)[-1] if candidates else None


# ------------------------------------------------------------------------------------------ sentences


def search_sentences(trials: Sequence[Trial], winner: Winner | None, null_gain: GainRow | None) -> list[str]:
    """Return the result of the search in words; only counts while trials are unfinished."""
    sentences = [_count_sentence(trials)]
    if any(trial.state in ("running", "waiting") for trial in trials):
        return sentences
    if null_gain is not None:
        sentences.append(_null_sentence(null_gain))
    sentences += _winner_sentences(trials, winner)
    hacked = [str(trial.number) for trial in trials if trial.reason == GUARD]
    if hacked:
        which = f"Trial {hacked[0]}" if len(hacked) == 1 else f"Trials {', '.join(hacked)}"
        sentences.append(f"{which} cannot win: the guard fell while the composite rose.")
    failed = [trial for trial in trials if trial.state == "failed"]
    return sentences + [f"Trial {trial.number} failed: {trial.reason}." for trial in failed]


def _count_sentence(trials: Sequence[Trial]) -> str:
    states = [trial.state for trial in trials if not trial.null]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    return f"{len(states)} trials: {counts}."


def _null_sentence(null_gain: GainRow) -> str:
    gain, error = null_gain["difference"], null_gain["standard_error"] or 0.0
    if max(abs(gain), error) <= ROUNDING:
        return "The null trial, which trains nothing, gains nothing: measurements are repeatable."
    return (
        f"Warning: the null trial, which trains nothing, gains {gain:+.3f} (standard error {error:.3f}): "
        "measurements are not repeatable (a reward service that is not deterministic, or random streams that "
        "drift), and gains of that size mean nothing."
    )


def _winner_sentences(trials: Sequence[Trial], winner: Winner | None) -> list[str]:
    if winner is None:
        return ["No trial gains anything: there is no winner, and the experiment's own settings stay."]
    candidates = sum(trial.can_win for trial in trials)
    won = f"Trial {winner.number} wins, the best of {candidates}, with {_gain_text(winner.selected)}"
    sentences = [f"{won} standard deviations: {settings_text(winner.params)}."]
    if winner.fresh is not None:
        sentences.append(_fresh_sentence(winner.selected, winner.fresh))
    return sentences


def _fresh_sentence(selected: GainRow, fresh: GainRow) -> str:
    lost = selected["difference"] - fresh["difference"]
    curse = (
        f"{lost:.3f} less than when it was chosen (the winner's curse)"
        if lost > 0
        else "no less than when it was chosen"
    )
    caveat = "" if fresh["verdict"] == "rises" else "; the interval does not exclude that it gains nothing"
    return f"On fresh random streams it gains {_gain_text(fresh)}, {curse}{caveat}."


def _gain_text(gain: GainRow) -> str:
    bounds = "" if gain["low"] is None else f" ({gain['low']:+.3f} to {gain['high']:+.3f})"
    return f"{gain['difference']:+.3f}{bounds}"


def settings_text(params: Mapping[str, Any]) -> str:
    """Return settings on one line."""
    texts = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    )
    return ", ".join(texts) or "as configured"


# --------------------------------------------------------------------------------------------- table


def trial_table(trials: Sequence[Trial], winner: Winner | None) -> Group:
    """Return a table of the trials, best first, and below it the settings of each."""
    results = Table(title="Search: gain of the composite", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("trial", "gain", "interval", "iterations", "state", ""):
        results.add_column(column, justify="left" if column in ("state", "") else "right", no_wrap=True)
    settings = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    settings.add_column(justify="right")
    for trial in sorted(trials, key=_rank):
        remark = "winner" if winner and trial.number == winner.number else _remark(trial)
        value = "" if trial.value is None else f"{trial.value:+.3f}"
        interval = "" if trial.low is None else f"{trial.low:+.3f} {trial.high:+.3f}"
        results.add_row(str(trial.number), value, interval, str(trial.iterations), trial.state, remark)
        settings.add_row(str(trial.number), "trains nothing" if trial.null else settings_text(trial.params))
    return Group(results, settings)


def _remark(trial: Trial) -> str:
    if trial.null:
        return "trains nothing"
    return trial.reason if trial.reason in (GUARD, "patience") else ""


def _rank(trial: Trial) -> tuple[int, float, int]:
    return STATES.index(trial.state), -(trial.value or 0.0), trial.number
