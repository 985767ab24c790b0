"""The service benchmark: its figures, and a short run of a person's command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.serving.bodies import FORMS, body, scene
from benchmarks.serving.callers import Outcome, arrivals
from benchmarks.serving.figures import Verdict, busy, goodput, heavy_rate, latencies_ms, percentile
from benchmarks.serving.host import Batch
from benchmarks.serving.parts import QUICK
from reward_service.config import load_config
from reward_service.scoring.requests import RequestParser

ROOT = Path(__file__).parents[2]


def test_arrivals_are_a_poisson_process() -> None:
    """As many as the rate says, with gaps of an exponential's mean and deviation; the same for a seed."""
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
def test_percentiles_are_values_that_were_measured(percent: float, expected: int) -> None:
    """The nearest rank, never something between two."""
    assert percentile(list(range(100, 0, -1)), percent) == expected
    assert math.isnan(percentile([], percent))


def test_verdicts_say_what_was_asked() -> None:
    """A line each; a figure that is no number is not met."""
    assert str(Verdict("a", "ratio", 0.97, 0.95)) == "(a) ratio: 0.97 of 0.95 asked: ok"
    assert str(Verdict("d", "loss", 2.5, 2, at_most=True)) == "(d) loss: 2.5 of at most 2 asked: falls short"
    assert Verdict("a", "ratio", 0.95, 0.95).ok
    assert not Verdict("a", "ratio", math.nan, 0.95).ok
    assert not Verdict("a", "ratio", math.nan, 0.95, at_most=True).ok


def test_latency_counts_from_when_a_request_was_due() -> None:
    """Not from when it was sent; refusals are no answers, neither fast nor good."""
    late = Outcome("x", due_s=1.0, sent_s=3.0, ended_s=3.5, status=200, in_order=True)
    refused = Outcome("x", due_s=1.0, sent_s=1.0, ended_s=1.001, status=503, in_order=True)
    assert latencies_ms([late, refused]) == [2500.0]
    assert goodput([late, refused], pairs=8, start_s=1.0, stop_s=5.0) == 2.0
    assert goodput([late], pairs=8, start_s=1.0, stop_s=3.5) == 0.0


def test_a_window_gets_its_part_of_a_batch() -> None:
    """By the time that the batch spent in it; light pairs are nobody's heavy ones."""
    batches = [Batch(0.0, 2.0, pairs=11, light=1), Batch(3.0, 4.0, pairs=6, light=0)]
    assert heavy_rate(batches, 1.0, 3.5) == pytest.approx((5 + 3) / 2.5)
    assert busy(batches, 1.0, 3.5) == pytest.approx((1.0 + 0.5) / 2.5)


@pytest.mark.parametrize("form", FORMS)
def test_the_service_reads_each_form(form: str) -> None:
    """As the same prompts and images, exactly where the form is lossless."""
    images = [scene(32, seed) for seed in (1, 2)]
    sent = body(form, ["one", "two"], images)
    pairs = RequestParser(load_config())(sent.content, sent.content_type).pairs
    assert [pair.prompt for pair in pairs] == ["one", "two"]
    for pair, image in zip(pairs, images, strict=True):
        assert pair.image.shape == image.shape
        assert (pair.image == image).all() == ("JPEG" not in form)


def test_a_short_run_measures_a_service(tmp_path: Path) -> None:
    """Part b through the command line: a row for each form, written as it is printed, no paths."""
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


def test_an_unknown_part_is_refused() -> None:
    """Before anything is started."""
    command = [sys.executable, "-m", "benchmarks.service", "--parts", "e"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 2
    assert "choose from a,b,c,d" in finished.stderr
