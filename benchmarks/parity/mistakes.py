"""Known mistakes of public scorers, made on purpose.

Each must change a score by far more than the tolerance, or the comparison would prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.parity.cases import LONG, PROMPTS, ImageCase
from benchmarks.parity.references import FIRST_SPECIAL_ID, Reference
from reward_service.engine.preprocessing import OPENAI_MEAN, OPENAI_STD
from reward_service.images import decode

_PLAIN = PROMPTS[0].text


@dataclass(frozen=True)
class Mistake:
    """Name of a mistake, and the largest change of a score that it causes."""

    name: str
    difference: float


def measure(reference: Reference, images: Sequence[ImageCase]) -> list[Mistake]:
    """Return the effect of every mistake that this reference's computation allows."""
    found = [_activation(reference, images), _antialias(reference, images), _alpha(reference, images)]
    found.append(_half_head(reference, images))
    if reference.reads_prompt:
        found.append(_end_cut_off(reference, images))
    return found


def _activation(reference: Reference, images: Sequence[ImageCase]) -> Mistake:
    right = _score(reference, _pixels(reference, images[0]))
    with _other_activation(reference) as name:
        wrong = _score(reference, _pixels(reference, images[0]))
    return Mistake(name, abs(wrong - right))


@contextmanager
def _other_activation(reference: Reference) -> Iterator[str]:
    """Replace GELU by QuickGELU or the reverse, while the block runs; yield the mistake's name."""
    holders = [
        (module, name)
        for module in reference.activations()
        for name in ("gelu", "activation_fn")
        if hasattr(module, name)
    ]
    kept = [getattr(module, name) for module, name in holders]
    quick = "quick" in type(kept[0]).__name__.lower()
    for module, name in holders:
        setattr(module, name, nn.GELU() if quick else _QuickGELU())
    yield "GELU for QuickGELU" if quick else "QuickGELU for GELU"
    for (module, name), activation in zip(holders, kept, strict=True):
        setattr(module, name, activation)


class _QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _antialias(reference: Reference, images: Sequence[ImageCase]) -> Mistake:
    """Resize the large image by bicubic interpolation without antialiasing."""
    image = _flattened(images[0])
    right = reference.pixels(image)
    unit = torch.from_numpy(decode(images[0].path.read_bytes()).rgb).permute(2, 0, 1)[None].float() / 255
    height, width = unit.shape[2:]
    letterbox = reference.kind == "hpsv2"
    scale = 224 / (max(height, width) if letterbox else min(height, width))
    size = (
        (round(height * scale), round(width * scale))
        if letterbox
        else (int(height * scale), int(width * scale))
    )
    small = F.interpolate(unit, size, mode="bicubic", align_corners=False, antialias=False)[0].clamp(0, 1)
    if letterbox:
        top, left = (224 - size[0]) // 2, (224 - size[1]) // 2
        small = F.pad(small, (left, 224 - size[1] - left, top, 224 - size[0] - top))
    else:
        top, left = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
        small = small[:, top : top + 224, left : left + 224]
    wrong = (small - _column(OPENAI_MEAN)) / _column(OPENAI_STD)
    return Mistake("no antialias", abs(_score(reference, wrong) - _score(reference, right)))


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def _alpha(reference: Reference, images: Sequence[ImageCase]) -> Mistake:
    """Drop the alpha channel, so that hidden colours show, in place of blending with white."""
    case = next(case for case in images if "RGBA" in case.name)
    with Image.open(case.path) as image:
        wrong = _score(reference, reference.pixels(image.convert("RGB")))
    return Mistake("RGBA without white", abs(wrong - _score(reference, _pixels(reference, case))))


def _half_head(reference: Reference, images: Sequence[ImageCase]) -> Mistake:
    """Round embeddings to bf16 before the cosine or the head; the mildest form of the mistake."""
    text = _text(reference, _PLAIN)
    worst = 0.0
    for case in images[:4]:
        image = reference.embed_image(_pixels(reference, case))
        wrong = reference.combine(image.bfloat16().float(), text.bfloat16().float())
        worst = max(worst, abs(wrong - reference.combine(image, text)))
    return Mistake("bf16 head", worst)


def _end_cut_off(reference: Reference, images: Sequence[ImageCase]) -> Mistake:
    """Slice the ids at 77, which cuts off the end token."""
    image = reference.embed_image(_pixels(reference, images[0]))
    worst = 0.0
    for prompt in (prompt for prompt in PROMPTS if prompt.name in LONG):
        right = reference.ids(prompt.text)
        # A slice would have another token at the end; the one before it stands for it.
        wrong = [*right[:-1], right[-2]]
        scores = [reference.combine(image, reference.embed_ids(ids)) for ids in (right, wrong)]
        worst = max(worst, abs(scores[0] - scores[1]))
    return Mistake("truncation without EOT", worst)


def _text(reference: Reference, prompt: str) -> Tensor:
    return reference.embed_ids(reference.ids(prompt)) if reference.reads_prompt else torch.empty(0)


def _score(reference: Reference, pixels: Tensor) -> float:
    return reference.combine(reference.embed_image(pixels), _text(reference, _PLAIN))


def _pixels(reference: Reference, image: ImageCase) -> Tensor:
    return reference.pixels(_flattened(image))


def _flattened(image: ImageCase) -> Image.Image:
    return Image.fromarray(decode(image.path.read_bytes()).rgb)


def injects(reference: Reference, prompt: str) -> bool:
    """Return whether the reference reads some of the prompt's characters as a start or end token."""
    return reference.reads_prompt and sum(token >= FIRST_SPECIAL_ID for token in reference.ids(prompt)) != 2
