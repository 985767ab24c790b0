"""Services in processes of their own: device faults and restarts, signals under load, full disks."""

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
from tests.support.faults.bystander import Bystander, ExpectedScores, undisturbed
from tests.support.faults.requests import OK, outcome, post, request_of

pytestmark = pytest.mark.slow
READY_S, END_S = 300.0, 240.0
NOT_READY = (503, "not_ready")
ProcessAndUrl = tuple[subprocess.Popen[bytes], str]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


@contextmanager
def process(port: int, *settings: str, redirect: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Run a ready service on a device whose faults are selected by the prompt.

    Args:
        redirect: redirection of its output, in the shell's syntax
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
def full_disk_service(keys: tuple[Path, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Service with keys, and with stdout and stderr on a full disk."""
    port = free_port()
    with process(
        port, f"auth.keys={keys[0]}", "watch.stuck_s=3", redirect=">/dev/full 2>/dev/full"
    ) as running:
        yield running, f"http://127.0.0.1:{port}"


def test_full_disk_of_the_log(
    full_disk_service: ProcessAndUrl,
    keys: tuple[Path, str],
    expected_scores: ExpectedScores,
) -> None:
    """Log lines are lost and counted; nothing else is affected."""
    _, url = full_disk_service
    with undisturbed(url, expected_scores, api_key=keys[1]):
        assert outcome(post(url, b"no request", Authorization=f"Bearer {keys[1]}")) == (400, "malformed_body")
    assert _metric(url, "reward_lost_log_lines", Authorization=f"Bearer {keys[1]}") >= 7


def test_keys_change_under_load(
    full_disk_service: ProcessAndUrl,
    keys: tuple[Path, str],
    expected_scores: ExpectedScores,
) -> None:
    """New keys work at once, removed keys end with a SIGHUP, and other keys are not affected."""
    running, url = full_disk_service
    path, kept = keys
    before = path.read_text()
    with undisturbed(url, expected_scores, api_key=kept):
        for name in ("first", "second"):
            assert _status(url, "rk_nobody") == 401
            key = new_key(path, name)[0]
            assert _status(url, key) == 200
            path.write_text(before)
            running.send_signal(signal.SIGHUP)
            _wait_for(url, key, 401)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CORRUPTIONS: dict[str, Callable[[Path], Any]] = {
    "garbage": lambda path: path.write_text("{{{"),
    "empty": lambda path: path.write_text(""),
    "half written": lambda path: path.write_text(path.read_text()[:-20]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "gone": lambda path: path.unlink(),
    "open to everybody": lambda path: path.chmod(0o666),
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupt_keys_file(
    full_disk_service: ProcessAndUrl,
    keys: tuple[Path, str],
    expected_scores: ExpectedScores,
    name: str,
) -> None:
    """The keys stay as they were: no client is locked out, and no other is let in."""
    running, url = full_disk_service
    path, kept = keys
    before = path.read_text()
    with undisturbed(url, expected_scores, api_key=kept):
        CORRUPTIONS[name](path)
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


def test_hang_restart_and_shutdown_under_load(
    full_disk_service: ProcessAndUrl,
    keys: tuple[Path, str],
    expected_scores: ExpectedScores,
) -> None:
    """Requests to a hung device get a retryable 503; the process exits with a status that has it restarted,
    and a client that retries gets correct scores only. Then, with stderr closed, SIGTERM under load: admitted
    requests are scored, later ones are rejected, and the exit status is 0.
    """
    hanging, url = full_disk_service
    bystander = Bystander(url, expected_scores, api_key=keys[1], retry_budget_s=READY_S)
    bystander.start()
    bystander.wait_for_scores()
    response = post(url, request_of("hang"), Authorization=f"Bearer {keys[1]}")
    assert outcome(response) == NOT_READY
    assert response.json()["retryable"] is True
    assert hanging.wait(END_S) in (1, 2)
    with process(int(url.rpartition(":")[2]), redirect="2>&-") as running:
        bystander.wait_for_scores()
        bystander.stop()
        assert not bystander.mistakes
        _shut_down_under_load(running, url, expected_scores)


def _shut_down_under_load(
    running: subprocess.Popen[bytes], url: str, expected_scores: ExpectedScores
) -> None:
    rows = [index % len(expected_scores.pairs) for index in range(300)]
    mistakes: list[Any] = []

    def send() -> None:
        with RewardClient(url, retry_budget_s=0, chunk_pairs=300) as service:
            try:
                pairs = [expected_scores.pairs[row] for row in rows]
                response = service.score([it.prompt for it in pairs], [it.image for it in pairs])
                mistakes.append(expected_scores.mistakes(rows, response))
            except Exception as error:  # noqa: BLE001 - reported below
                mistakes.append([repr(error)])

    clients = [threading.Thread(target=send) for _ in range(5)]
    for client in clients:
        client.start()
    until = time.monotonic() + END_S
    while _metric(url, "reward_queued_pairs") < 900:
        assert time.monotonic() < until
    running.send_signal(signal.SIGTERM)
    late_outcomes = set()
    with suppress(httpx.TransportError):
        while running.poll() is None:
            late_outcomes.add(outcome(post(url, request_of("too late"))))
    for client in clients:
        client.join(END_S)
    assert mistakes == [[]] * 5
    assert NOT_READY in late_outcomes
    assert late_outcomes <= {NOT_READY, OK}  # one may have come before the signal
    assert running.wait(END_S) == 0


def _metric(url: str, name: str, **headers: str) -> float:
    page = httpx.get(f"{url}/metrics", timeout=END_S, headers=headers).text
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    assert found, name
    return float(found[1])
