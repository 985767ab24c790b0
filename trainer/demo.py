"""A scoring service of its own as a child process, for as long as a run takes."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.children import last_line, signals_wait, stop
from trainer.errors import DemoError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@contextmanager
def local_service(config: Path, log: Path) -> Iterator[str]:
    """Address of a service on a free loopback port, stopped on the way out, however that comes about.

    Its output goes to `log`. Raises DemoError where it ends or says nothing within two minutes.
    """
    command = [sys.executable, "-m", "trainer.leash", "reward_service", "serve", "--config", str(config)]
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
            stop(service, STOP_TIMEOUT_S)


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
