"""Worker processes: side by side, terminated in order, never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from trainer.experiments.workers import WorkerCommand, run_side_by_side
from trainer.runtime.errors import JobError

QUIET = Console(quiet=True)
WAIT_S = 200.0  # generous: a loaded machine starts processes slowly


def job(folder: Path, name: str, code: str) -> WorkerCommand:
    return WorkerCommand(name, [sys.executable, "-c", code], folder / f"{name}.log")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + WAIT_S
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < deadline, f"{file} was not written"
        time.sleep(0.02)
    return file.read_text().strip()


def test_side_by_side_limits_the_jobs_at_a_time(tmp_path: Path) -> None:
    """Of four jobs that log start and end, at most two overlap, and all are run."""
    code = "import time; print(time.time(), flush=True); time.sleep(0.3); print(time.time())"
    jobs = [job(tmp_path, f"job {n}", code) for n in range(4)]
    run_side_by_side(jobs, 2, QUIET)
    spans = [tuple(map(float, each.log.read_text().split())) for each in jobs]
    for begun, _ in spans:
        assert sum(start <= begun < end for start, end in spans) <= 2


def test_failed_job_terminates_the_others(tmp_path: Path) -> None:
    """The error has the job's name, exit code, last line and log."""
    failing = job(tmp_path, "fold 1", "import sys; print('no more room'); sys.exit(7)")
    other = job(tmp_path, "fold 0", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    with pytest.raises(JobError, match=r"fold 1 ended with code 7: no more room \(see .*fold 1\.log\)"):
        run_side_by_side([other, failing], 2, QUIET)
    pid = other.log.read_text().strip()
    assert not pid or not is_alive(int(pid))


def test_child_terminates_when_its_parent_is_killed(tmp_path: Path) -> None:
    """A reward service or a fold ends with its parent, even after a SIGKILL."""
    (tmp_path / "child.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def leave(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'left')!r}).write_text('terminated')\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    parent = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'trainer.runtime.parent_watch', 'child']\n"
        "kept = subprocess.Popen(command, stdin=subprocess.PIPE)\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    process = subprocess.Popen([sys.executable, "-c", parent], env=os.environ | {"PYTHONPATH": path})
    try:
        wait_for(tmp_path / "pid")
        process.send_signal(signal.SIGKILL)
        assert wait_for(tmp_path / "left") == "terminated"
    finally:
        process.kill()
        process.wait()
