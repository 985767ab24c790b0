"""The README's lines that load a LoRA into plain diffusers, run as they stand but for their paths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.conftest import FakeScorer
from trainer.config import LORA_FILE, TrainerConfig, load_trainer_config
from trainer.rl.train import train_fold
from trainer.runs.setup import load_sampler
from trainer.runtime.rng import ImageKey

REPOSITORY = Path(__file__).parents[3]
PROMPT = "a large striped red ring on blue"
OTHER = "a small blue cross on white"


@dataclass(frozen=True)
class OneStream(ImageKey):
    """An image all of whose stages draw from one generator, one after the other, as the pipeline's do."""

    generators: tuple[torch.Generator, ...] = ()

    def stream(self, stage: object, share: object = "image") -> torch.Generator:
        """Path at which the stage before has left it."""
        return self.generators[self.image]


@pytest.fixture(scope="module")
def config() -> TrainerConfig:
    """The miniature's, shortened to one small iteration with the steps a pipeline takes by itself."""
    changes = [
        "iterations=1",
        "threads=1",
        "rollout.prompts_per_iteration=2",
        "rollout.images_per_prompt=2",
        "sampling.decoder_steps=4",
        "update.learning_rate=0.003",
        "lora.ema_decay=0",
        "objective.weights={red: 1.0}",
    ]
    return load_trainer_config(REPOSITORY / "configs" / "miniature.yaml", changes)


@pytest.fixture(scope="module")
def lora(config: TrainerConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA of a run."""
    folder = tmp_path_factory.mktemp("run") / "lora"
    folder.mkdir()
    sampler = load_sampler(config)
    sampler.policy.add_lora(config.lora, seed=0)
    train_fold(sampler, FakeScorer(), [PROMPT, OTHER], config)
    sampler.policy.save_lora(folder)
    assert (folder / LORA_FILE).exists()
    return folder


def readme_lines(lora: Path, image: Path) -> str:
    """The README's block, its three paths turned to where things are here."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (lines,) = [
        block for block in text.split("```python\n")[1:] if "load_lora_adapter" in block.split("```")[0]
    ]
    lines = lines.split("```")[0]
    places = {
        "miniature/models/karlo": REPOSITORY / "miniature" / "models" / "karlo",
        "runs/miniature/lora": lora,
        "ring.png": image,
    }
    for written, here in places.items():
        assert lines.count(written) == 1
        lines = lines.replace(written, str(here))
    return lines


def piped(pipeline: Any, config: TrainerConfig, prompts: Sequence[str]) -> np.ndarray:
    """Images (N, H, W, 3) of the pipeline, with the configuration's settings and one generator each."""
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        list(prompts),
        prior_num_inference_steps=config.sampling.prior_steps,
        decoder_num_inference_steps=config.sampling.decoder_steps,
        super_res_num_inference_steps=config.sampling.super_res_steps,
        prior_guidance_scale=config.sampling.prior_guidance,
        decoder_guidance_scale=config.sampling.decoder_guidance,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        output_type="np",
    ).images
    return np.asarray(np.round(drawn * 255), dtype=int)


def ours(config: TrainerConfig, lora: Path | None, prompts: Sequence[str]) -> np.ndarray:
    """The same images, drawn as `reward-trainer generate` draws.

    The sampler is new each time: one that remembers the prior's embeddings takes no random numbers for them.
    """
    sampler = load_sampler(config)
    if lora is not None:
        sampler.policy.load_lora(lora)
    generators = tuple(torch.Generator().manual_seed(i) for i in range(len(prompts)))
    keys = [OneStream(0, 0, -1, prompt, i, generators) for i, prompt in enumerate(prompts)]
    return sampler.sample(keys).images.astype(int)


def test_the_readme_loads_a_lora_into_plain_diffusers(
    config: TrainerConfig, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are those of `generate` with the same generators, and not those of the base."""
    monkeypatch.setattr(
        diffusers.pipelines, "unclip", None, raising=False
    )  # as before, after the lines set it
    names: dict[str, Any] = {}
    exec(readme_lines(lora, tmp_path / "ring.png"), names)  # noqa: S102
    with Image.open(tmp_path / "ring.png") as image:
        assert image.size == (32, 32)

    prompts = [PROMPT, OTHER]
    base, tuned = ours(config, None, prompts), ours(config, lora, prompts)
    loaded = piped(names["pipeline"], config, prompts)
    assert np.abs(tuned - base).max() > 8
    assert np.abs(loaded - tuned).max() <= 1
    assert (loaded != tuned).mean() < 0.01
