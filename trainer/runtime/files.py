"""Atomic writes of files and folders, and locks between processes."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock

from trainer.runtime.errors import StorageError

# Names of incomplete files and folders; `clear_stale` removes those that a killed process left.
STAGING, REMOVING, PARTIAL = ".writing-", ".removing-", ".partial"

# Errors of flock on a file system that has no locks, or whose lock server does not answer.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


# -------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file so that readers see the old content or the new one, never a part of it.

    Several processes may write the same file: each waits for the one before.

    Args:
        path: File to create or replace; missing parent folders are created.
        content: The bytes, or a function that writes the file at the path that it is given.

    Raises:
        OSError: The file cannot be written; the error names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    write = content if callable(content) else lambda target: target.write_bytes(content)
    with _one_writer(path.parent):
        try:
            with add_path_to_errors(path):
                write(partial)
                _sync(partial)
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Lock a folder, if its file system supports locks; no lock file stays behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            filelock.lock_descriptor(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError that names no file: a full disk does not say which write failed."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


# ------------------------------------------------------------------------------------------ folders


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty staging folder; when the block ends, it takes the place of `folder` in one step.

    If the block raises, `folder` stays as it was and the staging folder is removed. All users may read the
    new folder.

    Raises:
        OSError: The folder cannot be written; the error names it.
    """
    with add_path_to_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{folder.name}-", dir=folder.parent))
        try:
            yield staging
            _publish(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    """Rename a filled folder to its final name, once its files are on the disk."""
    for file in staging.iterdir():
        file.chmod(0o644)
        _sync(file)
    staging.chmod(0o755)
    _sync(staging)
    if folder.exists():
        remove_folder(folder)
    staging.rename(folder)
    _sync(folder.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; its name is free at once, however long the deletion takes."""
    doomed = path.with_name(f"{REMOVING}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clear_stale(folder: Path) -> None:
    """Remove what a killed process left in `folder`: files half written, folders half written or removed."""
    for prefix in (STAGING, REMOVING):
        for stale in folder.glob(f"{prefix}*"):
            shutil.rmtree(stale)
    for partial in folder.glob(f".*{PARTIAL}"):
        partial.unlink()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------- locks


class LockHeldError(StorageError):
    """The lock is held by another process."""

    def __init__(self, path: Path, process: str) -> None:
        """Args: the lock's file, and the process number in it ("unknown" if there is none)."""
        super().__init__(f"{path}: locked by process {process}; wait until it ends, or stop it")
        self.process = process


class Lock:
    """Exclusive lock between processes, and between threads; held from its creation on.

    The lock (`flock` on a file, which stays) ends with `release`, at the end of a `with` block, or with the
    process, however that ends. The file holds the number of the process that locked it last.
    """

    def __init__(self, path: Path, *, wait_s: float | None = 0.0) -> None:
        """Acquire the lock.

        Args:
            path: File to lock, created if missing.
            wait_s: Seconds to wait for another holder; None waits without limit.

        Raises:
            LockHeldError: Another process holds the lock, after the wait.
            StorageError: The file system has no locks.
            OSError: The file cannot be opened.
        """
        # A lock that did not end with its process would outlive a kill: hence no fallback.
        self._lock = filelock.FileLock(path, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire(timeout=-1 if wait_s is None else wait_s)
        except filelock.Timeout as error:
            holder = path.read_text(encoding="utf-8", errors="replace").strip()
            raise LockHeldError(path, holder or "unknown") from error
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            raise StorageError(
                f"{path}: cannot be locked ({error.strerror}): its file system has no locks, as some network "
                "file systems; choose a folder on a local disk (runs_dir, or --run)"
            ) from error
        with suppress(OSError):  # on a full disk: the lock holds, only its holder stays unknown
            path.write_text(str(os.getpid()), encoding="ascii")

    def release(self) -> None:
        """Let others acquire the lock; may be called more than once."""
        self._lock.release(force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
