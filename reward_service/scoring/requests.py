"""Parse, validate and decode a score request: bytes to pairs, or a problem with cause and remedy. No torch.

A request is JSON, msgpack or a form (multipart/form-data, for curl users). In a form, prompts and images pair
up in order: as many prompts as images, or one prompt for all images:

    curl -F prompt='a red circle' -F image=@one.png -F image=@two.jpg http://127.0.0.1:8000/score

Further fields, each at most once: `evaluators` (names separated by commas), `weights` (a JSON object),
`normalization`, `deterministic` and `allow_partial` (`true` or `false`).
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
from reward_service.images import DecodedImage, ImageError, decode
from reward_service.protocol import (
    MAX_PAIRS,
    MAX_PROBLEM_ITEMS,
    Item,
    MalformedBodyError,
    Normalization,
    ProblemError,
    ProblemItem,
    ScoreRequest,
    decode_request,
    item_problem,
    schema_error,
)

MULTIPART = "multipart/form-data"
#: Fields of a form besides `prompt` and `image`.
OPTIONS = ("evaluators", "weights", "normalization", "deterministic", "allow_partial")

# About 30 ms of decoding: how long another client's images wait at most.
_SLICE_COST = 1024
_RAW_COST, _FILE_COST = 1, 64
_TOO_LONG = re.compile(r"Expected `array` of length <= (\d+) - at `\$\.items`")
_MAX_PARTS = 2 * MAX_PAIRS + len(OPTIONS)
_BOOLEANS = {"true": True, "false": False}

# Its log messages quote the request.
logging.getLogger(MultipartParser.__module__).setLevel(logging.ERROR)


@dataclass(frozen=True)
class DecodedRequest:
    """Valid request with decoded images; `lossy[i]` is True if image i was lossily compressed."""

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
    """Valid request whose images are not decoded yet."""

    request: ScoreRequest
    evaluators: tuple[str, ...]
    weights: Mapping[str, float]
    started_s: float = field(default_factory=time.perf_counter)


@dataclass
class DecodedSlice:
    """DecodedImage images of consecutive items, or the problems with them."""

    images: list[DecodedImage] = field(default_factory=list)
    problems: list[ProblemItem] = field(default_factory=list)


class RequestParser:
    """Parser and validator of requests for one configuration; stateless, so any thread may call it."""

    def __init__(self, config: ServiceConfig) -> None:
        self._limits = config.limits
        self._weights = {name: evaluator.weight for name, evaluator in config.enabled.items()}

    def __call__(self, body: bytes, content_type: str) -> DecodedRequest:
        """Parse, validate and decode a request in one call.

        Args:
            body: the request body
            content_type: the whole header

        Raises:
            ProblemError: if the request is invalid
        """
        parsed = self.parse(body, content_type)
        return self.assemble(parsed, [self.decode(parsed, part) for part in self.slices(parsed)])

    def parse(self, body: bytes | bytearray, content_type: str) -> ParsedRequest:
        """Parse a request and validate all but its images; takes up to a second: call it off the event loop.

        Args:
            body: the request body
            content_type: the whole header

        Raises:
            ProblemError: if the request is invalid
        """
        started_s = time.perf_counter()
        request = self._parse_body(body, content_type)
        names = tuple(dict.fromkeys(request.evaluators or self._weights))
        self._check_evaluators(names)
        return ParsedRequest(request, names, self._weights_for(request, names), started_s)

    def slices(self, parsed: ParsedRequest) -> Iterator[range]:
        """Yield ranges of items that take about 30 ms to decode, so that requests can take turns."""
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
        """Decode the images of a slice; call it off the event loop.

        Args:
            parsed: the request
            part: indices of the slice's items
            reserve: called with the decoded size of each image, in bytes, before it is decoded

        Raises:
            ProblemError: if `reserve` raises it
        """
        found = DecodedSlice()
        for index in part:
            sent = parsed.request.items[index].image
            try:
                image = decode(sent.data, sent.format, sent.shape, self._limits.max_image_pixels, reserve)
            except ImageError as error:
                found.problems.append(ProblemItem(error.code, str(error), index))
                if len(found.problems) == MAX_PROBLEM_ITEMS:
                    break
                continue
            # After the first undecodable image the others are decoded only to report their problems.
            found.images += [] if found.problems else [image]
        return found

    def assemble(self, parsed: ParsedRequest, slices: Sequence[DecodedSlice]) -> DecodedRequest:
        """Return the request with the images of its slices.

        Raises:
            ProblemError: if an image cannot be decoded
        """
        if problems := [problem for part in slices for problem in part.problems]:
            first = problems[0]
            raise ProblemError(first.code, f"item {first.index}: {first.detail}", problems)
        request, decoded = parsed.request, [image for part in slices for image in part.images]
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

    def _parse_body(self, body: bytes | bytearray, content_type: str) -> ScoreRequest:
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
        limit = self._limits.max_prompt_chars
        for index, item in enumerate(items):
            if len(item.prompt) > limit:
                detail = f"the prompt is longer than {limit} characters; shorten it"
                raise item_problem("invalid_request", detail, index)

    def _check_evaluators(self, names: Iterable[str]) -> None:
        if any(name not in self._weights for name in names):
            known = ", ".join(self._weights)
            raise item_problem("unknown_evaluator", f"unknown evaluator; choose from {known}", None)

    def _weights_for(self, request: ScoreRequest, names: Sequence[str]) -> Mapping[str, float]:
        given = self._weights if request.weights is None else request.weights
        self._check_evaluators(given)
        weights = {name: given.get(name, 0.0) for name in names}
        if not 0.0 < sum(weights.values()) < float("inf"):
            message = (
                "the weights of the requested evaluators must be finite and not all 0; "
                "an evaluator that `weights` does not name has weight 0"
            )
            raise item_problem("bad_weights", message, None)
        return weights


def _too_many(limit: int) -> ProblemError:
    return ProblemError("too_many_pairs", f"at most {limit} pairs per request; send several requests")


def _schema_problem(error: MalformedBodyError) -> ProblemError:
    message = str(error)
    if error.syntax:
        return ProblemError("malformed_body", f"{message}; send a complete body, see /docs for the schema")
    # msgspec's message for `"items": []` names the schema; this one names the mistake.
    if message.startswith("Expected `array` of length >= 1 - at `$.items`"):
        return ProblemError("empty_batch", "items is empty; send at least one prompt with an image")
    if found := _TOO_LONG.match(message):
        return _too_many(int(found[1]))
    if message.startswith("more than"):
        return ProblemError("too_many_pairs", message)
    if message.startswith("Invalid base64"):
        remedy = "send plain base64 without line breaks or a data: prefix"
        return item_problem("invalid_request", f"{message}; {remedy}", error.index)
    return item_problem("invalid_request", f"{message}; see /docs for the schema", error.index)


def decode_form(body: bytes | bytearray, content_type: str) -> ScoreRequest:
    """Decode a form.

    Args:
        body: the request body
        content_type: the whole header, with the boundary

    Raises:
        MalformedBodyError: if the body is not a form (`syntax`), or the form is not a valid request
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
            raise _invalid_form(f"unknown field; expected one of {known}")
        elif name in options:
            raise _invalid_form(f"field {name} is given twice; send it once")
        else:
            options[name] = _option(name, _text(value, name))
    items = [
        {"prompt": prompt, "image": {"data": image}}
        for prompt, image in zip(_prompt_per_image(prompts, images), images, strict=True)
    ]
    try:
        return msgspec.convert({"items": items, **options}, ScoreRequest, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise schema_error(error) from None


def _prompt_per_image(prompts: list[str], images: list[bytes]) -> list[str]:
    if len(prompts) == 1:
        return prompts * len(images)
    if len(prompts) != len(images):
        counts = f"{len(prompts)} prompts for {len(images)} images"
        raise _invalid_form(f"{counts}; send one prompt for all images, or one prompt per image")
    return prompts


def _option(name: str, text: str) -> Any:
    if name == "evaluators":
        return [part.strip() for part in text.split(",")]
    if name == "weights":
        try:
            return msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            raise _invalid_form('field weights is not JSON; send a JSON object such as {"clip": 1}') from None
    if name == "normalization":
        return text
    if text not in _BOOLEANS:
        raise _invalid_form(f"field {name} must be true or false")
    return _BOOLEANS[text]


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _invalid_form(f"field {name} is not UTF-8") from None


def _invalid_form(detail: str) -> MalformedBodyError:
    return MalformedBodyError(detail, syntax=False)


class _PartCollector:
    """Callbacks for the multipart parser; collects names and values of the parts in order."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bytes]] = []
        self.complete = False
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
            "on_end": lambda: setattr(self, "complete", True),
        }

    def _collect(self, attribute: str) -> Callable[[bytes, int, int], None]:
        return lambda body, start, end: setattr(self, attribute, getattr(self, attribute) + body[start:end])

    def _begin(self) -> None:
        if len(self.parts) == _MAX_PARTS:
            raise _invalid_form(f"more than {_MAX_PARTS} fields; send fewer pairs per request")
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
        raise MalformedBodyError("the body is not a valid form: Content-Type has no boundary", syntax=True)
    collector = _PartCollector()
    try:
        MultipartParser(boundary, collector.callbacks()).write(body)
    except FormParserError:
        raise MalformedBodyError("the body is not a valid form", syntax=True) from None
    if not collector.complete:
        raise MalformedBodyError("the body is not a valid form: it is incomplete", syntax=True)
    return collector.parts
