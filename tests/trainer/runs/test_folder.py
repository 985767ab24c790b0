"""Folder of a run: atomic files, and nothing overwritten."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from trainer.config import ConfigError, TrainerConfig, load_trainer_config
from trainer.runs.folder import RunFolder, model_card
from trainer.runs.grids import before_and_after, grid


def test_create_writes_the_resolved_configuration(trainer_config: TrainerConfig) -> None:
    """Reading config.yaml back gives the same configuration."""
    run = RunFolder.create(trainer_config)
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert TrainerConfig.model_validate(saved["trainer"]) == trainer_config


@pytest.mark.parametrize("name", ["1e3", "0o17", "yes", "2024-01-01", "010"])
def test_a_name_that_looks_like_a_number_stays_a_name(trainer_config: TrainerConfig, name: str) -> None:
    """A run resumes with its own config.yaml."""
    run = RunFolder.create(trainer_config.model_copy(update={"name": name}))
    assert load_trainer_config(run.path / "config.yaml").name == name


def test_create_never_reuses_a_folder(trainer_config: TrainerConfig) -> None:
    """Nothing is overwritten, by default or by name."""
    first, second = RunFolder.create(trainer_config), RunFolder.create(trainer_config)
    assert first.path != second.path
    with pytest.raises(ConfigError, match=r"not empty.*--run"):
        RunFolder.create(trainer_config, first.path)


def test_log_writes_one_finite_json_object_per_line(trainer_config: TrainerConfig) -> None:
    """A NaN is an error when it is written, not when it is read a week later."""
    run = RunFolder.create(trainer_config)
    run.log({"iteration": 0, "composite": 0.5})
    run.log({"iteration": 1, "composite": 0.6})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.log({"iteration": 2, "composite": float("nan")})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1]


@pytest.mark.parametrize("lost", [1, 10, 10_000])
def test_cut_metrics_removes_an_incomplete_line(trainer_config: TrainerConfig, lost: int) -> None:
    """A file that is shorter than its checkpoint says stays one JSON object per line."""
    run = RunFolder.create(trainer_config)
    for iteration in range(3):
        run.log({"iteration": iteration})
    size = run.metrics_bytes()
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: max(0, size - lost)])
    run.cut_metrics(size)
    run.log({"iteration": 3})
    found = [json.loads(line)["iteration"] for line in path.read_text().splitlines()]
    assert found in ([0, 1, 3], [3])


def test_save_lora_replaces_the_whole_folder(trainer_config: TrainerConfig) -> None:
    """The folder holds one save, never a mixture of two; others may read it."""
    run = RunFolder.create(trainer_config)
    for content in ("one", "two"):

        def save(folder: Path, content: str = content) -> None:
            (folder / f"{content}.txt").write_text(content)

        run.save_lora(save, f"card {content}")
    assert sorted(path.name for path in run.lora.iterdir()) == ["README.md", "two.txt"]
    assert (run.lora / "README.md").read_text() == "card two"
    assert run.lora.stat().st_mode & 0o055 == 0o055


def test_model_card_names_evaluators_and_gain(trainer_config: TrainerConfig) -> None:
    """A LoRA that is passed on carries its provenance."""
    card = model_card(trainer_config, 7, {"clip": "abc/def"}, ["The composite rises significantly."])
    assert "trained for 7 iterations" in card
    assert "clip: `abc/def`" in card
    assert "The composite rises significantly." in card
    assert "load_lora_adapter" in card


def test_grids_place_every_image() -> None:
    """A row per prompt; before on the left, after on the right; pixels enlarged, not blurred."""
    before = np.zeros((2, 3, 8, 8, 3), dtype=np.uint8)
    after = np.full((2, 3, 8, 8, 3), 255, dtype=np.uint8)
    after[..., 1:] = 0
    sheet = np.asarray(before_and_after(["a", "b with ☂"], before, after, columns=2))
    black = (sheet == 0).all(axis=2)
    red = (sheet == [255, 0, 0]).all(axis=2)
    assert red.sum() == 2 * 2 * 96 * 96
    assert black[:, : sheet.shape[1] // 2].sum() >= 2 * 2 * 96 * 96
    assert np.flatnonzero(red.any(axis=0)).min() > sheet.shape[1] // 2
    assert isinstance(grid(["a", "b"], before, columns=3), Image.Image)
