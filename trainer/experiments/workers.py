"""Processes that this one starts and that do not outlive it: a reward service of its own, folds side by side.

A scoring service of its own as a child process, for as long as a run takes.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trainer.runtime.errors import DemoError, JobError

STOP_TIMEOUT_S = 60.0  # for a trainer to save what it has
POLL_S = 0.2


@dataclass(frozen=True, eq=False)
class Job:
    """A command, under which name it is spoken of, and the file that its output is added to."""

    name: str
    command: Sequence[str]
    log: Path


def run_side_by_side(jobs: Sequence[Job], workers: int, console: Console) -> None:
    """Run all jobs, so many at a time; each must heed `trainer.runtime.parent_watch`.

    Raises JobError where one fails; the others are stopped first, in order, so that they can go on later.
    """
    waiting, running = deque(jobs), dict[Job, "subprocess.Popen[bytes]"]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running[job] = _start(job)
                console.print(f"{job.name} begins: {job.log}", soft_wrap=True)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    stop(process, 0)
                    _check(job, process.returncode)
                    console.print(f"{job.name} is done")
            time.sleep(POLL_S)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            stop(process, STOP_TIMEOUT_S)


def _start(job: Job) -> "subprocess.Popen[bytes]":
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as output, signals_wait():
        # A session of its own: Ctrl-C reaches this process only, which then stops it in order. Its standard
        # input is what tells it that this process is gone, however it went.
        return subprocess.Popen(
            list(job.command),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _check(job: Job, code: int) -> None:
    if code != 0:
        raise JobError(f"{job.name} ended with code {code}: {last_line(job.log)} (see {job.log})")


def last_line(log: Path) -> str:
    """What was said last."""
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return said[-1] if said else "nothing was said"


def stop(process: "subprocess.Popen[bytes]", timeout_s: float) -> None:
    """Have a process leave in order; end it where it has not within the time."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals that end the program act after this block: a process begun within it is known by then."""
    arrived: list[int] = []
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in arrived:
        signal.raise_signal(late)


START_TIMEOUT_S = 120.0

SERVICE_STOP_TIMEOUT_S = 15.0

_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@contextmanager
def local_service(config: Path, log: Path) -> Iterator[str]:
    """Address of a service on a free loopback port, stopped on the way out, however that comes about.

    Its output goes to `log`. Raises DemoError where it ends or says nothing within two minutes.
    """
    command = [
        sys.executable,
        "-m",
        "trainer.runtime.parent_watch",
        "reward_service",
        "serve",
        "--config",
        str(config),
    ]
    command += ["--host", "127.0.0.1", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    service = None
    try:
        with log.open("wb") as output, signals_wait():
            # A session of its own: Ctrl-C reaches this process only, which then stops the service in order.
            service = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # ends when this process does, and with it the service
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        yield _wait_for_address(service, log)
    finally:
        if service is not None:
            stop(service, SERVICE_STOP_TIMEOUT_S)


def _wait_for_address(service: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        said = log.read_text(encoding="utf-8", errors="replace")
        found = _ADDRESS.search(said)
        if found and found[1] != "0":
            return found[0]
        if service.poll() is not None:
            code = service.returncode
            raise DemoError(f"the scoring service ended with code {code}: {last_line(log)} (see {log})")
        time.sleep(0.1)
    raise DemoError(f"the scoring service did not listen within {START_TIMEOUT_S:.0f} s; see {log}")
