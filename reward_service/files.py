"""Atomic file replacement and folder locks; imports neither torch nor a web framework."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from reward_service.runtime.errors import ConfigError


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644, preserve: bool = False) -> None:
    """Write a file so that readers, also after a crash, see the old content or the new one, never a part.

    A symbolic link stays one: the file that it points to is replaced.

    Args:
        path: the file to create or replace; its folder must exist
        content: the whole content
        mode: permission bits of the file
        preserve: keep the mode and the owner of an existing file; `mode` then holds for a new file only

    Raises:
        OSError: the folder or the disk refuses it; the old file is unchanged
    """
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if preserve and path.exists():
                before = path.stat()
                os.fchown(descriptor, before.st_uid, before.st_gid)
                mode = stat.S_IMODE(before.st_mode)
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder, which leaves no lock file behind.

    Raises:
        OSError: the folder cannot be opened
        ConfigError: its file system has no locks
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, path: Path, *, blocking: bool = True) -> bool:
    """Lock an open file or folder until it is closed; return False if another process holds the lock.

    Args:
        descriptor: of the file or folder
        path: its path, for messages
        blocking: wait for another holder

    Raises:
        ConfigError: the file system has no locks
    """
    try:
        return lock_descriptor(descriptor, blocking=blocking)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be locked ({error.strerror or error}): its file system has no locks, as some "
            "network file systems; choose one on a local disk"
        ) from None


def _sync_folder(folder: Path) -> None:
    """Write the new directory entry to disk; some network file systems cannot sync a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
