"""What a user lists for a recalibration: images with their prompts, and people's choices. CSV or JSONL."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from reward_service.settings import ConfigError, one_line

Format = Literal["csv", "jsonl"]
Row = TypeVar("Row")

MAX_PROMPT = 10_000
_SUFFIXES: dict[str, Format] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_MAX_WEIGHT = 1e6  # beyond it sums would lose the other choices, or overflow
_SHOWN, _SHOWN_NAME = 3, 200
_SURPLUS = "\0"  # no column of a file; the empty name is one: pandas gives it to its index


@dataclass(frozen=True, slots=True)
class Listed:
    """One image, its path as the file names it, and the prompt it was made for; `group` is the prompt's
    id, by default its text."""

    image: str
    prompt: str
    group: str
    line: int

    @property
    def key(self) -> tuple[str, str]:
        """What one score belongs to."""
        return self.prompt, self.image


@dataclass(frozen=True, slots=True)
class Choice:
    """A person preferred one image to another; `weight` counts the choice several times."""

    preferred: Listed
    rejected: Listed
    weight: float


def read_images(path: Path, form: Format | None = None) -> list[Listed]:
    """Read columns `image`, `prompt` and, if there is one, `prompt_id`.

    Raises:
        ConfigError: the file, and the line at fault if one is
    """
    found = _rows(path, form, ("image", "prompt"), _listed)
    first: dict[tuple[str, str], int] = {}
    for row in found:
        if (earlier := first.setdefault(row.key, row.line)) != row.line:
            raise ConfigError(f"{path}: line {row.line} repeats line {earlier} ({row.image}); remove one")
    return found


def read_choices(path: Path, form: Format | None = None) -> list[Choice]:
    """Read columns `prompt`, `preferred`, `rejected` and, if there are any, `weight`, `prompt_id`.

    Raises:
        ConfigError: the file, and the line at fault if one is
    """
    return _rows(path, form, ("prompt", "preferred", "rejected"), _choice)


def check_files(folder: Path, listed: Sequence[Listed], source: Path) -> None:
    """Every image is a file, asked of all before any is scored.

    Raises:
        ConfigError: how many are missing, and the first of them
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the images' folder with --images")
    missing = [row for row in listed if not _is_file(folder / row.image)]
    if missing:
        shown = ", ".join(f"{row.image[:_SHOWN_NAME]} (line {row.line})" for row in missing[:_SHOWN])
        more = " ..." if len(missing) > _SHOWN else ""
        count = f"{len(missing)} of {len(listed)} images are"
        raise ConfigError(f"{source}: {count} not in {folder}: {shown}{more}; correct the paths or --images")


def _is_file(path: Path) -> bool:
    """Whether it is one; a name that no file system takes is none."""
    try:
        return path.is_file()
    except OSError:  # too long
        return False


def _rows(
    path: Path, form: Format | None, columns: Sequence[str], parse: Callable[[Mapping[str, Any], int], Row]
) -> list[Row]:
    form = form or _SUFFIXES.get(path.suffix.lower())
    if form is None:
        raise ConfigError(f"{path}: neither .csv nor .jsonl; say which with --format")
    found = []
    try:
        for line, values in _csv(path, columns) if form == "csv" else _jsonl(path):
            try:
                found.append(parse(values, line))
            except ValueError as error:
                raise ConfigError(f"{path}: line {line}: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if not found:
        raise ConfigError(f"{path}: holds no rows; list images in columns {', '.join(columns)}")
    return found


def _csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey=_SURPLUS, strict=True)
        try:
            names = reader.fieldnames or ()
            lacking = [name for name in columns if name not in names]
            if lacking:
                found = ", ".join(names) or "nothing"
                raise ConfigError(f"{path}: no column {' and '.join(lacking)} in the first line ({found})")
            for values in reader:
                if _SURPLUS in values or None in values.values():
                    message = f"expected {len(names)} fields; quote a prompt that holds commas"
                    raise ConfigError(f"{path}: line {reader.line_num}: {message}")
                yield reader.line_num, values
        except csv.Error as error:
            raise ConfigError(f"{path}: line {reader.line_num}: not CSV ({one_line(error)})") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: line {line}: not JSON ({one_line(error)})") from None
            if not isinstance(values, dict):
                raise ConfigError(f"{path}: line {line}: expected a JSON object in each line")
            yield line, values


def _listed(values: Mapping[str, Any], line: int, column: str = "image") -> Listed:
    prompt = _text(values, "prompt")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"prompt has {len(prompt)} characters; at most {MAX_PROMPT} are read")
    group = values.get("prompt_id")
    return Listed(_text(values, column), prompt, prompt if group in (None, "") else str(group), line)


def _choice(values: Mapping[str, Any], line: int) -> Choice:
    preferred, rejected = (_listed(values, line, column) for column in ("preferred", "rejected"))
    if preferred.image == rejected.image:
        raise ValueError(f"preferred and rejected are both {preferred.image}; a choice is between two")
    given = values.get("weight")
    try:
        weight = 1.0 if given in (None, "") else float(given)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 1 / _MAX_WEIGHT <= weight <= _MAX_WEIGHT:
        limit = f"it must be a number above 0, from {1 / _MAX_WEIGHT:g} to {_MAX_WEIGHT:g}"
        raise ValueError(f"weight is {one_line(given)!r}; {limit}")
    return Choice(preferred, rejected, weight)


def _text(values: Mapping[str, Any], column: str) -> str:
    if column not in values:
        raise ValueError(f"no {column}; every line needs one")
    value = values[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} is {'empty' if value in ('', None) else 'no text'}; give it words")
    if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{column} holds half of a character (a lone surrogate); write it whole")
    return value
