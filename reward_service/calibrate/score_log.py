"""Score files: append-only logs of raw scores, to continue an interrupted calibration and to merge shards.

The format is JSON lines. The first line has the format's version and each evaluator's fingerprint; every
other line is one scored image:

```text
{"scores": 1, "evaluators": {"clip": "c0ffee…"}}
{"image": "a.png", "prompt": "…", "raw": {"clip": 0.27}, "truncated": false, "stamp": [1234, 1700…]}
```

`prompt_id` is present if it differs from the prompt, `pairs_only` if the image is listed in preference pairs
only. `stamp` is the image's size in bytes and its modification time in ns: a changed image is scored again,
and the later of two lines counts. A last line without its line end was left by a killed run and is ignored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from reward_service.calibrate.inputs import PairKey
from reward_service.files import lock
from reward_service.settings import ConfigError

FileStamp = tuple[int, int]
_VERSION = 1
_MAX_HEADER_BYTES = 4096
# Relative to the score or 1: what other batches on another processor may change, also in bfloat16.
_TOLERANCE = 5e-3


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """Raw scores of one image for its prompt, in the order of `ScoreSet.fingerprints`."""

    image: str
    prompt: str
    group: str
    raw: tuple[float, ...]
    truncated: bool
    stamp: FileStamp
    pairs_only: bool

    @property
    def key(self) -> PairKey:
        """Key of the image's score."""
        return self.prompt, self.image


@dataclass(frozen=True)
class ScoreSet:
    """Scored images, and the fingerprint of each evaluator that scored them."""

    fingerprints: dict[str, str]
    rows: dict[PairKey, ScoredImage]


def file_stamp(path: Path) -> FileStamp:
    """Return size in bytes and modification time in ns, which change with the file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def read_score_file(path: Path) -> ScoreSet:
    """Read a score file; an incomplete last line is ignored.

    Raises:
        ConfigError: not a score file, or an invalid line in the middle
    """
    try:
        with path.open("rb") as file:
            return _parse(path, file)[0]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


def merge_score_files(paths: Sequence[Path]) -> ScoreSet:
    """Read several score files as one; an image in two of them counts once.

    Raises:
        ConfigError: they come from different evaluators, or have different scores of an image
    """
    merged = read_score_file(paths[0])
    for path in paths[1:]:
        other = read_score_file(path)
        _check_same_evaluators(path, other.fingerprints, merged.fingerprints, str(paths[0]))
        for key, row in other.rows.items():
            earlier = merged.rows.get(key)
            if earlier is None or (earlier.pairs_only and not row.pairs_only):
                merged.rows[key] = row
            if earlier is not None and not _agree(earlier.raw, row.raw):
                raise ConfigError(
                    f"{path}: {row.image} has other scores than in an earlier file; "
                    "if two images share a name, give them different paths"
                )
    return merged


class ScoreWriter:
    """Writer that appends to a score file; `scores` is the content, including the appended rows."""

    def __init__(self, file: BinaryIO, scores: ScoreSet) -> None:
        self._file, self.scores = file, scores

    def append(self, rows: Iterable[ScoredImage]) -> None:
        """Append rows; after this, killing the process does not lose them."""
        names = tuple(self.scores.fingerprints)
        rows = list(rows)
        self._file.write(b"".join(_to_line(_row_values(row, names)) for row in rows))
        self._file.flush()
        self.scores.rows.update({row.key: row for row in rows})


@contextmanager
def open_score_file(path: Path, fingerprints: Mapping[str, str]) -> Iterator[ScoreWriter]:
    """Create a score file, or continue one of the same evaluators, under an exclusive lock.

    The lock is released when the process ends, however it ends.

    Raises:
        ConfigError: other evaluators, a concurrent run, not writable, or a file system without locks
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another --scores") from None
    with os.fdopen(descriptor, "r+b") as file:
        if not lock(descriptor, path, blocking=False):
            raise ConfigError(f"{path}: another run is writing it; wait, or name another --scores")
        yield ScoreWriter(file, _continue(path, file, fingerprints))


def _continue(path: Path, file: BinaryIO, fingerprints: Mapping[str, str]) -> ScoreSet:
    """Return the content and position the file after its last complete line."""
    header = file.readline()
    file.seek(0)
    if not header.endswith(b"\n") and len(header) < _MAX_HEADER_BYTES:  # new, or killed while creating it
        _check_header_start(path, header)
        file.truncate(0)
        file.write(_to_line({"scores": _VERSION, "evaluators": dict(fingerprints)}))
        file.flush()
        return ScoreSet(dict(fingerprints), {})
    scores, end = _parse(path, file)
    _check_same_evaluators(path, scores.fingerprints, fingerprints, "the configured evaluators")
    file.seek(end)
    file.truncate()
    return scores


def _check_header_start(path: Path, header: bytes) -> None:
    expected = b'{"scores": '
    if header[: len(expected)] != expected[: len(header)]:
        raise _not_a_score_file(path)


def _parse(path: Path, file: BinaryIO) -> tuple[ScoreSet, int]:
    """Return the content, and the position after the last complete line."""
    fingerprints = _parse_header(path, file.readline())
    names, rows, end = tuple(fingerprints), {}, file.tell()
    for number, line in enumerate(file, 2):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            row = _parse_row(json.loads(line), names)
        except (ValueError, KeyError, TypeError, AttributeError):
            message = "is not a scored image; delete the line to score the image again"
            raise ConfigError(f"{path}: line {number} {message}") from None
        rows[row.key] = row
    return ScoreSet(fingerprints, rows), end


def _parse_header(path: Path, line: bytes) -> dict[str, str]:
    try:
        header = json.loads(line)
        version, fingerprints = header["scores"], header["evaluators"]
        if not fingerprints or not all(isinstance(value, str) for value in fingerprints.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _not_a_score_file(path) from None
    if version != _VERSION:
        raise ConfigError(
            f"{path}: score file of format {version}, expected {_VERSION}; score the images again"
        )
    return dict(fingerprints)


def _not_a_score_file(path: Path) -> ConfigError:
    return ConfigError(f"{path}: not a score file; name another --scores")


def _parse_row(values: dict[str, Any], names: Sequence[str]) -> ScoredImage:
    raw = tuple(float(values["raw"][name]) for name in names)
    size, changed = values["stamp"]
    image, prompt = values["image"], values["prompt"]
    if not all(map(math.isfinite, raw)) or not isinstance(image, str) or not isinstance(prompt, str):
        raise ValueError
    group, pairs_only = values.get("prompt_id", prompt), values.get("pairs_only", False)
    return ScoredImage(
        image, prompt, group, raw, bool(values["truncated"]), (size, changed), bool(pairs_only)
    )


def _row_values(row: ScoredImage, names: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {"image": row.image, "prompt": row.prompt}
    values |= {} if row.group == row.prompt else {"prompt_id": row.group}
    values |= {"raw": dict(zip(names, row.raw, strict=True)), "truncated": row.truncated}
    values |= {"stamp": list(row.stamp)}
    return values | ({"pairs_only": True} if row.pairs_only else {})


def _to_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _check_same_evaluators(
    path: Path, found: Mapping[str, str], expected: Mapping[str, str], origin: str
) -> None:
    if found.keys() != expected.keys():
        message = f"scores of {', '.join(found)}, but those of {origin} are {', '.join(expected)}"
        raise ConfigError(f"{path}: {message}; name another --scores")
    for name, fingerprint in found.items():
        if fingerprint != expected[name]:
            message = f"evaluator {name} has fingerprint {fingerprint}, but {expected[name]} in {origin}"
            raise ConfigError(f"{path}: {message}; do not mix their scores: score one of them again")


def _agree(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= _TOLERANCE * max(1.0, abs(a)) for a, b in zip(one, other, strict=True))
