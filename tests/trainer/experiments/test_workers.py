"""Processes on a leash: side by side, stopped in order, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from trainer.experiments.workers import Job, run_side_by_side
from trainer.runtime.errors import JobError

QUIET = Console(quiet=True)
WAIT_S = 30.0


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, [sys.executable, "-c", code], folder / f"{name}.log")


def alive(pid: int) -> bool:
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


def test_no_more_jobs_run_at_once_than_asked_for(tmp_path: Path) -> None:
    """Each writes when it began and ended; at most two overlap, and all are run."""
    code = "import time; print(time.time(), flush=True); time.sleep(0.3); print(time.time())"
    jobs = [job(tmp_path, f"job {n}", code) for n in range(4)]
    run_side_by_side(jobs, 2, QUIET)
    spans = [tuple(map(float, each.log.read_text().split())) for each in jobs]
    for begun, _ in spans:
        assert sum(start <= begun < end for start, end in spans) <= 2


def test_a_job_that_fails_stops_the_others_and_is_named(tmp_path: Path) -> None:
    """With its code, the last thing it said and where the rest is."""
    bad = job(tmp_path, "fold 1", "import sys; print('no more room'); sys.exit(7)")
    other = job(tmp_path, "fold 0", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with pytest.raises(JobError, match=r"fold 1 ended with code 7: no more room \(see .*fold 1\.log\)"):
        run_side_by_side([other, bad], 2, QUIET)
    said = other.log.read_text().strip()
    assert not said or not alive(int(said))


def test_a_child_is_told_to_stop_when_its_parent_is_killed(tmp_path: Path) -> None:
    """However the parent went: a reward service or a fold that nobody waits for does not go on."""
    (tmp_path / "child.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def leave(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'left')!r}).write_text('in order')\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'trainer.runtime.parent_watch', 'child']\n"
        "kept = subprocess.Popen(command, stdin=subprocess.PIPE)\n"
        "time.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    process = subprocess.Popen([sys.executable, "-c", parent], env=os.environ | {"PYTHONPATH": path})
    try:
        wait_for(tmp_path / "pid")
        process.send_signal(signal.SIGKILL)
        assert wait_for(tmp_path / "left") == "in order"
    finally:
        process.kill()
        process.wait()
