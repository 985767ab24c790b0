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

from benchmarks.serving.clients import ClientSetup, Load, RequestResult
from benchmarks.serving.host import Batch, Cpu, Setup

Message = TypeVar("Message")

_READY_S = 600.0
_END_S = 30.0
#: Seconds between the start command and the first request.
LEAD_S = 0.2


class BenchmarkError(Exception):
    """A process of the benchmark failed to start or ended early; the message is one line."""


class ChildProcess:
    """Process with a line protocol: each line on its stdin gives a line of JSON on its stdout."""

    def __init__(self, module: str, first: msgspec.Struct, log: IO[bytes]) -> None:
        self._module, self._log = module, log
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.send(first)

    def send(self, message: msgspec.Struct | str) -> None:
        """Write a line to the process's stdin."""
        assert self.process.stdin is not None
        line = message.encode() if isinstance(message, str) else msgspec.json.encode(message)
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def read_line(self) -> bytes:
        """Return the next line of the process's stdout.

        Raises:
            BenchmarkError: the process has ended
        """
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise BenchmarkError(f"{self._module} ended: {last[0]}")

    def receive(self, kind: type[Message]) -> Message:
        """Return the next line, decoded from JSON."""
        return msgspec.json.decode(self.read_line(), type=kind)

    def stop(self) -> None:
        """Terminate the process; kill it if it does not end in time."""
        self.process.terminate()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def running_child(module: str, first: msgspec.Struct) -> Iterator[ChildProcess]:
    """Start a process, and stop it when the block ends."""
    with tempfile.TemporaryFile() as log:
        started = ChildProcess(module, first, log)
        try:
            yield started
        finally:
            started.stop()


class ServiceProcess:
    """Service that is ready, in a process of its own."""

    def __init__(self, child: ChildProcess, url: str) -> None:
        self._child, self.url = child, url

    def cpu(self) -> Cpu:
        """Return the CPU seconds so far."""
        self._child.send("cpu")
        return self._child.receive(Cpu)

    def batches(self) -> list[Batch]:
        """Return the batches of the device since the last call."""
        self._child.send("batches")
        return self._child.receive(list[Batch])

    def rescore(self) -> float:
        """Score the same batches without the service; return the seconds."""
        self._child.send("rescore")
        return self._child.receive(float)


@contextmanager
def running_service(setup: Setup) -> Iterator[ServiceProcess]:
    """Start a service and wait until it is ready.

    Raises:
        BenchmarkError: it does not become ready
    """
    with running_child("benchmarks.serving.host", setup) as started:
        url = started.read_line().decode().split()[-1]
        deadline = time.monotonic() + _READY_S
        with httpx.Client(base_url=url, trust_env=False) as connection:
            while connection.get("/health/ready").status_code != httpx.codes.OK:
                if time.monotonic() > deadline or started.process.poll() is not None:
                    started.read_line()
                    raise BenchmarkError("the service did not become ready")
                time.sleep(0.2)
        service = ServiceProcess(started, url)
        service.batches()  # drop those of the warm-up
        yield service


class ClientProcess:
    """Clients that are ready, in a process of their own; `body_bytes` is the size of one request."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self.body_bytes = child.receive(int)

    def start(self, start_s: float | None = None, **load: Any) -> float:
        """Start a load (fields of `Load`), by default after `LEAD_S`; return its start time in seconds."""
        start = time.monotonic() + LEAD_S if start_s is None else start_s
        self._child.send(Load(start, **load))
        return start

    def results(self) -> list[RequestResult]:
        """Wait for the end of the load and return the result of every request."""
        return self._child.receive(list[RequestResult])

    def run(self, **load: Any) -> list[RequestResult]:
        """Start a load and wait for its results."""
        self.start(**load)
        return self.results()


@contextmanager
def running_clients(
    service: ServiceProcess, clients: Sequence[str], cores: Sequence[int], **options: Any
) -> Iterator[ClientProcess]:
    """Start clients of a service, with further fields of `ClientSetup` as options."""
    setup = ClientSetup(service.url, list(clients), cores=list(cores), **options)
    with running_child("benchmarks.serving.clients", setup) as started:
        yield ClientProcess(started)
