"""Wire protocol: request, response and problem types, one schema for JSON and msgpack.

In JSON image bytes are base64, in msgpack they are binary; the types are the same. Decoding refuses unknown
fields and wrong types, and needs no torch. Errors are RFC 9457 problem details that never echo the input: a
detail consists of this program's own words, names of the schema and numbers, and is cut at 400 characters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta, Raw, Struct, field

JSON = "application/json"
MSGPACK = "application/msgpack"
PROBLEM = "application/problem+json"
MAX_PROBLEM_ITEMS = 10
MAX_DETAIL_CHARS = 400
MAX_PAIRS = 1024
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_PROMPT_CHARS = 10_000
#: Of one HTTP request: request line and headers.
MAX_HEAD_BYTES, MAX_HEADERS = 16 * 1024, 100
_MAX_NAMES = 64
# Sixteen times the commas of a full batch of short prompts. Each comma of JSON can cost 150 bytes of memory.
_MAX_COMMAS = 128 * MAX_PAIRS
# Below it, even a body of nothing but duplicate keys is decoded in a few milliseconds.
_LARGE_BODY_BYTES = 2**20

ImageFormat = Literal["png", "jpeg", "webp", "raw"]
Normalization = Literal["unit", "z", "raw"]
Weight = Annotated[float, Meta(ge=0)]
WeightsByEvaluator = Annotated[dict[str, Weight], Meta(max_length=_MAX_NAMES)]
ImageSide = Annotated[int, Meta(ge=1, le=2**31 - 1)]

if TYPE_CHECKING:
    _SentFormat: TypeAlias = ImageFormat
    _SentNormalization: TypeAlias = Normalization
else:

    def _one_of(literal):
        # msgspec's message about a wrong Literal quotes it: half a second for a value of 60 MB.
        values = get_args(literal)
        pattern = rf"^(?:{'|'.join(values)})\Z"
        return Annotated[str, Meta(pattern=pattern, extra_json_schema={"enum": sorted(values)})]

    _SentFormat, _SentNormalization = _one_of(ImageFormat), _one_of(Normalization)


class Picture(Struct, frozen=True, forbid_unknown_fields=True):
    """One image: an encoded file, or `raw` uint8 RGB values in rows.

    `format` is optional for an encoded file, which is recognized by its first bytes. `shape` is
    (height, width, 3) in pixels, for `raw` only.
    """

    data: bytes
    format: _SentFormat | None = None
    shape: tuple[ImageSide, ImageSide, Literal[3]] | None = None


class Item(Struct, frozen=True, forbid_unknown_fields=True):
    """One prompt and one image to score."""

    prompt: Annotated[str, Meta(min_length=1, max_length=MAX_PROMPT_CHARS)]
    image: Picture


class ScoreRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """A batch of pairs and how to score them.

    `evaluators`: names, or null for all evaluators of the service. `weights`: weight of each evaluator's
    normalized score in the reward; evaluators that are not named have weight 0; null for the configured
    weights. `normalization`: the kind of score that the reward is computed from. `allow_partial`: if an
    evaluator is out of service, return the scores of the others; otherwise that is an error.
    `deterministic`: make scores independent of the other pairs of the batch; slower.
    """

    items: Annotated[list[Item], Meta(min_length=1, max_length=MAX_PAIRS)]
    evaluators: Annotated[list[str], Meta(min_length=1, max_length=_MAX_NAMES)] | None = None
    weights: WeightsByEvaluator | None = None
    normalization: _SentNormalization = "unit"
    allow_partial: bool = False
    deterministic: bool = False


class EvaluatorScore(Struct, frozen=True):
    """One evaluator's score: raw by its formula, z in calibrated standard deviations, unit = Φ(z)."""

    raw: float
    z: float
    unit: float


class ItemResult(Struct, frozen=True):
    """The scores of one pair; `reward` is the weighted mean of its normalized scores.

    `reward` is null if an evaluator with a weight has `failed`; it is never a mean of the others.
    """

    index: int
    reward: float | None
    scores: dict[str, EvaluatorScore]
    truncated_prompt: bool
    lossy_input: bool


class EvaluatorIdentity(Struct, frozen=True):
    """Identity of the model and calibration that produced an evaluator's scores.

    `fingerprint`: hash of weights, preprocessing, tokenizer, formula and dtype. `calibration`: hash of
    the mean and standard deviation behind z and unit.
    """

    fingerprint: str
    calibration: str


class ScoreResponse(Struct, frozen=True):
    """Results in the order of the request's items; either all of them or none.

    `failed`: problem code of each requested evaluator that is out of service; always empty without
    `allow_partial`. Neither `evaluators` nor any result contains these evaluators.
    """

    id: str
    results: list[ItemResult]
    evaluators: dict[str, EvaluatorIdentity]
    timing_ms: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)


class EvaluatorDescription(Struct, frozen=True):
    """One configured evaluator."""

    fingerprint: str
    calibration: str
    formula: str
    mean: float
    std: float
    weight: float
    provisional: bool


class EvaluatorList(Struct, frozen=True):
    """Response of `/v1/evaluators`: the configured evaluators, device and dtype."""

    evaluators: dict[str, EvaluatorDescription]
    device: str
    dtype: str


class Health(Struct, frozen=True):
    """Response of the health routes; `detail` is the reason for a status other than live or ready."""

    status: Literal["live", "ready", "loading", "stopping", "failed"]
    detail: str = ""


class ProblemItem(Struct, frozen=True):
    """One error; `index` is the position of the item in the request, null if no item is at fault."""

    code: str
    detail: str
    index: int | None = None


class Problem(Struct, frozen=True):
    """RFC 9457 problem details, with a code, whether a retry can succeed, and at most ten errors."""

    title: str
    status: int
    code: str
    detail: str
    retryable: bool
    id: str
    type: str = "about:blank"
    errors: Annotated[list[ProblemItem], Meta(max_length=MAX_PROBLEM_ITEMS)] = field(default_factory=list)


class MalformedBodyError(Exception):
    """A body that is not a request of this protocol.

    Args:
        detail: the cause
        syntax: True if the body is not valid JSON or msgpack, False if it does not match the schema
        index: position of the item at fault, None if no single item is
    """

    def __init__(self, detail: str, *, syntax: bool, index: int | None = None) -> None:
        super().__init__(detail)
        self.syntax = syntax
        self.index = index


_CHOICES = {"format": get_args(ImageFormat), "normalization": get_args(Normalization), "shape[2]": ("3",)}
_NAMES = "|".join(name for type_ in (ScoreRequest, Item, Picture) for name in type_.__struct_fields__)
_PATH = re.compile(rf" - at (?P<key>`key` in )?`\$(?P<path>(?:\.(?:{_NAMES})|\[(?:\d{{1,6}}|\.\.\.)\])*)`\Z")
_MAX_PATH_CHARS = 100
_ITEM_PATH = re.compile(r"\$\.items\[(\d+)\]")
# The messages of msgspec that quote no input.
_SCHEMA_MESSAGE = re.compile(
    r"Expected `[a-z |]+`(?: of length(?: [<>]=)? \d+| [<>]=? -?[\d.]+)?(?:, got `?[a-z\d]+`?)?"
    r"|Object missing required field `\w+`|Invalid base64 encoded string"
    r"|(?:Integer value|Number) out of range"
)
_SYNTAX_MESSAGE = re.compile(
    r"Input data was truncated|[A-Za-z ]+ is malformed: [a-z ,':\"{}\[\]]+ \(byte \d+\)"
)


def decode_request(body: bytes | bytearray, content_type: str) -> ScoreRequest:
    """Decode a request body of one of the two content types.

    The last value of a duplicate key is used.

    Raises:
        MalformedBodyError: not valid JSON or msgpack (`syntax`), or it does not match the schema
    """
    decoder: Any = msgspec.msgpack if content_type == MSGPACK else msgspec.json
    # msgspec decodes a whole JSON array before it checks the length: gigabytes for a malicious one.
    if content_type == JSON and body.count(b",") > _MAX_COMMAS:
        raise MalformedBodyError(
            f"more than {_MAX_COMMAS} commas; send fewer pairs per request", syntax=False
        )
    try:
        if content_type == MSGPACK and len(body) > _LARGE_BODY_BYTES:
            _check_keys(body)
        request: ScoreRequest = decoder.decode(body, type=ScoreRequest)
    except msgspec.ValidationError as error:
        raise schema_error(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = "msgpack" if content_type == MSGPACK else "JSON"
        raise MalformedBodyError(f"the body is not valid {name}{_syntax_cause(error)}", syntax=True) from None
    return request


def schema_error(error: msgspec.ValidationError, at: str = "$") -> MalformedBodyError:
    """Return msgspec's validation error as a `MalformedBodyError`, without the input that it may quote.

    Args:
        error: the error
        at: path of the value that was decoded, in the request
    """
    message = str(error)
    found = _PATH.search(message, max(0, len(message) - _MAX_PATH_CHARS))
    path = at + found["path"] if found else at
    detail = _schema_cause(message[: found.start()] if found else message, path)
    if path != "$":
        detail += f" - at {(found and found['key']) or ''}`{path}`"
    item = _ITEM_PATH.match(path)
    return MalformedBodyError(detail, syntax=False, index=int(item[1]) if item else None)


def _schema_cause(message: str, path: str) -> str:
    """Return a message of msgspec without its path if it quotes no input, otherwise words of our own."""
    if message.startswith("Object contains unknown field"):
        return f"Object contains unknown field; expected {', '.join(_fields_at(path))}"
    if choices := _CHOICES.get(path.rpartition(".")[2]):
        return f"Expected {' or '.join(choices)}"
    return message if _SCHEMA_MESSAGE.fullmatch(message[:MAX_DETAIL_CHARS]) else "Invalid value"


def _fields_at(path: str) -> tuple[str, ...]:
    if path.endswith(".image"):
        return Picture.__struct_fields__
    return Item.__struct_fields__ if path.endswith("]") else ScoreRequest.__struct_fields__


def _syntax_cause(error: Exception) -> str:
    message = str(error)
    return f": {message}" if _SYNTAX_MESSAGE.fullmatch(message) else ""


class _Outline(Struct, forbid_unknown_fields=True):
    """ScoreRequest whose values are not decoded."""

    items: Annotated[list[Raw], Meta(max_length=MAX_PAIRS)]
    evaluators: Raw = Raw()
    weights: Raw = Raw()
    normalization: Raw = Raw()
    allow_partial: Raw = Raw()
    deterministic: Raw = Raw()


class _ItemOutline(Struct, forbid_unknown_fields=True):
    """Item whose values are not decoded."""

    prompt: Raw
    image: Raw


def _check_keys(body: bytes | bytearray) -> None:
    """Refuse duplicate keys in msgpack; msgspec decodes all their values, and no other thread runs then."""
    if _map_size(body) > len(_Outline.__struct_fields__):
        raise _duplicate_keys(None)
    outline = msgspec.msgpack.decode(body, type=_Outline)
    options = (getattr(outline, name) for name in _Outline.__struct_fields__[1:])
    if _map_size(body) > 1 + sum(len(option) > 0 for option in options):
        raise _duplicate_keys(None)
    for index, sent in enumerate(outline.items):
        if _map_size(sent) > len(_ItemOutline.__struct_fields__):
            raise _duplicate_keys(index)
        try:
            item = msgspec.msgpack.decode(sent, type=_ItemOutline)
        except msgspec.ValidationError as error:
            raise schema_error(error, f"$.items[{index}]") from None
        if _map_size(item.image) > len(Picture.__struct_fields__):
            raise _duplicate_keys(index)


def _map_size(packed: bytes | bytearray | Raw) -> int:
    """Return the number of keys of a msgpack map, 0 for another type."""
    head = bytes(memoryview(packed)[:5])
    if head[0] >> 4 == 0x8:
        return head[0] & 0xF
    return int.from_bytes(head[1 : {0xDE: 3, 0xDF: 5}.get(head[0], 1)])


def _duplicate_keys(index: int | None) -> MalformedBodyError:
    return MalformedBodyError("duplicate or unknown keys; send each field once", syntax=False, index=index)


def encode(value: Struct, content_type: str) -> bytes:
    """Encode a wire type as JSON or msgpack."""
    return msgspec.msgpack.encode(value) if content_type == MSGPACK else msgspec.json.encode(value)


def decode_response(body: bytes, content_type: str) -> ScoreResponse:
    """Decode a response and verify that no score is missing or not finite.

    Raises:
        ValueError: not a valid score response; msgspec's errors are ValueErrors too
    """
    decoder: Any = msgspec.msgpack if content_type == MSGPACK else msgspec.json
    response: ScoreResponse = decoder.decode(body, type=ScoreResponse)
    for position, result in enumerate(response.results):
        if result.index != position:
            raise ValueError(f"result {position} has index {result.index}; expected {position}")
        if result.reward is None and not response.failed:
            raise ValueError(f"result {position} has no reward, although no evaluator failed")
        if result.scores.keys() != response.evaluators.keys() or not (result.scores or response.failed):
            raise ValueError(f"result {position} does not have exactly the scores of `evaluators`")
        if not _all_finite(result.reward, result.scores):
            raise ValueError(f"result {position} has a number that is not finite")
    return response


def _all_finite(reward: float | None, scores: Mapping[str, EvaluatorScore]) -> bool:
    """Return True if all scores and the reward, unless it is None, are finite numbers."""
    return (reward is None or math.isfinite(reward)) and all(
        math.isfinite(number) for score in scores.values() for number in (score.raw, score.z, score.unit)
    )


def schemas() -> dict[str, Any]:
    """Return JSON schemas of the wire types by name, for `#/components/schemas` of OpenAPI."""
    types = [ScoreRequest, ScoreResponse, EvaluatorList, Health, Problem]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return {name: _without_patterns(schema) for name, schema in components.items()}


def _without_patterns(schema: Any) -> Any:
    """Return a JSON schema in which an `enum` stands alone, without the pattern that says the same."""
    if isinstance(schema, list):
        return [_without_patterns(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    redundant = ("type", "pattern") if "enum" in schema else ()
    return {name: _without_patterns(part) for name, part in schema.items() if name not in redundant}


#: code -> (status, title, whether a retry can succeed)
PROBLEM_CODES: dict[str, tuple[HTTPStatus, str, bool]] = {
    "malformed_request": (HTTPStatus.BAD_REQUEST, "The request cannot be read", False),
    "headers_too_large": (
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        "The headers are too large",
        False,
    ),
    "malformed_body": (HTTPStatus.BAD_REQUEST, "The body cannot be read", False),
    "unauthorized": (HTTPStatus.UNAUTHORIZED, "API key required", False),
    "forbidden": (HTTPStatus.FORBIDDEN, "API key not permitted", False),
    "body_timeout": (HTTPStatus.REQUEST_TIMEOUT, "Request body timeout", True),
    "body_too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is too large", False),
    "pictures_too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The images are too large in total", False),
    "unsupported_media_type": (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Unsupported media type", False),
    "invalid_request": (HTTPStatus.UNPROCESSABLE_ENTITY, "The request does not fit the schema", False),
    "empty_batch": (HTTPStatus.UNPROCESSABLE_ENTITY, "The batch is empty", False),
    "too_many_pairs": (HTTPStatus.UNPROCESSABLE_ENTITY, "The batch is too large", False),
    "unknown_evaluator": (HTTPStatus.UNPROCESSABLE_ENTITY, "Unknown evaluator", False),
    "bad_weights": (HTTPStatus.UNPROCESSABLE_ENTITY, "Unusable weights", False),
    "not_an_image": (HTTPStatus.UNPROCESSABLE_ENTITY, "Not an image", False),
    "bad_shape": (HTTPStatus.UNPROCESSABLE_ENTITY, "The shape does not match the image", False),
    "image_too_large": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image is too large", False),
    "image_too_long": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image is too elongated", False),
    "image_too_complex": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image takes too long to decode", False),
    "not_found": (HTTPStatus.NOT_FOUND, "Not found", False),
    "method_not_allowed": (HTTPStatus.METHOD_NOT_ALLOWED, "Method not allowed", False),
    "client_busy": (HTTPStatus.TOO_MANY_REQUESTS, "Too many concurrent requests of this client", True),
    "not_ready": (HTTPStatus.SERVICE_UNAVAILABLE, "Not ready", True),
    "queue_full": (HTTPStatus.SERVICE_UNAVAILABLE, "The queue is full", True),
    "too_many_connections": (HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections", True),
    "evaluator_down": (HTTPStatus.SERVICE_UNAVAILABLE, "An evaluator is out of service", True),
    "deadline_exceeded": (HTTPStatus.GATEWAY_TIMEOUT, "The deadline has passed", True),
    "scoring_failed": (HTTPStatus.INTERNAL_SERVER_ERROR, "A pair cannot be scored", False),
    "internal_error": (HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error", False),
}


class ProblemError(Exception):
    """A refused request, which gets a problem as its response.

    Args:
        code: a key of `PROBLEM_CODES`
        detail: cause and remedy in one line without input, cut at `MAX_DETAIL_CHARS`
        items: the items at fault; the first ten are reported
        retry_after_s: value of the Retry-After header, None for no header
        headers: further headers that the status requires
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
        self.code, self.detail = code, _cut(detail)
        self.items = tuple(
            ProblemItem(item.code, _cut(item.detail), item.index) for item in items[:MAX_PROBLEM_ITEMS]
        )
        self.retry_after_s = retry_after_s
        self.headers = headers or {}

    @property
    def status(self) -> HTTPStatus:
        """HTTP status of the code."""
        return PROBLEM_CODES[self.code][0]

    def to_problem(self, request_id: str) -> Problem:
        """Return the response body."""
        status, title, retryable = PROBLEM_CODES[self.code]
        return Problem(
            title, int(status), self.code, self.detail, retryable, request_id, errors=list(self.items)
        )


def item_problem(code: str, detail: str, index: int | None) -> ProblemError:
    """Return the problem of one item, or of the whole request if `index` is None."""
    return ProblemError(code, detail, [ProblemItem(code, detail, index)])


def _cut(detail: str) -> str:
    return detail if len(detail) <= MAX_DETAIL_CHARS else f"{detail[: MAX_DETAIL_CHARS - 1]}…"
