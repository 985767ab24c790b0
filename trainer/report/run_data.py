"""Tolerant reader of a run's or an experiment's folder, and rows of gains with their wording.

Crashed runs need a report most. A file that is missing, damaged or of an unexpected shape therefore never
raises: it yields nothing, and a note says so.
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

from reward_service.runtime.yaml12 import dump_yaml, parse_yaml
from trainer.config import flatten
from trainer.evaluation.comparison import COMPOSITE, Measurement
from trainer.runs.folder import CONFIG_FILE, METRICS_FILE
from trainer.runtime.errors import StorageError, reason

Json = Mapping[str, Any]

# A folder with any of these can be reported.
SIGNS = (METRICS_FILE, "evaluation.json", "crossval.json", "search.json", "test.json", "splits.json")
PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):\S*(?=@)")  # user:password@ of an address


def number(value: object) -> float | None:
    """Return a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None


def whole(value: object) -> int | None:
    """Return a whole number, or None."""
    found = number(value)
    return None if found is None or found != int(found) else int(found)


def mapping(value: object) -> Json:
    """Return a mapping; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def items(value: object) -> Sequence[Any]:
    """Return a list; an empty one for anything else."""
    return value if isinstance(value, (list, tuple)) else ()


def texts(value: object) -> tuple[str, ...]:
    """Return the strings of a list."""
    return tuple(item for item in items(value) if isinstance(item, str))


@dataclass
class RunData:
    """Files of one run or experiment folder, read once; `notes` lists what could not be read."""

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
        """Return a JSON object; an empty one if there is none."""
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
            self.notes.append(f"{name} does not hold a JSON object")
        return mapping(found)

    def _config(self) -> Json:
        try:
            found = parse_yaml((self.path / CONFIG_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.notes.append(f"{CONFIG_FILE} is missing: the configuration is unknown")
            return {}
        except (OSError, ValueError) as error:
            self.notes.append(f"{CONFIG_FILE} could not be read: {_cause(error)}")
            return {}
        section = mapping(mapping(found).get("trainer"))
        if not section:
            self.notes.append(f"{CONFIG_FILE} has no trainer section: the configuration is unknown")
        return section

    def _metrics(self) -> list[Json]:
        """Return the iterations in order; the last record of an iteration that was logged twice."""
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
        """Return images and scores of the validation prompts, or None."""
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
        """Name of the folder; for a part of an experiment, the path from the experiment's folder."""
        parts = self.path.resolve().parts
        above = (
            1 if parts[-1] == "final" else {"folds": 2, "trials": 3}.get(parts[-2] if parts[1:] else "", 0)
        )
        return "/".join(parts[-1 - above :])

    @property
    def is_experiment(self) -> bool:
        """True for the folder of a cross-validation or a search, False for that of one run."""
        files = any((self.path / name).exists() for name in ("crossval.json", "search.json", "splits.json"))
        folders = any((self.path / name).is_dir() for name in ("folds", "search", "final"))
        return files or (folders and not (self.path / METRICS_FILE).exists())

    @property
    def settings(self) -> dict[str, Any]:
        """Configuration with dotted keys, passwords masked."""
        return {key: masked(value) for key, value in flatten(self.config).items()}

    @property
    def yaml(self) -> str:
        """Configuration as YAML, passwords masked."""
        text = dump_yaml({"trainer": dict(self.config)}, allow_unicode=True)
        return str(masked(text))

    @property
    def evaluators(self) -> tuple[str, ...]:
        """Names of the evaluators, in the order of the arrays' last axis."""
        rows = [name for name in mapping(self.evaluation.get("rows")) if name != "composite"]
        logged = list(mapping(self.metrics[0].get("raw"))) if self.metrics else []
        return tuple(map(str, rows or logged or sorted(self.identity)))

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the reported composite."""
        reported = mapping(self.config.get("evaluation")).get("weights")
        chosen = mapping(reported or mapping(self.config.get("objective")).get("weights"))
        return {str(key): weight for key, it in chosen.items() if (weight := number(it)) is not None}

    @property
    def confidence(self) -> float:
        """Confidence of the intervals."""
        configured = mapping(self.config.get("evaluation")).get("confidence")
        return number(self.evaluation.get("confidence")) or number(configured) or 0.95

    @property
    def done(self) -> int:
        """Iterations completed at the newest record."""
        return int(self.metrics[-1]["iteration"]) + 1 if self.metrics else 0

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that wrote the newest checkpoint."""
        for path in sorted((self.path / "checkpoints").glob("iteration-*/state.json"), reverse=True):
            try:
                state = mapping(json.loads(path.read_bytes()))
            except (OSError, ValueError, RecursionError):
                continue
            return {str(key): str(it) for key, it in mapping(state.get("versions")).items()}
        return {}

    @property
    def seconds(self) -> float:
        """Seconds spent on iterations and the evaluations between them."""
        return sum(
            (number(record.get("seconds")) or 0.0)
            + (number(mapping(record.get("evaluation")).get("seconds")) or 0.0)
            for record in self.metrics
        )

    @property
    def written(self) -> datetime | None:
        """Time of the newest record or result, UTC."""
        names = ("finished.json", "test.json", "crossval.json", "search.json", METRICS_FILE, CONFIG_FILE)
        for name in names:
            try:
                return datetime.fromtimestamp((self.path / name).stat().st_mtime, UTC)
            except (OSError, OverflowError, ValueError):
                continue
        return None

    def within(self, *names: str) -> "RunData | None":
        """Return a run folder inside this one, or None."""
        path = self.path.joinpath(*names)
        return RunData(path) if path.is_dir() else None

    @cached_property
    def folds(self) -> dict[int, "RunData"]:
        """Started folds by number."""
        found = [path for path in (self.path / "folds").glob("*") if path.name.isdecimal() and path.is_dir()]
        return {int(path.name): RunData(path) for path in sorted(found, key=lambda it: int(it.name))}


def open_run_data(path: Path) -> RunData:
    """Read a folder.

    Raises:
        StorageError: it is not the folder of a run or an experiment
    """
    if not path.is_dir():
        what = "it is a file" if path.exists() else "no such folder"
        raise StorageError(f"{path}: {what}; name the folder of a run or of an experiment")
    run_data = RunData(path)
    if not run_data.config and not any((path / name).exists() for name in SIGNS):
        inner = sorted(it.parent.name for it in path.glob(f"*/{CONFIG_FILE}"))
        advice = f"name one inside it, such as {path / inner[0]}" if inner else "name a run's folder"
        raise StorageError(f"{path}: not a run or experiment (no {CONFIG_FILE}, no results); {advice}")
    return run_data


def masked(value: object) -> object:
    """Return the value with the password of an address masked."""
    return PASSWORD.sub(r"\1:***", value) if isinstance(value, str) else value


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


ARROWS = {"rises": "▲", "falls": "▼", "unclear": "●"}
ENDS = ("low", "high")


@dataclass(frozen=True)
class GainRow:
    """Gain of one evaluator or of the composite; None for a value that is missing or not finite."""

    name: str
    before: float | None
    after: float | None
    difference: float | None
    low: float | None
    high: float | None
    deviations: float | None

    @property
    def verdict(self) -> str:
        """The side of 0 that the interval lies on: "rises", "falls" or "unclear"."""
        if self.low is not None and self.low > 0:
            return "rises"
        return "falls" if self.high is not None and self.high < 0 else "unclear"

    @property
    def arrow(self) -> str:
        """Verdict as a symbol."""
        return ARROWS[self.verdict]

    @property
    def digits(self) -> int:
        """Significant decimals."""
        return 3 if self.name == COMPOSITE else 4

    @property
    def interval(self) -> str:
        """Both ends as text."""
        return interval(self.low, self.high, self.digits)

    def in_deviations(self) -> "GainRow | None":
        """Return the gain in calibrated deviations (z), or None if it is unknown."""
        if self.name == COMPOSITE:
            return self
        if not self.difference or self.deviations is None:
            return None
        scale = self.deviations / self.difference
        low, high = (None if end is None else end * scale for end in (self.low, self.high))
        return GainRow(self.name, None, None, self.deviations, low, high, self.deviations)


def row(name: str, values: object) -> GainRow | None:
    """Return the row of a file's values; None without a difference."""
    found = mapping(values)
    fields = ("before", "after", "difference", "low", "high", "deviations")
    numbers = {key: number(found.get(key)) for key in fields}
    return None if numbers["difference"] is None else GainRow(name, **numbers)


def rows(values: object) -> tuple[GainRow, ...]:
    """Return the rows of a file, evaluators first and the composite last."""
    found = [it for name, held in mapping(values).items() if (it := row(str(name), held)) is not None]
    return tuple(sorted(found, key=lambda it: it.name == COMPOSITE))


def composite_of(several: Iterable[GainRow]) -> GainRow | None:
    """Return the composite's row, or None."""
    return next((it for it in several if it.name == COMPOSITE), None)


# ----------------------------------------------------------------------------------------- wording


def signed(value: float | None, digits: int = 3) -> str:
    """Format a number with its sign and a true minus; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "+")


def plain(value: float | None, digits: int = 4) -> str:
    """Format a number without a plus sign."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """Format both ends of an interval, or "no interval"."""
    if low is None or high is None:
        return "no interval"
    return f"{signed(low, digits)} to {signed(high, digits)}"


def shown(value: object) -> str:
    """Format a setting's value."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not a number"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def duration(seconds: float) -> str:
    """Format a duration in s, min or h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{hours:g} h"


def counted(count: int, what: str) -> str:
    """Format a count with its noun."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def ended(value: object) -> str:
    """Format the reason of an early stop; an empty string if there is none."""
    if isinstance(value, Mapping):
        return ": ".join(str(value[key]) for key in ("by", "reason") if value.get(key))
    return str(value) if value else ""


def others(several: Sequence[GainRow]) -> list[str]:
    """List the evaluators that rise, fall and are not clear."""
    sentences = []
    for verdict, words in (("rises", "Rising"), ("falls", "Falling"), ("unclear", "Not clear")):
        names = [it.name for it in several if it.verdict == verdict and it.name != COMPOSITE]
        if names:
            sentences.append(f"{words}: {', '.join(names)}.")
    return sentences


def gain_sentence(gain: GainRow, where: str, confidence: float) -> str:
    """Describe the composite's change in one sentence that claims no more than its interval supports."""
    bounds = f"{confidence:.0%} interval {gain.interval}"
    change = f"{signed(gain.difference)}\u00a0σ"
    if gain.low is None or gain.high is None:
        return f"The composite changed by {change} {where}; there are too few prompts for an interval."
    if gain.verdict == "unclear":
        text = f"the composite changed by {change} {where} ({bounds}, which includes 0)"
        return f"No significant improvement: {text}."
    word = "rose" if gain.verdict == "rises" else "fell"
    size = f"{abs(gain.difference or 0):.3f}\u00a0σ"
    return f"The composite {word} by {size} {where} ({bounds})."
