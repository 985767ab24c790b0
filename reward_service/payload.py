"""The client's pictures and prompts as requests, and the answers put together again. No torch, no HTTP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reward_service.failures import InputError, RewardClientError
from reward_service.images import Pixels, flatten, sniff
from reward_service.protocol import (
    MAX_BODY_BYTES,
    MAX_PAIRS,
    Item,
    Normalization,
    Picture,
    ScoreRequest,
    ScoreResponse,
)

#: A Pillow picture, a uint8 array (H, W, 3), a tensor (uint8 (H, W, 3) or float (3, H, W) in [0, 1]), a path,
#: or the bytes of a PNG, JPEG or WebP file. Tensors are known by their methods: torch is not imported.
ImageLike = Any

#: Half of what the service takes, so that headers, prompts and one large picture still fit.
CHUNK_BYTES = MAX_BODY_BYTES // 2
_CHANNELS = 3


def chunks(
    prompts: Sequence[str],
    images: Sequence[ImageLike],
    evaluators: Sequence[str] | None,
    weights: Mapping[str, float] | None,
    normalization: Normalization,
    deterministic: bool,
) -> Iterator[tuple[int, ScoreRequest]]:
    """Requests of at most ``MAX_PAIRS`` pairs and about ``CHUNK_BYTES`` bytes, in order.

    Each comes with the place of its first pair among all.

    :raises InputError: before the first is made if the lengths differ, else at the picture at fault
    """
    _check_lengths(prompts, images)
    items: list[Item] = []
    size = 0

    def request() -> ScoreRequest:
        return ScoreRequest(
            items=items,
            evaluators=None if evaluators is None else list(evaluators),
            weights=None if weights is None else dict(weights),
            normalization=normalization,
            deterministic=deterministic,
        )

    for index, prompt in enumerate(prompts):
        item = _item(index, prompt, images[index])
        if items and (len(items) == MAX_PAIRS or size + len(item.image.data) > CHUNK_BYTES):
            yield index - len(items), request()
            items, size = [], 0
        items.append(item)
        size += len(item.image.data)
    yield len(prompts) - len(items), request()


def merge(responses: Sequence[ScoreResponse]) -> ScoreResponse:
    """One response of several chunks': results renumbered, times added.

    :raises RewardClientError: the chunks were not scored by the same evaluators
    """
    first = responses[0]
    if any(response.evaluators != first.evaluators for response in responses):
        raise RewardClientError("the service's evaluators changed within this batch; score it again")
    results = [result for response in responses for result in response.results]
    numbered = [_renumbered(result, index) for index, result in enumerate(results)]
    parts = {name for response in responses for name in response.timing_ms}
    timing = {
        name: math.fsum(response.timing_ms.get(name, 0.0) for response in responses) for name in sorted(parts)
    }
    return ScoreResponse(first.id, numbered, first.evaluators, timing)


def picture(image: ImageLike) -> Picture:
    """One picture as it goes over the wire: files unchanged, everything else as raw uint8 RGB.

    :raises InputError: not a picture this client can send
    """
    if isinstance(image, (str, Path)):
        return _file(Path(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _encoded(bytes(image), "these bytes")
    if isinstance(image, Image.Image):
        return _raw(_opened(image))
    return _raw(_pixels(image))


def _check_lengths(prompts: Sequence[str], images: Sequence[ImageLike]) -> None:
    if isinstance(prompts, (str, bytes)):
        raise InputError("prompts must be a list of strings, not one string")
    if isinstance(images, (str, bytes, Path, Image.Image)):
        raise InputError("images must be a list of pictures, not one picture")
    if len(prompts) != len(images):
        raise InputError(f"{len(prompts)} prompts but {len(images)} images; give one of each per pair")
    if len(prompts) == 0:
        raise InputError("the batch is empty; give at least one prompt and one image")


def _item(index: int, prompt: str, image: ImageLike) -> Item:
    if not prompt:
        raise InputError(f"prompt {index} is empty; give it words")
    try:
        return Item(prompt, picture(image))
    except InputError as error:
        raise InputError(f"image {index}: {error}") from None


def _file(path: Path) -> Picture:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the path") from None
    return _encoded(data, str(path))


def _opened(image: Image.Image) -> Pixels:
    try:
        return flatten(image)
    except OSError as error:  # Pillow reads an opened file's pixels only now
        raise InputError(f"the picture cannot be read ({error}); open a whole file") from None


def _encoded(data: bytes, name: str) -> Picture:
    found = sniff(data)
    if found is None:
        raise InputError(f"{name}: not a PNG, JPEG or WebP picture; convert it to one of these")
    return Picture(data, found)  # type: ignore[arg-type]  # sniff names only formats of the protocol


def _raw(pixels: Pixels) -> Picture:
    return Picture(np.ascontiguousarray(pixels).tobytes(), "raw", (pixels.shape[0], pixels.shape[1], 3))


def _pixels(image: Any) -> Pixels:
    """A uint8 (H, W, 3) array of an array or tensor."""
    is_tensor = hasattr(image, "detach") and hasattr(image, "cpu")
    if is_tensor:
        image = image.detach().cpu()
        # numpy knows no bfloat16, and float64 holds every smaller float exactly.
        image = image.double().numpy() if image.is_floating_point() else image.numpy()
    if not isinstance(image, np.ndarray):
        raise InputError(f"a {type(image).__name__} is no Pillow picture, array, tensor, path or bytes")
    if image.size == 0:
        raise InputError(f"the picture has no pixels: shape {tuple(image.shape)}")
    if is_tensor and np.issubdtype(image.dtype, np.floating):
        return _rounded(image)
    return _checked(image)


def _rounded(image: np.ndarray[Any, np.dtype[Any]]) -> Pixels:
    if image.ndim != _CHANNELS or image.shape[0] != _CHANNELS:
        raise InputError(f"a float tensor must have shape (3, height, width), not {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0.0 and high <= 1.0):
        raise InputError(f"a float tensor must lie in [0, 1], not [{low:.4g}, {high:.4g}]; clamp it")
    return np.rint(image.transpose(1, 2, 0) * 255.0).astype(np.uint8)


def _checked(image: np.ndarray[Any, np.dtype[Any]]) -> Pixels:
    if image.dtype != np.uint8:
        raise InputError(f"an array must be uint8 (height, width, 3), not {image.dtype}; convert it")
    if image.ndim != _CHANNELS or image.shape[2] != _CHANNELS:
        raise InputError(f"an array must have shape (height, width, 3), not {tuple(image.shape)}")
    return image


def _renumbered(result: Any, index: int) -> Any:
    return type(result)(index, result.reward, result.scores, result.truncated_prompt, result.lossy_input)
