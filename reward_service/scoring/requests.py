"""A request's way in: bytes to checked, decoded pairs, or a problem that names cause and remedy. No torch.

multipart/form-data as a score request, for people with curl. No torch, no web.

Prompts and images pair up in the order they come in: as many prompts as images, or one for all of them::

    curl -F prompt='a red circle' -F image=@one.png -F image=@two.jpg http://127.0.0.1:8000/score

Further fields, each at most once: `evaluators` (names with commas between), `weights` (a JSON object),
`normalization`, `deterministic` and `allow_partial` (true or false).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from reward_service.config import ServiceConfig
from reward_service.engine.types import Pair
from reward_service.images import Decoded, ImageError, decode
from reward_service.protocol import (
    MAX_PAIRS,
    MAX_PROBLEM_ITEMS,
    Item,
    MalformedBodyError,
    Normalization,
    ProblemError,
    ProblemItem,
    ScoreRequest,
    at_item,
    decode_request,
    not_the_schema,
)

MULTIPART = "multipart/form-data"
OPTIONS = ("evaluators", "weights", "normalization", "deterministic", "allow_partial")
_MOST_PARTS = 2 * MAX_PAIRS + len(OPTIONS)
_BOOLEANS = {"true": True, "false": False}

# It quotes the sender.
logging.getLogger(MultipartParser.__module__).setLevel(logging.ERROR)


def decode_form(body: bytes | bytearray, content_type: str) -> ScoreRequest:
    """Decode a form.

    Args:
        content_type: the whole header, with the boundary

    Raises:
        MalformedBodyError: not a form at all (`syntax`), or not one that makes a request
    """
    prompts: list[str] = []
    images: list[bytes] = []
    options: dict[str, Any] = {}
    for name, value in _parts(bytes(body), content_type):
        if name == "image":
            images.append(value)
        elif name == "prompt":
            prompts.append(_text(value, "prompt"))
        elif name not in OPTIONS:
            known = ", ".join(("prompt", "image", *OPTIONS))
            raise _unfit(f"a field has another name than {known}")
        elif name in options:
            raise _unfit(f"field {name} comes twice; it may come once")
        else:
            options[name] = _option(name, _text(value, name))
    items = [
        {"prompt": prompt, "image": {"data": image}}
        for prompt, image in zip(_one_each(prompts, images), images, strict=True)
    ]
    try:
        return msgspec.convert({"items": items, **options}, ScoreRequest, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise not_the_schema(error) from None


def _one_each(prompts: list[str], images: list[bytes]) -> list[str]:
    if len(prompts) == 1:
        return prompts * len(images)
    if len(prompts) != len(images):
        counts = f"{len(prompts)} prompts for {len(images)} images"
        raise _unfit(f"{counts}; send one prompt for all images, or one each")
    return prompts


def _option(name: str, text: str) -> Any:
    if name == "evaluators":
        return [part.strip() for part in text.split(",")]
    if name == "weights":
        try:
            return msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            raise _unfit('field weights is not JSON; write it as {"clip": 1}') from None
    if name == "normalization":
        return text
    if text not in _BOOLEANS:
        raise _unfit(f"field {name} must be true or false")
    return _BOOLEANS[text]


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _unfit(f"field {name} is not UTF-8") from None


def _unfit(detail: str) -> MalformedBodyError:
    return MalformedBodyError(detail, syntax=False)


class _Collector:
    """Callbacks of the parser: the parts by name, in their order."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bytes]] = []
        self.whole = False
        self._field, self._value = b"", b""
        self._name: str | None = None
        self._pieces: list[bytes] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._collect("_field"),
            "on_header_value": self._collect("_value"),
            "on_header_end": self._header,
            "on_part_data": lambda body, start, end: self._pieces.append(body[start:end]),
            "on_part_end": self._end,
            "on_end": lambda: setattr(self, "whole", True),
        }

    def _collect(self, attribute: str) -> Callable[[bytes, int, int], None]:
        return lambda body, start, end: setattr(self, attribute, getattr(self, attribute) + body[start:end])

    def _begin(self) -> None:
        if len(self.parts) == _MOST_PARTS:
            raise _unfit(f"more than {_MOST_PARTS} fields; send fewer pairs a request")
        self._name, self._pieces = None, []

    def _header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, parameters = parse_options_header(self._value)
            self._name = parameters.get(b"name", b"").decode("latin-1")
        self._field, self._value = b"", b""

    def _end(self) -> None:
        if self._name is None:
            raise MalformedBodyError("the body is not a valid form: a field has no name", syntax=True)
        self.parts.append((self._name, b"".join(self._pieces)))


def _parts(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary")
    if not boundary:
        raise MalformedBodyError("the body is not a valid form: its type names no boundary", syntax=True)
    collector = _Collector()
    try:
        MultipartParser(boundary, collector.callbacks()).write(body)
    except FormParserError:
        raise MalformedBodyError("the body is not a valid form", syntax=True) from None
    if not collector.whole:
        raise MalformedBodyError("the body is not a valid form: it breaks off", syntax=True)
    return collector.parts


# About 30 ms of work: what another caller's images may have to wait for.
_SLICE_COST = 1024
_RAW_COST, _FILE_COST = 1, 64
_TOO_LONG = re.compile(r"Expected `array` of length <= (\d+) - at `\$\.items`")


@dataclass(frozen=True)
class DecodedRequest:
    """A request that has passed every check; `lossy[i]` if image i came lossily compressed."""

    pairs: list[Pair]
    lossy: list[bool]
    evaluators: tuple[str, ...]
    weights: Mapping[str, float]
    normalization: Normalization
    deterministic: bool
    allow_partial: bool
    decode_s: float


@dataclass
class ParsedRequest:
    """A request whose form and options are right; its images are still to be decoded."""

    request: ScoreRequest
    evaluators: tuple[str, ...]
    weights: Mapping[str, float]
    started_s: float = field(default_factory=time.perf_counter)


@dataclass
class DecodedSlice:
    """The decoded images of some neighbouring items, or what is wrong with them."""

    decoded: list[Decoded] = field(default_factory=list)
    wrong: list[ProblemItem] = field(default_factory=list)


class RequestParser:
    """Checks requests against a configuration; stateless, so any thread may call it."""

    def __init__(self, config: ServiceConfig) -> None:
        self._limits = config.limits
        self._weights = {name: evaluator.weight for name, evaluator in config.enabled.items()}

    def __call__(self, body: bytes, content_type: str) -> DecodedRequest:
        """Parse, check and decode at once.

        Raises:
            ProblemError: whatever is wrong with the request
        """
        parsed = self.parse(body, content_type)
        return self.admitted(parsed, [self.decode(parsed, part) for part in self.slices(parsed)])

    def parse(self, body: bytes | bytearray, content_type: str) -> ParsedRequest:
        """Parse and check all but the images; takes up to a second, so call it off the event loop.

        Args:
            content_type: the whole header

        Raises:
            ProblemError: whatever is wrong with the request
        """
        started = time.perf_counter()
        request = self._parsed(body, content_type)
        names = tuple(dict.fromkeys(request.evaluators or self._weights))
        self._check_known(names)
        return ParsedRequest(request, names, self._weights_for(request, names), started)

    def slices(self, parsed: ParsedRequest) -> Iterator[range]:
        """The items in portions of about 30 ms of decoding: nobody waits for the whole of a large request."""
        items, first, cost = parsed.request.items, 0, 0
        for index, item in enumerate(items):
            cost += _RAW_COST if item.image.format == "raw" else _FILE_COST
            if cost >= _SLICE_COST:
                yield range(first, index + 1)
                first, cost = index + 1, 0
        if first < len(items):
            yield range(first, len(items))

    def decode(
        self, parsed: ParsedRequest, part: range, reserve: Callable[[int], None] = lambda _: None
    ) -> DecodedSlice:
        """Decode a portion of the images; call it off the event loop.

        Args:
            reserve: told the bytes of each image before it is decoded

        Raises:
            ProblemError: what `reserve` raises
        """
        found = DecodedSlice()
        for index in part:
            rgb = parsed.request.items[index].image
            most = self._limits.max_image_pixels
            try:
                image = decode(rgb.data, rgb.format, rgb.shape, most, reserve)
            except ImageError as error:
                found.wrong.append(ProblemItem(error.code, str(error), index))
                if len(found.wrong) == MAX_PROBLEM_ITEMS:
                    break
                continue
            # After the first wrong image the rest is only looked at for its mistakes.
            found.decoded += [] if found.wrong else [image]
        return found

    def admitted(self, parsed: ParsedRequest, slices: Sequence[DecodedSlice]) -> DecodedRequest:
        """The whole request, once its images are decoded.

        Raises:
            ProblemError: some of them cannot be
        """
        if wrong := [problem for part in slices for problem in part.wrong]:
            raise ProblemError(wrong[0].code, f"item {wrong[0].index}: {wrong[0].detail}", wrong)
        request, decoded = parsed.request, [image for part in slices for image in part.decoded]
        return DecodedRequest(
            pairs=[Pair(item.prompt, image.rgb) for item, image in zip(request.items, decoded, strict=True)],
            lossy=[image.lossy for image in decoded],
            evaluators=parsed.evaluators,
            weights=parsed.weights,
            normalization=request.normalization,
            deterministic=request.deterministic,
            allow_partial=request.allow_partial,
            decode_s=time.perf_counter() - parsed.started_s,
        )

    def _parsed(self, body: bytes | bytearray, content_type: str) -> ScoreRequest:
        media_type = content_type.partition(";")[0].strip().lower()
        try:
            if media_type == MULTIPART:
                request = decode_form(body, content_type)
            else:
                request = decode_request(body, media_type)
        except MalformedBodyError as error:
            raise _schema_problem(error) from None
        if len(request.items) > self._limits.max_pairs:
            raise _too_many(self._limits.max_pairs)
        self._check_prompts(request.items)
        return request

    def _check_prompts(self, items: Sequence[Item]) -> None:
        most = self._limits.max_prompt_chars
        for index, item in enumerate(items):
            if len(item.prompt) > most:
                detail = f"the prompt is longer than {most} characters; shorten it"
                raise at_item("invalid_request", detail, index)

    def _check_known(self, names: Iterable[str]) -> None:
        if any(name not in self._weights for name in names):
            known = ", ".join(self._weights)
            raise at_item("unknown_evaluator", f"there is no such evaluator here; choose from {known}", None)

    def _weights_for(self, request: ScoreRequest, names: Sequence[str]) -> Mapping[str, float]:
        given = self._weights if request.weights is None else request.weights
        self._check_known(given)
        weights = {name: given.get(name, 0.0) for name in names}
        if not 0.0 < sum(weights.values()) < float("inf"):
            message = "the weights of the evaluators asked for must be finite and not all 0; others weigh 0"
            raise at_item("bad_weights", message, None)
        return weights


def _too_many(limit: int) -> ProblemError:
    return ProblemError("too_many_pairs", f"at most {limit} pairs a request; send several requests")


def _schema_problem(error: MalformedBodyError) -> ProblemError:
    message = str(error)
    if error.syntax:
        return ProblemError("malformed_body", f"{message}; send it whole, /docs shows its form")
    # msgspec's words for `"items": []` name a schema; these name the mistake.
    if message.startswith("Expected `array` of length >= 1 - at `$.items`"):
        return ProblemError("empty_batch", "items is empty; send at least one prompt with its image")
    if found := _TOO_LONG.match(message):
        return _too_many(int(found[1]))
    if message.startswith("more than"):
        return ProblemError("too_many_pairs", message)
    if message.startswith("Invalid base64"):
        remedy = "send plain base64 without line breaks or a data: prefix"
        return at_item("invalid_request", f"{message}; {remedy}", error.index)
    return at_item("invalid_request", f"{message}; see /docs for the schema", error.index)
