"""Known mistakes of public scorers, made on purpose: each must move a score by far more than the tolerance,
or the comparison would prove nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.parity.cases import LONG, PROMPTS, Picture
from benchmarks.parity.references import FIRST_SPECIAL_ID, Reference
from reward_service.engine.preprocessing import OPENAI_MEAN, OPENAI_STD
from reward_service.images import decode

_PLAIN = PROMPTS[0].text


@dataclass(frozen=True)
class Mistake:
    """What was done wrong, and the largest change of a score that it made."""

    name: str
    difference: float


def measure(reference: Reference, images: Sequence[Picture]) -> list[Mistake]:
    """Make every mistake that this reference's computation allows."""
    found = [_activation(reference, images), _antialias(reference, images), _alpha(reference, images)]
    found.append(_half_head(reference, images))
    if reference.reads_prompt:
        found.append(_end_cut_off(reference, images))
    return found


def _activation(reference: Reference, images: Sequence[Picture]) -> Mistake:
    right = _score(reference, _pixels(reference, images[0]))
    with _other_activation(reference) as name:
        wrong = _score(reference, _pixels(reference, images[0]))
    return Mistake(name, abs(wrong - right))


@contextmanager
def _other_activation(reference: Reference) -> Iterator[str]:
    """GELU for QuickGELU, or the other way round."""
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


def _antialias(reference: Reference, images: Sequence[Picture]) -> Mistake:
    """The large image, made small by bicubic interpolation alone."""
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


def _alpha(reference: Reference, images: Sequence[Picture]) -> Mistake:
    """RGBA without white: the colours that lie hidden under the transparency show."""
    rgb = next(rgb for rgb in images if "RGBA" in rgb.name)
    with Image.open(rgb.path) as image:
        wrong = _score(reference, reference.pixels(image.convert("RGB")))
    return Mistake("RGBA without white", abs(wrong - _score(reference, _pixels(reference, rgb))))


def _half_head(reference: Reference, images: Sequence[Picture]) -> Mistake:
    """Embeddings rounded to bf16 before the cosine or the head; the mildest form of the mistake."""
    text = _text(reference, _PLAIN)
    worst = 0.0
    for rgb in images[:4]:
        image = reference.embed_image(_pixels(reference, rgb))
        wrong = reference.combine(image.bfloat16().float(), text.bfloat16().float())
        worst = max(worst, abs(wrong - reference.combine(image, text)))
    return Mistake("bf16 head", worst)


def _end_cut_off(reference: Reference, images: Sequence[Picture]) -> Mistake:
    """Ids sliced at 77, end token and all."""
    image = reference.embed_image(_pixels(reference, images[0]))
    worst = 0.0
    for prompt in (prompt for prompt in PROMPTS if prompt.name in LONG):
        right = reference.ids(prompt.text)
        # The token before the end stands for the one that a slice would have there.
        wrong = [*right[:-1], right[-2]]
        scores = [reference.combine(image, reference.embed_ids(ids)) for ids in (right, wrong)]
        worst = max(worst, abs(scores[0] - scores[1]))
    return Mistake("truncation without EOT", worst)


def _text(reference: Reference, prompt: str) -> Tensor:
    return reference.embed_ids(reference.ids(prompt)) if reference.reads_prompt else torch.empty(0)


def _score(reference: Reference, pixels: Tensor) -> float:
    return reference.combine(reference.embed_image(pixels), _text(reference, _PLAIN))


def _pixels(reference: Reference, image: Picture) -> Tensor:
    return reference.pixels(_flattened(image))


def _flattened(image: Picture) -> Image.Image:
    return Image.fromarray(decode(image.path.read_bytes()).rgb)


def injects(reference: Reference, prompt: str) -> bool:
    """Whether the reference takes some of the prompt's characters for a start or an end."""
    return reference.reads_prompt and sum(token >= FIRST_SPECIAL_ID for token in reference.ids(prompt)) != 2
