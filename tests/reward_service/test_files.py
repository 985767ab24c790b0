"""Atomic file replacement and the folder lock."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from reward_service.files import folder_lock, write_atomically


@pytest.mark.parametrize(("preserve", "expected"), [(False, 0o644), (True, 0o640)])
def test_write_atomically_sets_or_preserves_the_mode(tmp_path: Path, preserve: bool, expected: int) -> None:
    """The mode of an existing file is kept on request only; the content is replaced either way."""
    path = tmp_path / "table.json"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_atomically(path, b"new", mode=0o644, preserve=preserve)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == expected


def test_write_atomically_creates_a_file_with_the_given_mode(tmp_path: Path) -> None:
    """A new file has exactly the requested permission bits, and no temporary file stays beside it."""
    path = tmp_path / "keys.yaml"
    write_atomically(path, b"new", mode=0o600, preserve=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomically_replaces_the_target_of_a_link(tmp_path: Path) -> None:
    """A symbolic link still points to its file, which has the new content."""
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"


def test_write_atomically_keeps_the_old_file_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed write leaves the old content and no temporary file."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("reward_service.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_lock_excludes_a_second_holder(tmp_path: Path) -> None:
    """A second holder waits until the first releases the lock, which leaves no file."""
    order = list[str]()

    def enter() -> None:
        with folder_lock(tmp_path):
            order.append("second")

    thread = threading.Thread(target=enter)
    with folder_lock(tmp_path):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []
