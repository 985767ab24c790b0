"""Sampling at a configuration's full size with random weights: images/s and share of the peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.common.timing import matrix_peak, timed
from trainer.config import TrainerConfig
from trainer.plan.meta import Blueprint, draft
from trainer.plan.plan import make_plan
from trainer.rl.karlo import Condition


def measure_full(
    config: TrainerConfig, device: str, batches: Sequence[int], repeats: int, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure prior, decoder and super-resolution for each batch size; nothing is shared between images.

    Args:
        config: configuration of the published size
        device: torch device
        batches: batch sizes, in images
        repeats: runs of each stage; the median counts
        log: function that reports progress

    Returns:
        rows of the report, one for each batch size
    """
    log("building random networks")
    config = config.model_copy(update={"device": device})
    plan = make_plan(config, len(config.objective.weights))
    per_image = plan.flops["prior"] / plan.counts["image embeddings"]
    per_image += (plan.flops["decoder"] + plan.flops["super-resolution"]) / plan.counts["pictures"]
    blueprint = draft(config, device)
    torch_device, dtype = torch.device(device), blueprint.decoder.dtype
    peak = matrix_peak(torch_device, dtype)
    rows = []
    for batch in batches:
        log(f"batch of {batch}")
        stages = _stages(blueprint, config, batch)
        for run in stages.values():
            run()
        times = {
            name: median(timed(run, torch_device) for _ in range(repeats)) for name, run in stages.items()
        }
        rate = batch / sum(times.values())
        rows.append(
            {
                "batch": batch,
                **{f"{name}, s": round(seconds, 4) for name, seconds in times.items()},
                "images/s": round(rate, 3),
                "TFLOP an image": round(per_image / 1e12, 3),
                "share of peak": f"{rate * per_image / peak:.1%}",
                "measured peak, TFLOP/s": round(peak / 1e12, 2),
            }
        )
    return rows


def _stages(blueprint: Blueprint, config: TrainerConfig, batch: int) -> dict[str, Callable[[], object]]:
    sampling = config.sampling
    condition = _condition(blueprint, batch, guided=sampling.decoder_guidance > 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    prior = partial(_prior, blueprint, batch * (2 if sampling.prior_guidance > 1 else 1))
    enlarge = partial(_enlarge, blueprint, batch)
    return {
        "prior": lambda: [prior() for _ in range(sampling.prior_steps)],
        "decoder": lambda: blueprint.policy.sample(condition, generators),
        "super-resolution": lambda: [enlarge() for _ in range(sampling.super_res_steps)],
    }


def _condition(blueprint: Blueprint, batch: int, *, guided: bool) -> Condition:
    projection, options = blueprint.text_proj, {"device": blueprint.decoder.device}
    tokens = blueprint.tokens + projection.clip_extra_context_tokens
    width, time = projection.config.cross_attention_dim, projection.config.time_embed_dim
    branches = []
    for rows in (batch, batch if guided else 0):
        branches += [
            torch.randn(rows, tokens, width, dtype=projection.dtype, **options),
            torch.randn(rows, time, dtype=projection.dtype, **options),
            torch.ones(rows, tokens, dtype=torch.bool, **options),
        ]
    return Condition(*branches)


@torch.no_grad()
def _prior(blueprint: Blueprint, rows: int) -> None:
    network = blueprint.prior
    width, options = network.config.embedding_dim, {"device": network.device, "dtype": network.dtype}
    network(
        torch.randn(rows, width, **options),
        timestep=torch.zeros(1, dtype=torch.long, device=network.device),
        proj_embedding=torch.randn(rows, width, **options),
        encoder_hidden_states=torch.randn(rows, blueprint.tokens, width, **options),
        attention_mask=torch.ones(rows, blueprint.tokens, dtype=torch.bool, device=network.device),
    )


@torch.no_grad()
def _enlarge(blueprint: Blueprint, batch: int) -> None:
    network = blueprint.super_res_first
    size, channels = network.config.sample_size, network.config.in_channels
    inputs = torch.randn(batch, channels, size, size, device=network.device, dtype=network.dtype)
    network(inputs, timestep=torch.zeros(1, dtype=torch.long, device=network.device))
