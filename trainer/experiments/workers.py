"""Child processes that never outlive this one: commands side by side, and a reward service for one command.

A child reads its standard input through `trainer.runtime.parent_watch`: the pipe closes when this process
ends, however that happens, and the child then terminates itself. Children run in sessions of their own, so
that Ctrl-C reaches this process only, which terminates them in order.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from trainer.runtime.errors import DemoError, JobError

STOP_TIMEOUT_S = 60.0  # for a trainer to save its checkpoint
POLL_S = 0.2

SERVICE_START_TIMEOUT_S = 120.0
SERVICE_STOP_TIMEOUT_S = 15.0
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")

Process = subprocess.Popen[bytes]


# --------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True, eq=False)
class WorkerCommand:
    """A command to run in a process."""

    name: str  # in messages
    command: Sequence[str]  # must use `trainer.runtime.parent_watch`
    log: Path  # its output is appended


def run_side_by_side(jobs: Sequence[WorkerCommand], workers: int, console: Console) -> None:
    """Run all jobs, at most `workers` at a time.

    Raises:
        JobError: A job failed. The other jobs were terminated first, so that they can be resumed.
    """
    waiting, running = deque(jobs), dict[WorkerCommand, Process]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running[job] = _start_job(job)
                console.print(f"{job.name} started: {job.log}", soft_wrap=True)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    stop(process, 0)
                    _check_exit_code(job, process.returncode)
                    console.print(f"{job.name} is done")
            time.sleep(POLL_S)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            stop(process, STOP_TIMEOUT_S)


def _start_job(job: WorkerCommand) -> Process:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as output, delayed_signals():
        return _start(job.command, output)


def _check_exit_code(job: WorkerCommand, code: int) -> None:
    if code != 0:
        raise JobError(f"{job.name} ended with code {code}: {last_line(job.log)} (see {job.log})")


# ---------------------------------------------------------------------------------- reward service


@contextmanager
def local_service(config: Path, log: Path) -> Iterator[str]:
    """Run a reward service on a free loopback port; yield its address, and stop it at the end of the block.

    Args:
        config: Configuration file of the service.
        log: File for its output.

    Raises:
        DemoError: The service ends, or does not listen within two minutes.
    """
    command = [sys.executable, "-m", "trainer.runtime.parent_watch", "reward_service", "serve"]
    command += ["--config", str(config), "--host", "127.0.0.1", "--port", "0"]
    service = None
    try:
        with log.open("wb") as output, delayed_signals():
            service = _start(command, output, os.environ | {"PYTHONUNBUFFERED": "1"})
        yield wait_for_address(service, log)
    finally:
        if service is not None:
            stop(service, SERVICE_STOP_TIMEOUT_S)


def wait_for_address(service: Process, log: Path) -> str:
    """Wait until a reward service logs its address, and return that.

    Raises:
        DemoError: The service ends, or does not listen within two minutes.
    """
    deadline = time.monotonic() + SERVICE_START_TIMEOUT_S
    while time.monotonic() < deadline:
        found = _ADDRESS.search(log.read_text(encoding="utf-8", errors="replace"))
        if found and found[1] != "0":
            return found[0]
        if service.poll() is not None:
            code = service.returncode
            raise DemoError(f"the reward service ended with code {code}: {last_line(log)} (see {log})")
        time.sleep(0.1)
    raise DemoError(f"the reward service did not listen within {SERVICE_START_TIMEOUT_S:.0f} s; see {log}")


# ---------------------------------------------------------------------------------------- processes


def _start(command: Sequence[str], output: BinaryIO, environment: Mapping[str, str] | None = None) -> Process:
    return subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,  # closes when this process ends: see `trainer.runtime.parent_watch`
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def stop(process: Process, timeout_s: float) -> None:
    """Terminate a process; kill it if it has not ended within the timeout."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def last_line(log: Path) -> str:
    """Return the last line of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Deliver SIGINT, SIGTERM and SIGHUP after this block, when a process started in it can be stopped."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in received:
        signal.raise_signal(late)
