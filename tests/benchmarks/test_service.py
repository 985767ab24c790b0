"""Statistics of the service benchmark, and a short run through its command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.serving.bodies import FORMS, make_body, scene
from benchmarks.serving.clients import RequestResult, arrivals
from benchmarks.serving.figures import (
    Verdict,
    busy_share,
    goodput,
    heavy_pairs_per_s,
    latencies_ms,
    percentile,
)
from benchmarks.serving.host import Batch
from benchmarks.serving.parts import QUICK
from reward_service.config import load_config
from reward_service.requests.parsing import RequestParser

ROOT = Path(__file__).parents[2]


def test_arrivals_are_a_poisson_process() -> None:
    """The rate gives their number, gaps are exponentially distributed, and a seed repeats them."""
    points = arrivals(50.0, 200.0, seed=1)
    gaps = [later - earlier for earlier, later in pairwise(points)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert abs(len(points) - 10_000) < 500  # five deviations
    assert deviation == pytest.approx(mean, rel=0.1)
    assert all(gap > 0 for gap in gaps)
    assert points[-1] < 200.0
    assert points == arrivals(50.0, 200.0, seed=1) != arrivals(50.0, 200.0, seed=2)


@pytest.mark.parametrize(("percent", "expected"), [(50, 50), (99, 99), (100, 100), (0, 1)])
def test_percentile_is_a_measured_value(percent: float, expected: int) -> None:
    """Nearest rank, no interpolation."""
    assert percentile(list(range(100, 0, -1)), percent) == expected
    assert math.isnan(percentile([], percent))


def test_verdict_names_value_and_target() -> None:
    """One line; NaN misses every target."""
    assert str(Verdict("a", "ratio", 0.97, 0.95)) == "(a) ratio: 0.97, target at least 0.95: met"
    assert str(Verdict("d", "loss", 2.5, 2, at_most=True)) == "(d) loss: 2.5, target at most 2: missed"
    assert Verdict("a", "ratio", 0.95, 0.95).ok
    assert not Verdict("a", "ratio", math.nan, 0.95).ok
    assert not Verdict("a", "ratio", math.nan, 0.95, at_most=True).ok


def test_latency_counts_from_the_due_time() -> None:
    """Not from the time of sending; refused requests count neither for latency nor for goodput."""
    late = RequestResult("x", due_s=1.0, sent_s=3.0, ended_s=3.5, status=200, accepted=True)
    refused = RequestResult("x", due_s=1.0, sent_s=1.0, ended_s=1.001, status=503, accepted=True)
    assert latencies_ms([late, refused]) == [2500.0]
    assert goodput([late, refused], pairs=8, start_s=1.0, stop_s=5.0) == 2.0
    assert goodput([late], pairs=8, start_s=1.0, stop_s=3.5) == 0.0


def test_batch_counts_in_proportion_to_its_overlap_with_the_window() -> None:
    """By time; pairs of the light client are not counted as heavy ones."""
    batches = [Batch(0.0, 2.0, pairs=11, light=1), Batch(3.0, 4.0, pairs=6, light=0)]
    assert heavy_pairs_per_s(batches, 1.0, 3.5) == pytest.approx((5 + 3) / 2.5)
    assert busy_share(batches, 1.0, 3.5) == pytest.approx((1.0 + 0.5) / 2.5)


@pytest.mark.parametrize("form", FORMS)
def test_request_parser_reads_each_format(form: str) -> None:
    """Prompts and images are the same, exactly if the format is lossless."""
    images = [scene(32, seed) for seed in (1, 2)]
    sent = make_body(form, ["one", "two"], images)
    pairs = RequestParser(load_config())(sent.content, sent.content_type).pairs
    assert [pair.prompt for pair in pairs] == ["one", "two"]
    for pair, image in zip(pairs, images, strict=True):
        assert pair.image.shape == image.shape
        assert (pair.image == image).all() == ("JPEG" not in form)


@pytest.mark.slow
def test_short_run_writes_and_prints_the_report(tmp_path: Path) -> None:
    """Part b has a row for each format; the written and printed reports are equal and have no paths."""
    out = tmp_path / "service-cpu"
    command = [sys.executable, "-m", "benchmarks.service", "--quick", "--parts", "b", "--out", str(out)]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(Path(f"{out}.json").read_text())
    assert [row["form"] for row in report["wire"]] == list(QUICK.forms)
    assert all(row["service, µs CPU a pair"] > 0 < row["engine, µs CPU a pair"] for row in report["wire"])
    written = Path(f"{out}.md").read_text()
    assert written.strip() == finished.stdout.strip()
    assert str(ROOT) not in written
    assert str(tmp_path) not in written


def test_unknown_part_is_a_usage_error() -> None:
    """Reported before a process is started."""
    command = [sys.executable, "-m", "benchmarks.service", "--parts", "e"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 2
    assert "choose from a,b,c,d" in finished.stderr
