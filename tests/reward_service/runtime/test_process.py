"""Process environment: users without a name or a home, other systems, locales, file modes, lost folders."""

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_service.runtime.errors import ConfigError
from reward_service.runtime.process import prepare_process
from reward_service.settings import expand_user

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = ("reward_service", "trainer")
WAIT_S = 120.0


@pytest.fixture(autouse=True)
def same_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what `prepare_process` changes: environment and umask."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "somebody")
    before = os.umask(0o022)
    yield
    os.umask(before)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=WAIT_S,
        check=False,
    )  # fmt: skip


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker run --user 54321`: torch asks for the name while it is imported."""
    import getpass

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name)

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    prepare_process()
    assert getpass.getuser() == f"user-{os.getuid()}"


@pytest.mark.parametrize(("path", "home"), [("~", None), ("~/a", ""), ("~nobody-here/a", "/root")])
def test_a_missing_home_is_an_error_with_a_remedy(
    path: str, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty HOME is none, or the path would begin at the root."""

    def unknown(_: object) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(ValueError, match="has no home folder here; write the whole path"):
        expand_user(Path(path))
    assert expand_user(Path("a/~")) == Path("a/~")


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_posix_the_programs_name_the_systems_they_need(program: str) -> None:
    """Windows has no fcntl, grp, pwd, resource and termios: one line, not a package to install."""
    hide = (
        "import sys\nfor name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'): sys.modules[name] = None\n"
    )
    done = run(
        f"{hide}import runpy\nsys.argv = ['x', 'evaluators']\nrunpy.run_module('{program}', None, '__main__')"
    )
    assert done.returncode == 2
    assert "needs Linux or macOS" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_client_needs_no_posix() -> None:
    """It works on Windows too."""
    hide = (
        "import sys\nfor name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'): sys.modules[name] = None\n"
    )
    code = "import reward_service.adapters\nfrom reward_service.client import RewardClient\n"
    done = run(f"{hide}{code}RewardClient('http://x').close()")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_deleted_working_directory_is_one_line(program: str, tmp_path: Path) -> None:
    """It was a fatal error of a library of torch."""
    code = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
os.chdir({str(tmp_path)!r})
os.rmdir({str(tmp_path)!r})
sys.argv = ["x", "plan"]
runpy.run_module("{program}", None, "__main__")
"""
    done = run(code)
    assert done.returncode == 2
    assert "the working directory does not exist any more" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("before", "after"), [(0o000, 0o022), (0o020, 0o022), (0o002, 0o002), (0o027, 0o027), (0o077, 0o077)]
)
def test_no_file_can_be_written_by_all(before: int, after: int) -> None:
    """A umask that shares files with the group, and with nobody else, stays."""
    os.umask(before)
    prepare_process()
    assert os.umask(0o022) == after


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_locale_is_utf8(program: str, tmp_path: Path) -> None:
    """With LC_ALL=C and UTF-8 mode off, a path in the arguments is that of the disk."""
    folder = tmp_path / "bïld #1"
    folder.mkdir()
    config = folder / "é.yaml"
    config.write_text("service: {}\ntrainer: {}\n", encoding="utf-8")
    command = [sys.executable, "-m", program, {"trainer": "plan"}.get(program, "evaluators")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [*command, "--config", config], cwd=ROOT, env=environment, capture_output=True, timeout=WAIT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert str(config) in done.stderr.decode("utf-8")
    assert "required, but missing" in done.stderr.decode("utf-8")


def test_a_refused_process_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before anything is set."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    mask = os.umask(0)
    with pytest.raises(ConfigError, match="needs Linux or macOS"):
        prepare_process()
    assert os.umask(mask) == 0


def test_frozen_objects_are_not_collected_again() -> None:
    """In a process of its own, as it cannot be undone for some of them."""
    code = (
        "import gc; from reward_service.runtime.process import freeze_objects; "
        "freeze_objects(); assert gc.get_freeze_count() > 1000; assert len(gc.get_objects()) < 100"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
