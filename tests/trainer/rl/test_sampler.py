"""One random stream per image and stage: what is drawn together with an image does not change it."""

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
def noise_heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Noise]:
    """Every random number that an image's generators give, by the generator's seed, in order."""
    heard: Noise = defaultdict(list)
    original = trainer.rl.karlo.randn_tensor

    def listening(shape: Any, generator: Any = None, **options: Any) -> torch.Tensor:
        noise = original(shape, generator=generator, **options)
        for row, it in zip(noise, generator, strict=True):
            heard[it.initial_seed()].append(row.clone())
        return noise

    with monkeypatch.context() as patched:
        for module in (trainer.rl.karlo, trainer.rl.policy, diffusers.schedulers.scheduling_unclip):
            patched.setattr(module, "randn_tensor", listening)
        yield heard


def drawn(karlo: Karlo, batch: int, sharing: Sharing, world: int = 1) -> list[SampledImages]:
    """The images of all keys in batches, by a job of so many processes, none of which remembers others'."""
    drawings = []
    for rank in range(world):
        sampler = ImageSampler(karlo, make_policy(karlo), SAMPLING)
        process = Processes()
        process.rank, process.world = rank, world
        own = process.share(KEYS)
        drawings += [sampler.draw(own[start : start + batch], sharing) for start in range(0, len(own), batch)]
    return drawings


@pytest.mark.parametrize("sharing", [NOTHING_SHARED, SHARED])
@pytest.mark.parametrize(("batch", "world"), [(1, 1), (5, 1), (4, 3)])
def test_random_numbers_depend_on_the_image_alone(
    karlo: Karlo, sharing: Sharing, batch: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every stage, bit for bit, whatever is drawn beside an image and by how many processes."""
    with noise_heard(monkeypatch) as together:
        drawn(karlo, len(KEYS), sharing)
    with noise_heard(monkeypatch) as apart:
        drawn(karlo, batch, sharing, world)
    stages: dict[Stage, Any] = {
        "prior": sharing.prior,
        "decoder_start": sharing.decoder_start,
        "decoder": "image",
        "super_resolution": sharing.super_res,
    }
    for stage, share in stages.items():
        for seed in {key.seed_of(stage, share) for key in KEYS}:
            # Who shares a stream begins it anew, so that each draw of it comes as often as it is used.
            alone, among = _distinct(apart[seed]), _distinct(together[seed])
            assert alone
            assert alone == among


def _distinct(noise: list[torch.Tensor]) -> list[bytes]:
    return list(dict.fromkeys(draw.numpy().tobytes() for draw in noise))


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (5, 1), (4, 3)])
def test_images_do_not_depend_on_the_micro_batch_or_on_the_processes(
    karlo: Karlo, batch: int, world: int
) -> None:
    """The same images but for float32 rounding: at most one grey level in a thousandth of the values."""
    whole, parts = drawn(karlo, len(KEYS), SHARED), drawn(karlo, batch, SHARED, world)
    assert len(parts) > len(whole) == 1
    images = np.concatenate([part.images for part in parts]).astype(int)
    difference = np.abs(images - whole[0].images)
    assert whole[0].images.std() > 10  # not blank
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    latents = torch.cat([part.trajectory.latents for part in parts])
    torch.testing.assert_close(latents, whole[0].trajectory.latents, rtol=0, atol=1e-4)


def test_a_decoder_image_is_the_one_that_super_resolution_starts_from(sampler: ImageSampler) -> None:
    """Stage "decoder" gives the small image of the same trajectory, and runs no super-resolution."""
    small, large = sampler.draw(KEYS, SHARED, "decoder"), sampler.draw(KEYS, SHARED)
    assert torch.equal(small.trajectory.latents, large.trajectory.latents)
    assert small.images.shape == (12, 8, 8, 3)
    assert large.images.shape == (12, 16, 16, 3)
    expected = (small.trajectory.latents[:, -1].clamp(-1, 1) * 127.5 + 127.5).round()
    np.testing.assert_allclose(small.images, expected.permute(0, 2, 3, 1).numpy(), atol=1)


def test_training_at_the_decoder_stage_never_touches_super_resolution(
    sampler: ImageSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With reward_stage=decoder the scorer sees small images; evaluation still sees the final ones."""
    from tests.trainer.conftest import FakeScorer
    from trainer.config import EvaluationConfig, RolloutConfig
    from trainer.evaluation.evaluate import measure
    from trainer.rl.rollout import DropCount, collect

    measured = measure(sampler, FakeScorer(), PROMPTS[:1], EvaluationConfig(images_per_prompt=1), "base")
    assert measured.images.shape[2:] == (16, 16, 3)
    monkeypatch.setattr(ImageSampler, "enlarge", None)
    config = RolloutConfig(images_per_prompt=3, reward_stage="decoder")
    rollout = collect(sampler, FakeScorer(), KEYS, config, 6, DropCount(0.05))
    assert rollout.images.shape[1:] == (8, 8, 3)
