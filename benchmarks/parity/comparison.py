"""Comparison of one evaluator with its reference, from the same files, over all cases."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import pstdev
from typing import Any

from PIL import Image

from benchmarks.parity import mistakes
from benchmarks.parity.cases import PROMPTS, ImageCase, Prompt
from benchmarks.parity.mistakes import Mistake
from benchmarks.parity.references import Reference
from reward_service.config import ServiceConfig
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair
from reward_service.images import decode

#: Largest difference allowed, by kind of evaluator, in the units of its raw score.
TOLERANCES = {"hpsv2": 1e-6, "clip": 1e-6, "pickscore": 1e-4, "aesthetic": 1e-5}
#: Smallest effect of a mistake, in multiples of the tolerance, that is certain to be noticed.
MARGIN = 10.0

Case = tuple[int, int]


@dataclass
class Comparison:
    """Result for one evaluator, one reference and one size of the model."""

    kind: str
    reference: str
    model: str
    differences: dict[Case, float] = field(default_factory=dict)
    spread: float = 0.0
    mistakes: list[Mistake] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """Largest difference, in the raw score's units; NaN if one of them is NaN."""
        values = self.differences.values()
        return math.nan if any(map(math.isnan, values)) else max(values)

    @property
    def faults(self) -> list[str]:
        """Reasons why the comparison does not prove parity; empty if it does."""
        tolerance = TOLERANCES[self.kind]
        name = f"{self.kind} against {self.reference}, {self.model}"
        found = []
        if not self.worst < tolerance:
            found.append(f"{name}: differs by {self.worst:.1e}; the tolerance is {tolerance:.0e}")
        if self.spread < MARGIN * tolerance:
            found.append(f"{name}: scores spread by only {self.spread:.1e}; too small to prove parity")
        found += [
            f"{name}: {mistake.name} changes the score by {mistake.difference:.1e} only; might go unnoticed"
            for mistake in self.mistakes
            if mistake.difference < MARGIN * tolerance
        ]
        return found


def all_cases(images: Sequence[ImageCase]) -> list[Case]:
    """Return every image with every prompt, as indices."""
    return [(image, prompt) for image in range(len(images)) for prompt in range(len(PROMPTS))]


def diagonal(images: Sequence[ImageCase]) -> list[Case]:
    """Return each image with one prompt of its own, each prompt once, as indices."""
    return [(index, index) for index in range(min(len(images), len(PROMPTS)))]


def own_scores(
    config: ServiceConfig, kind: str, images: Sequence[ImageCase], cases: Sequence[Case]
) -> dict[Case, float]:
    """Return our engine's scores by case, from the files' bytes."""
    engine = build_engine(config)
    decoded = [decode(image.path.read_bytes()).rgb for image in images]
    pairs = [Pair(PROMPTS[prompt].text, decoded[image]) for image, prompt in cases]
    found = {case: scored.raw[kind] for case, scored in zip(cases, engine.score(pairs), strict=True)}
    del engine
    gc.collect()
    return found


def compare(
    labels: tuple[str, str, str],
    own: dict[Case, float],
    load: Callable[[], Reference],
    images: Sequence[ImageCase],
) -> Comparison:
    """Compare a reference's scores with ours.

    Args:
        labels: kind of evaluator, reference and model, for the table
        own: our scores by case
        load: function that loads the reference
        images: the image cases
    """
    reference = load()
    result = Comparison(*labels)
    expected = _reference_scores(reference, images, list(own))
    result.differences = {case: abs(own[case] - expected[case]) for case in own}
    result.spread = pstdev(expected.values())
    result.mistakes = mistakes.measure(reference, images)
    _free(reference)
    return result


def _reference_scores(
    reference: Reference, images: Sequence[ImageCase], cases: Sequence[Case]
) -> dict[Case, float]:
    files = [input_file(reference, image) for image in images]
    found = {}
    for number, prompt in enumerate(PROMPTS):
        indices = [image for image, prompt_index in cases if prompt_index == number]
        text = input_prompt(reference, prompt)
        scores = reference.score([files[image] for image in indices], text) if indices else []
        found.update({(image, number): score for image, score in zip(indices, scores, strict=True)})
    return found


def input_prompt(reference: Reference, prompt: Prompt) -> str:
    """Return the prompt, or its harmless spelling if the reference would read special tokens in it."""
    return prompt.harmless if mistakes.injects(reference, prompt.text) else prompt.text


def input_file(reference: Reference, image: ImageCase) -> Path:
    """Return the image file; if the reference has another policy than ours, our pixels as a plain PNG."""
    if reference.kind not in image.references:
        return image.path
    path = image.path.with_name(f"{image.path.stem}-flattened.png")
    Image.fromarray(decode(image.path.read_bytes()).rgb).save(path)
    return path


def _free(reference: Any) -> None:
    vars(reference).clear()
    if (package := _hps_package()) is not None:
        package.model_dict.clear()
    gc.collect()


def _hps_package() -> Any:
    import sys

    return sys.modules.get("hpsv2.img_score")
