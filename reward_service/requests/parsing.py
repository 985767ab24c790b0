"""Parse, validate and decode a score request: bytes to pairs, or a problem with cause and remedy. No torch.

A request is JSON, msgpack or a form (multipart/form-data, for curl users; see `forms`).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from reward_service.config import ServiceConfig
from reward_service.engine.types import Pair
from reward_service.images import DecodedImage, ImageError, decode
from reward_service.protocol import (
    MAX_PROBLEM_ITEMS,
    Item,
    MalformedBodyError,
    Normalization,
    Picture,
    ProblemError,
    ProblemItem,
    ScoreRequest,
    decode_request,
    item_problem,
)
from reward_service.requests.decoding import DecoderLane, OverrunError, usual_lane, usual_seconds
from reward_service.requests.forms import MULTIPART, decode_form

# A slice takes about so long, or holds one image: other clients' images wait for it.
_SLICE_S = 0.03
DecodeImage = Callable[[Picture, Callable[[int], None]], DecodedImage]
_TOO_LONG = re.compile(r"Expected `array` of length <= (\d+) - at `\$\.items`")


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
    reserved: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Slice:
    """Consecutive items whose images are decoded on one lane, and how long that usually takes."""

    items: range
    lane: DecoderLane
    cost_s: float


@dataclass
class DecodedSlice:
    """Decoded images of consecutive items, or the problems with them.

    `left`: the items that were not decoded; `overrun` if that is because the first of them takes much longer
    than usual, otherwise the time was over.
    """

    images: list[DecodedImage] = field(default_factory=list)
    problems: list[ProblemItem] = field(default_factory=list)
    left: range = range(0)
    overrun: bool = False


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
        return self.assemble(parsed, [self.decode(parsed, range(len(parsed.request.items)))])

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

    def slices(self, parsed: ParsedRequest, items: range | None = None) -> Iterator[Slice]:
        """Yield slices of a request that take about 30 ms to decode, so that requests can take turns.

        Args:
            parsed: the request
            items: consecutive items to decode; None for all
        """
        costs: list[float] = []
        first, lane = 0, usual_lane(0.0)
        for index in range(len(parsed.request.items)) if items is None else items:
            sent = parsed.request.items[index].image
            cost_s = usual_seconds(sent.data, sent.format)
            if costs and (sum(costs) >= _SLICE_S or usual_lane(cost_s) != lane):
                yield Slice(range(first, index), lane, sum(costs))
                costs = []
            if not costs:
                first, lane = index, usual_lane(cost_s)
            costs.append(cost_s)
        if costs:
            yield Slice(range(first, first + len(costs)), lane, sum(costs))

    def decode(
        self,
        parsed: ParsedRequest,
        items: range,
        reserve: Callable[[int], None] = lambda _: None,
        decode_image: DecodeImage | None = None,
        limit_s: float = math.inf,
    ) -> DecodedSlice:
        """Decode the images of consecutive items, at least one; call it off the event loop.

        Args:
            parsed: the request
            items: indices of the items
            reserve: called with the decoded size of each image, in bytes, before it is decoded
            decode_image: decodes one image; None to do it in this process. It may raise `OverrunError` to
                leave the image and those behind it
            limit_s: no further image is started after so many seconds

        Raises:
            ProblemError: if `reserve` raises it
        """
        found, end_s = DecodedSlice(), time.monotonic() + limit_s
        decode_image = decode_image or self._decode_here
        for index in items:
            if index > items.start and time.monotonic() > end_s:
                found.left = range(index, items.stop)
                break

            def reserve_once(size: int, index: int = index) -> None:
                if index not in parsed.reserved:
                    reserve(size)
                    parsed.reserved.add(index)

            try:
                image = decode_image(parsed.request.items[index].image, reserve_once)
            except ImageError as error:
                found.problems.append(ProblemItem(error.code, str(error), index))
                if len(found.problems) == MAX_PROBLEM_ITEMS:
                    break
                continue
            except OverrunError:
                found.left, found.overrun = range(index, items.stop), True
                break
            # After the first undecodable image the others are decoded only to report their problems.
            found.images += [] if found.problems else [image]
        return found

    def _decode_here(self, sent: Picture, reserve: Callable[[int], None]) -> DecodedImage:
        return decode(sent.data, sent.format, sent.shape, self._limits.max_image_pixels, reserve)

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
