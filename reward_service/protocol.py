"""Wire types of the service: one schema for JSON and msgpack, request, response and problem.

In JSON the image's bytes are base64, in msgpack they are binary; the types are the same.
Decoding refuses unknown fields and wrong types; it needs no torch.

Everything that can be wrong with a request, as RFC 9457 problem details. The input is never echoed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

JSON = "application/json"
MSGPACK = "application/msgpack"
PROBLEM = "application/problem+json"
MAX_PROBLEM_ITEMS = 10
MAX_PAIRS = 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_PROMPT_CHARS = 10_000
_MAX_NAMES = 64
# What a batch of short prompts needs sixteen times over. Each comma of JSON can cost 150 bytes of memory.
_MAX_COMMAS = 128 * MAX_PAIRS

ImageFormat = Literal["png", "jpeg", "webp", "raw"]
Normalization = Literal["unit", "z", "raw"]
Weight = Annotated[float, Meta(ge=0)]
# Bounded, because a refusal names it, and JSON has numbers of thousands of digits.
Side = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Picture(Struct, frozen=True, forbid_unknown_fields=True):
    """One image: an encoded file, or `raw` uint8 RGB values in rows.

    `format` may be left out for an encoded file: its first bytes tell. `shape` is (height, width, 3)
    in pixels, for `raw` only.
    """

    data: bytes
    format: ImageFormat | None = None
    shape: tuple[Side, Side, Literal[3]] | None = None


class Item(Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt and the image to judge by it."""

    prompt: Annotated[str, Meta(min_length=1, max_length=MAX_PROMPT_CHARS)]
    image: Picture


class ScoreRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A batch of pairs and how to score them.

    `evaluators`: names, or null for all that the service has. `weights`: evaluator → weight of its
    normalized score in the reward; an evaluator that is not named then weighs 0; null for the service's own.
    `normalization`: which of the three numbers the reward is made of. `allow_partial`: take the scores of
    the other evaluators when one is out of service; without it that is an error. `deterministic`: let
    scores depend on nothing but the pair; slower.
    """

    items: Annotated[list[Item], Meta(min_length=1, max_length=MAX_PAIRS)]
    evaluators: Annotated[list[str], Meta(min_length=1, max_length=_MAX_NAMES)] | None = None
    weights: Annotated[dict[str, Weight], Meta(max_length=_MAX_NAMES)] | None = None
    normalization: Normalization = "unit"
    allow_partial: bool = False
    deterministic: bool = False


class EvaluatorScore(Struct, frozen=True):
    """One evaluator's number: as its formula gives it, in calibrated deviations, and as Φ(z) in (0, 1)."""

    raw: float
    z: float
    unit: float


class ItemResult(Struct, frozen=True):
    """The scores of one pair; `reward` is the weighted mean of its normalized scores.

    It is null, never a mean of something else, if an evaluator that it is made of has `failed`.
    """

    index: int
    reward: float | None
    scores: dict[str, EvaluatorScore]
    truncated_prompt: bool
    lossy_input: bool


class EvaluatorIdentity(Struct, frozen=True):
    """What produced an evaluator's numbers.

    `fingerprint`: hash of weights, preprocessing, tokenizer, formula and dtype. `calibration`: hash of
    the mean and deviation behind z and unit.
    """

    fingerprint: str
    calibration: str


class ScoreResponse(Struct, frozen=True):
    """Results in the order of the request's items, all of them or none.

    `failed`: evaluator → problem code, for those that were asked for and are out of service; empty unless
    the request said `allow_partial`. Neither `evaluators` nor any result has them.
    """

    id: str
    results: list[ItemResult]
    evaluators: dict[str, EvaluatorIdentity]
    timing_ms: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)


class EvaluatorDescription(Struct, frozen=True):
    """One configured evaluator, as `/v1/evaluators` lists it."""

    fingerprint: str
    calibration: str
    formula: str
    mean: float
    std: float
    weight: float
    provisional: bool


class EvaluatorList(Struct, frozen=True):
    """Answer of `/v1/evaluators`: what is configured and on what it runs."""

    evaluators: dict[str, EvaluatorDescription]
    device: str
    dtype: str


class Health(Struct, frozen=True):
    """Answer of the health routes; `detail` says what is being waited for."""

    status: Literal["live", "ready", "loading", "stopping", "failed"]
    detail: str = ""


class ProblemItem(Struct, frozen=True):
    """One thing that is wrong; `index` is the item's place in the request, null if it is no item's."""

    code: str
    detail: str
    index: int | None = None


class Problem(Struct, frozen=True):
    """RFC 9457 problem details, with a code, whether asking again can help, and at most ten items."""

    title: str
    status: int
    code: str
    detail: str
    retryable: bool
    id: str
    type: str = "about:blank"
    errors: Annotated[list[ProblemItem], Meta(max_length=MAX_PROBLEM_ITEMS)] = field(default_factory=list)


class MalformedBodyError(Exception):
    """A body that is not a request of this protocol; `index` is the item at fault, if one is."""

    def __init__(self, detail: str, *, syntax: bool, index: int | None = None) -> None:
        super().__init__(detail)
        self.syntax = syntax
        self.index = index


_ITEM_PATH = re.compile(r"\$\.items\[(\d+)\]")
# The two messages of msgspec that quote the sender; the path that may follow is the schema's own.
_QUOTED_INPUT = re.compile(
    r"(?:unknown field|enum value) (?P<quote>[`'])(?P<input>.*)(?P=quote)(?= - at `[^`]*`$|$)", re.DOTALL
)


def decode_request(body: bytes | bytearray, content_type: str) -> ScoreRequest:
    """Decode a request body of one of the two content types.

    Of a key that comes twice the last value counts.

    Raises:
        MalformedBodyError: not JSON/msgpack at all (`syntax`), or not this schema
    """
    decoder: Any = msgspec.msgpack if content_type == MSGPACK else msgspec.json
    # msgspec reads a JSON array whole before it looks at its length: gigabytes for a hostile one.
    if content_type == JSON and body.count(b",") > _MAX_COMMAS:
        raise MalformedBodyError(f"more than {_MAX_COMMAS} commas; send fewer pairs a request", syntax=False)
    try:
        request: ScoreRequest = decoder.decode(body, type=ScoreRequest)
    except msgspec.ValidationError as error:
        raise not_the_schema(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = "msgpack" if content_type == MSGPACK else "JSON"
        raise MalformedBodyError(f"the body is not valid {name}: {str(error)[:120]}", syntax=True) from None
    return request


def not_the_schema(error: msgspec.ValidationError) -> MalformedBodyError:
    """msgspec's complaint about a value, without the sender's own words."""
    found = _ITEM_PATH.search(str(error))
    detail = _without_input(str(error))
    return MalformedBodyError(detail, syntax=False, index=int(found[1]) if found else None)


def _without_input(message: str) -> str:
    """msgspec's message with the sender's own text taken out, save a plain field name."""
    found = _QUOTED_INPUT.search(message)
    if found and not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", found["input"]):
        message = message[: found.start("quote")] + "(not shown)" + message[found.end() :]
    return message


def encode(value: Struct, content_type: str) -> bytes:
    """Encode a wire type as JSON or msgpack."""
    return msgspec.msgpack.encode(value) if content_type == MSGPACK else msgspec.json.encode(value)


def decode_response(body: bytes, content_type: str) -> ScoreResponse:
    """Decode a response and refuse one with a missing, unexplained or non-finite number.

    Raises:
        ValueError: not a score response; msgspec's errors are ValueErrors too
    """
    decoder: Any = msgspec.msgpack if content_type == MSGPACK else msgspec.json
    response: ScoreResponse = decoder.decode(body, type=ScoreResponse)
    for position, result in enumerate(response.results):
        if result.index != position:
            raise ValueError(f"result {position} carries index {result.index}")
        if result.reward is None and not response.failed:
            raise ValueError(f"result {position} has no reward, though no evaluator failed")
        if result.scores.keys() != response.evaluators.keys() or not (result.scores or response.failed):
            raise ValueError(f"result {position} has not the scores of the evaluators named")
        if not finite(result.reward, result.scores):
            raise ValueError(f"result {position} holds a number that is not finite")
    return response


def finite(reward: float | None, scores: Mapping[str, EvaluatorScore]) -> bool:
    """Whether a reward, if there is one, and all of its scores are finite numbers."""
    return (reward is None or math.isfinite(reward)) and all(
        math.isfinite(number) for score in scores.values() for number in (score.raw, score.z, score.unit)
    )


def schemas() -> dict[str, Any]:
    """JSON schemas of the wire types by name, for `#/components/schemas` of OpenAPI."""
    types = [ScoreRequest, ScoreResponse, EvaluatorList, Health, Problem]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return components


#: code -> (status, title, whether asking again can help)
CODES: dict[str, tuple[HTTPStatus, str, bool]] = {
    "malformed_request": (HTTPStatus.BAD_REQUEST, "The request cannot be read", False),
    "malformed_body": (HTTPStatus.BAD_REQUEST, "The body cannot be read", False),
    "unauthorized": (HTTPStatus.UNAUTHORIZED, "A key is needed", False),
    "forbidden": (HTTPStatus.FORBIDDEN, "The key may not do this", False),
    "body_timeout": (HTTPStatus.REQUEST_TIMEOUT, "The body came too slowly", True),
    "body_too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is too large", False),
    "pictures_too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The images are too large together", False),
    "unsupported_media_type": (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Unsupported media type", False),
    "invalid_request": (HTTPStatus.UNPROCESSABLE_ENTITY, "The request does not fit the schema", False),
    "empty_batch": (HTTPStatus.UNPROCESSABLE_ENTITY, "The batch is empty", False),
    "too_many_pairs": (HTTPStatus.UNPROCESSABLE_ENTITY, "The batch is too large", False),
    "unknown_evaluator": (HTTPStatus.UNPROCESSABLE_ENTITY, "Unknown evaluator", False),
    "bad_weights": (HTTPStatus.UNPROCESSABLE_ENTITY, "Unusable weights", False),
    "not_an_image": (HTTPStatus.UNPROCESSABLE_ENTITY, "Not an image", False),
    "bad_shape": (HTTPStatus.UNPROCESSABLE_ENTITY, "The shape does not fit", False),
    "image_too_large": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image is too large", False),
    "image_too_long": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image is too elongated", False),
    "not_found": (HTTPStatus.NOT_FOUND, "No such address", False),
    "method_not_allowed": (HTTPStatus.METHOD_NOT_ALLOWED, "Method not allowed", False),
    "client_busy": (HTTPStatus.TOO_MANY_REQUESTS, "Too much of this client's is under way", True),
    "not_ready": (HTTPStatus.SERVICE_UNAVAILABLE, "Not ready", True),
    "queue_full": (HTTPStatus.SERVICE_UNAVAILABLE, "The queue is full", True),
    "too_many_connections": (HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections", True),
    "evaluator_down": (HTTPStatus.SERVICE_UNAVAILABLE, "An evaluator is out of service", True),
    "deadline_exceeded": (HTTPStatus.GATEWAY_TIMEOUT, "The deadline has passed", True),
    "scoring_failed": (HTTPStatus.INTERNAL_SERVER_ERROR, "A pair cannot be scored", False),
    "internal_error": (HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error", False),
}


class ProblemError(Exception):
    """A request that is answered with a problem.

    Args:
        code: a key of `CODES`
        detail: cause and remedy in one line
        items: the items at fault; the first ten are told
        retry_after_s: for the Retry-After header
        headers: further ones that the status calls for
    """

    def __init__(
        self,
        code: str,
        detail: str,
        items: Sequence[ProblemItem] = (),
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
        self.items = tuple(items[:MAX_PROBLEM_ITEMS])
        self.retry_after_s = retry_after_s
        self.headers = headers or {}

    @property
    def status(self) -> HTTPStatus:
        """The HTTP status that goes with the code."""
        return CODES[self.code][0]

    def as_problem(self, request_id: str) -> Problem:
        """The body of the answer."""
        status, title, retryable = CODES[self.code]
        return Problem(
            title, int(status), self.code, self.detail, retryable, request_id, errors=list(self.items)
        )


def at_item(code: str, detail: str, index: int | None) -> ProblemError:
    """A problem of one item, or of the request if `index` is None."""
    return ProblemError(code, detail, [ProblemItem(code, detail, index)])
