"""What the OpenAPI document says of each route: parameters, bodies, answers and keys.

The page at /docs, made from the OpenAPI document: no script, nothing from a foreign host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from reward_service.protocol import CODES, JSON, MAX_PAIRS, MSGPACK, PROBLEM, schemas
from reward_service.scoring.requests import MULTIPART, OPTIONS

#: No script runs on it, and nothing is fetched but its own style.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #eee; } a { color: #8cf; } }
code, pre { font: 14px/1.4 ui-monospace, monospace; }
pre { background: #8882; padding: .7rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
td, th { border-bottom: 1px solid #8886; padding: .25rem .6rem .25rem 0; text-align: left; }
"""

_EXAMPLES = """curl -F prompt='a red circle' -F image=@one.png ADDRESS/v1/score

curl ADDRESS/v1/score -H 'Content-Type: application/json' \\
  -d '{"items": [{"prompt": "a red circle", "image": {"data": "'"$(base64 -w0 one.png)"'"}}]}'"""


def handbook(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: as `/openapi.json` has it
    """
    info, schemas = document["info"], document["components"]["schemas"]
    routes = [
        _route(method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]
    models = [_model(name, schema) for name, schema in sorted(schemas.items())]
    codes = _table(
        ("code", "status", "ask again?", "meaning"),
        (
            (code, int(status), "yes" if again else "", title)
            for code, (status, title, again) in CODES.items()
        ),
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{escape(info["title"])}</h1>
<p>{escape(info["description"])} The document for programs is <a href="openapi.json">openapi.json</a>.</p>
<pre>{escape(_EXAMPLES)}</pre>
<p>Where the service has keys, add <code>-H 'Authorization: Bearer KEY'</code>.</p>
<h2>Routes</h2>{"".join(routes)}
<h2>Problems</h2>
<p>Errors are <code>application/problem+json</code> with one of these codes.</p>{codes}
<h2>Types</h2>{"".join(models)}
</body></html>
"""


def _route(method: str, path: str, operation: Mapping[str, Any]) -> str:
    headers = [
        (parameter["name"], _kind(parameter["schema"]), parameter.get("description", ""))
        for parameter in operation.get("parameters", [])
    ]
    bodies = [
        (content_type, _kind(content["schema"]), "")
        for content_type, content in operation.get("requestBody", {}).get("content", {}).items()
    ]
    answers = [
        (status, *_answer_type(answer), answer["description"])
        for status, answer in operation["responses"].items()
    ]
    return (
        f"<h3><code>{escape(method.upper())} {escape(path)}</code></h3>"
        f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>"
        + _table(("header", "type", ""), headers)
        + _table(("body", "type", ""), bodies)
        + _table(("answer", "type", ""), answers)
    )


def _answer_type(answer: Mapping[str, Any]) -> list[str]:
    return [_kind(content["schema"]) for content in answer["content"].values()][:1]


def _model(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    fields = [
        (field, _kind(kind), "" if field in required else "may be left out")
        for field, kind in schema.get("properties", {}).items()
    ]
    about = f"<p>{escape(schema.get('description', ''))}</p>"
    return f'<h3 id="{escape(name)}">{escape(name)}</h3>{about}' + _table(("field", "type", ""), fields)


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        inner = schema.get("items") or {}
        return f"list of {_kind(inner)}" if inner else "list"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    return " ".join(str(schema[key]) for key in ("type", "contentEncoding", "format") if key in schema)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><tr>{top}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


#: Less is no time for any image; more is no deadline.
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
