"""create_app(config): routes, limits and errors. No scoring here; nothing holds up the event loop."""

from __future__ import annotations

import asyncio
import re
import sys
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from reward_service.config import ServiceConfig
from reward_service.judge import Judge
from reward_service.problems import CODES, ProblemError
from reward_service.protocol import JSON, MSGPACK, PROBLEM, Health, encode, schemas

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DESCRIPTION = "Judges pictures by their prompts with several evaluators; POST /v1/score scores a batch."
_SCORE_CODES = sorted({int(status) for status, _, _ in CODES.values()} - {404, 405, 408})


def create_app(config: ServiceConfig, judge: Judge | None = None) -> FastAPI:
    """The service as an ASGI application; the models load once it has started.

    :param judge: the scorer to serve; None for one of this configuration
    :raises ConfigError: the calibration table is unusable
    """
    scorer = judge or Judge(config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scorer.start()
        yield
        scorer.close()

    app = FastAPI(title="Reward service", description=_DESCRIPTION, lifespan=lifespan, redoc_url=None)
    # A redirect would be an empty answer to a client that does not follow it.
    app.router.redirect_slashes = False
    app.state.judge = scorer
    _add_routes(app, scorer)
    _add_error_answers(app)
    _describe_truthfully(app)
    return app


def _add_routes(app: FastAPI, judge: Judge) -> None:
    async def score(request: Request) -> Response:
        """Score prompt-image pairs with every evaluator asked for."""
        content_type = _content_type(request)
        judge.admit()
        try:
            body = await _read_body(request, judge.config.limits.max_body_bytes)
            return _answer(request, await judge.score(body, content_type, _request_id(request)))
        except asyncio.CancelledError:  # still open when the time for an orderly end was over
            raise ProblemError("not_ready", "the service shut down before this was scored") from None

    async def evaluators(request: Request) -> Response:
        """What is configured, with fingerprints and calibration."""
        return _answer(request, judge.describe())

    async def live(request: Request) -> Response:
        """Whether the process runs; says nothing about the models."""
        return _answer(request, Health("live"))

    async def ready(request: Request) -> Response:
        """Whether the models are loaded and warmed; 503 until then."""
        health = judge.health
        return _answer(request, health, 200 if health.status == "ready" else 503)

    for path, name in (("/score", "score"), ("/v1/score", "score_v1")):
        extra = {"requestBody": _request_body(), "responses": _responses("ScoreResponse", _SCORE_CODES)}
        app.add_api_route(path, score, methods=["POST"], operation_id=name, openapi_extra=extra)
    for path, get, model, codes in (
        ("/v1/evaluators", evaluators, "EvaluatorList", [503]),
        ("/health/live", live, "Health", []),
    ):
        extra = {"responses": _responses(model, codes)}
        app.add_api_route(path, get, methods=["GET"], openapi_extra=extra)
    waiting = {"description": "Not ready", "content": _content("Health", JSON)}
    extra = {"responses": _responses("Health", []) | {"503": waiting}}
    app.add_api_route("/health/ready", ready, methods=["GET"], openapi_extra=extra)


def _add_error_answers(app: FastAPI) -> None:
    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        if error.status >= 500 and error.__cause__ is not None:
            _log(error.__cause__)
        return _problem_answer(request, error)

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        code, detail = {
            404: ("not_found", "no such address; POST /v1/score scores, GET /docs explains"),
            405: ("method_not_allowed", "this address takes another method; see GET /docs"),
        }.get(status, ("internal_error", "the service failed; its log says why"))
        return _problem_answer(request, ProblemError(code, detail))

    async def bug(request: Request, _: Exception) -> Response:
        return _problem_answer(
            request, ProblemError("internal_error", "the service failed; its log says why")
        )

    app.add_exception_handler(ProblemError, problem)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def _content_type(request: Request) -> str:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in (JSON, MSGPACK):
        raise ProblemError("unsupported_media_type", f"send the header Content-Type: {JSON} or {MSGPACK}")
    return content_type


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is known to be too long.

    :raises ProblemError: it is
    """
    too_large = ProblemError(
        "body_too_large", f"more than {limit / 2**20:g} MiB; send fewer or smaller pictures a request"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise ProblemError("malformed_body", "the body broke off; send it whole") from None
    return b"".join(parts)


def _request_id(request: Request) -> str:
    """The caller's id if it is a plain one, else a new one; the same for the whole request."""
    if not hasattr(request.state, "id"):
        given = request.headers.get("x-request-id", "")
        request.state.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return str(request.state.id)


def _answer(request: Request, value: Struct, status: int = 200) -> Response:
    content_type = MSGPACK if MSGPACK in request.headers.get("accept", "") else JSON
    headers = {"X-Request-Id": _request_id(request)}
    return Response(encode(value, content_type), status, headers, content_type)


def _problem_answer(request: Request, error: ProblemError) -> Response:
    request_id = _request_id(request)
    headers = {"X-Request-Id": request_id}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    body = encode(error.as_problem(request_id), JSON)
    return Response(body, int(error.status), headers, PROBLEM)


def _log(error: BaseException) -> None:
    traceback.print_exception(error, file=sys.stderr)


def _content(model: str, *content_types: str) -> dict[str, Any]:
    schema = {"schema": {"$ref": f"#/components/schemas/{model}"}}
    return dict.fromkeys(content_types, schema)


def _request_body() -> dict[str, Any]:
    return {"required": True, "content": _content("ScoreRequest", JSON, MSGPACK)}


def _responses(model: str, problems: list[int]) -> dict[str, Any]:
    answers: dict[str, Any] = {"200": {"description": "OK", "content": _content(model, JSON, MSGPACK)}}
    for status in problems:
        titles = sorted({title for found, title, _ in CODES.values() if found == status})
        answers[str(status)] = {"description": " · ".join(titles), "content": _content("Problem", PROBLEM)}
    return answers


def _describe_truthfully(app: FastAPI) -> None:
    """Add the wire types' own schemas to what FastAPI generates from the routes."""
    generate: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas())
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


Handler = Callable[[Request], Awaitable[Response]]
