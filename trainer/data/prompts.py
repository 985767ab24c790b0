"""Prompt sets: text files with one prompt a line, CSV and JSON lines that also say whose a prompt is."""

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config import ConfigError

USER_COLUMNS = ("user", "user_name")  # the second is DiffusionDB's


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt; who wrote it and which cluster it belongs to, where that is known.

    Prompts of one user, or of one cluster, are never on two sides of a split.
    """

    text: str
    user: str | None = None
    cluster: str | None = None


class Row(NamedTuple):
    """What one line of a file says, and which line that is (from 1)."""

    line: int
    text: Any
    user: Any = None
    cluster: Any = None


def read_prompt_set(path: Path, limit: int | None = None) -> tuple[Prompt, ...]:
    """The distinct prompts of a UTF-8 file, in order, the first `limit` of them; the suffix says the format.

    - .txt: one a line; blank lines and lines that begin with # are left out.
    - .csv: a header; column prompt, and where there are any user (or user_name) and cluster.
    - .jsonl: an object with these keys on each line, or just a string.

    Texts are in NFC with single spaces. Of a prompt that comes again, the first counts. Raises ConfigError,
    in one line that names the file and the line, for anything else.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise ConfigError(f"{path}: {path.suffix or 'no suffix'} is no format of prompts; {SUFFIXES}")
    found: dict[str, Prompt] = {}
    for row in read(path, _text(path)):
        text = _checked(path, row)
        if text and text not in found:
            found[text] = Prompt(text, _label(path, row, "user"), _label(path, row, "cluster"))
    if not found:
        raise ConfigError(f"{path}: holds no prompt; write at least one")
    return tuple(found.values())[:limit]


def read_prompts(path: Path, limit: int | None = None) -> tuple[str, ...]:
    """The texts of `read_prompt_set`."""
    return tuple(prompt.text for prompt in read_prompt_set(path, limit))


def clean(prompts: Iterable[str]) -> tuple[str, ...]:
    """Prompts in NFC with single spaces; empty ones and repetitions left out, order kept."""
    return tuple(dict.fromkeys(filter(None, map(cleaned, prompts))))


def cleaned(prompt: str) -> str:
    """In NFC, with single spaces between words and none around them."""
    return " ".join(unicodedata.normalize("NFC", prompt).split())


# ------------------------------------------------------------------------------------------- formats


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # Excel begins its UTF-8 with a mark
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such prompt file; see trainer.prompts in the configuration") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; name a file of prompts in it") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); see its permissions") from error


def _read_lines(_path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.lstrip().startswith("#"):
            yield Row(number, line)


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    began = 1  # a quoted prompt may span lines; the first of them is named
    try:
        header = [name.strip().casefold() for name in next(reader, [])]
        columns = _columns(path, header)
        began = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(header):
                raise ConfigError(
                    f"{path}, line {began}: {len(fields)} fields, but the header has {len(header)}; "
                    'put a prompt with commas between double quotes ("...")'
                )
            if fields:
                yield Row(began, **{name: fields[column] for name, column in columns.items()})
            began = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{path}, line {began}: no CSV ({error}); close every quote, write one within a prompt twice, "
            f"and keep fields below {csv.field_size_limit():,} characters"
        ) from error


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    """Where the header has what a Row needs."""
    names = {"text": ("prompt",), "user": USER_COLUMNS, "cluster": ("cluster",)}
    found = {name: [i for i, column in enumerate(header) if column in of] for name, of in names.items()}
    if not found["text"]:
        shown = ", ".join(filter(None, header))[:80] or "nothing"
        raise ConfigError(f"{path}, line 1: no column prompt in the header ({shown}); name a column so")
    for name, of in names.items():
        if len(found[name]) > 1:
            raise ConfigError(f"{path}, line 1: several columns {' or '.join(of)}; keep one of them")
    return {name: columns[0] for name, columns in found.items() if columns}


def _read_json_lines(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): a JSON string may hold what it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            cause = getattr(error, "msg", "cannot be read")
            raise ConfigError(
                f'{path}, line {number}: no JSON ({cause}); write {{"prompt": "..."}} on each line'
            ) from error
        yield _of_json(path, number, value)


def _of_json(path: Path, line: int, value: Any) -> Row:
    if isinstance(value, str):
        return Row(line, value)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}, line {line}: {_kind(value)}; write an object with a prompt, or a string")
    if "prompt" not in value:
        shown = ", ".join(map(repr, value))[:80] or "nothing"
        raise ConfigError(f"{path}, line {line}: no key prompt in the object ({shown}); name the text so")
    users = [value[name] for name in USER_COLUMNS if name in value]
    if len(users) > 1:
        raise ConfigError(f"{path}, line {line}: several keys {' or '.join(USER_COLUMNS)}; keep one of them")
    return Row(line, value["prompt"], users[0] if users else None, value.get("cluster"))


READERS = {".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_json_lines}
SUFFIXES = "name a .txt, .csv or .jsonl file (of DiffusionDB: reward-trainer prompts diffusiondb)"

# -------------------------------------------------------------------------------------------- values


def _checked(path: Path, row: Row) -> str:
    """The cleaned text of a row. Raises ConfigError where it is no text."""
    if not isinstance(row.text, str):
        raise ConfigError(f"{path}, line {row.line}: the prompt is {_kind(row.text)}; write a string")
    return _presentable(path, row.line, "prompt", cleaned(row.text))


def _label(path: Path, row: Row, name: str) -> str | None:
    """A user or cluster: a string or whole number; None where it is empty or missing."""
    value = getattr(row, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str | None):
        raise ConfigError(
            f"{path}, line {row.line}: the {name} is {_kind(value)}; write a string, or leave it out"
        )
    return _presentable(path, row.line, name, cleaned(value or "")) or None


def _presentable(path: Path, line: int, name: str, text: str) -> str:
    """The text. Raises ConfigError where it holds what is no text: control characters and half characters."""
    wrong = next((c for c in text if c < " " or unicodedata.category(c) in ("Cc", "Cs")), None)
    if wrong is not None:
        raise ConfigError(
            f"{path}, line {line}: the {name} holds the control character U+{ord(wrong):04X}; remove it"
        )
    return text


def _kind(value: object) -> str:
    names: Mapping[type, str] = {dict: "an object", list: "a list", type(None): "null", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "a string")
