"""create_app(config): routes and errors. No scoring here; nothing holds up the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from reward_service.config import ServiceConfig
from reward_service.observability import metrics
from reward_service.observability.logs import Log
from reward_service.observability.tracing import Observed, Tracer, current
from reward_service.protocol import JSON, MSGPACK, PROBLEM, Health, ProblemError, ScoreResponse, encode
from reward_service.scoring.auth import Client, Keyring, Permission
from reward_service.scoring.service import RETRY_LOADING_S, ScoringService
from reward_service.web import openapi as describing
from reward_service.web.dependencies import (
    ClientGoneError,
    announced_bytes,
    client_of,
    content_type,
    deadline,
    read_body,
    request_id,
    wants_msgpack,
    while_connected,
)
from reward_service.web.openapi import POLICY, handbook

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES = ("/score", "/v1/score", "/v1/evaluators", "/health/live", "/health/ready", "/metrics", "/docs", "/")
PAGE = Path(__file__).resolve().parent / "static"
_DESCRIPTION = "Judges images by their prompts with several evaluators; POST /v1/score scores a batch."
_FAILED = ProblemError("internal_error", "the service failed; its log says why")
_CLIENT_GONE = 499
_logger = logging.getLogger(__name__)
#: The page may fetch from here only, show images that it holds itself, and make no markup of text.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


def create_app(
    config: ServiceConfig,
    service: ScoringService | None = None,
    log: Log | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The service as an ASGI application; the models load once it has started.

    Args:
        judge: the scorer to serve; None for one of this configuration
        log: gets a line for each request
        tracer: gets the spans of each request

    Raises:
        ConfigError: the calibration table or the file of keys is unusable
    """
    scorer = service or ScoringService(config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scorer.start()
        yield
        await asyncio.to_thread(scorer.close)

    app = _Application(
        title="Reward service",
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    # A redirect would be an empty answer to a client that does not follow it.
    app.router.redirect_slashes = False
    app.state.service, app.state.log, app.state.tracer = scorer, log, tracer
    scorer.metrics.routes = frozenset(ROUTES)
    app.state.keys = _keyring(config, log)
    _add_scoring(app, scorer)
    _add_listings(app, scorer)
    _add_health(app, scorer)
    _add_pages(app)
    _add_error_answers(app)
    return app


def _keyring(config: ServiceConfig, log: Log | None) -> Keyring | None:
    note = log.warning if log else lambda _: None
    return Keyring(config.auth.keys, note) if config.auth.keys else None


class _Application(FastAPI):
    """FastAPI, with what goes around it and what its document lacks."""

    def build_middleware_stack(self) -> ASGIApp:
        """What a request passes, from the outside: it is told of, HEAD becomes GET, then Starlette's own."""
        inner = _HeadAsGet(super().build_middleware_stack())
        state = self.state
        return Observed(inner, state.service.metrics, state.log, state.tracer)

    def openapi(self) -> dict[str, Any]:
        """FastAPI's document with the wire types' own schemas."""
        document = super().openapi()
        for name, found in describing.components().items():
            document.setdefault("components", {}).setdefault(name, {}).update(found)
        return document


class _HeadAsGet:
    """HEAD is answered as GET is, without the body (RFC 9110, section 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def bodiless(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app(dict(scope, method="GET"), receive, bodiless)


def _add_scoring(app: FastAPI, service: ScoringService) -> None:
    async def score(request: Request) -> Response:
        """Score prompt-image pairs with every evaluator asked for."""
        client = _client(request, "score")
        given, until = content_type(request), deadline(request)
        announced = announced_bytes(request, service.config.limits.max_body_bytes)
        try:
            async with asyncio.timeout_at(until):
                response = await _scored(request, service, client, announced, given, until)
        except TimeoutError:
            raise ProblemError("deadline_exceeded", "it could not be scored before X-Deadline-Ms") from None
        except ClientGoneError:
            return Response(status_code=_CLIENT_GONE)
        except asyncio.CancelledError:  # still open when the time for an orderly end was over
            detail = "the service shut down before this was scored"
            raise ProblemError("not_ready", detail, retry_after_s=RETRY_LOADING_S) from None
        return _answer(request, response)

    auth = {"needs_key": _needs_key(app), "may_have_key": app.state.keys is not None}
    for path, name in (("/score", "score"), ("/v1/score", "score_v1")):
        extra = describing.scoring(name, **auth)
        app.add_api_route(path, score, methods=["POST"], operation_id=name, openapi_extra=extra)


async def _scored(
    request: Request,
    service: ScoringService,
    client: Client,
    announced: int | None,
    given: str,
    until: float | None,
) -> ScoreResponse:
    limits = service.config.limits
    with service.enter(client, announced) as ticket:
        body = await read_body(request, limits.max_body_bytes, limits.body_timeout_s)
        ticket.set("body bytes", len(body))
        work = service.score(ticket, body, given, request_id(request), until)
        del body  # the work alone holds it, and lets it go early
        return await while_connected(request, work)


def _add_listings(app: FastAPI, service: ScoringService) -> None:
    async def evaluators(request: Request) -> Response:
        """What is configured, with fingerprints and calibration."""
        _client(request, "score")
        return _answer(request, service.describe())

    async def rendered(request: Request) -> Response:
        """Prometheus metrics."""
        if not service.config.auth.open_metrics:
            _client(request, "metrics")
        page = await asyncio.to_thread(service.metrics.render)
        return Response(page, headers=_headers(request), media_type=metrics.CONTENT_TYPE)

    needs, keys = _needs_key(app), app.state.keys is not None
    extra = {"responses": describing.answers("EvaluatorList", [401, 403, 422, 503])}
    extra |= describing.security(needs_key=needs, may_have_key=keys)
    app.add_api_route("/v1/evaluators", evaluators, openapi_extra=extra)
    extra = {"responses": describing.text("text/plain", [401, 403, 422])}
    extra |= describing.security(needs_key=needs, may_have_key=keys and not service.config.auth.open_metrics)
    app.add_api_route("/metrics", rendered, openapi_extra=extra)


def _add_health(app: FastAPI, service: ScoringService) -> None:
    async def live(request: Request) -> Response:
        """Whether the process runs; says nothing about the models."""
        return _answer(request, Health("live"))

    async def ready(request: Request) -> Response:
        """Whether the models are loaded, warmed and proven; 503 before, and once the end is asked for."""
        health = service.health
        return _answer(request, health, 200 if health.status == "ready" else 503)

    extra = {"responses": describing.answers("Health", [])}
    app.add_api_route("/health/live", live, openapi_extra=extra)
    app.add_api_route("/health/ready", ready, openapi_extra={"responses": describing.readiness()})


def _add_pages(app: FastAPI) -> None:
    async def docs(request: Request) -> Response:
        """The routes, types and problems, for people."""
        headers = _headers(request) | {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(handbook(app.openapi()), headers=headers, media_type="text/html")

    extra = {"responses": describing.text("text/html", [])}
    app.add_api_route("/docs", docs, openapi_extra=extra)
    files = _PageFiles(directory=PAGE)

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    # The files refer to each other as page/NAME, so that the service may live below a path of a proxy's.
    app.add_api_route("/", page, include_in_schema=False)
    app.mount("/page", files)


class _PageFiles(StaticFiles):
    """The files of the page, which may fetch nothing from elsewhere."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Starlette's answer with the policy of the page."""
        answer = await super().get_response(path, scope)
        answer.headers["Content-Security-Policy"] = _PAGE_POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        # Asked about each time, so that no two files are of different versions.
        answer.headers["Cache-Control"] = "no-cache"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer


def _add_error_answers(app: FastAPI) -> None:
    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and error.__cause__ is not None:
            _logger.error("a request failed", exc_info=error.__cause__)
        return _problem_answer(request, error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, detail = {
            404: ("not_found", "no such address; POST /v1/score scores, GET /docs explains"),
            405: ("method_not_allowed", "this address takes another method; see GET /docs"),
        }.get(error.status_code, (_FAILED.code, _FAILED.detail))
        return _problem_answer(request, ProblemError(code, detail, headers=error.headers or {}))

    async def bug(request: Request, _: Exception) -> Response:
        return _problem_answer(request, _FAILED)

    app.add_exception_handler(ProblemError, problem)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def _needs_key(app: FastAPI) -> bool:
    return app.state.keys is not None and not app.state.service.config.auth.allow_anonymous


def _client(request: Request, to: Permission) -> Client:
    current().id = request_id(request)  # also of a caller who leaves
    state = request.app.state
    anonymous = state.service.config.auth.allow_anonymous
    client = client_of(request, state.keys, allow_anonymous=anonymous, to=to)
    current().client = client.name or metrics.ANONYMOUS
    return client


def _headers(request: Request) -> dict[str, str]:
    current().id = request_id(request)
    return {"X-Request-Id": request_id(request)}


def _answer(request: Request, value: Struct, status: int = 200) -> Response:
    kind = MSGPACK if wants_msgpack(request) else JSON
    return Response(encode(value, kind), status, _headers(request) | {"Vary": "Accept"}, kind)


def _problem_answer(request: Request, error: ProblemError) -> Response:
    headers = _headers(request) | dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    current().reason = error.code
    body = encode(error.as_problem(request_id(request)), JSON)
    return Response(body, int(error.status), headers, PROBLEM)
