"""Output of `reward-service evaluators` and `reward-service download`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reward_service.cli.main import main
from reward_service.cli.models import list_evaluators
from reward_service.config import load_config
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from tests.support.service.checkpoints import Checkpoints

OFF = "evaluators.second={kind: hpsv2, tower: other, enabled: false}"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the stdout of a command that must succeed without writing to stderr."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    assert (exited.value.code or 0, streams.err) == (0, "")
    return streams.out


def entries(capsys: pytest.CaptureFixture[str], config: Path, *settings: str) -> dict[str, Any]:
    options = [part for setting in settings for part in ("--set", setting)]
    listed = json.loads(run(capsys, "evaluators", "--json", "--config", config, *options))["evaluators"]
    return {entry["name"]: entry for entry in listed}


@pytest.fixture
def other_tower(checkpoints: Checkpoints) -> str:
    """Settings of a second HPS tower whose weights are missing."""
    origin = f"origin: {{folder: {checkpoints.hps}}}"
    return f"towers.other={{layout: open_clip, {origin}, weights: {{file: no.pt}}, vocabulary: bpe.txt.gz}}"


def test_evaluators_lists_what_the_engine_uses(
    checkpoints: Checkpoints, engine: RewardEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fingerprints equal the engine's, hashes the files', and the preprocessing is listed."""
    listed = entries(capsys, checkpoints.config)
    assert {name: entry["fingerprint"] for name, entry in listed.items()} == {
        name: evaluator.fingerprint for name, evaluator in engine.evaluators.items()
    }
    aesthetic, hpsv2 = listed["aesthetic"], listed["hpsv2"]
    assert aesthetic["head_sha256"] == hashlib.sha256(checkpoints.head.read_bytes()).hexdigest()
    assert hpsv2["weights_sha256"] == hashlib.sha256((checkpoints.hps / "HPS.pt").read_bytes()).hexdigest()
    assert hpsv2["preprocessing"] == {"method": "letterbox", "size_px": 32, "antialias": True}
    assert aesthetic["preprocessing"]["method"] == "crop"
    assert "cleaning openai, 24 tokens" in aesthetic["tokenizer"]
    assert (aesthetic["dtype"], aesthetic["provisional"]) == ("float32", True)


def test_fingerprints_cover_what_determines_a_score(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """dtype, text cleaning and vocabulary change it; location of the files and other files do not."""
    first = entries(capsys, checkpoints.config)
    shutil.copytree(checkpoints.folder, tmp_path / "moved")
    (tmp_path / "moved" / "clip" / "special_tokens_map.json").write_text("{}")
    config = tmp_path / "moved" / "config.yaml"

    def changed(*settings: str) -> set[str]:
        found = entries(capsys, config, *settings)
        return {name for name in found if found[name]["fingerprint"] != first[name]["fingerprint"]}

    assert changed() == set()
    assert changed("dtype=bfloat16") == set(first)
    assert changed("towers.pickscore.text_cleaning=openai") == {"pickscore"}
    merges = tmp_path / "moved" / "clip" / "merges.txt"
    merges.write_text("\n".join(merges.read_text().splitlines()[:-1]))
    assert changed() == {"aesthetic", "clip"}


def test_a_disabled_evaluator_needs_no_files(
    checkpoints: Checkpoints, other_tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is listed with its problem, but neither loaded nor required."""
    listed = entries(capsys, checkpoints.config, other_tower, OFF)
    assert (listed["second"]["enabled"], listed["second"]["fingerprint"]) == (False, None)
    assert "no.pt: no such file" in listed["second"]["problem"]
    config = load_config(checkpoints.config, [other_tower, OFF])
    assert set(build_engine(config).evaluators) == {"aesthetic", "clip", "pickscore", "hpsv2"}


def test_a_disabled_evaluator_can_be_enabled(checkpoints: Checkpoints, other_tower: str) -> None:
    """One override enables it when its files are available."""
    settings = [other_tower, OFF, "towers.other.weights.file=HPS.pt", "evaluators.second.enabled=true"]
    settings.append(f"calibration={checkpoints.folder / 'two.json'}")
    table = json.loads((checkpoints.folder / "calibration.json").read_text())
    table["evaluators"]["second"] = table["evaluators"]["hpsv2"]
    (checkpoints.folder / "two.json").write_text(json.dumps(table))
    config = load_config(checkpoints.config, settings)
    prints = {entry.name: entry.fingerprint for entry in list_evaluators(config, lambda _: None)}
    assert prints["second"] == prints["hpsv2"]
    assert "second" in build_engine(config).evaluators


def test_the_text_output_matches_the_json_output(
    checkpoints: Checkpoints, other_tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has fingerprint, weights with hash and preprocessing; disabled evaluators are marked."""
    listed = entries(capsys, checkpoints.config)
    shown = run(capsys, "evaluators", "--config", checkpoints.config, "--set", other_tower, "--set", OFF)
    for entry in listed.values():
        assert f"  fingerprint    {entry['fingerprint']}\n" in shown
        assert f"{entry['weights']} ({entry['weights_sha256'][:12]})" in shown
    assert "letterbox 32 px, antialias yes" in shown
    assert "second (off)\n" in shown


def test_download_prints_every_file_and_the_total(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each line has hash, size and name; a shared file appears once."""
    *lines, total = run(capsys, "download", "--config", checkpoints.config).splitlines()
    sizes = [int(line.split()[1].replace(",", "")) for line in lines]
    assert len(lines) == len({line.split()[2] for line in lines}) == 12
    assert total == f"12 files, {sum(sizes):,} bytes in all; ready to serve aesthetic, clip, hpsv2, pickscore"
