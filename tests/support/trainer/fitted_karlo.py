"""Tiny Karlo fitted to images of one colour, and settings with which it learns redness in ten iterations."""

from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers import UnCLIPScheduler
from torch.nn import functional as F

from tests.trainer.conftest import TOKENS, WIDTH, build_karlo
from trainer.config import ModelSource
from trainer.rl.karlo import load_karlo

LEARNABLE = {
    "iterations": 10,
    "lora__targets": ("to_out.0", "conv1", "conv2", "conv_out"),
    "sampling__micro_batch": 48,
    "rollout__prompts_per_iteration": 4,
    "rollout__images_per_prompt": 12,
    "update__learning_rate": 3e-3,
    "update__schedule": "linear",
    "update__train_steps": (1, 4),
    "update__steps_per_image": 4,
    "update__micro_batch": 48,
}


def coloured(count: int, size_px: int, generator: torch.Generator) -> torch.Tensor:
    """Return random images of one colour each."""
    colour = torch.rand(count, 3, 1, 1, generator=generator) * 1.6 - 0.8
    return colour.expand(-1, -1, size_px, size_px)


def build_fitted_karlo(folder: Path) -> None:
    """Write a tiny Karlo, fitted within seconds to 4x4 images of one colour, which it upscales to 8x8.

    A random decoder generates noise that saturates everywhere, which training cannot improve.
    """
    build_karlo(folder, size_px=4)
    UnCLIPScheduler(prediction_type="sample").save_pretrained(folder / "super_res_scheduler")
    karlo = load_karlo(ModelSource(path=folder))
    for network, loss in ((karlo.decoder, _denoising_loss), (karlo.super_res_last, _upscaling_loss)):
        network.requires_grad_(True)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(150):
            optimizer.zero_grad()
            loss(network, generator).backward()
            optimizer.step()
    karlo.decoder.save_pretrained(folder / "decoder")
    karlo.super_res_last.save_pretrained(folder / "super_res_last")


def _denoising_loss(decoder: Any, generator: torch.Generator) -> torch.Tensor:
    x0 = coloured(32, 4, generator)
    timesteps = torch.randint(0, 1000, (32,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    scheduler = UnCLIPScheduler()
    output = decoder(
        sample=scheduler.add_noise(x0, noise, timesteps),
        timestep=timesteps,
        encoder_hidden_states=torch.randn(32, TOKENS + 4, WIDTH, generator=generator),
        class_labels=torch.randn(32, 64, generator=generator),
    ).sample
    return F.mse_loss(output[:, :3], noise) + 0.01 * output[:, 3:].square().mean()


def _upscaling_loss(network: Any, generator: torch.Generator) -> torch.Tensor:
    upscaled = coloured(8, 8, generator)
    noise = torch.randn(upscaled.shape, generator=generator)
    return F.mse_loss(network(sample=torch.cat([noise, upscaled], dim=1), timestep=0).sample, upscaled)
