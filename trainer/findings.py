"""All that the report of a run or an experiment says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from markupsafe import Markup

from trainer.cases import Cases
from trainer.provenance import Provenance
from trainer.rows import Row
from trainer.trials import Search

T = TypeVar("T")


class Chart(NamedTuple):
    """A chart with what it shows."""

    title: str
    svg: Markup


class Table(NamedTuple):
    """Gains with intervals, and where they were measured."""

    title: str
    note: str
    rows: Sequence[Row]


class Fold(NamedTuple):
    """A line of the fold table."""

    name: str
    prompts: int | None
    iterations: int | None
    best: int | None
    gain: Row | None
    rows: Sequence[Row]
    stopped: str
    guard: str


class Guard(NamedTuple):
    """What the guard says of a run."""

    where: str
    tripped: bool
    sentence: str
    gain: Row | None
    note: str


@dataclass
class Report:
    """All that the page says."""

    name: str
    path: str
    kind: str  # "run" or "experiment"
    state: str
    headline: str
    tone: str  # "rises", "falls", "unclear", "warning", "none"
    sentences: list[str]
    facts: list[tuple[str, str]]
    notes: list[str]
    provenance: Provenance
    settings: dict[str, Any]
    confidence: float
    tables: list[Table] = field(default_factory=list)
    forest: list[Chart] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    chosen: int | None = None
    tested: bool = False  # whether the test prompts have been looked at
    search: Search | None = None
    guards: list[Guard] = field(default_factory=list)
    drift: Sequence[Row] = ()
    drift_said: Sequence[str] = ()
    curves: list[Chart] = field(default_factory=list)
    curve_note: str = ""
    drift_curves: list[Chart] = field(default_factory=list)
    training: list[Chart] = field(default_factory=list)
    cases: list[Cases] = field(default_factory=list)
    grid: tuple[str, str] | None = None  # title, data URI
    lora: str = ""
    karlo: str = ""  # arguments of from_pretrained
    events: list[str] = field(default_factory=list)


def attempt(notes: list[str], what: str, add: Callable[..., T], *given: Any) -> T | None:
    """What `add` returns; where a file's content is too odd for it, a note, and the other parts stand."""
    try:
        return add(*given)
    except (
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        OSError,
        MemoryError,
    ) as error:
        notes.append(f"The part on {what} is left out: what the files hold is not as expected ({error}).")
        return None
