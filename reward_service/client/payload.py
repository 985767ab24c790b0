"""The client's batch as bodies of requests, made one after another, and the answers put together again.

No torch, no HTTP.

Whatever a caller has for an image, as it goes over the wire: lossless, and never changed. No torch.
"""

from __future__ import annotations

import io
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from PIL import Image

from reward_service.client.errors import InputError
from reward_service.images import Pixels, flatten, sniff
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
#: a PNG, JPEG or WebP file. Tensors are known by their methods: torch is not imported.
ImageLike = Any
#: How pixels travel. All three are lossless; the last two cost milliseconds an image and save the network.
Encoding = Literal["raw", "png", "webp"]

_CHANNELS = 3
_LONGEST_WEBP_SIDE = 16383
# PNG's default level takes three times as long for a few per cent; WebP's quality is its effort here.
_SAVING: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
}

Array = np.ndarray[Any, np.dtype[Any]]


def check_encoding(encoding: str) -> None:
    """Nothing if pixels can travel so.

    Raises:
        InputError: they cannot
    """
    if encoding not in get_args(Encoding):
        raise InputError(f"encoding must be one of {', '.join(get_args(Encoding))}; the lossy ones are none")


def encode_image(image: ImageLike, encoding: Encoding = "raw") -> Picture:
    """One image as it goes over the wire: files unchanged, everything else as lossless RGB.

    Raises:
        InputError: not an image this client can send
    """
    if isinstance(image, (str, os.PathLike)):
        return _file(Path(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _file_bytes(bytes(image), "these bytes")
    if isinstance(image, Image.Image):
        _check_size(image.height, image.width, encoding)
        return _sent(_opened(image), encoding)
    pixels = _pixels(image)
    _check_size(pixels.shape[0], pixels.shape[1], encoding)
    return _sent(pixels, encoding)


def _file(path: Path) -> Picture:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError for a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); check the path") from None
    return _file_bytes(data, str(path))


def _file_bytes(data: bytes, name: str) -> Picture:
    found = sniff(data)
    if found is None:
        raise InputError(f"{name}: not a PNG, JPEG or WebP image; convert it to one of these")
    return Picture(data, found)  # type: ignore[arg-type]  # sniff names only formats of the protocol


def _opened(image: Image.Image) -> Pixels:
    try:
        return flatten(image)
    except (OSError, SyntaxError) as error:  # Pillow reads an opened file's pixels only now
        raise InputError(f"the image cannot be read ({error}); open a whole file") from None


def _check_size(height: int, width: int, encoding: Encoding) -> None:
    if encoding == "raw" and height * width * _CHANNELS > MAX_BODY_BYTES:
        raise InputError(
            f"{width}x{height} pixels are {height * width * _CHANNELS / 2**20:.0f} MiB raw, more than the "
            f"{MAX_BODY_BYTES / 2**20:.0f} MiB of a request; shrink it, or use the client with encoding='png'"
        )
    if encoding == "webp" and max(height, width) > _LONGEST_WEBP_SIDE:
        raise InputError(f"{width}x{height} pixels: WebP ends at {_LONGEST_WEBP_SIDE} a side; shrink it")


def _sent(pixels: Pixels, encoding: Encoding) -> Picture:
    if encoding == "raw":
        # A view, to be copied but once, into the request's body.
        data = np.ascontiguousarray(pixels).data.cast("B")
        return Picture(data, "raw", (pixels.shape[0], pixels.shape[1], 3))  # type: ignore[arg-type]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, **_SAVING[encoding])
    return Picture(file.getvalue(), encoding)


def _pixels(image: Any) -> Pixels:
    """A uint8 (H, W, 3) array of an array or tensor."""
    is_tensor = hasattr(image, "detach") and hasattr(image, "cpu")
    array = _rows_first(_array_of(image)) if is_tensor else image
    if not isinstance(array, np.ndarray):
        raise InputError(f"a {type(image).__name__} is no Pillow image, array, tensor, path or bytes")
    if array.ndim != _CHANNELS or array.shape[2] != _CHANNELS:
        raise InputError(f"an array must have shape (height, width, 3), not {tuple(array.shape)}")
    if array.size == 0:
        raise InputError(f"the image has no pixels: shape {tuple(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        return _rounded(array)
    if array.dtype != np.uint8:
        raise InputError(f"pixels must be uint8, or float in [0, 1], not {array.dtype}; convert them")
    return array


def _array_of(tensor: Any) -> Array:
    """A tensor's values; numpy knows no bfloat16, and float64 holds every smaller float exactly."""
    tensor = tensor.detach().cpu()
    array: Array = tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
    return array


def _rows_first(array: Array) -> Array:
    """A tensor's (3, H, W) as (H, W, 3); a uint8 one may come as (H, W, 3) already."""
    shape = tuple(array.shape)
    channels_first = array.ndim == _CHANNELS and shape[0] == _CHANNELS
    channels_last = array.ndim == _CHANNELS and shape[2] == _CHANNELS and array.dtype == np.uint8
    if channels_first and channels_last:
        raise InputError(f"shape {shape} may mean (3, height, width) or (height, width, 3); give an array")
    if not (channels_first or channels_last):
        raise InputError(f"a tensor must have shape (3, height, width), not {shape}")
    return array.transpose(1, 2, 0) if channels_first else array


def _rounded(array: Array) -> Pixels:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):
        raise InputError(
            f"float pixels must lie in [0, 1], not [{low:.4g}, {high:.4g}]; clamp them, or make them uint8"
        )
    # In float64 the product is exact for every smaller float: it is rounded once, by rint.
    levels = np.multiply(array, 255.0, dtype=np.float64)
    return np.rint(levels, out=levels).astype(np.uint8)


#: A quarter of what the service takes: several are under way at once, and each is soon there.
CHUNK_BYTES = MAX_BODY_BYTES // 4
#: Four of these are the most pairs that a service admits of one client at once, if left as it comes.
CHUNK_PAIRS = 512
_ITEM_BYTES = 64  # what msgpack adds to a prompt and an image: names, sizes, shape
_ENCODER = msgspec.msgpack.Encoder()
_AXES_OF_ONE = (0, 2, 3)
_MISSING = object()


@dataclass(frozen=True)
class Question:
    """What is asked of every pair: evaluators, weights and options, in plain Python values."""

    evaluators: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = None
    normalization: Normalization = "unit"
    deterministic: bool = False
    allow_partial: bool = False


def question(
    evaluators: Iterable[str] | None,
    weights: Mapping[str, float] | None,
    normalization: Normalization,
    deterministic: bool,
    allow_partial: bool,
) -> Question:
    """The options of a call, checked.

    Raises:
        InputError: one of them has no sense
    """
    if normalization not in get_args(Normalization):
        raise InputError(f"normalization must be one of {', '.join(get_args(Normalization))}")
    if isinstance(evaluators, str):
        raise InputError("evaluators must be a list of names, not one string")
    names = None if evaluators is None else tuple(map(_name, evaluators))
    if names == ():
        raise InputError("evaluators is empty; name at least one, or leave it None for all")
    numbers = None if weights is None else {_name(name): _weight(it) for name, it in weights.items()}
    return Question(names, numbers, normalization, bool(deterministic), bool(allow_partial))


@dataclass(frozen=True)
class Chunk:
    """One request's body; `first` is the place of its first pair in the whole batch."""

    first: int
    pairs: int
    body: bytes
    request_id: str


@dataclass(frozen=True)
class Portions:
    """How large a request may become, and how its pixels travel."""

    pairs: int = CHUNK_PAIRS
    bytes: int = CHUNK_BYTES
    encoding: Encoding = "raw"

    def chunks(self, prompts: Iterable[str], images: Iterable[ImageLike], asked: Question) -> Iterator[Chunk]:
        """The batch as requests in order; each is made when it is asked for, so that few are in memory.

        Raises:
            InputError: before the first is made if the lengths differ, else at the pair at fault
        """
        check_batch(prompts, images)
        call_id = uuid.uuid4().hex
        first, body = 0, _Body(asked)
        for index, (prompt, image) in enumerate(_pairs(prompts, images)):
            item = _item(index, prompt, image, self.encoding)
            if body.pairs and (body.pairs == self.pairs or body.size + _size(item) > self.bytes):
                yield Chunk(first, body.pairs, body.close(), f"{call_id}-{first}")
                first = index
            body.add(item)
            if body.size > MAX_BODY_BYTES - body.options_size:
                needed, limit = (f"{size / 2**20:.1f} MiB" for size in (body.size, MAX_BODY_BYTES))
                raise InputError(f"image {index}: {needed} are more than the {limit} of a request; shrink it")
        if not body.pairs:
            raise InputError("the batch is empty; give at least one prompt and one image")
        yield Chunk(first, body.pairs, body.close(), f"{call_id}-{first}")


class _Body:
    """A request's body while it is filled. Each pair is copied once, and at once: its array may be reused."""

    _ARRAY_OF = b"\xdd"  # msgpack's array whose length takes four bytes, so that it can be written last

    def __init__(self, asked: Question) -> None:
        self._options = _options(asked)
        self.options_size = len(_ENCODER.encode({**self._options, "items": None}))
        self._clear()

    def _clear(self) -> None:
        self.pairs, self._items = 0, bytearray(self._ARRAY_OF + bytes(4))

    @property
    def size(self) -> int:
        """Bytes of the pairs so far."""
        return len(self._items)

    def add(self, item: Item) -> None:
        """One pair more."""
        _ENCODER.encode_into(item, self._items, -1)
        self.pairs += 1

    def close(self) -> bytes:
        """The body; the next one begins."""
        self._items[1:5] = self.pairs.to_bytes(4, "big")
        body = _ENCODER.encode({**self._options, "items": msgspec.Raw(self._items)})
        self._clear()
        return body


def check_batch(prompts: Iterable[str], images: Iterable[ImageLike]) -> None:
    """Nothing if the two can be a batch.

    Raises:
        InputError: they cannot, or their lengths differ
    """
    if isinstance(prompts, (str, bytes)):
        raise InputError("prompts must be a list of strings, not one string")
    one_array = getattr(images, "ndim", None) in _AXES_OF_ONE
    if one_array or isinstance(images, (str, bytes, bytearray, memoryview, PathLike, Image.Image)):
        raise InputError("images must be a list of images or an array of four axes, not one image")
    for name, given in (("prompts", prompts), ("images", images)):
        if isinstance(given, (Mapping, Set)) or not _iterable(given):
            raise InputError(f"{name} must be a list, not a {type(given).__name__}")
    if isinstance(prompts, Sized) and isinstance(images, Sized) and len(prompts) != len(images):
        raise InputError(f"{len(prompts)} prompts but {len(images)} images; give one of each per pair")


def merge(responses: Sequence[ScoreResponse]) -> ScoreResponse:
    """One response of several chunks': results renumbered, times added, failed evaluators of any of them."""
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
    parts = {name for response in responses for name in response.timing_ms}
    timing = {
        name: math.fsum(response.timing_ms.get(name, 0.0) for response in responses) for name in sorted(parts)
    }
    return ScoreResponse(first.id, numbered, identities, timing, failed)


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
    if not _encodable(prompt):
        raise InputError(f"prompt {index} cannot be sent: half a surrogate pair is no character")
    try:
        # What str() makes of a subclass is the subclass's own affair: an enumeration's name, say.
        return Item(str.__str__(prompt), encode_image(image, encoding))
    except InputError as error:
        raise InputError(f"image {index}: {error}") from None


def _size(item: Item) -> int:
    # Four bytes a character at most, so that the prompt need not be encoded to be measured.
    return len(item.image.data) + 4 * len(item.prompt) + _ITEM_BYTES


def _options(asked: Question) -> dict[str, Any]:
    """A request's fields, but for its items."""
    options = msgspec.structs.asdict(
        ScoreRequest(
            items=[],
            evaluators=None if asked.evaluators is None else list(asked.evaluators),
            weights=None if asked.weights is None else dict(asked.weights),
            normalization=asked.normalization,
            allow_partial=asked.allow_partial,
            deterministic=asked.deterministic,
        )
    )
    del options["items"]
    return options


def _name(given: Any) -> str:
    if not isinstance(given, str) or not _encodable(given):
        raise InputError(f"an evaluator's name must be a string, not a {type(given).__name__}")
    return str.__str__(given)


def _weight(given: Any) -> float:
    try:
        weight = float(given)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError("a weight must be a finite number of at least 0")
    return weight


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _iterable(given: Any) -> bool:
    try:
        iter(given)
    except TypeError:
        return False
    return True
