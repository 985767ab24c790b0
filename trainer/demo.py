"""`reward-trainer demo`: a scoring service of its own as a child process, for as long as the run takes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import DemoError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@contextmanager
def local_service(config: Path, log: Path) -> Iterator[str]:
    """Address of a service on a free loopback port, stopped on the way out, however that comes about.

    Its output goes to `log`. Raises DemoError where it ends or says nothing within two minutes.
    """
    command = [sys.executable, "-m", "reward_service", "serve", "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    service = None
    try:
        with log.open("wb") as output, _signals_wait():
            # A session of its own: Ctrl-C reaches this process only, which then stops the service in order.
            service = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        yield _wait_for_address(service, log)
    finally:
        if service is not None:
            _stop(service)


@contextmanager
def _signals_wait() -> Iterator[None]:
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


def _wait_for_address(service: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        said = log.read_text(encoding="utf-8", errors="replace")
        found = _ADDRESS.search(said)
        if found and found[1] != "0":
            return found[0]
        if service.poll() is not None:
            last = said.strip().splitlines()[-1:] or ["nothing was said"]
            raise DemoError(
                f"the scoring service ended with code {service.returncode}: {last[0]} (see {log})"
            )
        time.sleep(0.1)
    raise DemoError(f"the scoring service did not listen within {START_TIMEOUT_S:.0f} s; see {log}")


def _stop(service: "subprocess.Popen[bytes]") -> None:
    service.terminate()
    try:
        service.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()
