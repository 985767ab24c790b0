"""Policy on the committed models, against diffusers' own pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UnCLIPPipeline

from trainer.config import LoraSettings, load_trainer_config
from trainer.data.prompts import read_prompts
from trainer.rl.diffusion import log_ratio
from trainer.rl.karlo import decoder_condition, encode_text, load_karlo, sample_prior, super_resolve
from trainer.rl.policy import DecoderPolicy

CONFIG = Path(__file__).parents[2] / "configs" / "miniature.yaml"
PRIOR_STEPS, DECODER_STEPS, SUPER_RES_STEPS = 4, 12, 2


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("guidance", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("count", [1, 5])
def test_base_policy_generates_the_images_of_the_pipeline_and_replays_with_ratio_one(
    count: int, guidance: float
) -> None:
    """Without the adapter, equal generators give equal images; with it, replay repeats the density."""
    config = load_trainer_config(CONFIG)
    prompts = list(read_prompts(config.prompts.validation, count))
    karlo = load_karlo(config.karlo)
    pipeline = UnCLIPPipeline(**karlo.components())
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompts,
        prior_num_inference_steps=PRIOR_STEPS,
        decoder_num_inference_steps=DECODER_STEPS,
        super_res_num_inference_steps=SUPER_RES_STEPS,
        prior_guidance_scale=guidance,
        decoder_guidance_scale=guidance,
        generator=generators(count),
        output_type="np",
    ).images

    policy = DecoderPolicy(karlo.decoder, karlo.decoder_scheduler, steps=DECODER_STEPS, guidance=guidance)
    policy.add_lora(LoraSettings(targets=("to_q", "add_k_proj", "conv1")), seed=0)
    for i, weight in enumerate(policy.lora.values()):
        torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(i))
    streams = generators(count)
    text, empty = encode_text(karlo, prompts), encode_text(karlo, [""] * count)
    embeddings = sample_prior(karlo, text, empty, streams, PRIOR_STEPS, guidance)
    condition = decoder_condition(karlo, text, empty, embeddings, guidance > 1)
    with policy.base():
        small = policy.sample(condition, streams).latents[:, -1].clamp(-1, 1)
    found = super_resolve(karlo, small, streams, SUPER_RES_STEPS) * 0.5 + 0.5
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5

    tuned = policy.sample(condition, generators(count))
    for i in range(DECODER_STEPS - 1):
        move = policy.replay(tuned.latents[:, i], torch.full((count,), i), condition)
        x_p, mean, sigma = tuned.latents[:, i + 1], tuned.means[:, i], tuned.sigmas[:, i]
        ratio = log_ratio(x_p, move.mean, sigma, mean, sigma).exp()
        assert (ratio - 1).abs().max() < 1e-5
