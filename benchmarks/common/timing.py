"""Measurements of the evaluator benchmark."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.common.models import Group, Models
from benchmarks.common.results import Log, Report, Rows
from benchmarks.parity.cases import scene
from reward_service.engine.preprocessing import Preprocessing
from reward_service.engine.types import Pair

_WORDS = ("a red fox on a mossy log", "an old harbour at dawn, oil on canvas", "a glass teapot", "two moons")
# Rows and columns of the matrix product that measures the peak of the hardware.
_PEAK_SIZE = {"cuda": 8192, "cpu": 2048}


@dataclass
class EvaluatorReport(Report):
    """Results of the evaluator benchmark."""

    name = "evaluators"
    titles: ClassVar = {
        "machine": "# Evaluator benchmark\n",
        "scores": "\n## Score differences\n\nEngine against reference loop, same weights and images.\n",
        "speed": "\n## Times\n",
        "ratios": "\n## Ratios\n\nEach is the median of the ratios of neighbouring runs.\n",
        "throughput": "\n## Throughput\n\nThe peak is that of a matrix product in this run.\n",
    }
    scores: Rows = field(default_factory=list)
    speed: Rows = field(default_factory=list)
    ratios: Rows = field(default_factory=list)
    throughput: Rows = field(default_factory=list)


def measure(
    report: EvaluatorReport,
    models: Models,
    options: argparse.Namespace,
    accelerations: Sequence[str],
    batches: Sequence[int],
    log: Log,
) -> None:
    """Run all measurements and fill the report."""
    groups = workload(options.images, options.per_prompt, options.size_px)
    log("comparing the scores")
    report.scores = _differences(models, groups)
    seconds = _alternating(_measured_functions(models, groups), models, options.repeats, log)
    report.speed = [
        {
            "what": name,
            "seconds": round(median(times), 4),
            "images/s": round(options.images / median(times), 3),
        }
        for name, times in seconds.items()
    ]
    report.ratios = _ratios(seconds)
    if batches:
        report.throughput = _throughput(models, accelerations, batches, options, log)


def workload(images: int, per_prompt: int, size_px: int) -> list[Group]:
    """Return random images under a few prompts."""
    pixels = [Image.fromarray(scene(size_px, size_px, seed)) for seed in range(images)]
    starts = range(0, images, per_prompt)
    return [
        Group(f"{_WORDS[number % len(_WORDS)]}, number {number}", pixels[start : start + per_prompt])
        for number, start in enumerate(starts)
    ]


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """Return the workload as pairs for the engine."""
    return [Pair(group.prompt, np.asarray(image)) for group in groups for image in group.images]


def _differences(models: Models, groups: Sequence[Group]) -> list[dict[str, Any]]:
    scored = models.engine.score(pairs_of(groups))
    rows = []
    for name, loop in models.loops.items():
        found = np.array([pair.raw[name] for pair in scored])
        expected = np.array(loop(groups))
        rows.append(
            {
                "evaluator": name,
                "largest difference": f"{np.abs(found - expected).max():.1e}",
                "scores from": round(float(expected.min()), 4),
                "to": round(float(expected.max()), 4),
            }
        )
    return rows


def _measured_functions(models: Models, groups: Sequence[Group]) -> dict[str, Callable[[], object]]:
    pairs = pairs_of(groups)
    pixels = _pixels(models, [pair.image for pair in pairs])
    texts = _texts(models, [group.prompt for group in groups])
    return {
        "engine": lambda: models.engine.score(pairs),
        "engine, prompts cached": lambda: models.engine.score(pairs),
        **{f"reference loop, {name}": partial(loop, groups) for name, loop in models.loops.items()},
        "bare forward passes, images": lambda: [models.bare[n].encode_image(p) for n, p in pixels.items()],
        "bare forward passes, prompts": lambda: [models.bare[n].encode_text(ids) for n, ids in texts.items()],
    }


def _pixels(models: Models, images: Sequence[Any]) -> dict[str, Tensor]:
    """Return each tower's preprocessed inputs, on its device."""
    engine = models.engine
    steps: dict[str, Preprocessing] = {e.tower_name: e.preprocessing for e in engine.evaluators.values()}
    return {name: step(images).to(engine.device, engine.dtype) for name, step in steps.items()}


def _texts(models: Models, prompts: Sequence[str]) -> dict[str, Tensor]:
    from open_clip.tokenizer import SimpleTokenizer

    ids = SimpleTokenizer()(list(prompts)).to(models.engine.device)
    return dict.fromkeys(models.towers, ids)


def _alternating(
    functions: Mapping[str, Callable[[], object]], models: Models, repeats: int, log: Log
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name, run in functions.items():
            log(f"run {repeat + 1} of {repeats}: {name}")
            if name == "engine":
                for tower in models.towers.values():
                    tower.clear_text_cache()
            seconds[name].append(timed(run, models.engine.device))
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run, including the device's work."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratios(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    loops = np.sum([times for name, times in seconds.items() if name.startswith("reference")], axis=0)
    engine, cached = np.array(seconds["engine"]), np.array(seconds["engine, prompts cached"])
    images = np.array(seconds["bare forward passes, images"])
    prompts = np.array(seconds["bare forward passes, prompts"])
    ratios = {
        "four reference loops / engine": loops / engine,
        "engine / bare forward passes of images and prompts": engine / (images + prompts),
        "engine, prompts cached / bare forward passes of images": cached / images,
    }
    return [
        {
            "what": name,
            "ratio": round(float(np.median(r)), 3),
            "from": round(r.min(), 3),
            "to": round(r.max(), 3),
        }
        for name, r in ratios.items()
    ]


def _throughput(
    models: Models,
    accelerations: Sequence[str],
    batches: Sequence[int],
    options: argparse.Namespace,
    log: Log,
) -> list[dict[str, Any]]:
    """Return images/s by batch size: the three towers alone, and the engine with preprocessing and heads."""
    engine = models.engine
    peak = matrix_peak(engine.device, engine.dtype)
    cost = sum(_flops(config["vision_cfg"]) for config in models.configs.values())
    rows = []
    for mode in accelerations:
        log(f"preparing acceleration {mode}")
        for tower in models.towers.values():
            tower.accelerate(mode, max(batches))
        for batch in batches:
            log(f"throughput: {mode}, batch of {batch}")
            pairs = pairs_of(workload(batch, batch, options.size_px))
            pixels = _pixels(models, [pair.image for pair in pairs])
            towers = _rate(partial(_embed, models, pixels), batch, engine.device)
            whole = _rate(partial(engine.score, pairs), batch, engine.device)
            rows.append(
                {
                    "acceleration": mode,
                    "batch": batch,
                    "towers, images/s": round(towers, 2),
                    "engine, images/s": round(whole, 2),
                    "towers' share of peak": f"{towers * cost / peak:.1%}",
                    "measured peak, TFLOP/s": round(peak / 1e12, 2),
                }
            )
    return rows


def _embed(models: Models, pixels: Mapping[str, Tensor]) -> None:
    for name, tower in models.towers.items():
        tower.embed_images(pixels[name])


def _rate(run: Callable[[], object], batch: int, device: torch.device, repeats: int = 5) -> float:
    run()
    return batch / median(timed(run, device) for _ in range(repeats))


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product, the best of ten."""
    size = _PEAK_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: left @ right, device) for _ in range(10))


def _flops(vision: Mapping[str, Any]) -> float:
    """Return the FLOPs of one image's forward pass: the blocks' matrix products and the patch embedding."""
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    tokens, width = patches + 1, vision["width"]
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    return float(vision["layers"] * block + 6 * patches * width * vision["patch_size"] ** 2)
