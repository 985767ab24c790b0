"""Jobs of real processes started by `accelerate launch`: same result, clean end, no process left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.trainer.job_comparison import TOLERANCE, WAIT_S, assert_equal_records, with_sections
from trainer.config import LORA_FILE, TrainerConfig

REPOSITORY = Path(__file__).parents[3]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0", "-m", "tests.support.trainer.job"]


@pytest.fixture
def config_file(trainer_config: TrainerConfig, tmp_path: Path) -> Path:
    """Configuration of the tiny Karlo with four prompts per iteration."""
    config = with_sections(trainer_config, rollout={"prompts_per_iteration": 4})
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({"trainer": config.model_dump(mode="json")}))
    return file


@contextmanager
def job(command: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a job; kill the processes that are left at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in (process.pid, *workers(process).values()):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def workers(launcher: "subprocess.Popen[bytes]") -> dict[int, int]:
    """Return the process IDs of the launcher's processes by rank."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # processes that have ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            environment = stat.with_name("environ").read_bytes().split(b"\0")
            ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
            if parent == launcher.pid and ranks:
                found[ranks[0]] = int(stat.parent.name)
    return found


def checkpoints(run: Path) -> list[int]:
    """Return the number of completed iterations of each of a run's checkpoints."""
    return [int(path.name.rpartition("-")[2]) for path in run.glob("checkpoints/iteration-*")]


def wait_for(condition: Callable[[], object], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_launched_job_equals_single_process(config_file: Path, tmp_path: Path) -> None:
    """Two real processes write the same LoRA and metrics as one, into one run folder."""
    options = ["train", "--config", str(config_file), "--run"]
    alone = [sys.executable, "-m", "tests.support.trainer.job", *options, str(tmp_path / "alone")]
    subprocess.run(alone, cwd=REPOSITORY, check=True, capture_output=True)
    log = tmp_path / "log"
    with job([*LAUNCH, *options, str(tmp_path / "two")], log) as launched:
        assert launched.wait(WAIT_S) == 0, log.read_text()
    ours, theirs = (load_file(tmp_path / name / "lora" / LORA_FILE) for name in ("two", "alone"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, **TOLERANCE)
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "alone")
    ]
    assert_equal_records(*metrics)
    files = [sorted(it.name for it in (tmp_path / name).iterdir()) for name in ("two", "alone")]
    assert files[0] == files[1]
    assert log.read_text().count("LoRA:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_job(victim: int, config_file: Path, tmp_path: Path) -> None:
    """The launcher ends without waiting for a timeout and reports the cause; no process is left."""
    log, run = tmp_path / "log", tmp_path / "run"
    command = [*LAUNCH, "train", "--config", str(config_file), "--run", str(run), "iterations=10000"]
    with job(command, log) as launched:
        wait_for(lambda: checkpoints(run) or launched.poll() is not None, log)
        processes = workers(launched)
        assert sorted(processes) == [0, 1], log.read_text()
        os.kill(processes[victim], signal.SIGKILL)
        assert launched.wait(WAIT_S) != 0  # long before trainer.processes.timeout_s, half an hour
        assert not [pid for pid in processes.values() if Path(f"/proc/{pid}").exists()]
    output = log.read_text()
    assert "Signal 9 (SIGKILL)" in output
    assert f"process {1 - victim} of 2 lost the connection to the others" in output or "SIGTERM" in output


@pytest.mark.slow
def test_terminated_job_can_be_resumed(config_file: Path, tmp_path: Path) -> None:
    """SIGTERM stops all processes; completed iterations are kept, and a job of two resumes them."""
    log, run = tmp_path / "log", tmp_path / "run"
    command = [*LAUNCH, "train", "--config", str(config_file), "--run", str(run)]
    with job([*command, "iterations=10000"], log) as launched:
        wait_for(lambda: checkpoints(run) or launched.poll() is not None, log)
        processes = workers(launched)
        launched.send_signal(signal.SIGTERM)
        assert launched.wait(WAIT_S) != 0
        assert not [pid for pid in processes.values() if Path(f"/proc/{pid}").exists()]
    ours = [line for line in log.read_text().splitlines() if "reward-trainer: " in line]
    assert len(ours) == 1, log.read_text()
    assert "--resume" in ours[0]
    kept = max(checkpoints(run))
    with job([*command, "--resume", f"iterations={kept + 1}"], log) as launched:
        assert launched.wait(WAIT_S) == 0, log.read_text()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(kept + 1))


@pytest.mark.slow
def test_configuration_error_is_reported_once(config_file: Path, tmp_path: Path) -> None:
    """An invalid configuration is reported in one line, however many processes read it."""
    log = tmp_path / "log"
    command = [*LAUNCH, "train", "--config", str(config_file), "rollout.prompts_per_iteration=1"]
    with job(command, log) as launched:
        assert launched.wait(WAIT_S) != 0
    ours = [line for line in log.read_text().splitlines() if line.startswith("reward-trainer: ")]
    assert len(ours) == 1, log.read_text()
    assert "cannot be shared among 2 processes" in ours[0]
    assert not (tmp_path / "runs").exists()
