"""What the OpenAPI document says of each route: parameters, bodies, answers and keys."""

from __future__ import annotations

from typing import Any

from reward_service.forms import MULTIPART, OPTIONS
from reward_service.problems import CODES
from reward_service.protocol import JSON, MAX_PAIRS, MSGPACK, PROBLEM, schemas

#: Less is no time for any picture; more is no deadline.
MIN_DEADLINE_MS, MAX_DEADLINE_MS = 100, 86_400_000
CLIENT_ID = r"^[A-Za-z0-9._-]{1,64}$"
KEY = "key"

#: Statuses of a score request besides 200.
SCORE_STATUSES = sorted({int(status) for status, _, _ in CODES.values()} - {404, 405})

_RETRY_STATUSES = {429, 503}
_HEADERS = {
    "X-Client-Id": (
        "For sharing the service fairly: a part of a key's work, or who asks where there are no keys.",
        {"type": "string", "pattern": CLIENT_ID},
    ),
    "X-Request-Id": ("Comes back in the answer and the log, if it is plain and short.", {"type": "string"}),
    "X-Deadline-Ms": (
        "Milliseconds after which the answer is of no use; the work is dropped then.",
        {"type": "integer", "minimum": MIN_DEADLINE_MS, "maximum": MAX_DEADLINE_MS},
    ),
    "traceparent": ("W3C trace context.", {"type": "string"}),
}


def scoring(operation_id: str, *, needs_key: bool, may_have_key: bool) -> dict[str, Any]:
    """A route that scores."""
    content = {JSON: _named("ScoreRequest"), MSGPACK: _named("ScoreRequest"), MULTIPART: _named("ScoreForm")}
    return {
        "operationId": operation_id,
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
            for name, (text, schema) in _HEADERS.items()
        ],
        "requestBody": {"required": True, "content": content},
        "responses": answers("ScoreResponse", SCORE_STATUSES),
        **security(needs_key=needs_key, may_have_key=may_have_key),
    }


def security(*, needs_key: bool, may_have_key: bool) -> dict[str, Any]:
    """Whether a route asks for a key."""
    if not may_have_key:
        return {}
    return {"security": [{KEY: []}] if needs_key else [{KEY: []}, {}]}


def answers(model: str, statuses: list[int]) -> dict[str, Any]:
    """An answer of a model of ours, and the problems that may come instead."""
    good = {"description": "OK", "headers": _REQUEST_ID, "content": _content(model)}
    return {"200": good} | {str(status): _problem(status) for status in statuses}


def text(content_type: str, statuses: list[int]) -> dict[str, Any]:
    """An answer that is plain text or a page."""
    good = {"description": "OK", "content": {content_type: {"schema": {"type": "string"}}}}
    return {"200": good} | {str(status): _problem(status) for status in statuses}


def readiness() -> dict[str, Any]:
    """The two answers of a health route that can say no."""
    waiting = {"description": "Not ready", "headers": _REQUEST_ID, "content": _content("Health")}
    return answers("Health", []) | {"503": waiting}


def components() -> dict[str, Any]:
    """The schemas that the routes refer to, and how a key is sent."""
    scheme = {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of `reward-service keys new`; none is needed where the service has no keys.",
    }
    return {"schemas": schemas() | {"ScoreForm": _form()}, "securitySchemes": {KEY: scheme}}


_REQUEST_ID = {"X-Request-Id": {"description": "The request's id.", "schema": {"type": "string"}}}


def _named(model: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{model}"}}


def _content(model: str) -> dict[str, Any]:
    return dict.fromkeys((JSON, MSGPACK), _named(model))


def _problem(status: int) -> dict[str, Any]:
    codes = sorted(code for code, (found, _, _) in CODES.items() if found == status)
    headers: dict[str, Any] = dict(_REQUEST_ID)
    if status in _RETRY_STATUSES:
        headers["Retry-After"] = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
    return {"description": ", ".join(codes), "headers": headers, "content": {PROBLEM: _named("Problem")}}


def _form() -> dict[str, Any]:
    words = {"type": "string", "enum": ["true", "false"]}
    fields: dict[str, Any] = {
        "prompt": {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "minItems": 1,
            "maxItems": MAX_PAIRS,
        },
        "image": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "minItems": 1,
            "maxItems": MAX_PAIRS,
        },
        "evaluators": {"type": "string", "description": "Names, with commas between."},
        "weights": {"type": "string", "description": 'A JSON object, such as {"clip": 1}.'},
        "normalization": {"type": "string", "enum": ["unit", "z", "raw"]},
        "deterministic": words,
        "allow_partial": words,
    }
    assert set(fields) == {"prompt", "image", *OPTIONS}
    return {
        "title": "ScoreForm",
        "description": "ScoreRequest as a form: prompts and images pair up in order, or one prompt for all.",
        "type": "object",
        "properties": fields,
        "required": ["prompt", "image"],
        "additionalProperties": False,
    }
