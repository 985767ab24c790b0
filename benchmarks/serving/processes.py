"""Control of the processes of `benchmarks.serving.host` and `benchmarks.serving.clients`. No torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import httpx
import msgspec

from benchmarks.serving.clients import Crowd, Errand, Outcome
from benchmarks.serving.host import Batch, Cpu, Setup

Answer = TypeVar("Answer")

_READY_S = 600.0
_END_S = 30.0
#: Between the order and the first request.
LEAD_S = 0.2


class FailedError(Exception):
    """A process of the benchmark ended or did not begin; the message is one line."""


class Child:
    """A process that answers a line by a line."""

    def __init__(self, module: str, first: msgspec.Struct, log: IO[bytes]) -> None:
        self._module, self._log = module, log
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.tell(first)

    def tell(self, what: msgspec.Struct | str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        line = what.encode() if isinstance(what, str) else msgspec.json.encode(what)
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def line(self) -> bytes:
        """Receive a line.

        Raises:
            FailedError: the process has ended
        """
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise FailedError(f"{self._module} ended: {last[0]}")

    def hear(self, kind: type[Answer]) -> Answer:
        """Receive an answer."""
        return msgspec.json.decode(self.line(), type=kind)

    def end(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def child(module: str, first: msgspec.Struct) -> Iterator[Child]:
    """Start a process, and end it at the end."""
    with tempfile.TemporaryFile() as log:
        started = Child(module, first, log)
        try:
            yield started
        finally:
            started.end()


class Host:
    """A service that is ready."""

    def __init__(self, child: Child, url: str) -> None:
        self._child, self.url = child, url

    def cpu(self) -> Cpu:
        """CPU seconds until now."""
        self._child.tell("cpu")
        return self._child.hear(Cpu)

    def batches(self) -> list[Batch]:
        """What the device did since the last time."""
        self._child.tell("batches")
        return self._child.hear(list[Batch])

    def again(self) -> float:
        """Seconds of the same batches without the service."""
        self._child.tell("again")
        return self._child.hear(float)


@contextmanager
def hosting(setup: Setup) -> Iterator[Host]:
    """Start a service and wait until it is ready.

    Raises:
        FailedError: it never is
    """
    with child("benchmarks.serving.host", setup) as started:
        url = started.line().decode().split()[-1]
        deadline = time.monotonic() + _READY_S
        with httpx.Client(base_url=url) as connection:
            while connection.get("/health/ready").status_code != httpx.codes.OK:
                if time.monotonic() > deadline or started.process.poll() is not None:
                    started.line()
                    raise FailedError("the service did not become ready")
                time.sleep(0.2)
        host = Host(started, url)
        host.batches()  # those of the warm-up
        yield host


class Calling:
    """Callers that are ready; `body_bytes` is what a request of theirs has."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.body_bytes = child.hear(int)

    def begin(self, start_s: float | None = None, **errand: Any) -> float:
        """Send them off; when they start, which is soon if not said."""
        begins = time.monotonic() + LEAD_S if start_s is None else start_s
        self._child.tell(Errand(begins, **errand))
        return begins

    def outcomes(self) -> list[Outcome]:
        """Wait until they are back."""
        return self._child.hear(list[Outcome])

    def run(self, **errand: Any) -> list[Outcome]:
        """Send them off and wait."""
        self.begin(**errand)
        return self.outcomes()


@contextmanager
def calling(host: Host, clients: Sequence[str], cores: Sequence[int], **crowd: Any) -> Iterator[Calling]:
    """Start callers of a service."""
    who = Crowd(host.url, list(clients), cores=list(cores), **crowd)
    with child("benchmarks.serving.clients", who) as started:
        yield Calling(started)
