"""NEW MODULE."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STAGING, REMOVING, PARTIAL = (
    ".writing-",
    ".removing-",
    ".partial",
)  # names of what is not, or no longer, whole


# ------------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, then put it in place in one step.

    Several processes may write the same file: one after the other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with _one_writer(path.parent):
        try:
            with naming(path):
                write(partial)
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system can lock a folder: a lock that leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staging(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` to be filled and put in place; whatever goes wrong, it does not stay."""
    folder = Path(tempfile.mkdtemp(prefix=f"{STAGING}{prefix}", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_stale(folder: Path) -> None:
    """Remove what was being written or removed in `folder` when the process that did so was killed."""
    for prefix in (STAGING, REMOVING):
        for stale in folder.glob(f"{prefix}*"):
            shutil.rmtree(stale)
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink()


def replace_folder(folder: Path, target: Path) -> None:
    """Put a filled folder in the place of `target`, its files on the disk first; others may read it."""
    for file in folder.iterdir():
        file.chmod(0o644)
        _sync(file)
    folder.chmod(0o755)
    _sync(folder)
    if target.exists():
        remove_folder(target)
    folder.rename(target)
    _sync(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; it leaves its name at once, however long the rest takes."""
    doomed = path.with_name(f"{REMOVING}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError that names no file name this one: a full disk does not say which write it refused."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
