"""Command `crossval --judge --search` killed in a trial, in a fold and in the final fit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import SAMPLING
from tests.trainer.experiments.test_crossval import POOL, TEST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

REPOSITORY = Path(__file__).parents[3]
RESULTS = ("search.json", "crossval.json", "test.json")
# Generous: a loaded machine may be many times slower. A process that ends is noticed at once.
LOG_TIMEOUT_S, COMMAND_TIMEOUT_S = 900.0, 1500.0


def command(folder: Path, karlo: Path, run: Path) -> list[str]:
    """Return the command, with the miniature's evaluators, the tiny Karlo and as little work as possible."""
    (folder / "train.txt").write_text("\n".join(POOL))
    (folder / "test.txt").write_text("\n".join(TEST))
    settings = {
        "karlo.path": str(karlo),
        "prompts": {"train": str(folder / "train.txt"), "test": str(folder / "test.txt")},
        "sampling": SAMPLING.model_dump() | {"decoder_steps": 5},
        "lora": {"rank": 2, "alpha": 2, "targets": ["to_q", "to_out.0"]},
        "rollout": {"prompts_per_iteration": 2, "images_per_prompt": 2},
        "evaluation": {"every": 2, "images_per_prompt": 2, "resamples": 100},
        "iterations": 4,
        "threads": 1,
        "crossval.folds": 2,
        "search": {
            "trials": 2,
            "iterations": 4,
            "space": {"update.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        },
    }
    sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    return [sys.executable, "-m", "trainer", "crossval", "--judge", "--search", "--run", str(run), *sets]


def start(arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments, cwd=REPOSITORY, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def kill_after_first_iteration(arguments: Sequence[str], metrics: Path, log: Path) -> None:
    """Start the command, and kill it as soon as a run has logged an iteration."""
    process = start(arguments, log)
    deadline = time.monotonic() + LOG_TIMEOUT_S
    try:
        while not (metrics.exists() and metrics.read_bytes().count(b"\n")):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, f"{metrics} was not written: {log.read_text()[-2000:]}"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def results(run: Path) -> dict[str, Any]:
    return {name: json.loads((run / name).read_text()) for name in RESULTS}


def test_killed_experiment_ends_with_the_same_numbers(tmp_path: Path, karlo_folder: Path) -> None:
    """The same command resumes after each kill, each time with a new reward service."""
    logs = tmp_path / "killed.log", tmp_path / "whole.log"
    killed, whole = (command(tmp_path, karlo_folder, tmp_path / name / "run") for name in ("killed", "whole"))
    run = tmp_path / "killed" / "run"
    for place in ("search/trials/0002", "folds/1", "final"):
        kill_after_first_iteration(killed, run / place / "metrics.jsonl", logs[0])
    for arguments, log in zip((killed, whole), logs, strict=True):
        assert start(arguments, log).wait(timeout=COMMAND_TIMEOUT_S) == 0, log.read_text()[-2000:]
    assert results(run) == results(tmp_path / "whole" / "run")
    assert (run / "report.html").exists()
