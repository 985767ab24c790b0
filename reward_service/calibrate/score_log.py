"""Raw scores on disk, appended as they come: what a killed run goes on from, and what machines share.

A file of JSON lines. The first names the format and each evaluator's fingerprint; every other is one scored
image::

    {"scores": 1, "evaluators": {"clip": "c0ffee…"}}
    {"image": "a.png", "prompt": "…", "raw": {"clip": 0.27}, "truncated": false, "stamp": [1234, 1700…]}

`prompt_id` is there if it is not the prompt, `pairs_only` if the image serves preference pairs alone.
`stamp` is the image's size in bytes and its time of change in ns: a changed image is scored anew, and
the later of two lines counts. A last line without its end is what a kill left, and is dropped.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reward_service.settings import ConfigError

Key = tuple[str, str]
Stamp = tuple[int, int]
_VERSION = 1
# Of the score or 1: what other batches on another processor may change, in bfloat16 too.
_SAME = 5e-3


@dataclass(frozen=True, slots=True)
class Scored:
    """Raw scores of one image by its prompt, in the order of the book's evaluators."""

    image: str
    prompt: str
    group: str
    raw: tuple[float, ...]
    truncated: bool
    stamp: Stamp
    pairs_only: bool

    @property
    def key(self) -> Key:
        """What the scores belong to."""
        return self.prompt, self.image


@dataclass(frozen=True)
class Book:
    """Scored images, and the fingerprint of each evaluator that scored them."""

    fingerprints: dict[str, str]
    rows: dict[Key, Scored]


def stamp(path: Path) -> Stamp:
    """What tells a changed file: size in bytes, time of change in ns."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_book(path: Path) -> Book:
    """Read a file of scores; a last line without its end is left out.

    Raises:
        ConfigError: not such a file, or broken in the middle
    """
    try:
        with path.open("rb") as file:
            return _parsed(path, file)[0]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


def merge(paths: Sequence[Path]) -> Book:
    """Several files as one; an image in two of them counts once.

    Raises:
        ConfigError: they come from different evaluators, or disagree about an image
    """
    first = read_book(paths[0])
    for path in paths[1:]:
        other = read_book(path)
        _check_same(path, other.fingerprints, first.fingerprints, str(paths[0]))
        for key, row in other.rows.items():
            earlier = first.rows.get(key)
            if earlier is None or (earlier.pairs_only and not row.pairs_only):
                first.rows[key] = row
            if earlier is not None and not _agree(earlier.raw, row.raw):
                message = f"{row.image} has other scores than in an earlier file; two images of one name?"
                raise ConfigError(f"{path}: {message} Give them paths of their own")
    return first


class Writer:
    """Appends to a file of scores; `book` is what it held, and grows."""

    def __init__(self, file: BinaryIO, book: Book) -> None:
        self._file, self.book = file, book

    def add(self, rows: Iterable[Scored]) -> None:
        """Append rows; after this a kill cannot lose them."""
        names = tuple(self.book.fingerprints)
        rows = list(rows)
        self._file.write(b"".join(_line(_plain(row, names)) for row in rows))
        self._file.flush()
        self.book.rows.update({row.key: row for row in rows})


@contextmanager
def open_book(path: Path, fingerprints: Mapping[str, str]) -> Iterator[Writer]:
    """Begin a file of scores, or go on with one of the same evaluators.

    Raises:
        ConfigError: other evaluators, another run is writing, or it cannot be written
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another --scores") from None
    with os.fdopen(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{path}: another run is writing it; wait, or name another --scores") from None
        yield Writer(file, _continued(path, file, fingerprints))


def _continued(path: Path, file: BinaryIO, fingerprints: Mapping[str, str]) -> Book:
    text = file.readline()
    file.seek(0)
    if not text.endswith(b"\n") and len(text) < 4096:  # new, or killed while it was begun
        _check_ours(path, text)
        file.truncate(0)
        file.write(_line({"scores": _VERSION, "evaluators": dict(fingerprints)}))
        file.flush()
        return Book(dict(fingerprints), {})
    book, end = _parsed(path, file)
    _check_same(path, book.fingerprints, fingerprints, "the configured evaluators")
    file.seek(end)
    file.truncate()
    return book


def _check_ours(path: Path, text: bytes) -> None:
    beginning = b'{"scores": '
    if text[: len(beginning)] != beginning[: len(text)]:
        raise ConfigError(f"{path}: not a file of scores; name another --scores")


def _parsed(path: Path, file: BinaryIO) -> tuple[Book, int]:
    """The book, and where its last whole line ends."""
    fingerprints = _header(path, file.readline())
    names, rows, end = tuple(fingerprints), {}, file.tell()
    for number, text in enumerate(file, 2):
        if not text.endswith(b"\n"):
            break
        end += len(text)
        try:
            row = _row(json.loads(text), names)
        except (ValueError, KeyError, TypeError, AttributeError):
            message = "is no scored image; delete it, and it is scored anew"
            raise ConfigError(f"{path}: line {number} {message}") from None
        rows[row.key] = row
    return Book(fingerprints, rows), end


def _header(path: Path, text: bytes) -> dict[str, str]:
    try:
        header = json.loads(text)
        version, fingerprints = header["scores"], header["evaluators"]
        if not fingerprints or not all(isinstance(value, str) for value in fingerprints.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: not a file of scores; name another --scores") from None
    if version != _VERSION:
        raise ConfigError(f"{path}: scores of format {version}, this reads {_VERSION}; score anew")
    return dict(fingerprints)


def _row(values: dict[str, Any], names: Sequence[str]) -> Scored:
    raw = tuple(float(values["raw"][name]) for name in names)
    size, changed = values["stamp"]
    image, prompt = values["image"], values["prompt"]
    if not all(map(math.isfinite, raw)) or not isinstance(image, str) or not isinstance(prompt, str):
        raise ValueError
    group, pairs_only = values.get("prompt_id", prompt), values.get("pairs_only", False)
    return Scored(image, prompt, group, raw, bool(values["truncated"]), (size, changed), bool(pairs_only))


def _plain(row: Scored, names: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {"image": row.image, "prompt": row.prompt}
    values |= {} if row.group == row.prompt else {"prompt_id": row.group}
    values |= {"raw": dict(zip(names, row.raw, strict=True)), "truncated": row.truncated}
    values |= {"stamp": list(row.stamp)}
    return values | ({"pairs_only": True} if row.pairs_only else {})


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _check_same(path: Path, found: Mapping[str, str], expected: Mapping[str, str], whose: str) -> None:
    if found.keys() != expected.keys():
        message = f"scores of {', '.join(found)}, but {whose} are {', '.join(expected)}"
        raise ConfigError(f"{path}: {message}; name another --scores")
    for name, fingerprint in found.items():
        if fingerprint != expected[name]:
            message = f"evaluator {name} has fingerprint {fingerprint}, but {expected[name]} in {whose}"
            raise ConfigError(f"{path}: {message}; their scores do not mix: score one of them anew")


def _agree(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= _SAME * max(1.0, abs(a)) for a, b in zip(one, other, strict=True))
