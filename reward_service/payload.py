"""The client's batch as bodies of requests, made one after another, and the answers put together again.

No torch, no HTTP.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from itertools import zip_longest
from os import PathLike
from typing import Any, get_args

import msgspec
from PIL import Image

from reward_service.failures import InputError
from reward_service.pictures import Encoding, ImageLike, picture
from reward_service.protocol import (
    MAX_BODY_BYTES,
    MAX_PROMPT_CHARS,
    EvaluatorIdentity,
    Item,
    Normalization,
    ScoreRequest,
    ScoreResponse,
)

#: A quarter of what the service takes: several are under way at once, and each is soon there.
CHUNK_BYTES = MAX_BODY_BYTES // 4
#: Four of these are the most pairs that a service admits of one client at once, if left as it comes.
CHUNK_PAIRS = 512
_ITEM_BYTES = 64  # what msgpack adds to a prompt and a picture: names, sizes, shape
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

    :raises InputError: one of them has no sense
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
    """One request's body; ``first`` is the place of its first pair in the whole batch."""

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

        :raises InputError: before the first is made if the lengths differ, else at the pair at fault
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

    :raises InputError: they cannot, or their lengths differ
    """
    if isinstance(prompts, (str, bytes)):
        raise InputError("prompts must be a list of strings, not one string")
    one_array = getattr(images, "ndim", None) in _AXES_OF_ONE
    if one_array or isinstance(images, (str, bytes, bytearray, memoryview, PathLike, Image.Image)):
        raise InputError("images must be a list of pictures or an array of four axes, not one picture")
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
        return Item(str.__str__(prompt), picture(image, encoding))
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
