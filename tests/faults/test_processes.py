"""Whole services in processes of their own: broken devices and restarts, signals under load, full disks."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.client import RewardClient
from reward_service.scoring.auth import new_key
from tests.support.faults.bystander import Bystander, Truth, undisturbed
from tests.support.faults.calling import OK, post, request_of, told

pytestmark = pytest.mark.slow
READY_S, END_S = 90.0, 60.0
NOT_READY = (503, "not_ready")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


@contextmanager
def process(port: int, *settings: str, redirect: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A ready service on a device that breaks by the prompt.

    Args:
        redirect: for the shell: where its output goes
    """
    options = [part for it in ("threads=1", *settings) for part in ("--set", it)]
    command = [sys.executable, "-m", "tests.support.faults.program", "serve", "--port", str(port), *options]
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
    root = Path(__file__).resolve().parents[2]
    running = subprocess.Popen(shell, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=root)
    try:
        until = time.monotonic() + READY_S
        while not ready(port):
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield running
    finally:
        running.kill()
        running.wait()


def ready(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=END_S).status_code == 200
    return False


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    return path, new_key(path, "stays")[0]


@pytest.fixture(scope="module")
def crowded(keys: tuple[Path, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """With keys, and stdout and stderr on a full disk."""
    port = free_port()
    with process(
        port, f"auth.keys={keys[0]}", "watch.stuck_s=3", redirect=">/dev/full 2>/dev/full"
    ) as running:
        yield running, f"http://127.0.0.1:{port}"


def test_a_full_disk_for_the_log(
    crowded: tuple[subprocess.Popen[bytes], str], keys: tuple[Path, str], truth: Truth
) -> None:
    """Lines are lost and counted, and nothing else is."""
    _, url = crowded
    with undisturbed(url, truth, api_key=keys[1]):
        assert told(post(url, b"no request", Authorization=f"Bearer {keys[1]}")) == (400, "malformed_body")
    assert _metric(url, "reward_lost_log_lines", Authorization=f"Bearer {keys[1]}") >= 7


def test_keys_change_under_load(
    crowded: tuple[subprocess.Popen[bytes], str], keys: tuple[Path, str], truth: Truth
) -> None:
    """New keys work at once and old ones end with a SIGHUP; whoever kept his notices nothing."""
    running, url = crowded
    path, kept = keys
    before = path.read_text()
    with undisturbed(url, truth, api_key=kept):
        for name in ("first", "second"):
            assert _status(url, "rk_nobody") == 401
            key = new_key(path, name)[0]
            assert _status(url, key) == 200
            path.write_text(before)
            running.send_signal(signal.SIGHUP)
            _wait_for(url, key, 401)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, Callable[[Path], Any]] = {
    "garbage": lambda path: path.write_text("{{{"),
    "empty": lambda path: path.write_text(""),
    "half written": lambda path: path.write_text(path.read_text()[:-20]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "gone": lambda path: path.unlink(),
    "open to everybody": lambda path: path.chmod(0o666),
    "a folder": become_a_folder,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_keys(
    crowded: tuple[subprocess.Popen[bytes], str], keys: tuple[Path, str], truth: Truth, name: str
) -> None:
    """The keys stay as they were: nobody is locked out, and nobody let in."""
    running, url = crowded
    path, kept = keys
    before = path.read_text()
    with undisturbed(url, truth, api_key=kept):
        BROKEN[name](path)
        running.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert _status(url, kept) == 200
        assert _status(url, "rk_" + "a" * 43) == 401
    if path.is_dir():
        path.rmdir()
    path.write_text(before)
    path.chmod(0o600)


def _status(url: str, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{url}/v1/evaluators", headers=headers, timeout=END_S).status_code


def _wait_for(url: str, key: str, status: int) -> None:
    until = time.monotonic() + END_S
    while _status(url, key) != status:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_hang_a_restart_and_an_end_under_load(
    crowded: tuple[subprocess.Popen[bytes], str], keys: tuple[Path, str], truth: Truth
) -> None:
    """Callers of a device that hangs are told to come back; the process ends with a status that has it
    restarted, and a client that retries sees right scores only. Then, with stderr closed, SIGTERM under
    load: what was admitted is answered, what comes later is refused, and the end has status 0.
    """
    hanging, url = crowded
    bystander = Bystander(url, truth, api_key=keys[1], retry_budget_s=READY_S)
    bystander.start()
    bystander.again()
    answer = post(url, request_of("hang"), Authorization=f"Bearer {keys[1]}")
    assert told(answer) == NOT_READY
    assert answer.json()["retryable"] is True
    assert hanging.wait(END_S) in (1, 2)
    with process(int(url.rpartition(":")[2]), redirect="2>&-") as running:
        bystander.again()
        bystander.stop()
        assert not bystander.wrong
        _end_under_load(running, url, truth)


def _end_under_load(running: subprocess.Popen[bytes], url: str, truth: Truth) -> None:
    rows = [index % len(truth.pairs) for index in range(300)]
    mistakes: list[Any] = []

    def ask() -> None:
        with RewardClient(url, retry_budget_s=0, chunk_pairs=300) as service:
            try:
                pairs = [truth.pairs[row] for row in rows]
                answer = service.score([it.prompt for it in pairs], [it.image for it in pairs])
                mistakes.append(truth.mistakes(rows, answer))
            except Exception as error:  # noqa: BLE001 - told below
                mistakes.append([repr(error)])

    callers = [threading.Thread(target=ask) for _ in range(5)]
    for caller in callers:
        caller.start()
    until = time.monotonic() + END_S
    while _metric(url, "reward_queued_pairs") < 900:
        assert time.monotonic() < until
    running.send_signal(signal.SIGTERM)
    later = set()
    with suppress(httpx.TransportError):
        while running.poll() is None:
            later.add(told(post(url, request_of("too late"))))
    for caller in callers:
        caller.join(END_S)
    assert mistakes == [[]] * 5
    assert NOT_READY in later
    assert later <= {NOT_READY, OK}  # one may have come before the signal
    assert running.wait(END_S) == 0


def _metric(url: str, name: str, **headers: str) -> float:
    page = httpx.get(f"{url}/metrics", timeout=END_S, headers=headers).text
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    assert found, name
    return float(found[1])
