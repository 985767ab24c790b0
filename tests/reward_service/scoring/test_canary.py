"""Canary: golden scores, detection of wrong scores, and the periodic check."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reward_service.cli import models
from reward_service.config import ServiceConfig, load_config
from reward_service.engine import preprocessing as preprocess
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair, PairScores
from reward_service.images import Pixels
from reward_service.scoring.breaker import CanaryLoop, EvaluatorBreakers
from reward_service.scoring.canary import GoldenScores, canary_pair, load_golden, pair_hash
from reward_service.settings import ConfigError

WAIT_S = 60.0


def ignore(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def miniature() -> ServiceConfig:
    return load_config(overrides=["threads=1"])


@pytest.fixture(scope="module")
def golden(miniature: ServiceConfig) -> GoldenScores:
    assert miniature.canary is not None
    return load_golden(miniature.canary)


@pytest.fixture
def engine(miniature: ServiceConfig) -> RewardEngine:
    """Miniature engine of one test, which may modify it."""
    return build_engine(miniature)


def parameters(engine: RewardEngine, name: str) -> dict[str, Tensor]:
    return dict(engine.evaluators[name].tower.model.named_parameters())


def test_canary_pair_is_the_same_on_every_machine() -> None:
    """Its hash is the one that the committed golden scores contain."""
    assert pair_hash(canary_pair()) == "1e4d36d13004f91d"
    assert canary_pair().image.shape == (420, 512, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_miniature_reproduces_its_golden_scores(
    miniature: ServiceConfig, golden: GoldenScores, dtype: str
) -> None:
    """They agree on any machine within the tolerance, and every evaluator has one."""
    breakers = EvaluatorBreakers(build_engine(miniature.model_copy(update={"dtype": dtype})), golden)
    assert breakers.self_test() == []
    assert breakers.without_golden_score() == []


@pytest.mark.parametrize(
    ("evaluator", "parameter", "factor", "expected"),
    [
        ("clip", "visual.transformer.resblocks.0.mlp.c_fc.weight", 1.05, {"aesthetic", "clip"}),
        ("pickscore", "text_projection", 0.0, {"pickscore"}),
        ("hpsv2", "visual.conv1.weight", 1.05, {"hpsv2"}),
    ],
)
def test_wrong_weight_is_detected(
    engine: RewardEngine,
    golden: GoldenScores,
    evaluator: str,
    parameter: str,
    factor: float,
    expected: set[str],
) -> None:
    """A tensor scaled by 5 %, or with one row set to 0, changes the score; the line names the evaluator."""
    with torch.no_grad():
        tensor = parameters(engine, evaluator)[parameter]
        (tensor if factor else tensor[0]).mul_(factor)
    lines = EvaluatorBreakers(engine, golden).self_test()
    assert {line.split()[1] for line in lines} == expected
    assert all("expected its golden score" in line and "within" in line for line in lines)


def test_resizing_without_antialias_is_detected(
    engine: RewardEngine, golden: GoldenScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This common mistake of reimplementations is detected for both preprocessing methods."""
    interpolate = F.interpolate

    def coarse(self: preprocess.Preprocessing, image: Pixels) -> Tensor:
        unit = torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(255)
        height, width = self._resized(image)
        size = self.size_px
        small = interpolate(unit[None], [height, width], mode="bicubic", align_corners=False)[0]
        top, left = self._offset(height - size), self._offset(width - size)
        return small[:, top : top + size, left : left + size].clamp(0, 1)

    monkeypatch.setattr(preprocess.Preprocessing, "_crop", coarse)
    monkeypatch.setattr(
        preprocess.F,
        "interpolate",
        lambda *args, **options: interpolate(*args, **options | {"antialias": False}),
    )
    lines = EvaluatorBreakers(engine, golden).self_test()
    assert {line.split()[1] for line in lines} == {"aesthetic", "clip", "pickscore", "hpsv2"}


def test_first_score_is_expected_without_a_golden_score(engine: RewardEngine) -> None:
    """A score that changes after the start is detected, also if the text tower has changed."""
    breakers = EvaluatorBreakers(engine)
    assert breakers.self_test() == []
    assert breakers.without_golden_score() == list(engine.evaluators)
    lane = (tuple(engine.evaluators), True)
    assert breakers.mismatches(breakers([breakers.canary], lane)[0].raw) == []
    with torch.no_grad():
        parameters(engine, "pickscore")["transformer.resblocks.0.mlp.c_fc.weight"].mul_(1.5)
    (line,) = breakers.mismatches(breakers([breakers.canary], lane)[0].raw)
    assert line.startswith("evaluator pickscore")
    assert "its score at the start" in line


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 2.0])
def test_non_finite_score_is_a_mismatch(engine: RewardEngine, wrong: float) -> None:
    """NaN and infinity are never within the tolerance, and neither is a wrong number."""
    breakers = EvaluatorBreakers(engine)
    breakers.self_test()
    (line,) = breakers.mismatches({"clip": wrong})
    assert "evaluator clip" in line


def test_canary_command_writes_a_file_that_the_service_reads(
    config: ServiceConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of other devices and fingerprints stay in the file, and changed scores are reported."""
    path = tmp_path / "canary.json"
    models.write_golden_scores(config.model_copy(update={"dtype": "bfloat16"}), path, ignore)
    models.write_golden_scores(config, path, ignore)
    assert [len(prints) for prints in load_golden(path).scores.values()] == [8]
    checked = config.model_copy(update={"canary": path})
    lines: list[str] = []
    assert models.compare_canary(checked, ignore, lines.append) is None
    assert len(lines) == 4
    assert all(" golden " in line for line in lines)
    changed = json.loads(path.read_text())
    for entry in changed["scores"]["cpu"].values():
        entry["raw"] += 1.0 if entry["evaluator"] == "clip" else 0.0
    path.write_text(json.dumps(changed))
    failure = models.compare_canary(checked, ignore, ignore)
    assert failure is not None
    assert failure.startswith("evaluator clip")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read"),
        ("{", "Invalid JSON"),
        ('{"pair": "x", "scores": {}}', "another canary pair"),
        ('{"pair": "x", "scores": {"cpu": {"f": {"evaluator": "clip", "raw": NaN}}}}', "finite"),
    ],
)
def test_unusable_file_is_reported_in_one_line(tmp_path: Path, text: str | None, expected: str) -> None:
    """The error names the remedy; a service with golden scores never starts unchecked."""
    path = tmp_path / "canary.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_golden(path)
    assert expected in str(error.value)
    assert "reward-service canary --write" in str(error.value)


def run_canary_loop(
    breakers: EvaluatorBreakers, score: Callable[[Pair], PairScores], mismatches: list[str]
) -> None:
    """Run the loop for three rounds, or until a mismatch."""
    finished, rounds = threading.Event(), iter(range(10**6))

    def submit(pair: Pair) -> Future[PairScores]:
        future: Future[PairScores] = Future()
        try:
            future.set_result(score(pair))
        except Exception as error:  # noqa: BLE001 - whatever a queue raises
            future.set_exception(error)
        if next(rounds) == 2:
            finished.set()
        return future

    loop = CanaryLoop(breakers, submit, 0.01, lambda line: (mismatches.append(line), finished.set()))
    assert finished.wait(WAIT_S)
    loop.stop()


def test_canary_loop_reports_a_changed_score_only(engine: RewardEngine) -> None:
    """A full queue or an evaluator out of service is no mismatch; a changed score is reported once."""
    breakers = EvaluatorBreakers(engine)
    breakers.self_test()
    raw = engine.score([breakers.canary], deterministic=True)[0].raw
    mismatches: list[str] = []

    def full(_: Pair) -> PairScores:
        raise RuntimeError("the queue is full")

    run_canary_loop(breakers, full, mismatches)
    run_canary_loop(breakers, lambda _: PairScores(raw, truncated_prompt=False), mismatches)
    run_canary_loop(
        breakers, lambda _: PairScores({}, truncated_prompt=False, failed={"clip": "down"}), mismatches
    )
    assert mismatches == []
    changed: dict[str, Any] = raw | {"clip": raw["clip"] + 0.1}
    run_canary_loop(breakers, lambda _: PairScores(changed, truncated_prompt=False), mismatches)
    assert len(mismatches) == 1
    assert mismatches[0].startswith("evaluator clip")
