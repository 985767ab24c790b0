"""Request bodies in each format that the service accepts. No torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from reward_service.images import Pixels
from reward_service.protocol import JSON, MSGPACK, Item, Picture, ScoreRequest, encode

RAW = "msgpack, raw"
#: Content type and image format by name.
FORMS: dict[str, tuple[str, str]] = {
    RAW: (MSGPACK, "raw"),
    "msgpack, WebP lossless": (MSGPACK, "webp"),
    "msgpack, PNG": (MSGPACK, "png"),
    "msgpack, JPEG q95": (MSGPACK, "jpeg"),
    "JSON + base64, raw": (JSON, "raw"),
    "JSON + base64, PNG": (JSON, "png"),
    "multipart, PNG": ("multipart/form-data", "png"),
}
_SAVING: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "webp": {"lossless": True, "quality": 0, "method": 0},
    "jpeg": {"quality": 95},
}


@dataclass(frozen=True)
class Body:
    """Encoded body of one request."""

    content: bytes
    content_type: str


def make_body(form: str, prompts: Sequence[str], images: Sequence[Pixels]) -> Body:
    """Return a request for the pairs of prompts and images, in one of `FORMS`."""
    content_type, kind = FORMS[form]
    if content_type.startswith("multipart"):
        return _multipart(prompts, [_file(pixels, kind) for pixels in images], kind)
    items = [Item(prompt, _image(pixels, kind)) for prompt, pixels in zip(prompts, images, strict=True)]
    return Body(encode(ScoreRequest(items), content_type), content_type)


def scene(size_px: int, seed: int) -> Pixels:
    """Return an image that compresses as drawings do: gradients, discs and some noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[0:size_px, 0:size_px] / size_px
    slopes, starts = rng.uniform(-90, 90, (2, 3)), rng.uniform(60, 190, 3)
    pixels = starts + down[..., None] * slopes[0] + across[..., None] * slopes[1]
    for _ in range(6):
        y, x, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.25)
        pixels[(down - y) ** 2 + (across - x) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    noisy = pixels + rng.integers(-2, 3, pixels.shape)
    return np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8))


def _image(pixels: Pixels, kind: str) -> Picture:
    if kind == "raw":
        return Picture(pixels.tobytes(), "raw", (pixels.shape[0], pixels.shape[1], 3))
    return Picture(_file(pixels, kind), kind)  # type: ignore[arg-type]  # the formats of FORMS


def _file(pixels: Pixels, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **_SAVING[kind])
    return file.getvalue()


def _multipart(prompts: Sequence[str], files: Sequence[bytes], kind: str) -> Body:
    parts = [("image", (f"{number}.{kind}", file)) for number, file in enumerate(files)]
    request = httpx.Request("POST", "http://service", data={"prompt": list(prompts)}, files=parts)
    return Body(request.read(), request.headers["content-type"])
