"""Atomic writes of files and folders, and locks between processes."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from trainer.runtime.errors import StorageError
from trainer.runtime.files import Lock, LockHeldError, clear_stale, replacing, write_atomically

REPOSITORY = Path(__file__).parents[3]
WAIT_S = 120.0


def test_write_atomically_makes_a_second_writer_wait(tmp_path: Path) -> None:
    """Two searches of one experiment write its report at once: the second writes after the first."""
    target = tmp_path / "report.html"
    second = Thread(target=write_atomically, args=(target, lambda path: path.write_text("second")))

    def write_slowly(path: Path) -> None:
        path.write_text("fir")
        second.start()
        second.join(0.2)
        path.write_text("first")

    write_atomically(target, write_slowly)
    second.join()
    assert target.read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_write_atomically_leaves_the_old_file_if_it_fails(tmp_path: Path) -> None:
    """Disk full or killed in the middle: the previous content stays, and no other file."""
    target = tmp_path / "evaluation.json"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write_atomically(target, fail)
    assert caught.value.filename == str(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_replacing_swaps_the_whole_folder(tmp_path: Path) -> None:
    """The new folder has no file of the old one, and everybody may read it."""
    folder = tmp_path / "lora"
    for name in ("one", "two"):
        with replacing(folder) as staging:
            assert not folder.exists() or [path.name for path in folder.iterdir()] == ["one"]
            (staging / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["two"]
    assert folder.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_replacing_keeps_the_old_folder_if_the_block_fails(tmp_path: Path) -> None:
    """The error names the folder, and the staging folder is removed."""
    folder = tmp_path / "lora"
    with replacing(folder) as staging:
        (staging / "one").write_text("one")

    def fail() -> None:
        with replacing(folder) as staging:
            (staging / "two").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        fail()
    assert caught.value.filename == str(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["lora", "one"]


def test_clear_stale_removes_only_incomplete_files(tmp_path: Path) -> None:
    """Leftovers of a killed process go, and nothing else."""
    (tmp_path / ".writing-x").mkdir()
    (tmp_path / ".removing-y").mkdir()
    (tmp_path / ".z.json.partial").touch()
    (tmp_path / "z.json").touch()
    clear_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["z.json"]


def test_lock_names_its_holder_and_is_released(tmp_path: Path) -> None:
    """A second acquisition fails with the holder's process number until the first is released."""
    path = tmp_path / ".lock"
    with Lock(path):
        for _ in range(2):  # a failed attempt must not erase the number
            with pytest.raises(LockHeldError, match=f"locked by process {os.getpid()};") as caught:
                Lock(path)
            assert caught.value.process == str(os.getpid())
    again = Lock(path)
    again.release()
    again.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_lock_names_a_file_system_without_locks(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system, of which the library says nothing or something else: one line with a remedy."""

    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StorageError, match=f"{os.strerror(code)}.*has no locks.*local disk"):
        Lock(tmp_path / ".lock")
    write_atomically(tmp_path / "a.json", b"{}")  # one writer at a time is all that it needs
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_lock_waits_for_its_release(tmp_path: Path) -> None:
    """With `wait_s`, it is acquired as soon as the holder releases it."""
    first = Lock(tmp_path / ".lock")
    second = Thread(target=lambda: Lock(tmp_path / ".lock", wait_s=WAIT_S).release())
    second.start()
    second.join(0.2)
    assert second.is_alive()
    first.release()
    second.join(WAIT_S)
    assert not second.is_alive()


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A lock of a killed process does not block the next one."""
    path = tmp_path / ".lock"
    program = (
        "import sys, pathlib; from trainer.runtime.files import Lock; "
        "held = Lock(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LockHeldError, match=f"process {holder.pid};"):
            Lock(path)
    finally:
        holder.kill()
        holder.communicate()
    Lock(path).release()
