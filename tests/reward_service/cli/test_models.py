"""What is configured, as `reward-service evaluators` and `reward-service download` say it."""

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


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What an orderly command writes to stdout; nothing goes to stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    assert (ended.value.code or 0, streams.err) == (0, "")
    return streams.out


def entries(capsys: pytest.CaptureFixture[str], config: Path, *settings: str) -> dict[str, Any]:
    options = [part for setting in settings for part in ("--set", setting)]
    listed = json.loads(said(capsys, "evaluators", "--json", "--config", config, *options))["evaluators"]
    return {entry["name"]: entry for entry in listed}


@pytest.fixture
def other_tower(checkpoints: Checkpoints) -> str:
    """A second HPS tower, whose weights are not there."""
    origin = f"origin: {{folder: {checkpoints.hps}}}"
    return f"towers.other={{layout: open_clip, {origin}, weights: {{file: no.pt}}, vocabulary: bpe.txt.gz}}"


def test_what_is_listed_is_what_serves(
    checkpoints: Checkpoints, engine: RewardEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fingerprints are the running engine's, hashes the files', and each way of preparing is told."""
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


def test_what_decides_a_score_is_in_its_fingerprint(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """dtype, cleaning and vocabulary change it; where the files lie and what lies beside them do not."""
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


def test_an_evaluator_that_is_off_costs_nothing(
    checkpoints: Checkpoints, other_tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is listed, but neither loaded, nor served, nor missed."""
    listed = entries(capsys, checkpoints.config, other_tower, OFF)
    assert (listed["second"]["enabled"], listed["second"]["fingerprint"]) == (False, None)
    assert "no.pt: no such file" in listed["second"]["problem"]
    config = load_config(checkpoints.config, [other_tower, OFF])
    assert set(build_engine(config).evaluators) == {"aesthetic", "clip", "pickscore", "hpsv2"}


def test_switching_it_on_serves_it(checkpoints: Checkpoints, other_tower: str) -> None:
    """One override, once its files are there."""
    settings = [other_tower, OFF, "towers.other.weights.file=HPS.pt", "evaluators.second.enabled=true"]
    settings.append(f"calibration={checkpoints.folder / 'two.json'}")
    table = json.loads((checkpoints.folder / "calibration.json").read_text())
    table["evaluators"]["second"] = table["evaluators"]["hpsv2"]
    (checkpoints.folder / "two.json").write_text(json.dumps(table))
    config = load_config(checkpoints.config, settings)
    prints = {entry.name: entry.fingerprint for entry in list_evaluators(config, lambda _: None)}
    assert prints["second"] == prints["hpsv2"]
    assert "second" in build_engine(config).evaluators


def test_the_list_for_people_holds_the_same(
    checkpoints: Checkpoints, other_tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fingerprint, weights with their hash, antialias; what is off says so."""
    listed = entries(capsys, checkpoints.config)
    shown = said(capsys, "evaluators", "--config", checkpoints.config, "--set", other_tower, "--set", OFF)
    for entry in listed.values():
        assert f"  fingerprint    {entry['fingerprint']}\n" in shown
        assert f"{entry['weights']} ({entry['weights_sha256'][:12]})" in shown
    assert "letterbox 32 px, antialias yes" in shown
    assert "second (off)\n" in shown


def test_download_lists_every_file_and_the_total(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hash, size, name; shared files once."""
    *lines, total = said(capsys, "download", "--config", checkpoints.config).splitlines()
    sizes = [int(line.split()[1].replace(",", "")) for line in lines]
    assert len(lines) == len({line.split()[2] for line in lines}) == 12
    assert total == f"12 files, {sum(sizes):,} bytes in all; ready to serve aesthetic, clip, hpsv2, pickscore"
