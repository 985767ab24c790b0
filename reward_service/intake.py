"""A request's way in: bytes to checked, decoded pairs, or a problem that names cause and remedy. No torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from reward_service.config import ServiceConfig
from reward_service.forms import MULTIPART, decode_form
from reward_service.images import Decoded, ImageError, decode
from reward_service.pairs import Pair
from reward_service.problems import ProblemError, at_item
from reward_service.protocol import (
    MAX_PROBLEM_ITEMS,
    Item,
    MalformedBodyError,
    Normalization,
    ProblemItem,
    ScoreRequest,
    decode_request,
)

# About 30 ms of work: what another caller's pictures may have to wait for.
_SLICE_COST = 1024
_RAW_COST, _FILE_COST = 1, 64
_TOO_LONG = re.compile(r"Expected `array` of length <= (\d+) - at `\$\.items`")


@dataclass(frozen=True)
class Admitted:
    """A request that has passed every check; ``lossy[i]`` if picture i came lossily compressed."""

    pairs: list[Pair]
    lossy: list[bool]
    evaluators: tuple[str, ...]
    weights: Mapping[str, float]
    normalization: Normalization
    deterministic: bool
    allow_partial: bool
    decode_s: float


@dataclass
class Parsed:
    """A request whose form and options are right; its pictures are still to be decoded."""

    request: ScoreRequest
    evaluators: tuple[str, ...]
    weights: Mapping[str, float]
    started_s: float = field(default_factory=time.perf_counter)


@dataclass
class Slice:
    """The decoded pictures of some neighbouring items, or what is wrong with them."""

    decoded: list[Decoded] = field(default_factory=list)
    wrong: list[ProblemItem] = field(default_factory=list)


class Intake:
    """Checks requests against a configuration; stateless, so any thread may call it."""

    def __init__(self, config: ServiceConfig) -> None:
        self._limits = config.limits
        self._weights = {name: evaluator.weight for name, evaluator in config.enabled.items()}

    def __call__(self, body: bytes, content_type: str) -> Admitted:
        """Parse, check and decode at once.

        :raises ProblemError: whatever is wrong with the request
        """
        parsed = self.parse(body, content_type)
        return self.admitted(parsed, [self.decode(parsed, part) for part in self.slices(parsed)])

    def parse(self, body: bytes | bytearray, content_type: str) -> Parsed:
        """Parse and check all but the pictures; takes up to a second, so call it off the event loop.

        :param content_type: the whole header
        :raises ProblemError: whatever is wrong with the request
        """
        started = time.perf_counter()
        request = self._parsed(body, content_type)
        names = tuple(dict.fromkeys(request.evaluators or self._weights))
        self._check_known(names)
        return Parsed(request, names, self._weights_for(request, names), started)

    def slices(self, parsed: Parsed) -> Iterator[range]:
        """The items in portions of about 30 ms of decoding: nobody waits for the whole of a large request."""
        items, first, cost = parsed.request.items, 0, 0
        for index, item in enumerate(items):
            cost += _RAW_COST if item.image.format == "raw" else _FILE_COST
            if cost >= _SLICE_COST:
                yield range(first, index + 1)
                first, cost = index + 1, 0
        if first < len(items):
            yield range(first, len(items))

    def decode(self, parsed: Parsed, part: range, reserve: Callable[[int], None] = lambda _: None) -> Slice:
        """Decode a portion of the pictures; call it off the event loop.

        :param reserve: told the bytes of each picture before it is decoded
        :raises ProblemError: what ``reserve`` raises
        """
        found = Slice()
        for index in part:
            picture = parsed.request.items[index].image
            most = self._limits.max_image_pixels
            try:
                image = decode(picture.data, picture.format, picture.shape, most, reserve)
            except ImageError as error:
                found.wrong.append(ProblemItem(error.code, str(error), index))
                if len(found.wrong) == MAX_PROBLEM_ITEMS:
                    break
                continue
            # After the first wrong picture the rest is only looked at for its mistakes.
            found.decoded += [] if found.wrong else [image]
        return found

    def admitted(self, parsed: Parsed, slices: Sequence[Slice]) -> Admitted:
        """The whole request, once its pictures are decoded.

        :raises ProblemError: some of them cannot be
        """
        if wrong := [problem for part in slices for problem in part.wrong]:
            raise ProblemError(wrong[0].code, f"item {wrong[0].index}: {wrong[0].detail}", wrong)
        request, decoded = parsed.request, [image for part in slices for image in part.decoded]
        return Admitted(
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
