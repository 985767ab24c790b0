"""`reward-trainer crossval --judge --search`, killed in a trial, in a fold and in the final fit."""

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[3]
OUTCOMES = ("search.json", "crossval.json", "test.json")


def command(folder: Path, karlo: Path, run: Path) -> list[str]:
    """The command under test: the miniature's judge, the tiny Karlo, as little work as there can be."""
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


def begin(arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments, cwd=REPOSITORY, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def kill_once_there(arguments: Sequence[str], metrics: Path, log: Path) -> None:
    """Begin, and SIGKILL as soon as that run has logged an iteration."""
    process = begin(arguments, log)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n")):
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, f"{metrics} was not written: {log.read_text()[-2000:]}"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def outcome(run: Path) -> dict[str, Any]:
    return {name: json.loads((run / name).read_text()) for name in OUTCOMES}


def test_kills_anywhere_change_no_number(tmp_path: Path, karlo_folder: Path) -> None:
    """The same command goes on each time, with a reward service anew each time, and ends with the same numbers."""
    logs = tmp_path / "killed.log", tmp_path / "whole.log"
    killed, whole = (command(tmp_path, karlo_folder, tmp_path / name / "run") for name in ("killed", "whole"))
    run = tmp_path / "killed" / "run"
    for place in ("search/trials/0002", "folds/1", "final"):
        kill_once_there(killed, run / place / "metrics.jsonl", logs[0])
    for arguments, log in zip((killed, whole), logs, strict=True):
        assert begin(arguments, log).wait(timeout=240) == 0, log.read_text()[-2000:]
    assert outcome(run) == outcome(tmp_path / "whole" / "run")
    assert (run / "report.html").exists()
