"""Score files: continued after a kill, and merged from several machines."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from reward_service.calibrate.score_log import (
    ScoredImage,
    merge_score_files,
    open_score_file,
    read_score_file,
)
from reward_service.settings import ConfigError

FINGERPRINTS = {"clip": "aaaa", "hpsv2": "bbbb"}


def row(image: str, score: float = 0.25, **changes: object) -> ScoredImage:
    scored = ScoredImage(image, "a “prompt”", "a “prompt”", (score, 1 / 3), False, (10, 20), False)
    return replace(scored, **changes)  # type: ignore[arg-type]


def score_file(path: Path, *rows: ScoredImage, fingerprints: dict[str, str] = FINGERPRINTS) -> Path:
    with open_score_file(path, fingerprints) as writer:
        writer.append(rows)
    return path


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    """Numbers, groups and flags are preserved exactly; the later of two lines of an image counts."""
    rows = [row("a"), row("b", group="7", truncated=True), row("c", pairs_only=True), row("a", 0.5)]
    found = read_score_file(score_file(tmp_path / "s.jsonl", *rows))
    assert found.fingerprints == FINGERPRINTS
    assert list(found.rows.values()) == [rows[3], rows[1], rows[2]]


@pytest.mark.parametrize("kept", [1, 20, 75])
def test_an_incomplete_last_line_is_ignored(tmp_path: Path, kept: int) -> None:
    """Readers ignore it, and a continued run removes it before appending."""
    path = score_file(tmp_path / "s.jsonl", row("a"), row("b"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    assert [found.image for found in read_score_file(path).rows.values()] == ["a"]
    score_file(path, row("c"))
    assert [found.image for found in read_score_file(path).rows.values()] == ["a", "c"]


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_an_incomplete_header_is_written_again(tmp_path: Path, kept: int) -> None:
    """A run that is killed while it creates the file can be continued."""
    path = score_file(tmp_path / "s.jsonl")
    path.write_bytes(path.read_bytes()[:kept])
    assert list(read_score_file(score_file(path, row("a"))).rows.values()) == [row("a")]


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    """A file that is not a score file is refused and unchanged, with and without line ends."""
    for content in ("my notes", "my notes\n", '{"a": 1}\n'):
        path = tmp_path / "notes.txt"
        path.write_text(content)
        with pytest.raises(ConfigError, match="not a score file"), open_score_file(path, FINGERPRINTS):
            pass
        assert path.read_text() == content


def test_invalid_lines_are_reported_by_number(tmp_path: Path) -> None:
    """An invalid line in the middle is an error: no killed run leaves one."""
    path = score_file(tmp_path / "s.jsonl", row("a"), row("b"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:30] + "\n" + lines[2])
    with pytest.raises(ConfigError, match="line 2 is not a scored image"):
        read_score_file(path)


@pytest.mark.parametrize("fingerprints", [{"clip": "aaaa", "hpsv2": "cccc"}, {"clip": "aaaa"}])
def test_scores_of_different_evaluators_are_not_mixed(tmp_path: Path, fingerprints: dict[str, str]) -> None:
    """Continuing a file and merging files both require equal fingerprints."""
    one = score_file(tmp_path / "one.jsonl", row("a"))
    raw = (0.25, 1 / 3)[: len(fingerprints)]
    other = score_file(tmp_path / "other.jsonl", row("b", raw=raw), fingerprints=fingerprints)
    with pytest.raises(ConfigError, match="hpsv2"):
        merge_score_files([one, other])
    with pytest.raises(ConfigError, match="hpsv2"), open_score_file(one, fingerprints):
        pass


def test_a_second_concurrent_run_is_refused(tmp_path: Path) -> None:
    """A second run fails with an error while the first holds the lock."""
    path = tmp_path / "s.jsonl"
    with (
        open_score_file(path, FINGERPRINTS),
        pytest.raises(ConfigError, match="another run"),
        open_score_file(path, FINGERPRINTS),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not mistaken for another run."""

    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(ConfigError, match=f"{os.strerror(code)}.*has no locks.*local disk") as caught,
        open_score_file(tmp_path / "s.jsonl", FINGERPRINTS),
    ):
        pass
    assert "another run" not in str(caught.value)


def test_others_cannot_write_a_score_file(tmp_path: Path) -> None:
    """Not even if the umask allows it: a merged table takes its scores from there."""
    before = os.umask(0)
    try:
        path = score_file(tmp_path / "s.jsonl", row("a"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_merged_files_must_agree_on_common_images(tmp_path: Path) -> None:
    """A common image counts once, in its group if it has one in either file; other scores are an error."""
    one = score_file(tmp_path / "one.jsonl", row("a", pairs_only=True), row("b"))
    same = score_file(tmp_path / "same.jsonl", row("a", 0.25 + 1e-7), row("c"))
    found = merge_score_files([one, same])
    assert sorted(key[1] for key in found.rows) == ["a", "b", "c"]
    assert not found.rows["a “prompt”", "a"].pairs_only
    with pytest.raises(ConfigError, match="b has other scores"):
        merge_score_files([one, score_file(tmp_path / "other.jsonl", row("b", 0.4))])
