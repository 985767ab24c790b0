"""What a run or an experiment has left in its folder, read as far as it can be.

A report is wanted most of the run that crashed. So nothing here fails on a file that is missing, damaged or
of another shape than expected: it yields nothing, and a note says so.

Rows of gains as files hold them, and what they mean in words.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trainer.evaluation.comparison import Measurement
from trainer.runs.folder import CONFIG_FILE, METRICS_FILE
from trainer.runtime.errors import StorageError, reason

Json = Mapping[str, Any]

# Any of these makes a folder one that there is something to say about.
SIGNS = (METRICS_FILE, "evaluation.json", "crossval.json", "search.json", "test.json", "splits.json")
SHARED_OUT = re.compile(r"(?<=://)([^:/@\s]*):\S*(?=@)")  # user:password@ of an address


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def whole(value: object) -> int | None:
    """A whole number, or None."""
    found = number(value)
    return None if found is None or found != int(found) else int(found)


def mapping(value: object) -> Json:
    """A mapping; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def items(value: object) -> Sequence[Any]:
    """A list; an empty one for anything else."""
    return value if isinstance(value, (list, tuple)) else ()


def texts(value: object) -> tuple[str, ...]:
    """The strings of a list."""
    return tuple(item for item in items(value) if isinstance(item, str))


def flat(values: Json, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


@dataclass
class Remains:
    """The files of one folder; read once, kept. `notes` says what could not be read."""

    path: Path
    notes: list[str] = field(default_factory=list)
    _kept: dict[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self._config()
        self.identity = {str(key): str(it) for key, it in self.json("scorer.json").items()}
        self.prompts = self.json("prompts.json")
        self.metrics = self._metrics()
        self.evaluation = self.json("evaluation.json")
        self.finished = self.json("finished.json")

    # ------------------------------------------------------------------------------------ reading

    def json(self, name: str) -> Json:
        """A JSON object; empty where there is none."""
        if name not in self._kept:
            self._kept[name] = self._json(name)
        return self._kept[name]

    def _json(self, name: str) -> Json:
        try:
            found = json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.notes.append(f"{name} could not be read: {_cause(error)}")
            return {}
        if not isinstance(found, dict):
            self.notes.append(f"{name} does not hold what was expected")
        return mapping(found)

    def _config(self) -> Json:
        try:
            found = yaml.safe_load((self.path / CONFIG_FILE).read_bytes())
        except FileNotFoundError:
            self.notes.append(f"{CONFIG_FILE} is missing: what was configured is not known")
            return {}
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            self.notes.append(f"{CONFIG_FILE} could not be read: {_cause(error)}")
            return {}
        section = mapping(mapping(found).get("trainer"))
        if not section:
            self.notes.append(f"{CONFIG_FILE} has no trainer section: what was configured is not known")
        return section

    def _metrics(self) -> list[Json]:
        """The iterations in order; of one that was logged twice, the last."""
        try:
            lines = (self.path / METRICS_FILE).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            self.notes.append(f"{METRICS_FILE} could not be read: {_cause(error)}")
            return []
        parsed = [_line(line) for line in lines if line.strip()]
        whole_lines = [record for record in parsed if whole(record.get("iteration")) is not None]
        if lost := len(parsed) - len(whole_lines):
            what = "1 line" if lost == 1 else f"{lost} lines"
            self.notes.append(f"{METRICS_FILE}: {what} could not be read and {_are(lost)} left out")
        by_iteration = {record["iteration"]: record for record in whole_lines}
        return [by_iteration[key] for key in sorted(by_iteration)]

    def measurement(self, name: str) -> Measurement | None:
        """Images and scores of the validation prompts; None where there are none."""
        if not (self.path / name).exists():
            return None
        try:
            return Measurement.load(self.path / name, texts(self.prompts.get("validation")))
        except (StorageError, OSError, ValueError, MemoryError) as error:
            self.notes.append(f"{name} could not be read: {_cause(error)}")
            return None

    # ------------------------------------------------------------------------------------ meaning

    @property
    def name(self) -> str:
        """The folder's; of a part of an experiment, from the experiment on."""
        parts = self.path.resolve().parts
        above = (
            1 if parts[-1] == "final" else {"folds": 2, "trials": 3}.get(parts[-2] if parts[1:] else "", 0)
        )
        return "/".join(parts[-1 - above :])

    @property
    def is_experiment(self) -> bool:
        """Whether this is the folder of a cross-validation or a search, rather than of one run."""
        files = any((self.path / name).exists() for name in ("crossval.json", "search.json", "splits.json"))
        folders = any((self.path / name).is_dir() for name in ("folds", "search", "final"))
        return files or (folders and not (self.path / METRICS_FILE).exists())

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with dotted keys, an address's password left out."""
        return {key: masked(value) for key, value in flat(self.config).items()}

    @property
    def yaml(self) -> str:
        """The configuration as text, an address's password left out."""
        text = yaml.safe_dump({"trainer": dict(self.config)}, sort_keys=False, allow_unicode=True)
        return str(masked(text))

    @property
    def evaluators(self) -> tuple[str, ...]:
        """Their names, in the order of the arrays' last axis."""
        rows = [name for name in mapping(self.evaluation.get("rows")) if name != "composite"]
        logged = list(mapping(self.metrics[0].get("raw"))) if self.metrics else []
        return tuple(map(str, rows or logged or sorted(self.identity)))

    @property
    def weights(self) -> dict[str, float]:
        """Of the composite that is reported."""
        judged = mapping(self.config.get("evaluation")).get("weights")
        chosen = mapping(judged or mapping(self.config.get("objective")).get("weights"))
        return {str(key): weight for key, it in chosen.items() if (weight := number(it)) is not None}

    @property
    def confidence(self) -> float:
        """Of the intervals."""
        configured = mapping(self.config.get("evaluation")).get("confidence")
        return number(self.evaluation.get("confidence")) or number(configured) or 0.95

    @property
    def done(self) -> int:
        """Iterations behind the newest record."""
        return int(self.metrics[-1]["iteration"]) + 1 if self.metrics else 0

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries that its newest checkpoint was written with."""
        for path in sorted((self.path / "checkpoints").glob("iteration-*/state.json"), reverse=True):
            try:
                state = mapping(json.loads(path.read_bytes()))
            except (OSError, ValueError, RecursionError):
                continue
            return {str(key): str(it) for key, it in mapping(state.get("versions")).items()}
        return {}

    @property
    def seconds(self) -> float:
        """Spent on iterations and on the evaluations between them."""
        return sum(
            (number(record.get("seconds")) or 0.0)
            + (number(mapping(record.get("evaluation")).get("seconds")) or 0.0)
            for record in self.metrics
        )

    @property
    def written(self) -> datetime | None:
        """When its newest record or result was written, UTC."""
        names = ("finished.json", "test.json", "crossval.json", "search.json", METRICS_FILE, CONFIG_FILE)
        for name in names:
            try:
                return datetime.fromtimestamp((self.path / name).stat().st_mtime, UTC)
            except (OSError, OverflowError, ValueError):
                continue
        return None

    def within(self, *names: str) -> "Remains | None":
        """A run folder inside this one, where there is one."""
        path = self.path.joinpath(*names)
        return Remains(path) if path.is_dir() else None

    @cached_property
    def folds(self) -> dict[int, "Remains"]:
        """Folds that have begun, by their number."""
        found = [path for path in (self.path / "folds").glob("*") if path.name.isdecimal() and path.is_dir()]
        return {int(path.name): Remains(path) for path in sorted(found, key=lambda it: int(it.name))}


def open_remains(path: Path) -> Remains:
    """What the folder holds. Raises StorageError, in one line, where that is no run."""
    if not path.is_dir():
        what = "this is a file" if path.exists() else "no such folder"
        raise StorageError(f"{path}: {what}; name the folder of a run or of an experiment")
    remains = Remains(path)
    if not remains.config and not any((path / name).exists() for name in SIGNS):
        inner = sorted(it.parent.name for it in path.glob(f"*/{CONFIG_FILE}"))
        advice = f"name one of those in it, such as {path / inner[0]}" if inner else "name a run's folder"
        raise StorageError(f"{path}: no run or experiment (no {CONFIG_FILE} of one, no results); {advice}")
    return remains


def masked(value: object) -> object:
    """The value; in text, what stands for a password in an address is taken out."""
    return SHARED_OUT.sub(r"\1:***", value) if isinstance(value, str) else value


def _line(line: bytes) -> Json:
    try:
        return mapping(json.loads(line))
    except (ValueError, RecursionError):
        return {}


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return reason(error) if isinstance(error, Exception) else type(error).__name__


COMPOSITE = "composite"
ARROWS = {"rises": "▲", "falls": "▼", "unclear": "●"}
ENDS = ("low", "high")


@dataclass(frozen=True)
class Row:
    """One evaluator's gain, or the composite's; None where the file has no finite number."""

    name: str
    before: float | None
    after: float | None
    difference: float | None
    low: float | None
    high: float | None
    deviations: float | None

    @property
    def verdict(self) -> str:
        """ "rises", "falls" or "unclear": which side of 0 the interval lies on."""
        if self.low is not None and self.low > 0:
            return "rises"
        return "falls" if self.high is not None and self.high < 0 else "unclear"

    @property
    def arrow(self) -> str:
        """The verdict as a sign."""
        return ARROWS[self.verdict]

    @property
    def digits(self) -> int:
        """Decimals that are worth reading."""
        return 3 if self.name == COMPOSITE else 4

    @property
    def interval(self) -> str:
        """Both ends in words of figures."""
        return interval(self.low, self.high, self.digits)

    def in_deviations(self) -> "Row | None":
        """The same in calibrated deviations (z), of which raw scores are multiples."""
        if self.name == COMPOSITE:
            return self
        if not self.difference or self.deviations is None:
            return None
        scale = self.deviations / self.difference
        low, high = (None if end is None else end * scale for end in (self.low, self.high))
        return Row(self.name, None, None, self.deviations, low, high, self.deviations)


def row(name: str, values: object) -> Row | None:
    """The row that a file holds; None where it has no difference."""
    found = mapping(values)
    fields = ("before", "after", "difference", "low", "high", "deviations")
    numbers = {key: number(found.get(key)) for key in fields}
    return None if numbers["difference"] is None else Row(name, **numbers)


def rows(values: object) -> tuple[Row, ...]:
    """Rows by their names, evaluators first and the composite last."""
    found = [it for name, held in mapping(values).items() if (it := row(str(name), held)) is not None]
    return tuple(sorted(found, key=lambda it: it.name == COMPOSITE))


def composite_of(several: Iterable[Row]) -> Row | None:
    """The composite among rows."""
    return next((it for it in several if it.name == COMPOSITE), None)


# --------------------------------------------------------------------------------------------- words


def signed(value: float | None, digits: int = 3) -> str:
    """With its sign, a true minus; a dash for no number."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "+")


def plain(value: float | None, digits: int = 4) -> str:
    """Without a plus."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """Both ends; says so where there is none."""
    if low is None or high is None:
        return "no interval"
    return f"{signed(low, digits)} to {signed(high, digits)}"


def shown(value: object) -> str:
    """A setting's value, short."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not a number"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def duration(seconds: float) -> str:
    """As a person says it."""
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{hours:g} h"


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def ended(value: object) -> str:
    """Why a fold ended before its last iteration; empty where it did not."""
    if isinstance(value, Mapping):
        return ": ".join(str(value[key]) for key in ("by", "reason") if value.get(key))
    return str(value) if value else ""


def others(several: Sequence[Row]) -> list[str]:
    """What the evaluators beside the composite did: who rises, who falls, who neither."""
    said = []
    for verdict, words in (("rises", "Rising"), ("falls", "Falling"), ("unclear", "Not clear")):
        names = [it.name for it in several if it.verdict == verdict and it.name != COMPOSITE]
        if names:
            said.append(f"{words}: {', '.join(names)}.")
    return said


def gain_sentence(gain: Row, where: str, confidence: float) -> str:
    """What became of the composite, in one sentence that claims no more than the interval does."""
    bounds = f"{confidence:.0%} interval {gain.interval}"
    change = f"{signed(gain.difference)}\u00a0σ"
    if gain.low is None or gain.high is None:
        return f"The composite changed by {change} {where}; of so few prompts there is no interval."
    if gain.verdict == "unclear":
        said = f"the composite changed by {change} {where} ({bounds}, which includes 0)"
        return f"Nothing improved for certain: {said}."
    word = "rose" if gain.verdict == "rises" else "fell"
    size = f"{abs(gain.difference or 0):.3f}\u00a0σ"
    return f"The composite {word} by {size} {where} ({bounds})."
