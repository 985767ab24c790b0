"""Input files of a calibration: images with their prompts, and human preferences. CSV or JSONL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from reward_service.runtime.text_files import (
    CsvSyntaxError,
    CsvTable,
    TextFileError,
    decode_utf8,
    unique_keys,
)
from reward_service.settings import ConfigError, one_line

FileFormat = Literal["csv", "jsonl"]
#: Prompt and image path: the pair that one score belongs to.
PairKey: TypeAlias = tuple[str, str]
Row = TypeVar("Row")

_MAX_PROMPT_CHARS = 10_000
_MAX_WEIGHT = 1e6  # larger sums would lose the other preferences, or overflow
_SUFFIXES: dict[str, FileFormat] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_SHOWN_IMAGES, _SHOWN_CHARS = 3, 200
_OPTIONAL_COLUMNS = ("prompt_id", "weight")


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One image and the prompt that it was generated from.

    Attributes:
        image: path as written in the file
        prompt: text of the prompt
        group: ID of the prompt; by default its text
        line: line number in the file
    """

    image: str
    prompt: str
    group: str
    line: int

    @property
    def key(self) -> PairKey:
        """Key of the image's score."""
        return self.prompt, self.image


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Human preference of one image over another; `weight` is its number of repetitions."""

    preferred: ListedImage
    rejected: ListedImage
    weight: float


def read_images(path: Path, file_format: FileFormat | None = None) -> list[ListedImage]:
    """Read the columns `image`, `prompt` and, if present, `prompt_id`.

    Raises:
        ConfigError: names the file, and the line if one is invalid
    """
    rows = _read_rows(path, file_format, ("image", "prompt"), _parse_image)
    lines: dict[PairKey, int] = {}
    for row in rows:
        if (earlier := lines.setdefault(row.key, row.line)) != row.line:
            raise ConfigError(f"{path}: line {row.line} repeats line {earlier} ({row.image}); remove one")
    return rows


def read_preferences(path: Path, file_format: FileFormat | None = None) -> list[PreferencePair]:
    """Read the columns `prompt`, `preferred`, `rejected` and, if present, `weight`, `prompt_id`.

    Raises:
        ConfigError: names the file, and the line if one is invalid
    """
    return _read_rows(path, file_format, ("prompt", "preferred", "rejected"), _parse_preference)


def check_images_exist(folder: Path, images: Sequence[ListedImage], source: Path) -> None:
    """Raise an error if any listed image is not a file; called before the first one is scored.

    Args:
        folder: the folder that the paths are relative to
        images: the listed images
        source: the file that lists them, for the message

    Raises:
        ConfigError: the number of missing images, and the first of them
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the images' folder with --images")
    missing = [row for row in images if not _is_file(folder / row.image)]
    if missing:
        shown = ", ".join(f"{row.image[:_SHOWN_CHARS]} (line {row.line})" for row in missing[:_SHOWN_IMAGES])
        more = " ..." if len(missing) > _SHOWN_IMAGES else ""
        count = f"{len(missing)} of {len(images)} images are"
        raise ConfigError(f"{source}: {count} not in {folder}: {shown}{more}; correct the paths or --images")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long for the file system
        return False


def _read_rows(
    path: Path,
    file_format: FileFormat | None,
    columns: Sequence[str],
    parse: Callable[[Mapping[str, Any], int], Row],
) -> list[Row]:
    file_format = file_format or _SUFFIXES.get(path.suffix.lower())
    if file_format is None:
        raise ConfigError(f"{path}: neither .csv nor .jsonl; give the format with --format")
    read = _read_csv if file_format == "csv" else _read_jsonl
    rows = []
    try:
        for line, values in read(decode_utf8(path.read_bytes()), columns):
            try:
                rows.append(parse(values, line))
            except ValueError as error:
                raise TextFileError(line, str(error)) from None
    except CsvSyntaxError as error:
        raise ConfigError(f"{path}: line {error.line}: not CSV {error.problem}") from None
    except TextFileError as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    if not rows:
        raise ConfigError(f"{path}: no rows; list images in columns {', '.join(columns)}")
    return rows


def _read_csv(text: str, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    table = CsvTable(text, columns)
    missing = [name for name in columns if name not in table.header]
    if missing:
        found = ", ".join(table.header)[:_SHOWN_CHARS] or "nothing"
        raise TextFileError(1, f"no column {' and '.join(missing)} in the header ({found}); add it")
    for name in (*columns, *_OPTIONAL_COLUMNS):
        if table.header.count(name) > 1:
            raise TextFileError(1, f"several columns {name}; keep one of them")
    for line, fields in table.rows():
        if len(fields) != len(table.header):
            problem = f"expected {len(table.header)} fields, found {len(fields)}"
            raise TextFileError(
                line, f"{problem}; the separator is a comma: quote a prompt that contains commas"
            )
        yield line, dict(zip(table.header, fields, strict=True))


def _read_jsonl(text: str, _columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines(): a JSON string may contain characters that it takes for line ends.
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            values = json.loads(row, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise TextFileError(line, f"not JSON ({one_line(error)})") from None
        if not isinstance(values, dict):
            raise TextFileError(line, "expected a JSON object in each line")
        yield line, values


def _parse_image(values: Mapping[str, Any], line: int, column: str = "image") -> ListedImage:
    prompt = _text(values, "prompt")
    if len(prompt) > _MAX_PROMPT_CHARS:
        raise ValueError(f"prompt has {len(prompt)} characters, expected at most {_MAX_PROMPT_CHARS}")
    group = values.get("prompt_id")
    return ListedImage(_text(values, column), prompt, prompt if group in (None, "") else str(group), line)


def _parse_preference(values: Mapping[str, Any], line: int) -> PreferencePair:
    preferred, rejected = (_parse_image(values, line, column) for column in ("preferred", "rejected"))
    if preferred.image == rejected.image:
        raise ValueError(f"preferred and rejected are both {preferred.image}; expected two images")
    text = values.get("weight")
    try:
        weight = 1.0 if text in (None, "") else float(text)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 1 / _MAX_WEIGHT <= weight <= _MAX_WEIGHT:
        expected = f"expected a number above 0, from {1 / _MAX_WEIGHT:g} to {_MAX_WEIGHT:g}"
        raise ValueError(f"weight is {one_line(text)!r}; {expected}")
    return PreferencePair(preferred, rejected, weight)


def _text(values: Mapping[str, Any], column: str) -> str:
    if column not in values:
        raise ValueError(f"no {column}; every line needs one")
    value = values[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} is {'empty' if value in ('', None) else 'not text'}; give it words")
    if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{column} contains a lone surrogate, half of a character; correct it")
    return value
