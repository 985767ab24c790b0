"""Offline scoring with `reward-service score`."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reward_service.cli.score import OfflineReport, OfflineRequest, print_scores, score_files
from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.images import Pixels
from reward_service.observability.tracing import RequestTrace
from reward_service.protocol import (
    MSGPACK,
    EvaluatorIdentity,
    EvaluatorScore,
    Item,
    ItemResult,
    Picture,
    ScoreRequest,
    ScoreResponse,
    encode,
)
from reward_service.scoring.auth import Client
from reward_service.scoring.service import ScoringService
from reward_service.settings import ConfigError
from tests.support.service.checkpoints import Checkpoints

PROMPTS = ("a red square", "and " * 60, "ünïcode fish")


@pytest.fixture(scope="module")
def files(images: list[Pixels], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three images, the last of them lossily compressed."""
    folder = tmp_path_factory.mktemp("images")
    paths = tuple(folder / name for name in ("a.png", "b.png", "c.jpeg"))
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture(scope="module")
def weighted(config: ServiceConfig) -> ServiceConfig:
    """Configuration with unequal weights, one of them 0, and batches smaller than the request."""
    weights = {"aesthetic": 0.0, "clip": 1.0, "pickscore": 2.0, "hpsv2": 0.5}
    evaluators = {
        name: evaluator.model_copy(update={"weight": weights[name]})
        for name, evaluator in config.evaluators.items()
    }
    return config.model_copy(update={"evaluators": evaluators, "batch_pairs": 2})


def score_in_service(config: ServiceConfig, engine: RewardEngine, request: OfflineRequest) -> ScoreResponse:
    items = [
        Item(prompt, Picture(path.read_bytes()))
        for prompt, path in zip(request.prompts, request.paths, strict=True)
    ]
    body = ScoreRequest(
        items,
        list(request.evaluators) if request.evaluators else None,
        normalization=request.normalization,
        deterministic=request.deterministic,
    )
    service = ScoringService(config, build=lambda _: engine)
    service.start()
    deadline = time.monotonic() + 20
    while service.health.status == "loading" and time.monotonic() < deadline:
        time.sleep(0.01)
    sent = encode(body, MSGPACK)
    with service.admit(Client(), len(sent)) as ticket:
        response = asyncio.run(service.score(ticket, sent, MSGPACK, RequestTrace(id="id")))
    service.close()
    return response


@pytest.mark.parametrize("normalization", ["unit", "z", "raw"])
@pytest.mark.parametrize("evaluators", [None, ("hpsv2", "clip")])
def test_scores_equal_those_of_the_service(
    weighted: ServiceConfig,
    engine: RewardEngine,
    files: tuple[Path, ...],
    normalization: Any,
    evaluators: tuple[str, ...] | None,
) -> None:
    """Numbers, flags and identities are equal to the last bit."""
    request = OfflineRequest(files, PROMPTS, evaluators, normalization, deterministic=True)
    found = score_files(weighted, request, lambda _: None).response
    expected = score_in_service(weighted, engine, request)
    assert found.results == expected.results
    assert found.evaluators == expected.evaluators
    assert [result.truncated_prompt for result in found.results] == [False, True, False]
    assert [result.lossy_input for result in found.results] == [False, False, True]


def test_one_prompt_is_used_for_all_images(config: ServiceConfig, files: tuple[Path, ...]) -> None:
    """A single prompt gives the same scores as repeating it for each image."""
    one = score_files(config, OfflineRequest(files, ("x",), deterministic=True), lambda _: None)
    each = score_files(config, OfflineRequest(files, ("x", "x", "x"), deterministic=True), lambda _: None)
    assert one.response.results == each.response.results


def test_an_invalid_image_is_reported_by_its_path(weighted: ServiceConfig, files: tuple[Path, ...]) -> None:
    """The error names the path, in whatever batch the image is."""
    bad = files[0].with_name("bad.png")
    bad.write_bytes(files[0].read_bytes()[:60])
    for paths in ((bad, *files), (*files, bad)):
        with pytest.raises(ConfigError, match=r"bad\.png: the png image is truncated"):
            score_files(weighted, OfflineRequest(paths, ("x",)), lambda _: None)


def report(path: Path, provisional: tuple[str, ...] = ("clip",)) -> OfflineReport:
    scores = {"clip": EvaluatorScore(0.25, -0.25, 0.4)}
    result = ItemResult(0, 0.4, scores, truncated_prompt=True, lossy_input=False)
    response = ScoreResponse("id", [result], {"clip": EvaluatorIdentity("f", "c")}, {})
    return OfflineReport(OfflineRequest((path,), ('a "cat", red',)), response, provisional, "Round figures.")


def test_print_scores_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """The table has all scores and the reward; provisional scales and truncated prompts are reported."""
    print_scores(report(Path("folder/image.png")), "table")
    shown = capsys.readouterr()
    assert all(word in shown.out for word in ("image.png", "clip", "0.2500", "-0.25", "0.400", "reward"))
    assert "provisional scales: clip (Round figures)" in shown.out
    assert "cut off" in shown.err
    print_scores(report(Path("image.png"), ()), "table")
    assert "provisional" not in capsys.readouterr().out


def test_brackets_in_a_file_name_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """A file name in brackets is printed unchanged."""
    print_scores(report(Path("[bold]a.png")), "table")
    assert "[bold]a.png" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_file_name_can_be_printed(checkpoints: Checkpoints, tmp_path: Path, encoding: str) -> None:
    """A name that is not UTF-8 is printed too, in every locale."""
    path = os.fsencode(tmp_path) + "/ü".encode() + b"\xff.png"
    Image.new("RGB", (8, 8)).save(data := BytesIO(), "PNG")
    Path(os.fsdecode(path)).write_bytes(data.getvalue())
    command: list[Any] = [sys.executable, "-m", "reward_service", "score", path, "--prompt", "x", "--csv"]
    command += ["--evaluators", "clip", "--config", checkpoints.config]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    name = path if encoding == "utf-8" else os.fsencode(tmp_path) + rb"/\xfc\udcff.png"
    assert done.stdout.splitlines()[1].startswith(name + b",x,")


def test_print_scores_as_csv(capsys: pytest.CaptureFixture[str]) -> None:
    """A CSV reader restores each image's row, including fingerprint and calibration."""
    print_scores(report(Path("a, b.png")), "csv")
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert row == {
        "path": "a, b.png",
        "prompt": 'a "cat", red',
        "reward": "0.4",
        "clip_raw": "0.25",
        "clip_z": "-0.25",
        "clip_unit": "0.4",
        "truncated_prompt": "true",
        "lossy_input": "false",
        "clip_fingerprint": "f",
        "clip_calibration": "c",
        "clip_provisional": "true",
    }


def test_print_scores_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON output is the service's response."""
    print_scores(report(Path("a.png")), "json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["results"][0]["scores"]["clip"] == {"raw": 0.25, "z": -0.25, "unit": 0.4}
    assert shown["evaluators"]["clip"] == {"fingerprint": "f", "calibration": "c"}
