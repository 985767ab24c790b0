"""Whole service with a failing device or model: responses to its clients, and the end of the process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from reward_service.config import ServiceConfig, load_config
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair, PairScores
from reward_service.observability.metrics import Metrics
from reward_service.scoring.backend import open_backend
from reward_service.scoring.service import ScoringService
from reward_service.settings import DEFAULT_CONFIG

READY_S, END_S = 300.0, 120.0
# The prompt selects the fault.
PROGRAM = """
import sys, threading
from reward_service.engine.engine import RewardEngine
score = RewardEngine.score_batch
broken = []
def breaking(self, pairs, chosen, *rest):
    prompts = {pair.prompt for pair in pairs}
    if "hang" in prompts:
        threading.Event().wait()
    if "clip" in prompts:
        broken.append("clip")
    if broken and any(evaluator.name == "clip" for evaluator in chosen):
        from reward_service.engine.types import ScoringError
        raise ScoringError("evaluator clip failed", "clip")
    return score(self, pairs, chosen, *rest)
RewardEngine.score_batch = breaking
import functools
from reward_service.web import server
# On a slow machine, the watchdog must not be faster than the shutdown.
server.exit_soon = functools.partial(server.exit_soon, within_s=100.0)
from reward_service.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def miniature() -> ServiceConfig:
    return load_config(overrides=["threads=1"])


@pytest.fixture
def engine(miniature: ServiceConfig) -> RewardEngine:
    """Engine that a test may damage."""
    return build_engine(miniature)


@contextmanager
def service(*settings: str, stderr: Any = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a ready service in a process of its own; yields the process and the address."""
    options = [part for setting in ("threads=1", *settings) for part in ("--set", setting)]
    command = [sys.executable, "-c", PROGRAM, "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        wait_for(url, 200)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def wait_for(url: str, status: int) -> None:
    deadline = time.monotonic() + READY_S
    while httpx.get(f"{url}/health/ready").status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_pairs(url: str) -> None:
    """Wait until a request is admitted."""
    deadline = time.monotonic() + READY_S
    while "reward_inflight_bytes 0.0" in httpx.get(f"{url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send_request(url: str, prompt: str, **options: Any) -> httpx.Response:
    image = {"data": "AAAA", "format": "raw", "shape": [1, 1, 3]}
    body = {"items": [{"prompt": prompt, "image": image}], **options}
    return httpx.post(f"{url}/score", json=body, timeout=END_S)


def events(log: str) -> list[str]:
    """Return the events of a log; its last line, for people, is not JSON."""
    return [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_hung_device_ends_the_process() -> None:
    """Clients get a retryable 503, and within seconds the process exits so that it can be restarted."""
    with service("watch.stuck_s=1") as (process, url):
        response = send_request(url, "hang")
        assert (response.status_code, response.json()["code"], response.json()["retryable"]) == (
            503,
            "not_ready",
            True,
        )
        assert int(response.headers["Retry-After"]) >= 1
        _, log = process.communicate(timeout=END_S)
    assert process.returncode == 2
    (line,) = [event for event in events(log) if event.endswith("so that it can be restarted")]
    assert "has not responded for 1 s" in line
    assert log.splitlines()[-1] == "reward-service: the device has not responded for 1 s"


@pytest.mark.slow
def test_second_ctrl_c_ends_the_process_at_once() -> None:
    """Also while the device is at work: unfinished requests get a 503, and there is no traceback."""
    with service("drain_s=100") as (process, url), ThreadPoolExecutor(1) as clients:
        unfinished = clients.submit(send_request, url, "hang")
        wait_for_pairs(url)
        process.send_signal(signal.SIGINT)
        wait_for(url, 503)
        process.send_signal(signal.SIGINT)
        assert (unfinished.result().status_code, unfinished.result().json()["code"]) == (503, "not_ready")
        _, log = process.communicate(timeout=END_S)
    assert process.returncode == 130
    assert "Traceback" not in log
    assert "CancelledError" not in log


IMPORTING = """
import sys, time
class Finder:
    def find_spec(self, name, *_):
        if name == sys.argv[1] + ".cli":
            print("importing", flush=True)
            time.sleep(1000)
sys.meta_path.insert(0, Finder())
__import__(sys.argv[1] + ".__main__")
sys.modules[sys.argv[1] + ".__main__"].main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", ["reward_service", "trainer"])
def test_signal_during_the_imports(program: str, number: signal.Signals) -> None:
    """It has a handler before the imports begin, as process 1 needs it, and ends the program in silence."""
    command = [sys.executable, "-c", IMPORTING, program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=END_S)
    assert (process.returncode, errors) == (128 + number, "")


@pytest.mark.parametrize("name", ["reward-service", "reward-trainer"])
def test_commands_install_their_handlers_first(name: str) -> None:
    """The console scripts start at the entry points that do."""
    project = tomllib.loads((DEFAULT_CONFIG.parent.parent / "pyproject.toml").read_text())
    assert project["project"]["scripts"][name].endswith(".__main__:main")


@pytest.mark.slow
def test_evaluator_down_and_full_disk_affect_nothing_else() -> None:
    """Strict requests get Retry-After, others partial results; lost log lines are counted."""
    with Path("/dev/full").open("w") as full, service(stderr=full) as (process, url):
        strict = send_request(url, "clip")
        assert (strict.status_code, strict.json()["code"]) == (503, "evaluator_down")
        assert int(strict.headers["Retry-After"]) >= 1
        partial = send_request(url, "x", allow_partial=True).json()
        assert partial["failed"] == {"clip": "evaluator_down"}
        assert set(partial["results"][0]["scores"]) == {"aesthetic", "pickscore", "hpsv2"}
        assert partial["results"][0]["reward"] is None
        assert send_request(url, "x", evaluators=["aesthetic", "hpsv2"]).json()["failed"] == {}
        assert httpx.get(f"{url}/health/ready").status_code == 200
        metrics = httpx.get(f"{url}/metrics").text
        assert 'reward_evaluator_up{evaluator="clip"} 0.0' in metrics
        (lost,) = re.findall(r"^reward_lost_log_lines (\S+)", metrics, re.MULTILINE)
        assert float(lost) >= 3
        process.terminate()
        assert process.wait(END_S) == 0


def start(config: ServiceConfig, engine: RewardEngine) -> tuple[ScoringService, threading.Event]:
    """Start a service; return it and the event of its failure."""
    failed = threading.Event()
    service = ScoringService(config, build=lambda _: engine, on_failure=lambda _: failed.set())
    service.start()
    return service, failed


def test_golden_score_mismatch_fails_the_start(
    miniature: ServiceConfig, engine: RewardEngine, tmp_path: Path
) -> None:
    """One line names the evaluator, both scores and the tolerance; the service never becomes ready."""
    assert miniature.canary is not None
    golden = json.loads(miniature.canary.read_text())
    for entry in golden["scores"]["cpu"].values():
        entry["raw"] += 0.25 if entry["evaluator"] == "hpsv2" else 0.0
    path = tmp_path / "canary.json"
    path.write_text(json.dumps(golden))
    service, failed = start(miniature.model_copy(update={"canary": path}), engine)
    assert failed.wait(END_S)
    assert service.health.status == "failed"
    expected = (
        r"evaluator hpsv2 scores the canary pair 0\.427.*, expected its golden score 0\.677.* within 1e-05"
    )
    assert re.fullmatch(expected, service.health.detail)
    service.close()


def test_changed_score_is_detected_by_the_canary(miniature: ServiceConfig, engine: RewardEngine) -> None:
    """A round of the canary detects it without any request; then nothing more is scored."""
    watch = miniature.watch.model_copy(update={"canary_every_s": 0.05})
    service, failed = start(miniature.model_copy(update={"watch": watch}), engine)
    deadline = time.monotonic() + END_S
    while service.health.status == "loading" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (service.health.status, failed.wait(0.3)) == ("ready", False)
    engine.evaluators["pickscore"].tower.logit_scale *= 1.1
    assert failed.wait(END_S)
    assert service.health.status == "failed"
    assert service.health.detail.startswith("evaluator pickscore scores the canary pair")
    service.close()


def test_next_batch_is_prepared_while_one_runs(miniature: ServiceConfig, engine: RewardEngine) -> None:
    """Its images are preprocessed before the device is free, and only once."""
    miniature = miniature.model_copy(update={"prepare_ahead": True})
    backend = open_backend(miniature, engine, Metrics(), print, print)
    score, free, prepared = engine.score_batch, threading.Event(), threading.Event()
    ready: list[bool] = []

    def held(pairs: Sequence[Pair], *rest: Any) -> list[PairScores]:
        assert free.wait(READY_S)
        ready.extend(bool(pair.preprocessed) for pair in pairs)
        return score(pairs, *rest)

    def watched(pairs: Sequence[Pair], names: Sequence[str] | None = None) -> list[Pair]:
        found = RewardEngine.prepare(engine, pairs, names)
        if any(pair.prompt == "second" for pair in pairs):
            prepared.set()
        return found

    engine.score_batch, engine.prepare = held, watched  # type: ignore[method-assign]
    lane, image = (tuple(engine.evaluators), False), np.zeros((64, 64, 3), np.uint8)
    first = backend.queue.submit([Pair("first", image)], lane)
    while backend.queue.queued_pairs:
        time.sleep(0.001)
    second = backend.queue.submit([Pair("second", image)], lane)
    assert prepared.wait(READY_S)
    assert not first.done()
    free.set()
    assert second.result(READY_S).results[0].raw.keys() == engine.evaluators.keys()
    assert ready == [True, True]
    assert backend.close(END_S)
