"""Request bodies for a batch of prompts and images, and the merging of their responses. No torch, no HTTP.

A batch is split into chunks, each encoded as one request body when it is needed. Images of every kind are
sent lossless: files unchanged, everything else as RGB pixels.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, get_args

import msgspec
from PIL import Image

from reward_service.client.arguments import parse_weight
from reward_service.client.encoding import Encoding, ImageLike, encode_image
from reward_service.client.errors import InputError
from reward_service.protocol import (
    MAX_BODY_BYTES,
    MAX_PROMPT_CHARS,
    EvaluatorIdentity,
    Item,
    Normalization,
    ScoreRequest,
    ScoreResponse,
)

#: A quarter of the service's limit: several requests are in flight at once, and each arrives soon.
CHUNK_BYTES = MAX_BODY_BYTES // 4
#: With the default configuration, four of these are the most pairs that the service admits per client.
CHUNK_PAIRS = 512

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
    if evaluators is not None and not _is_iterable(evaluators):
        raise InputError(f"evaluators must be a list of names, not a {type(evaluators).__name__}")
    if weights is not None and not isinstance(weights, Mapping):
        raise InputError(f"weights must be a mapping from names to numbers, not a {type(weights).__name__}")
    names = None if evaluators is None else tuple(map(_parse_name, evaluators))
    if names == ():
        raise InputError("evaluators is empty; name at least one, or use None for all")
    numbers = None
    if weights is not None:
        numbers = {_parse_name(name): parse_weight(weight) for name, weight in weights.items()}
    return ScoreOptions(names, numbers, normalization, bool(deterministic), bool(allow_partial))


def _parse_name(name: Any) -> str:
    if not isinstance(name, str) or not _is_encodable(name):
        raise InputError(f"an evaluator's name must be a string, not a {type(name).__name__}")
    return str.__str__(name)


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
    counts = _length(prompts), _length(images)
    if None not in counts and counts[0] != counts[1]:
        raise InputError(f"{counts[0]} prompts but {counts[1]} images; give one of each per pair")


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
    except Exception:  # noqa: BLE001 - a TypeError, or an error of a tensor's own
        return False
    return True


def _length(value: Any) -> int | None:
    """Return the length, None where it is unknown: of a generator, or a tensor of nested shapes."""
    try:
        return len(value)
    except Exception:  # noqa: BLE001 - a TypeError, or an error of a tensor's own
        return None
