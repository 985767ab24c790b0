"""Request bodies for a batch of prompts and images, and the merging of their responses. No torch, no HTTP.

A batch is split into chunks, each encoded as one request body when it is needed. Images of every kind are
sent lossless: files unchanged, everything else as RGB pixels.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from PIL import Image

from reward_service.client.errors import InputError
from reward_service.images import Pixels, detect_format, to_rgb
from reward_service.protocol import (
    MAX_BODY_BYTES,
    MAX_PROMPT_CHARS,
    EvaluatorIdentity,
    Item,
    Normalization,
    Picture,
    ScoreRequest,
    ScoreResponse,
)

#: A Pillow image, an array (H, W, 3) or tensor (3, H, W), uint8 or float in [0, 1], a path, or the bytes of
#: a PNG, JPEG or WebP file. Tensors are recognized by their methods: torch is not imported.
ImageLike = Any
#: Encoding of pixels on the wire. All three are lossless; the last two cost milliseconds per image and reduce
#: network traffic.
Encoding = Literal["raw", "png", "webp"]
Array = np.ndarray[Any, np.dtype[Any]]

#: A quarter of the service's limit: several requests are in flight at once, and each arrives soon.
CHUNK_BYTES = MAX_BODY_BYTES // 4
#: With the default configuration, four of these are the most pairs that the service admits per client.
CHUNK_PAIRS = 512

_CHANNELS = 3
_MAX_WEBP_SIDE = 16383
# PNG's default level takes three times as long for a few per cent; for lossless WebP, quality means effort.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
}
_ITEM_OVERHEAD_BYTES = 64  # what msgpack adds to a prompt and an image: names, sizes, shape
_NDIM_OF_ONE_IMAGE = (0, 2, 3)
_MISSING = object()
_ENCODER = msgspec.msgpack.Encoder()


# Options ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreOptions:
    """Options of a score call, which hold for every pair; the fields are those of `ScoreRequest`."""

    evaluators: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = None
    normalization: Normalization = "unit"
    deterministic: bool = False
    allow_partial: bool = False


def parse_options(
    evaluators: Iterable[str] | None,
    weights: Mapping[str, float] | None,
    normalization: Normalization,
    deterministic: bool,
    allow_partial: bool,
) -> ScoreOptions:
    """Return the validated options of a call, as plain Python values.

    Raises:
        InputError: an option is not usable
    """
    if normalization not in get_args(Normalization):
        raise InputError(f"normalization must be one of {', '.join(get_args(Normalization))}")
    if isinstance(evaluators, str):
        raise InputError("evaluators must be a list of names, not one string")
    names = None if evaluators is None else tuple(map(_parse_name, evaluators))
    if names == ():
        raise InputError("evaluators is empty; name at least one, or use None for all")
    numbers = None
    if weights is not None:
        numbers = {_parse_name(name): _parse_weight(weight) for name, weight in weights.items()}
    return ScoreOptions(names, numbers, normalization, bool(deterministic), bool(allow_partial))


def check_encoding(encoding: str) -> None:
    """Raise an error for an unsupported encoding of pixels.

    Raises:
        InputError: it is not lossless, or not an encoding of the protocol
    """
    if encoding not in get_args(Encoding):
        raise InputError(f"encoding must be one of {', '.join(get_args(Encoding))}, which are lossless")


def _parse_name(name: Any) -> str:
    if not isinstance(name, str) or not _is_encodable(name):
        raise InputError(f"an evaluator's name must be a string, not a {type(name).__name__}")
    return str.__str__(name)


def _parse_weight(weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise InputError("a weight must be a finite number of at least 0")
    return number


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Body of one request; `first` is the index of its first pair in the whole batch."""

    first: int
    pairs: int
    body: bytes
    request_id: str


@dataclass(frozen=True)
class Chunking:
    """Maximum size of a chunk in pairs and (approximately) bytes, and the encoding of its pixels."""

    pairs: int = CHUNK_PAIRS
    bytes: int = CHUNK_BYTES
    encoding: Encoding = "raw"

    def split(
        self, prompts: Iterable[str], images: Iterable[ImageLike], options: ScoreOptions
    ) -> Iterator[Chunk]:
        """Yield the batch as chunks in order, each built on demand so that few are in memory.

        Raises:
            InputError: before the first chunk if the lengths differ, otherwise at the invalid pair
        """
        check_batch(prompts, images)
        call_id = uuid.uuid4().hex
        first, body = 0, _BodyBuilder(options)
        for index, (prompt, image) in enumerate(_pairs(prompts, images)):
            item = _item(index, prompt, image, self.encoding)
            if body.pairs and (body.pairs == self.pairs or body.size + _max_size(item) > self.bytes):
                yield Chunk(first, body.pairs, body.finish(), f"{call_id}-{first}")
                first = index
            body.add(item)
            if body.size > MAX_BODY_BYTES - body.options_size:
                size, limit = (f"{size / 2**20:.1f} MiB" for size in (body.size, MAX_BODY_BYTES))
                raise InputError(f"image {index}: {size} exceeds the {limit} of a request; shrink it")
        if not body.pairs:
            raise InputError("the batch is empty; give at least one prompt and one image")
        yield Chunk(first, body.pairs, body.finish(), f"{call_id}-{first}")


class _BodyBuilder:
    """Incremental encoder of a request body. Each pair is copied at once, so its array may be reused."""

    _ARRAY_OF = b"\xdd"  # msgpack's array whose length takes four bytes, so that it can be written last

    def __init__(self, options: ScoreOptions) -> None:
        self._options = _request_fields(options)
        self.options_size = len(_ENCODER.encode({**self._options, "items": None}))
        self._clear()

    def _clear(self) -> None:
        self.pairs, self._items = 0, bytearray(self._ARRAY_OF + bytes(4))

    @property
    def size(self) -> int:
        """Bytes of the pairs so far."""
        return len(self._items)

    def add(self, item: Item) -> None:
        """Append a pair."""
        _ENCODER.encode_into(item, self._items, -1)
        self.pairs += 1

    def finish(self) -> bytes:
        """Return the body and begin the next one."""
        self._items[1:5] = self.pairs.to_bytes(4, "big")
        body = _ENCODER.encode({**self._options, "items": msgspec.Raw(self._items)})
        self._clear()
        return body


def check_batch(prompts: Iterable[str], images: Iterable[ImageLike]) -> None:
    """Raise an error for arguments that cannot be a batch.

    Raises:
        InputError: one of the two is not a list, or their known lengths differ
    """
    if isinstance(prompts, (str, bytes)):
        raise InputError("prompts must be a list of strings, not one string")
    one_array = getattr(images, "ndim", None) in _NDIM_OF_ONE_IMAGE
    if one_array or isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)):
        raise InputError("images must be a list of images or an array of four axes, not one image")
    for name, argument in (("prompts", prompts), ("images", images)):
        if isinstance(argument, (Mapping, Set)) or not _is_iterable(argument):
            raise InputError(f"{name} must be a list, not a {type(argument).__name__}")
    if isinstance(prompts, Sized) and isinstance(images, Sized) and len(prompts) != len(images):
        raise InputError(f"{len(prompts)} prompts but {len(images)} images; give one of each per pair")


def merge_responses(responses: Sequence[ScoreResponse]) -> ScoreResponse:
    """Return the responses of several chunks as one: results renumbered, times summed, `failed` united."""
    first = responses[0]
    if len(responses) == 1:
        return first
    results = [result for response in responses for result in response.results]
    numbered = [msgspec.structs.replace(result, index=index) for index, result in enumerate(results)]
    identities: dict[str, EvaluatorIdentity] = {}
    failed: dict[str, str] = {}
    for response in responses:
        identities |= response.evaluators
        failed |= response.failed
    stages = {name for response in responses for name in response.timing_ms}
    timing_ms = {
        name: math.fsum(response.timing_ms.get(name, 0.0) for response in responses)
        for name in sorted(stages)
    }
    return ScoreResponse(first.id, numbered, identities, timing_ms, failed)


def _pairs(prompts: Iterable[Any], images: Iterable[ImageLike]) -> Iterator[tuple[Any, ImageLike]]:
    for prompt, image in zip_longest(prompts, images, fillvalue=_MISSING):
        if prompt is _MISSING or image is _MISSING:
            more, fewer = ("images", "prompts") if prompt is _MISSING else ("prompts", "images")
            raise InputError(f"there are more {more} than {fewer}; give one of each per pair")
        yield prompt, image


def _item(index: int, prompt: Any, image: ImageLike, encoding: Encoding) -> Item:
    if not isinstance(prompt, str):
        raise InputError(f"prompt {index} cannot be sent: it is a {type(prompt).__name__}, not a string")
    if not prompt:
        raise InputError(f"prompt {index} is empty; give it words")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise InputError(f"prompt {index} has more than {MAX_PROMPT_CHARS:,} characters; shorten it")
    if not _is_encodable(prompt):
        raise InputError(
            f"prompt {index} cannot be sent: it contains a lone surrogate; use valid Unicode text"
        )
    try:
        # The str() of a subclass may be anything, such as the name of an enumeration's member.
        return Item(str.__str__(prompt), encode_image(image, encoding))
    except InputError as error:
        raise InputError(f"image {index}: {error}") from None


def _max_size(item: Item) -> int:
    # Four bytes per character at most, so that the prompt need not be encoded to be measured.
    return len(item.image.data) + 4 * len(item.prompt) + _ITEM_OVERHEAD_BYTES


def _request_fields(options: ScoreOptions) -> dict[str, Any]:
    """Return a request's fields without its items."""
    fields = msgspec.structs.asdict(
        ScoreRequest(
            items=[],
            evaluators=None if options.evaluators is None else list(options.evaluators),
            weights=None if options.weights is None else dict(options.weights),
            normalization=options.normalization,
            allow_partial=options.allow_partial,
            deterministic=options.deterministic,
        )
    )
    del fields["items"]
    return fields


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


# Images -------------------------------------------------------------------------------------------------


def encode_image(image: ImageLike, encoding: Encoding = "raw") -> Picture:
    """Return an image in its wire form: a file unchanged, everything else as lossless RGB.

    Raises:
        InputError: not an image that this client can send
    """
    if isinstance(image, (str, os.PathLike)):
        return _encode_path(Path(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _encode_file(bytes(image), "these bytes")
    if isinstance(image, Image.Image):
        _check_size(image.height, image.width, encoding)
        return _encode_pixels(_pillow_pixels(image), encoding)
    pixels = _array_pixels(image)
    _check_size(pixels.shape[0], pixels.shape[1], encoding)
    return _encode_pixels(pixels, encoding)


def _encode_path(path: Path) -> Picture:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError for a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); check the path") from None
    return _encode_file(data, str(path))


def _encode_file(data: bytes, name: str) -> Picture:
    image_format = detect_format(data)
    if image_format is None:
        raise InputError(f"{name}: not a PNG, JPEG or WebP image; convert it to one of these")
    return Picture(data, image_format)  # type: ignore[arg-type]  # detect_format names only formats of the protocol


def _encode_pixels(pixels: Pixels, encoding: Encoding) -> Picture:
    if encoding == "raw":
        # A view: the only copy is the one into the request's body.
        data = np.ascontiguousarray(pixels).data.cast("B")
        return Picture(data, "raw", (pixels.shape[0], pixels.shape[1], 3))  # type: ignore[arg-type]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, **_SAVE_OPTIONS[encoding])
    return Picture(file.getvalue(), encoding)


def _check_size(height: int, width: int, encoding: Encoding) -> None:
    if encoding == "raw" and height * width * _CHANNELS > MAX_BODY_BYTES:
        raise InputError(
            f"{width}x{height} pixels are {height * width * _CHANNELS / 2**20:.0f} MiB raw, more than the "
            f"{MAX_BODY_BYTES / 2**20:.0f} MiB of a request; shrink it, or use the client with encoding='png'"
        )
    if encoding == "webp" and max(height, width) > _MAX_WEBP_SIDE:
        raise InputError(f"{width}x{height} pixels: the limit of WebP is {_MAX_WEBP_SIDE} a side; shrink it")


def _pillow_pixels(image: Image.Image) -> Pixels:
    try:
        return to_rgb(image)
    except (OSError, SyntaxError) as error:  # Pillow reads the pixels of an opened file only now
        raise InputError(f"the image cannot be read ({error}); open a complete file") from None


def _array_pixels(image: Any) -> Pixels:
    """Return the uint8 pixels (H, W, 3) of an array or tensor."""
    is_tensor = hasattr(image, "detach") and hasattr(image, "cpu")
    array = _channels_last(_tensor_values(image)) if is_tensor else image
    if not isinstance(array, np.ndarray):
        raise InputError(f"a {type(image).__name__} is not a Pillow image, array, tensor, path or bytes")
    if array.ndim != _CHANNELS or array.shape[2] != _CHANNELS:
        raise InputError(f"an array must have shape (height, width, 3), not {tuple(array.shape)}")
    if array.size == 0:
        raise InputError(f"the image has no pixels: shape {tuple(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        return _round_floats(array)
    if array.dtype != np.uint8:
        raise InputError(f"pixels must be uint8, or float in [0, 1], not {array.dtype}; convert them")
    return array


def _tensor_values(tensor: Any) -> Array:
    """Return a tensor as an array; numpy has no bfloat16, and float64 holds every smaller float exactly."""
    tensor = tensor.detach().cpu()
    array: Array = tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
    return array


def _channels_last(array: Array) -> Array:
    """Return a tensor's (3, H, W) as (H, W, 3); a uint8 tensor may already be (H, W, 3)."""
    shape = tuple(array.shape)
    channels_first = array.ndim == _CHANNELS and shape[0] == _CHANNELS
    channels_last = array.ndim == _CHANNELS and shape[2] == _CHANNELS and array.dtype == np.uint8
    if channels_first and channels_last:
        raise InputError(f"shape {shape} may mean (3, height, width) or (height, width, 3); give an array")
    if not (channels_first or channels_last):
        raise InputError(f"a tensor must have shape (3, height, width), not {shape}")
    return array.transpose(1, 2, 0) if channels_first else array


def _round_floats(array: Array) -> Pixels:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):
        raise InputError(
            f"float pixels must be in [0, 1], not [{low:.4g}, {high:.4g}]; clamp them, or convert to uint8"
        )
    # In float64 the product is exact for every smaller float: it is rounded once, by rint.
    levels = np.multiply(array, 255.0, dtype=np.float64)
    return np.rint(levels, out=levels).astype(np.uint8)
