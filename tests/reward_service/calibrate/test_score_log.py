"""Scores on disk: what a killed run goes on from, and what machines share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reward_service.calibrate.score_log import Scored, merge, open_book, read_book
from reward_service.settings import ConfigError

PRINTS = {"clip": "aaaa", "hpsv2": "bbbb"}


def row(image: str, score: float = 0.25, **changes: object) -> Scored:
    made = Scored(image, "a “prompt”", "a “prompt”", (score, 1 / 3), False, (10, 20), False)
    return replace(made, **changes)  # type: ignore[arg-type]


def book(path: Path, *rows: Scored, prints: dict[str, str] = PRINTS) -> Path:
    with open_book(path, prints) as writer:
        writer.add(rows)
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Every number exactly, groups and marks too; a later line of an image counts."""
    rows = [row("a"), row("b", group="7", truncated=True), row("c", pairs_only=True), row("a", 0.5)]
    found = read_book(book(tmp_path / "s.jsonl", *rows))
    assert found.fingerprints == PRINTS
    assert list(found.rows.values()) == [rows[3], rows[1], rows[2]]


@pytest.mark.parametrize("kept", [1, 20, 75])
def test_a_half_written_last_line_is_dropped(tmp_path: Path, kept: int) -> None:
    """By readers, and by the run that goes on, whose own lines then are whole."""
    path = book(tmp_path / "s.jsonl", row("a"), row("b"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    assert [found.image for found in read_book(path).rows.values()] == ["a"]
    book(path, row("c"))
    assert [found.image for found in read_book(path).rows.values()] == ["a", "c"]


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_a_half_written_header_is_begun_anew(tmp_path: Path, kept: int) -> None:
    """A kill in the first moment costs nothing."""
    path = book(tmp_path / "s.jsonl")
    path.write_bytes(path.read_bytes()[:kept])
    assert list(read_book(book(path, row("a"))).rows.values()) == [row("a")]


def test_a_strangers_file_is_left_alone(tmp_path: Path) -> None:
    """With or without line ends in it."""
    for content in ("my notes", "my notes\n", '{"a": 1}\n'):
        path = tmp_path / "notes.txt"
        path.write_text(content)
        with pytest.raises(ConfigError, match="not a file of scores"), open_book(path, PRINTS):
            pass
        assert path.read_text() == content


def test_broken_lines_are_named(tmp_path: Path) -> None:
    """In the middle it is no kill's doing."""
    path = book(tmp_path / "s.jsonl", row("a"), row("b"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:30] + "\n" + lines[2])
    with pytest.raises(ConfigError, match="line 2 is no scored image"):
        read_book(path)


@pytest.mark.parametrize("prints", [{"clip": "aaaa", "hpsv2": "cccc"}, {"clip": "aaaa"}])
def test_other_evaluators_do_not_mix(tmp_path: Path, prints: dict[str, str]) -> None:
    """Neither when a run goes on nor when files are merged."""
    one = book(tmp_path / "one.jsonl", row("a"))
    raw = (0.25, 1 / 3)[: len(prints)]
    other = book(tmp_path / "other.jsonl", row("b", raw=raw), prints=prints)
    with pytest.raises(ConfigError, match="hpsv2"):
        merge([one, other])
    with pytest.raises(ConfigError, match="hpsv2"), open_book(one, prints):
        pass


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    """The other is told."""
    path = tmp_path / "s.jsonl"
    with open_book(path, PRINTS), pytest.raises(ConfigError, match="another run"), open_book(path, PRINTS):
        pass


def test_files_overlap_only_in_the_same_scores(tmp_path: Path) -> None:
    """An image in both counts once, for its group if either says so; another of its name is noticed."""
    one = book(tmp_path / "one.jsonl", row("a", pairs_only=True), row("b"))
    same = book(tmp_path / "same.jsonl", row("a", 0.25 + 1e-7), row("c"))
    found = merge([one, same])
    assert sorted(key[1] for key in found.rows) == ["a", "b", "c"]
    assert not found.rows["a “prompt”", "a"].pairs_only
    with pytest.raises(ConfigError, match="b has other scores"):
        merge([one, book(tmp_path / "other.jsonl", row("b", 0.4))])
