"""Quality of the committed miniature, measured on held-out scenes through the product's own code.

The service's engine loads the evaluators and the trainer's sampler the generator, as in production.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from miniature import evaluators, world
from miniature.probe import QUALITY, Reading, load_probe
from miniature.world import Part, Scenes
from reward_service.calibrate.statistics import correlation, score_statistics
from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair
from trainer.config import TrainerConfig
from trainer.data.prompts import read_prompts
from trainer.rl.sampler import ImageSampler
from trainer.runs.setup import load_sampler
from trainer.runtime.rng import ImageKey

Scores = NDArray[np.float64]

RETRIEVAL_SCENES = 256
PREFERENCE_PAIRS = 2000
AESTHETIC_SCENES = 1000
IMAGES_PER_PROMPT = 4
CALIBRATION_IMAGES_PER_PROMPT = 8


@dataclass(frozen=True)
class Retrieval:
    """Share of held-out captions whose own image is the best, or among the best five, of 256."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Quality:
    """Results of `evaluate`. `correlation`: of the four scores over generated images, by pair."""

    retrieval: dict[str, Retrieval]
    preference: dict[str, float]
    aesthetic: float
    correlation: dict[tuple[str, str], float]
    probe: dict[str, float]
    generated: dict[str, float]


def measure(service: ServiceConfig, trainer: TrainerConfig, probe_file: Path, seed: int = 0) -> Quality:
    """Measure evaluators, generator and probe on scenes and prompts that no model has seen."""
    rng = torch.Generator().manual_seed(90_000 + seed)
    engine = build_engine(service)
    sampler = load_sampler(trainer)
    prompts = read_prompts(trainer.prompts.validation or trainer.prompts.train)
    images, requested = generate(sampler, prompts, IMAGES_PER_PROMPT)
    raw = score(engine, requested, images, "scoring generated images")
    return Quality(
        retrieval=retrieval(engine, rng),
        preference={kind: preference_accuracy(engine, kind, rng) for kind in ("pickscore", "hpsv2")},
        aesthetic=aesthetic_correlation(engine, rng),
        correlation=correlations(raw),
        probe=probe_accuracy(probe_file, rng),
        generated=fidelity(probe_file, requested, images),
    )


# Evaluators ---------------------------------------------------------------------------------------


def as_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Convert images (N, 3, H, W) in [0, 1] to uint8 (N, H, W, 3), as clients of the service send them."""
    images: NDArray[np.uint8] = (
        (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    )
    return images


def score(
    engine: RewardEngine,
    prompts: list[str],
    images: NDArray[np.uint8],
    progress: str,
    names: Sequence[str] | None = None,
) -> dict[str, Scores]:
    """Return raw scores (N,) of N pairs by evaluator, for the named evaluators or all."""
    pairs = [Pair(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    rows = []
    for start in tqdm(range(0, len(pairs), 256), desc=progress):
        rows += [result.raw for result in engine.score(pairs[start : start + 256], names)]
    return {name: np.array([row[name] for row in rows]) for name in names or engine.evaluators}


def distinct_held_out(n: int, rng: torch.Generator) -> Scenes:
    """Return n held-out scenes of distinct content."""
    scenes = world.sample_scenes(50 * n, Part.HELD_OUT, rng)
    first: dict[tuple[int, ...], int] = {}
    for i, content in enumerate(scenes.content.tolist()):
        first.setdefault(tuple(content), i)
    return scenes[torch.tensor(list(first.values())[:n])]


def retrieval(engine: RewardEngine, rng: torch.Generator) -> dict[str, Retrieval]:
    """Return the retrieval of captions among images of every quality, by evaluator that reads prompts."""
    scenes = distinct_held_out(RETRIEVAL_SCENES, rng)
    pixels = list(as_uint8(world.draw(scenes, rng)))
    captions = world.describe(scenes, rng, drop=0.0).text
    found = {}
    for name, evaluator in engine.evaluators.items():
        if evaluator.reads_prompt:
            images = evaluator.tower.embed_images(evaluator.preprocessing(pixels))
            texts = evaluator.tower.embed_texts(captions).vectors
            own = (texts @ images.T).argsort(1, descending=True) == torch.arange(len(captions))[:, None]
            found[name] = Retrieval(*(own[:, :k].any(1).float().mean().item() for k in (1, 5)))
    return found


def preference_accuracy(engine: RewardEngine, kind: str, rng: torch.Generator) -> float:
    """Return the share of held-out pairs whose preferred image agrees with the stated utility."""
    scenes = world.sample_scenes(PREFERENCE_PAIRS, Part.HELD_OUT, rng)
    other = evaluators.sample_alternatives(scenes, Part.HELD_OUT, rng)
    captions = world.describe(scenes, rng)
    sides = [
        score(engine, captions.text, as_uint8(world.draw(s, rng)), f"preferences of {kind}", [kind])[kind]
        for s in (scenes, other)
    ]
    gap = evaluators.utilities(kind, captions, scenes, scenes) - evaluators.utilities(
        kind, captions, scenes, other
    )
    return float(((sides[0] > sides[1]) == (gap.numpy() > 0)).mean())


def aesthetic_correlation(engine: RewardEngine, rng: torch.Generator) -> float:
    """Return the Pearson correlation of the aesthetic score with the stated aesthetic on held-out scenes."""
    scenes = world.sample_scenes(AESTHETIC_SCENES, Part.HELD_OUT, rng)
    images = as_uint8(world.draw(scenes, rng))
    found = score(engine, [""] * len(scenes), images, "aesthetic", ["aesthetic"])["aesthetic"]
    return float(np.corrcoef(found, world.aesthetic(scenes).numpy())[0, 1])


# Generator ----------------------------------------------------------------------------------------


def generate(
    sampler: ImageSampler, prompts: tuple[str, ...], each: int
) -> tuple[NDArray[np.uint8], list[str]]:
    """Generate `each` images of every prompt; return images (P * each, H, W, 3) and their prompts."""
    keys = [ImageKey(0, 0, -2, prompt, image) for prompt in prompts for image in range(each)]
    starts = tqdm(range(0, len(keys), 64), desc="generating")
    batches = [sampler.sample(keys[start : start + 64]).images for start in starts]
    return np.concatenate(batches), [key.prompt for key in keys]


def correlations(raw: dict[str, Scores]) -> dict[tuple[str, str], float]:
    """Return the Pearson correlation of every two evaluators over the same images."""
    names = list(raw)
    matrix = correlation(np.cov([raw[name] for name in names]))
    return {(a, b): float(matrix[i, j]) for i, a in enumerate(names) for j, b in enumerate(names) if i < j}


def calibrate(service: ServiceConfig, trainer: TrainerConfig) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of the base generator's scores on training prompts, by evaluator.

    The scale uses the deviation over all images, so that other images also get a unit score inside (0, 1).
    The pooled within-prompt deviation is informative only: a trainer divides by its own.
    """
    prompts = read_prompts(trainer.prompts.train)
    images, requested = generate(load_sampler(trainer), prompts, CALIBRATION_IMAGES_PER_PROMPT)
    raw = score(build_engine(service), requested, images, "calibrating")
    group = np.repeat(np.arange(len(prompts)), CALIBRATION_IMAGES_PER_PROMPT)
    found = score_statistics(np.column_stack(list(raw.values())), group)
    return {
        name: {"mean": float(mean), "std": float(total), "std_within_prompt": float(within)}
        for name, mean, total, within in zip(raw, found.mean, found.total, found.within, strict=True)
    }


# The probe --------------------------------------------------------------------------------------


def probe_accuracy(probe_file: Path, rng: torch.Generator) -> dict[str, float]:
    """Return the accuracy of the probe on held-out scenes, by attribute."""
    scenes = world.sample_scenes(AESTHETIC_SCENES, Part.HELD_OUT, rng)
    reading = load_probe(probe_file).read(world.draw(scenes, rng) * 2 - 1)
    return reading.accuracy(scenes.content)


def fidelity(probe_file: Path, prompts: list[str], images: NDArray[np.uint8]) -> dict[str, float]:
    """Return the share of images that show what their prompt states, and their mean quality, by the probe."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    reading = load_probe(probe_file).read(pixels)
    return {**_stated_shown(prompts, reading), **_mean_quality(reading)}


def _stated_shown(prompts: list[str], reading: Reading) -> dict[str, float]:
    shown: dict[str, list[bool]] = {}
    for prompt, values in zip(prompts, reading.content.tolist(), strict=True):
        for i, (name, value) in enumerate(stated(prompt).items()):
            if value is not None:
                shown.setdefault(name, []).append(values[i] == value)
    return {name: float(np.mean(hits)) for name, hits in shown.items()}


def _mean_quality(reading: Reading) -> dict[str, float]:
    return dict(zip(QUALITY, reading.quality.mean(0).tolist(), strict=True))


def stated(prompt: str) -> dict[str, int | None]:
    """Return what a caption states, by attribute; None for an attribute that it leaves out."""
    words = prompt.replace(",", " ").split()

    def mentioned(options: tuple[str, ...]) -> list[int]:
        return [options.index(word) for word in words if word in options]

    def first(found: list[int]) -> int | None:
        return found[0] if found else None

    colours = mentioned(world.COLOURS)
    return {
        "shape": first(mentioned(world.SHAPES)),
        "figure": first(colours),
        "background": first(colours[1:]),
        "size": first(mentioned(world.SIZES)),
        "texture": first(mentioned(world.TEXTURES)),
    }
