"""OpenAPI document: headers, bodies, responses and security that FastAPI cannot derive from the routes.

The wire types are msgspec structs, which encode and decode much faster than pydantic models, so FastAPI knows
neither their schemas nor where they are used. The headers are validated by `dependencies`, more strictly than
pydantic would ("+5" and "٣" are no numbers there), and an invalid one is answered with problem details.
"""

from __future__ import annotations

from typing import Any

from reward_service.protocol import JSON, MAX_PAIRS, MSGPACK, PROBLEM, PROBLEM_CODES, schemas
from reward_service.requests.forms import MULTIPART, OPTIONS

#: A shorter deadline leaves no time for any image; a longer one is not a deadline.
MIN_DEADLINE_MS, MAX_DEADLINE_MS = 100, 86_400_000
CLIENT_ID = r"^[A-Za-z0-9._-]{1,64}$"
#: Statuses of a score request besides 200.
SCORE_STATUSES = sorted({int(status) for status, _, _ in PROBLEM_CODES.values()} - {404, 405})

_SECURITY_SCHEME = "key"
_RETRY_STATUSES = {429, 503}
_REQUEST_HEADERS = {
    "X-Client-Id": (
        "Client for fair scheduling: a part of the work of a key, or the client itself if there are no keys.",
        {"type": "string", "pattern": CLIENT_ID},
    ),
    "X-Request-Id": (
        "ID of the request, returned in the response and logged if it is valid.",
        {"type": "string"},
    ),
    "X-Deadline-Ms": (
        "Milliseconds after which the response is useless; the request is cancelled then.",
        {"type": "integer", "minimum": MIN_DEADLINE_MS, "maximum": MAX_DEADLINE_MS},
    ),
    "traceparent": ("W3C trace context.", {"type": "string"}),
}
_RESPONSE_HEADERS = {"X-Request-Id": {"description": "ID of the request.", "schema": {"type": "string"}}}

_EXAMPLES = """\
    curl --form-string prompt='a red circle' -F image=@one.png ADDRESS/v1/score

    curl ADDRESS/v1/score -H 'Content-Type: application/json' \\
      -d '{"items": [{"prompt": "a red circle", "image": {"data": "'"$(base64 -w0 one.png)"'"}}]}'
"""

Document = dict[str, Any]
Responses = dict[int | str, Document]


def description() -> str:
    """Return the description of the API in Markdown, with examples and all problem codes."""
    codes = "\n".join(
        f"| `{code}` | {int(status)} | {'yes' if retryable else 'no'} | {title} |"
        for code, (status, title, retryable) in PROBLEM_CODES.items()
    )
    return (
        "Scores images by their prompts with several evaluators; POST /v1/score scores a batch.\n\n"
        f"{_EXAMPLES}\n"
        "If the service has API keys, add `-H 'Authorization: Bearer KEY'`.\n\n"
        f"Errors are `{PROBLEM}` with one of these codes:\n\n"
        f"| code | status | retry | meaning |\n|---|---|---|---|\n{codes}\n"
    )


def score_request() -> Document:
    """Return headers and body of a score request, for `openapi_extra`."""
    content = {JSON: _ref("ScoreRequest"), MSGPACK: _ref("ScoreRequest"), MULTIPART: _ref("ScoreForm")}
    return {
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
            for name, (text, schema) in _REQUEST_HEADERS.items()
        ],
        "requestBody": {"required": True, "content": content},
    }


def security(*, has_keys: bool, requires_key: bool = True) -> Document:
    """Return the security requirement of a route, for `openapi_extra`; FastAPI knows no optional one.

    Args:
        has_keys: the service has API keys and the route checks them
        requires_key: requests without a key are refused
    """
    if not has_keys:
        return {}
    return {"security": [{_SECURITY_SCHEME: []}] if requires_key else [{_SECURITY_SCHEME: []}, {}]}


def model_responses(model: str, problems: list[int]) -> Responses:
    """Return the responses of a route that sends a wire type.

    Args:
        model: name of the wire type
        problems: statuses of the problems that the route can send instead
    """
    return {200: _model_response("OK", model), **_problem_responses(problems)}


def text_responses(content_type: str, problems: list[int]) -> Responses:
    """Return the responses of a route that sends text; `problems` as in `model_responses`."""
    ok: Document = {"description": "OK", "content": {content_type: {"schema": {"type": "string"}}}}
    return {200: ok, **_problem_responses(problems)}


def readiness_responses() -> Responses:
    """Return the responses of the readiness route, whose 503 is not a problem."""
    return {200: _model_response("OK", "Health"), 503: _model_response("Not ready", "Health")}


def components() -> Document:
    """Return the schemas that the routes refer to, and the security scheme."""
    scheme = {
        "type": "http",
        "scheme": "bearer",
        "description": "A key of `reward-service keys new`; not needed if the service has no keys.",
    }
    return {
        "schemas": schemas() | {"ScoreForm": _form_schema()},
        "securitySchemes": {_SECURITY_SCHEME: scheme},
    }


def _ref(model: str) -> Document:
    return {"schema": {"$ref": f"#/components/schemas/{model}"}}


def _model_response(description: str, model: str) -> Document:
    content = dict.fromkeys((JSON, MSGPACK), _ref(model))
    return {"description": description, "headers": _RESPONSE_HEADERS, "content": content}


def _problem_responses(statuses: list[int]) -> Responses:
    return {status: _problem_response(status) for status in statuses}


def _problem_response(status: int) -> Document:
    codes = sorted(code for code, (found, _, _) in PROBLEM_CODES.items() if found == status)
    headers: Document = dict(_RESPONSE_HEADERS)
    if status in _RETRY_STATUSES:
        headers["Retry-After"] = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
    return {"description": ", ".join(codes), "headers": headers, "content": {PROBLEM: _ref("Problem")}}


def _form_schema() -> Document:
    boolean = {"type": "string", "enum": ["true", "false"]}
    fields: Document = {
        "prompt": _array_of({"type": "string", "minLength": 1}),
        "image": _array_of({"type": "string", "format": "binary"}),
        "evaluators": {"type": "string", "description": "Names, separated by commas."},
        "weights": {"type": "string", "description": 'A JSON object, such as {"clip": 1}.'},
        "normalization": {"type": "string", "enum": ["unit", "z", "raw"]},
        "deterministic": boolean,
        "allow_partial": boolean,
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


def _array_of(item: Document) -> Document:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_PAIRS}
