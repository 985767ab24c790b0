"""Command line of the reward service, run as a process."""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from reward_service.client import RejectedError, RewardClient, UnreachableError
from reward_service.engine.engine import RewardEngine
from reward_service.engine.types import Pair
from reward_service.images import Pixels
from tests.support.service.checkpoints import Checkpoints

START_S, READY_S, END_S = 60.0, 120.0, 30.0


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reward_service", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=False)


@contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield the process of a running service and its address."""
    command = [sys.executable, "-m", "reward_service", "serve", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
    try:
        line = lines.get(timeout=START_S)
        assert line.startswith("listening on http://"), process.communicate(timeout=END_S)
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


MISTAKES = {
    "unknown option": (["serve", "--nope"], "no such option"),
    "unknown command": (["frobnicate"], "no such command"),
    "no command": ([], "see reward-service --help"),
    "no configuration": (["serve", "--config", "/nothing.yaml"], "name one with --config"),
    "unknown key": (["serve", "--set", "deivce=cpu"], "did you mean 'device'"),
    "bare override": (["serve", "nothing.at.all=1"], "unknown key"),
    "no keys, IPv6": (["serve", "--host", "::"], "auth.allow_anonymous"),
    "empty prompt": (["score", "x.png", "--prompt", ""], "the prompt is empty"),
    "no keys, IPv4": (["serve", "--host", "0.0.0.0"], "auth.allow_anonymous"),
    "bad port": (["serve", "--port", "99999"], "service.port"),
    "no prompt": (["score", "x.png"], "prompt"),
    "no image": (["score", "/nothing.png", "--prompt", "x"], "/nothing.png cannot be read"),
    "not an image": (["score", __file__, "--prompt", "x"], "not a PNG, JPEG or WebP"),
    "two formats": (["score", "x.png", "--prompt", "x", "--json", "--csv"], "choose one"),
    "three prompts": (["score", "x.png", "y.png", *3 * ["--prompt", "x"]], "3 prompts for 2 images"),
    "unknown evaluator": (["score", __file__, "--prompt", "x", "--evaluators", "beauty"], "choose from"),
    "no evaluators": (["score", __file__, "--prompt", "x", "--evaluators", " ,"], "names none"),
    "too long a name": (["score", 5000 * "x", "--prompt", "x"], "cannot be read (File name too long)"),
    "no table": (["serve", "--set", "calibration=/nothing.json"], "/nothing.json"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_user_errors_are_one_line_and_exit_code_2(name: str) -> None:
    """Cause and remedy are on stderr, without a traceback; stdout is empty."""
    arguments, message = MISTAKES[name]
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr.lower() or message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_reported(checkpoints: Checkpoints) -> None:
    """The error has the remedy, another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--config", checkpoints.config, "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "another --port (0 selects a free one)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_service_exits_if_models_cannot_be_loaded(checkpoints: Checkpoints) -> None:
    """A service that can never become ready does not stay up."""
    done = run("serve", "--config", checkpoints.config, "--set", "towers.hps.weights.file=nothing.pt")
    assert done.returncode == 2
    assert "nothing.pt: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_score_prints_the_scores_of_the_engine(
    checkpoints: Checkpoints, engine: RewardEngine, images: list[Pixels], tmp_path: Path
) -> None:
    """`score --json` prints the engine's raw scores without a server."""
    path = tmp_path / "image.png"
    Image.fromarray(images[1]).save(path)
    done = run("score", path, path, "--prompt", "a red square", "--config", checkpoints.config, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    expected = engine.score([Pair("a red square", images[1])])[0].raw
    for result in results:
        assert {name: s["raw"] for name, s in result["scores"].items()} == pytest.approx(expected, abs=1e-4)


def test_serve_scores_until_sigterm(
    checkpoints: Checkpoints, engine: RewardEngine, images: list[Pixels]
) -> None:
    """The service starts on a free port, scores, rejects a request, keeps serving, and exits with 0."""
    with (
        serving("--config", checkpoints.config, "--port", "0") as (process, url),
        RewardClient(url) as service,
    ):
        service.wait_until_ready(READY_S)
        assert service.ready()
        response = service.score(["a red square"] * 2, images[:2], normalization="z")
        expected = engine.score([Pair("a red square", image) for image in images[:2]])
        for result, scores in zip(response.results, expected, strict=True):
            found = {name: score.raw for name, score in result.scores.items()}
            assert found == pytest.approx(scores.raw, abs=1e-4)
            assert np.isfinite(result.reward)
        with pytest.raises(RejectedError, match="choose from"):
            service.score(["x"], images[:1], evaluators=["beauty"])
        listed = service.evaluators().evaluators
        assert {name: identity.fingerprint for name, identity in response.evaluators.items()} == {
            name: evaluator.fingerprint for name, evaluator in listed.items()
        }
        assert service.score(["x"], images[:1]).results[0].index == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(END_S) == 0
        with RewardClient(url, retry_budget_s=0.0) as late, pytest.raises(UnreachableError):
            late.score(["x"], images[:1])


def test_serve_can_listen_beyond_loopback(checkpoints: Checkpoints) -> None:
    """allow_anonymous permits other addresses; Ctrl-C exits with 0 even while loading."""
    arguments = ["--config", checkpoints.config, "--host", "0.0.0.0", "--set", "auth.allow_anonymous=true"]
    with serving(*arguments) as (process, url):
        port = url.rsplit(":", 1)[1]
        assert httpx.get(f"http://127.0.0.1:{port}/health/live").json()["status"] == "live"
        process.send_signal(signal.SIGINT)
        assert process.wait(END_S) == 0
