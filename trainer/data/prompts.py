"""Prompt files: text with one prompt a line; CSV and JSON lines, optionally with user and cluster."""

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reward_service.runtime.text_files import (
    CsvSyntaxError,
    CsvTable,
    TextFileError,
    decode_utf8,
    unique_keys,
)
from trainer.config import ConfigError

USER_COLUMNS = ("user", "user_name")  # the second is DiffusionDB's


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, with the user who wrote it and the cluster it belongs to, if known.

    A split never divides the prompts of one user, or of one cluster.
    """

    text: str
    user: str | None = None
    cluster: str | None = None


class Row(NamedTuple):
    """Values of one line of a prompt file, not validated."""

    line: int  # counted from 1
    text: Any
    user: Any = None
    cluster: Any = None


def read_prompt_set(path: Path, limit: int | None = None) -> tuple[Prompt, ...]:
    """Read the distinct prompts of a UTF-8 file, in order. The suffix selects the format:

    - .txt: one prompt a line; blank lines, and lines that begin with #, are skipped.
    - .csv: a header with the column prompt, and optionally user (or user_name) and cluster.
    - .jsonl: on each line an object with these keys, or just a string.

    Texts are normalized to NFC with single spaces. Of a repeated prompt, the first one counts.

    Args:
        path: The file.
        limit: Most prompts to return, the first ones.

    Raises:
        ConfigError: The file or a line is invalid; the message names both.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        suffix = path.suffix or "no suffix"
        raise ConfigError(f"{path}: {suffix} is not a supported format of prompts; {SUFFIXES}")
    prompts: dict[str, Prompt] = {}
    for row in read(path, _read_text(path)):
        text = _valid_text(path, row)
        if text and text not in prompts:
            prompts[text] = Prompt(text, _valid_label(path, row, "user"), _valid_label(path, row, "cluster"))
    if not prompts:
        raise ConfigError(f"{path}: contains no prompt; write at least one")
    return tuple(prompts.values())[:limit]


def read_prompts(path: Path, limit: int | None = None) -> tuple[str, ...]:
    """Return the texts of `read_prompt_set`."""
    return tuple(prompt.text for prompt in read_prompt_set(path, limit))


def normalize_prompts(prompts: Iterable[str]) -> tuple[str, ...]:
    """Return the normalized texts, in order, without empty and repeated ones."""
    return tuple(dict.fromkeys(filter(None, map(normalize_text, prompts))))


def normalize_text(prompt: str) -> str:
    """Return a text in NFC, with single spaces between words and none around them."""
    return " ".join(unicodedata.normalize("NFC", prompt).split())


# ------------------------------------------------------------------------------------------- formats


def _read_text(path: Path) -> str:
    try:
        return decode_utf8(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such prompt file; set trainer.prompts in the configuration") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; name a file of prompts in it") from error
    except TextFileError as error:
        raise ConfigError(f"{path}, {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _read_lines(_path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("#"):
            yield Row(number, line)


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    try:
        table = CsvTable(text, ("prompt",))
        columns = _columns(path, table.header)
        for line, fields in table.rows():
            if len(fields) != len(table.header):
                raise ConfigError(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(table.header)}; "
                    'the separator is a comma: put a prompt with commas between double quotes ("...")'
                )
            yield Row(line, **{name: fields[column] for name, column in columns.items()})
    except CsvSyntaxError as error:
        raise ConfigError(f"{path}, line {error.line}: invalid CSV {error.problem}") from error
    except TextFileError as error:
        raise ConfigError(f"{path}, {error}") from error


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    """Return the index of the column of each field of a Row that the header has."""
    names = {"text": ("prompt",), "user": USER_COLUMNS, "cluster": ("cluster",)}
    indices = {
        field: [i for i, column in enumerate(header) if column in columns] for field, columns in names.items()
    }
    if not indices["text"]:
        shown = ", ".join(filter(None, header))[:80] or "nothing"
        raise ConfigError(f"{path}, line 1: no column prompt in the header ({shown}); add one")
    for field, columns in names.items():
        if len(indices[field]) > 1:
            raise ConfigError(f"{path}, line 1: several columns {' or '.join(columns)}; keep one of them")
    return {field: found[0] for field, found in indices.items() if found}


def _read_json_lines(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): a JSON string may contain characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            cause = (
                "too deeply nested"
                if isinstance(error, RecursionError)
                else getattr(error, "msg", str(error))
            )
            raise ConfigError(
                f'{path}, line {number}: invalid JSON ({cause}); write {{"prompt": "..."}} on each line'
            ) from error
        yield _json_row(path, number, value)


def _json_row(path: Path, line: int, value: Any) -> Row:
    if isinstance(value, str):
        return Row(line, value)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}, line {line}: {_kind(value)}; write an object with a prompt, or a string")
    if "prompt" not in value:
        shown = ", ".join(map(repr, value))[:80] or "nothing"
        raise ConfigError(f"{path}, line {line}: no key prompt in the object ({shown}); add it")
    users = [value[name] for name in USER_COLUMNS if name in value]
    if len(users) > 1:
        raise ConfigError(f"{path}, line {line}: several keys {' or '.join(USER_COLUMNS)}; keep one of them")
    return Row(line, value["prompt"], users[0] if users else None, value.get("cluster"))


READERS = {".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_json_lines}
SUFFIXES = "name a .txt, .csv or .jsonl file (for DiffusionDB: reward-trainer prompts diffusiondb)"

# -------------------------------------------------------------------------------------------- values


def _valid_text(path: Path, row: Row) -> str:
    """Return the normalized prompt of a row; raise a ConfigError if it is not a text."""
    if not isinstance(row.text, str):
        raise ConfigError(f"{path}, line {row.line}: the prompt is {_kind(row.text)}; write a string")
    return _without_controls(path, row.line, "prompt", normalize_text(row.text))


def _valid_label(path: Path, row: Row, name: str) -> str | None:
    """Return a user or cluster, a string or whole number; None if it is empty or missing."""
    value = getattr(row, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str | None):
        raise ConfigError(
            f"{path}, line {row.line}: the {name} is {_kind(value)}; write a string, or leave it out"
        )
    return _without_controls(path, row.line, name, normalize_text(value or "")) or None


def _without_controls(path: Path, line: int, name: str, text: str) -> str:
    """Return the text; raise a ConfigError if it contains control characters or surrogates."""
    wrong = next((c for c in text if c < " " or unicodedata.category(c) in ("Cc", "Cs")), None)
    if wrong is not None:
        raise ConfigError(
            f"{path}, line {line}: the {name} contains the control character U+{ord(wrong):04X}; remove it"
        )
    return text


def _kind(value: object) -> str:
    names: Mapping[type, str] = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "a string")
