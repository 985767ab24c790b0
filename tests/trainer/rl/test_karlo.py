"""Karlo's stages compared with diffusers' own pipeline."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UnCLIPPipeline

from tests.trainer.conftest import PROMPTS, SAMPLING, make_policy
from trainer.config import ConfigError, ModelSource
from trainer.rl.karlo import Karlo, decoder_condition, encode_text, load_karlo, sample_prior, super_resolve


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("count", [1, 5])
def test_images_without_adapter_equal_pipeline(karlo: Karlo, count: int, guidance: float, lora: bool) -> None:
    """The trainer's base policy is the published model: same generators, same images, within 1e-5."""
    prompts = [*PROMPTS, "one more"][:count]
    pipeline = UnCLIPPipeline(**karlo.components())
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompts,
        prior_num_inference_steps=SAMPLING.prior_steps,
        decoder_num_inference_steps=SAMPLING.decoder_steps,
        super_res_num_inference_steps=SAMPLING.super_res_steps,
        prior_guidance_scale=guidance,
        decoder_guidance_scale=guidance,
        generator=generators(count),
        output_type="np",
    ).images

    sampling = SAMPLING.model_copy(update={"prior_guidance": guidance, "decoder_guidance": guidance})
    policy = make_policy(karlo, sampling, lora=lora)
    streams = generators(count)
    # The same batch sizes as the pipeline: others round differently, and strong guidance amplifies that.
    text, unconditional = encode_text(karlo, prompts), encode_text(karlo, [""] * count)
    embeddings = sample_prior(karlo, text, unconditional, streams, sampling.prior_steps, guidance)
    condition = decoder_condition(karlo, text, unconditional, embeddings, guidance > 1)
    if lora:
        with policy.base():
            small = policy.sample(condition, streams).latents[:, -1].clamp(-1, 1)
    else:
        small = policy.sample(condition, streams).latents[:, -1].clamp(-1, 1)
    images = super_resolve(karlo, small, streams, sampling.super_res_steps) * 0.5 + 0.5

    difference = np.abs(images.permute(0, 2, 3, 1).numpy() - expected).max()
    assert expected.std() > 0.05  # not a blank image
    assert difference < 1e-5


def test_damaged_component_is_reported_in_one_line(karlo_folder: Path, tmp_path: Path) -> None:
    """The error names the component of a truncated file, whichever library reads it."""
    for name, file in (("decoder", "diffusion_pytorch_model"), ("text_encoder", "model")):
        folder = tmp_path / name
        shutil.copytree(karlo_folder, folder)
        weights = folder / name / f"{file}.safetensors"
        weights.write_bytes(weights.read_bytes()[:500])
        with pytest.raises(ConfigError, match=f"cannot load Karlo's {name}") as caught:
            load_karlo(ModelSource(path=folder))
        assert "\n" not in str(caught.value)


def test_missing_folder_is_reported_in_one_line(tmp_path) -> None:
    """The error names the path and the setting to change."""
    with pytest.raises(ConfigError, match=r"no Karlo model here.*trainer\.karlo") as caught:
        load_karlo(ModelSource(path=tmp_path))
    assert "\n" not in str(caught.value)
