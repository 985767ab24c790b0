"""UTF-8 text, CSV and JSON files of both programs, with the line number of every error."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from reward_service.runtime.errors import ConfigError, one_line

_SEPARATORS = {";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}


class TextFileError(ValueError):
    """A text that cannot be read.

    Attributes:
        line: line number, from 1, at which the problem begins
        problem: what is wrong, and what to do
    """

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")
        self.line, self.problem = line, problem


class CsvSyntaxError(TextFileError):
    """A text that is not CSV; `problem` begins with the cause in brackets."""

    def __init__(self, line: int, error: csv.Error) -> None:
        limit = f"keep fields below {csv.field_size_limit():,} characters"
        super().__init__(
            line, f"({one_line(error)}); close every quote, double those within a text, and {limit}"
        )


def decode_utf8(content: bytes) -> str:
    """Return the text of a file without its byte order mark, which spreadsheets write.

    Raises:
        TextFileError: not UTF-8
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise TextFileError(line, f"not UTF-8 text ({error.reason}); save it as UTF-8") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of a JSON object, as the `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: the object has a key twice
    """
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} is there twice; remove one")
        values[key] = value
    return values


def require_unicode(text: str, name: str) -> None:
    """Raise ConfigError if an argument of the command line was not UTF-8.

    Args:
        text: the argument, as Python decoded it
        name: name of the argument, for the message
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is not UTF-8 text; use a terminal with a UTF-8 locale") from None


class CsvTable:
    """Comma-separated table, read row by row.

    Args:
        text: the whole file; a quoted field may span lines
        wanted: names of columns that tell whether the header was split at the right separator

    Attributes:
        header: names of the columns, in lower case and without spaces around them

    Raises:
        CsvSyntaxError: the header is not CSV
        TextFileError: the header is separated by something else than commas
    """

    def __init__(self, text: str, wanted: Sequence[str]) -> None:
        self._reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        first = text.lstrip("\r\n").splitlines()[:1]
        try:
            names = next(self._reader, [])
        except csv.Error as error:
            _check_separator(first, wanted)
            raise CsvSyntaxError(1, error) from None
        self.header = [_normalize(name) for name in names]
        if not set(wanted) <= set(self.header):
            _check_separator(first, wanted)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the line at which each row begins, and its fields; blank lines are skipped.

        Raises:
            CsvSyntaxError: not CSV
        """
        start = self._reader.line_num + 1
        try:
            for fields in self._reader:
                if fields:
                    yield start, fields
                start = self._reader.line_num + 1
        except csv.Error as error:
            raise CsvSyntaxError(start, error) from None


def _normalize(name: str) -> str:
    return name.strip().casefold()


def _check_separator(first_line: Sequence[str], wanted: Sequence[str]) -> None:
    for line in first_line:
        for separator, name in _SEPARATORS.items():
            columns = [_normalize(column.strip().strip('"')) for column in line.split(separator)]
            # Excel announces the separator of the table in a line of its own.
            if columns[0] == "sep=" or (len(columns) > 1 and set(wanted) & set(columns)):
                problem = f"the separator is a comma, not {name}; save the file with commas"
                raise TextFileError(1, problem)
