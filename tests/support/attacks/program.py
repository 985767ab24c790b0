"""Service under attack: a program of its own, its processes, their memory and CPU time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import msgspec
import psutil  # type: ignore[import-untyped]  # it has no stubs of its own

from reward_service.protocol import MSGPACK
from tests.support.attacks import bodies, jpeg, png, prompts, webp
from tests.support.attacks.sending import Target

COMMAND = (
    sys.executable, "-m", "reward_service", "serve", "--config", "configs/miniature.yaml", "--port", "0",
)  # fmt: skip
_START_S, _END_S = 300.0, 60.0
_OK = 200


class Program:
    """Running service, and the processes that it started.

    Args:
        process: the program
        url: its address
    """

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    @property
    def ready(self) -> bool:
        """True if `/health/ready` says so."""
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=10)
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == _OK
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def memory_mb(self) -> float:
        """Return the resident memory of all its processes; what they share counts once for each."""
        return self._total(lambda process: process.memory_info().rss / 2**20)

    def cpu_s(self) -> float:
        """Return the CPU seconds of its processes so far."""
        return self._total(lambda process: process.cpu_times().user + process.cpu_times().system)

    def wait_until_quiet(self, most_s: float, load: float = 0.1) -> float:
        """Wait until the program needs little CPU time; return the seconds that it took, at most `most_s`."""
        begun_s = time.monotonic()
        while time.monotonic() < begun_s + most_s:
            before_s = self.cpu_s()
            time.sleep(0.5)
            if self.cpu_s() - before_s < 0.5 * load:
                break
        return time.monotonic() - begun_s

    def warm_up(self) -> None:
        """Send ordinary requests of every kind and size: memory and caches become those of a used service."""
        target = Target(self.url, 600.0)
        raw = bytes(3 * 512 * 512)
        image = {"data": raw, "format": "raw", "shape": (512, 512, 3)}
        large = msgspec.msgpack.encode({"items": [{"prompt": "a wall", "image": image}] * 70})
        for _ in range(3):
            for message in (
                bodies.images(*[png.flat(png.SIDE_PX)] * 4),
                bodies.images(*[png.flat(2000, png.RGBA, 16)] * 8),
                bodies.images(*[jpeg.flat(jpeg.SIDE_PX)] * 4, *[webp.flat(2000)] * 8),
                bodies.images(*[jpeg.run_scans(5, 2000)] * 16),
                bodies.texts(*(prompts.ordinary_words(number)[:300] for number in range(128))),
                bodies.Message(large, MSGPACK),
                bodies.json_image("A" * 10_000_000),
                bodies.form(),
            ):
                target.exchange(message)

    def _total(self, measure: Callable[[psutil.Process], float]) -> float:
        """Return the sum of a number over the processes that still run."""
        total = 0.0
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            for process in (main, *main.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += measure(process)
        return total


@contextmanager
def running(command: Sequence[str] = COMMAND, *, warm: bool = True) -> Iterator[Program]:
    """Run a service that is ready, and end it with the block.

    Args:
        command: starts it; its first line of output ends with the address
        warm: send it ordinary requests first, for measurements

    Raises:
        RuntimeError: it does not start
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first:
            raise RuntimeError(f"the service did not start; run it by hand: {' '.join(command)}")
        program = Program(process, first.split()[-1])
        end_s = time.monotonic() + _START_S
        while not program.ready:
            if process.poll() is not None or time.monotonic() > end_s:
                raise RuntimeError(f"the service is not ready after {_START_S:g} s")
            time.sleep(0.2)
        if warm:
            program.warm_up()
        yield program
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
