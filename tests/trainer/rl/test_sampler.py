"""Image sampler: one random stream per image and stage, independent of batch and processes."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.schedulers.scheduling_unclip
import numpy as np
import pytest
import torch

import trainer.rl.karlo
import trainer.rl.policy
from tests.trainer.conftest import PROMPTS, SAMPLING, make_policy
from trainer.config import Sharing
from trainer.rl.karlo import Karlo
from trainer.rl.rollout import group_keys
from trainer.rl.sampler import NOTHING_SHARED, ImageSampler, SampledImages
from trainer.runtime.distributed import Processes
from trainer.runtime.rng import Stage

KEYS = group_keys(PROMPTS, 3, seed=0, fold=0, iteration=2)
SHARED = Sharing()
Noise = dict[int, list[torch.Tensor]]


@contextmanager
def record_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Noise]:
    """Record all random numbers of the images' generators, by the generator's seed, in order."""
    recorded: Noise = defaultdict(list)
    original = trainer.rl.karlo.randn_tensor

    def recording_randn(shape: Any, generator: Any = None, **options: Any) -> torch.Tensor:
        noise = original(shape, generator=generator, **options)
        for row, it in zip(noise, generator, strict=True):
            recorded[it.initial_seed()].append(row.clone())
        return noise

    with monkeypatch.context() as patched:
        for module in (trainer.rl.karlo, trainer.rl.policy, diffusers.schedulers.scheduling_unclip):
            patched.setattr(module, "randn_tensor", recording_randn)
        yield recorded


def sample_all(karlo: Karlo, batch: int, sharing: Sharing, world_size: int = 1) -> list[SampledImages]:
    """Sample the images of all keys in batches, as a job of `world_size` processes does."""
    sampled = []
    for rank in range(world_size):
        sampler = ImageSampler(karlo, make_policy(karlo), SAMPLING)
        process = Processes()
        process.rank, process.world_size = rank, world_size
        own = process.share(KEYS)
        sampled += [
            sampler.sample(own[start : start + batch], sharing) for start in range(0, len(own), batch)
        ]
    return sampled


@pytest.mark.parametrize("sharing", [NOTHING_SHARED, SHARED])
@pytest.mark.parametrize(("batch", "world_size"), [(1, 1), (5, 1), (4, 3)])
def test_random_numbers_depend_only_on_the_image(
    karlo: Karlo, sharing: Sharing, batch: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every stage, bit for bit, for any batch size and number of processes."""
    with record_noise(monkeypatch) as whole:
        sample_all(karlo, len(KEYS), sharing)
    with record_noise(monkeypatch) as split:
        sample_all(karlo, batch, sharing, world_size)
    stages: dict[Stage, Any] = {
        "prior": sharing.prior,
        "decoder_start": sharing.decoder_start,
        "decoder": "image",
        "super_resolution": sharing.super_res,
    }
    for stage, share in stages.items():
        for seed in {key.seed_of(stage, share) for key in KEYS}:
            # Images that share a stream restart it, so that its numbers are recorded once per image.
            expected, found = _distinct(whole[seed]), _distinct(split[seed])
            assert found
            assert found == expected


def _distinct(noise: list[torch.Tensor]) -> list[bytes]:
    return list(dict.fromkeys(numbers.numpy().tobytes() for numbers in noise))


@pytest.mark.parametrize(("batch", "world_size"), [(1, 1), (5, 1), (4, 3)])
def test_images_do_not_depend_on_batch_or_processes(karlo: Karlo, batch: int, world_size: int) -> None:
    """Images agree up to float32 rounding: one grey level at most, in less than 0.1% of the values."""
    whole, parts = sample_all(karlo, len(KEYS), SHARED), sample_all(karlo, batch, SHARED, world_size)
    assert len(parts) > len(whole) == 1
    images = np.concatenate([part.images for part in parts]).astype(int)
    difference = np.abs(images - whole[0].images)
    assert whole[0].images.std() > 10  # not blank
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    latents = torch.cat([part.trajectory.latents for part in parts])
    torch.testing.assert_close(latents, whole[0].trajectory.latents, rtol=0, atol=1e-4)


def test_decoder_stage_returns_input_of_super_resolution(sampler: ImageSampler) -> None:
    """Stage "decoder" returns the small image of the same trajectory."""
    small, large = sampler.sample(KEYS, SHARED, "decoder"), sampler.sample(KEYS, SHARED)
    assert torch.equal(small.trajectory.latents, large.trajectory.latents)
    assert small.images.shape == (12, 8, 8, 3)
    assert large.images.shape == (12, 16, 16, 3)
    expected = (small.trajectory.latents[:, -1].clamp(-1, 1) * 127.5 + 127.5).round()
    np.testing.assert_allclose(small.images, expected.permute(0, 2, 3, 1).numpy(), atol=1)


def test_reward_stage_decoder_skips_super_resolution(
    sampler: ImageSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With reward_stage=decoder small images are scored; evaluation still scores the final ones."""
    from tests.trainer.conftest import FakeScorer
    from trainer.config import EvaluationConfig, RolloutConfig
    from trainer.evaluation.evaluate import measure
    from trainer.rl.rollout import DropCount, collect_rollout

    measured = measure(sampler, FakeScorer(), PROMPTS[:1], EvaluationConfig(images_per_prompt=1), "base")
    assert measured.images.shape[2:] == (16, 16, 3)
    monkeypatch.setattr(ImageSampler, "upscale", None)
    config = RolloutConfig(images_per_prompt=3, reward_stage="decoder")
    rollout = collect_rollout(sampler, FakeScorer(), KEYS, config, 6, DropCount(0.05))
    assert rollout.images.shape[1:] == (8, 8, 3)
