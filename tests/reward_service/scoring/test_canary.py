"""The canary pair tells a reward service that computes wrongly from one that doesn't."""

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

from reward_service.cli import models as goldens
from reward_service.config import ServiceConfig, load_config
from reward_service.engine import preprocessing as preprocess
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair, PairScores
from reward_service.images import Pixels
from reward_service.scoring.breaker import CanaryLoop, EvaluatorBreakers
from reward_service.scoring.canary import GoldenScores, canary_pair, identity, load_golden
from reward_service.settings import ConfigError

WAIT_S = 10.0


def quiet(_: str) -> None:
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
    """The miniature, which a test may damage."""
    return build_engine(miniature)


def parameters(engine: RewardEngine, name: str) -> dict[str, Tensor]:
    return dict(engine.evaluators[name].tower._model.named_parameters())


def test_the_pair_is_the_same_everywhere() -> None:
    """Whole numbers only: its hash is the one that the committed golden scores name."""
    assert identity(canary_pair()) == "1e4d36d13004f91d"
    assert canary_pair().image.shape == (420, 512, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_miniature_gets_its_committed_scores(
    miniature: ServiceConfig, golden: GoldenScores, dtype: str
) -> None:
    """On any machine, within the tolerance; every evaluator's score is known, so none goes unchecked."""
    breakers = EvaluatorBreakers(build_engine(miniature.model_copy(update={"dtype": dtype})), golden)
    assert breakers.prove() == []
    assert breakers.unproven() == []


@pytest.mark.parametrize(
    ("evaluator", "parameter", "change", "named"),
    [
        ("clip", "visual.transformer.resblocks.0.mlp.c_fc.weight", 1.05, {"aesthetic", "clip"}),
        ("pickscore", "text_projection", 0.0, {"pickscore"}),
        ("hpsv2", "visual.conv1.weight", 1.05, {"hpsv2"}),
    ],
)
def test_a_wrong_weight_is_noticed(
    engine: RewardEngine, golden: GoldenScores, evaluator: str, parameter: str, change: float, named: set[str]
) -> None:
    """One tensor scaled by a twentieth, or one row of it lost, is another score; the line says whose."""
    with torch.no_grad():
        tensor = parameters(engine, evaluator)[parameter]
        (tensor if change else tensor[0]).mul_(change)
    lines = EvaluatorBreakers(engine, golden).prove()
    assert {line.split()[1] for line in lines} == named
    assert all("expected its golden score" in line and "within" in line for line in lines)


def test_resizing_without_antialias_is_noticed(
    engine: RewardEngine, golden: GoldenScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent mistake of many reimplementations, in both ways of preparing images."""
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
    lines = EvaluatorBreakers(engine, golden).prove()
    assert {line.split()[1] for line in lines} == {"aesthetic", "clip", "pickscore", "hpsv2"}


def test_without_golden_scores_the_first_ones_count(engine: RewardEngine) -> None:
    """What was right at the start and has changed is noticed, in the text tower too."""
    breakers = EvaluatorBreakers(engine)
    assert breakers.prove() == []
    assert breakers.unproven() == list(engine.evaluators)
    lane = (tuple(engine.evaluators), True)
    assert breakers.mismatches(breakers([breakers.canary], lane)[0].raw) == []
    with torch.no_grad():
        parameters(engine, "pickscore")["transformer.resblocks.0.mlp.c_fc.weight"].mul_(1.5)
    (line,) = breakers.mismatches(breakers([breakers.canary], lane)[0].raw)
    assert line.startswith("evaluator pickscore")
    assert "its score at the start" in line


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 2.0])
def test_no_number_is_close_enough(engine: RewardEngine, wrong: float) -> None:
    """A number that is none doesn't pass for its golden score."""
    breakers = EvaluatorBreakers(engine)
    breakers.prove()
    (line,) = breakers.mismatches({"clip": wrong})
    assert "evaluator clip" in line


def test_the_command_writes_what_the_service_reads(
    config: ServiceConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other devices' and fingerprints' scores stay in the file; its own are checked against it."""
    path = tmp_path / "canary.json"
    goldens.write(config.model_copy(update={"dtype": "bfloat16"}), path, quiet)
    goldens.write(config, path, quiet)
    assert [len(prints) for prints in load_golden(path).scores.values()] == [8]
    checked = config.model_copy(update={"canary": path})
    said: list[str] = []
    assert goldens.compare(checked, quiet, said.append) is None
    assert len(said) == 4
    assert all(" golden " in line for line in said)
    changed = json.loads(path.read_text())
    for entry in changed["scores"]["cpu"].values():
        entry["raw"] += 1.0 if entry["evaluator"] == "clip" else 0.0
    path.write_text(json.dumps(changed))
    failure = goldens.compare(checked, quiet, quiet)
    assert failure is not None
    assert failure.startswith("evaluator clip")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "Invalid JSON"),
        ('{"pair": "x", "scores": {}}', "another canary pair"),
        ('{"pair": "x", "scores": {"cpu": {"f": {"evaluator": "clip", "raw": NaN}}}}', "finite"),
    ],
)
def test_an_unusable_file_is_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    """With the remedy; a service that was told to check doesn't start unchecked."""
    path = tmp_path / "canary.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_golden(path)
    assert words in str(caught.value)
    assert "reward-service canary --write" in str(caught.value)


def canary_loop(
    breakers: EvaluatorBreakers, answer: Callable[[Pair], PairScores], found: list[str]
) -> threading.Event:
    """Rounds in quick succession; the event is set at their third."""
    third, count = threading.Event(), iter(range(10**6))

    def submit(pair: Pair) -> Future[PairScores]:
        future: Future[PairScores] = Future()
        try:
            future.set_result(answer(pair))
        except Exception as error:  # noqa: BLE001 - whatever a queue raises
            future.set_exception(error)
        if next(count) == 2:
            third.set()
        return future

    walk = CanaryLoop(breakers, submit, 0.01, lambda line: (found.append(line), third.set()))
    assert third.wait(WAIT_S)
    walk.stop()
    return third


def test_rounds_tell_of_a_change_and_of_nothing_else(engine: RewardEngine) -> None:
    """A full queue or an evaluator out of service is no mismatch; another number is, and is told once."""
    breakers = EvaluatorBreakers(engine)
    breakers.prove()
    raw = engine.score([breakers.canary], deterministic=True)[0].raw
    found: list[str] = []

    def full(_: Pair) -> PairScores:
        raise RuntimeError("the queue is full")

    canary_loop(breakers, full, found)
    canary_loop(breakers, lambda _: PairScores(raw, truncated_prompt=False), found)
    canary_loop(breakers, lambda _: PairScores({}, truncated_prompt=False, failed={"clip": "down"}), found)
    assert found == []
    changed: dict[str, Any] = raw | {"clip": raw["clip"] + 0.1}
    canary_loop(breakers, lambda _: PairScores(changed, truncated_prompt=False), found)
    assert len(found) == 1
    assert found[0].startswith("evaluator clip")
