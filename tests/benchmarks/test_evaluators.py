"""Evaluator benchmark through its command line, on towers of one layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reward_service.engine.test_numerics import FLOAT32

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/evaluators.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.slow
def test_engine_and_reference_loops_give_the_same_scores(tmp_path: Path) -> None:
    """Within the documented tolerances; the written reports contain no path of this machine."""
    sizes = ["--layers", "1", "--images", "2", "--per-prompt", "2", "--repeats", "1", "--batches", "1"]
    finished = run(*sizes, "--json", "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert {row["evaluator"] for row in report["scores"]} == set(FLOAT32)
    for row in report["scores"]:
        assert float(row["largest difference"]) <= FLOAT32[row["evaluator"]]
    assert {row["what"] for row in report["ratios"]} >= {"four reference loops / engine"}
    assert report["throughput"][0]["acceleration"] == "none"
    written = [(tmp_path / f"evaluators-cpu.{kind}").read_text() for kind in ("md", "json")]
    assert json.loads(written[1]) == report
    for text in written:
        assert str(ROOT) not in text
        assert str(tmp_path) not in text


@pytest.mark.slow
def test_graphs_without_a_gpu_are_a_usage_error() -> None:
    """One line, before any model is built."""
    finished = run("--acceleration", "graphs")
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "--device cuda" in finished.stderr
