"""HTTP application: routes, static pages and error responses. No scoring; nothing blocks the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from reward_service.config import ServiceConfig
from reward_service.observability import metrics
from reward_service.observability.logs import Log
from reward_service.observability.tracing import (
    CLIENT_CLOSED_REQUEST,
    ObservabilityMiddleware,
    RequestTrace,
    Tracer,
)
from reward_service.protocol import JSON, MSGPACK, PROBLEM, Health, ProblemError, ScoreResponse, encode
from reward_service.scoring.auth import Client, Keyring, Permission
from reward_service.scoring.responses import deadline_exceeded
from reward_service.scoring.service import RETRY_LOADING_S, ScoringService
from reward_service.web import openapi
from reward_service.web.dependencies import (
    ClientDisconnectedError,
    authenticate,
    cancel_on_disconnect,
    content_length,
    content_type,
    deadline,
    prefers_msgpack,
    read_body,
    request_id,
    trace_of,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES = ("/score", "/v1/score", "/v1/evaluators", "/health/live", "/health/ready", "/metrics", "/docs", "/")
STATIC_FILES = Path(__file__).resolve().parent / "static"
#: Swagger UI's own files, as this package ships them.
SWAGGER_UI_PACKAGE = ("fastapi_offline", "static")

_INTERNAL_ERROR = ProblemError("internal_error", "the service failed; see its log for the cause")
_LIVE = Health("live")
_VARY = {"Vary": "Accept"}
_logger = logging.getLogger(__name__)
# Both pages may load and send data only from and to this service, and run no inline script.
_OWN_FILES_ONLY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
)
_PAGE_POLICY = f"{_OWN_FILES_ONLY}img-src 'self' blob:; require-trusted-types-for 'script'"
# Swagger UI's stylesheet has its icons as data: URLs.
_DOCS_POLICY = f"{_OWN_FILES_ONLY}img-src 'self' data:"


def create_app(
    config: ServiceConfig,
    service: ScoringService | None = None,
    log: Log | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """Return the service as an ASGI application; the models are loaded once it has started.

    Args:
        config: of the service
        service: the service to serve; None for a new one with this configuration
        log: gets a line for each request
        tracer: gets the spans of each request

    Raises:
        ConfigError: if the calibration table or the keys file is unusable
    """
    scoring = service or ScoringService(config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scoring.start()
        yield
        await asyncio.to_thread(scoring.close)

    app = _Application(
        title="Reward service",
        description=openapi.description(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # The service traces its requests itself.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.router.route_class = _Route
    # A redirect would be an empty response for a client that does not follow it.
    app.router.redirect_slashes = False
    app.state.service, app.state.log, app.state.tracer = scoring, log, tracer
    scoring.metrics.routes = frozenset(ROUTES)
    app.state.keys = _load_keyring(config, log)
    _add_scoring_routes(app, scoring)
    _add_information_routes(app, scoring)
    _add_health_routes(app, scoring)
    _add_pages(app)
    _add_error_handlers(app)
    return app


def _load_keyring(config: ServiceConfig, log: Log | None) -> Keyring | None:
    note = log.warning if log else lambda _: None
    return Keyring(config.auth.keys, note) if config.auth.keys else None


class _Application(FastAPI):
    """FastAPI with the service's middleware, and with the schemas that it cannot derive."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return the application inside its middleware; observability is outermost."""
        inner = _HeadMiddleware(_LivenessMiddleware(super().build_middleware_stack()))
        state = self.state
        return ObservabilityMiddleware(inner, state.service.metrics, state.log, state.tracer)

    def openapi(self) -> dict[str, Any]:
        """Return FastAPI's document with the schemas of the wire types."""
        if self.openapi_schema is None:
            document = super().openapi()
            for name, found in openapi.components().items():
                document.setdefault("components", {}).setdefault(name, {}).update(found)
        assert self.openapi_schema is not None
        return self.openapi_schema


class _HeadMiddleware:
    """ASGI middleware that responds to HEAD as to GET, without the body (RFC 9110, section 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app(dict(scope, method="GET"), receive, send_without_body)


class _LivenessMiddleware:
    """ASGI middleware that responds to the liveness probe; the router alone would take longer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._responses = {kind: Response(encode(_LIVE, kind), 200, _VARY, kind) for kind in (JSON, MSGPACK)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] != "/health/live" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        response = self._responses[_kind(request)]
        headers = [*response.raw_headers, (b"x-request-id", request_id(request).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})


class _Route(APIRoute):
    """Route whose endpoint gets the request as it is; FastAPI would parse cookies and query for nothing."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the endpoint."""
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


# Scoring ----------------------------------------------------------------------------------------------


def _add_scoring_routes(app: FastAPI, service: ScoringService) -> None:
    async def score(request: Request) -> Response:
        """Score prompt-image pairs with every requested evaluator."""
        trace = trace_of(request)
        client = _authenticate(request, trace, "score")
        kind, deadline_s = content_type(request), deadline(request)
        length = content_length(request, service.config.limits.max_body_bytes)
        try:
            async with asyncio.timeout_at(deadline_s):
                response = await _score(request, service, client, length, kind, trace, deadline_s)
        except TimeoutError:
            raise deadline_exceeded() from None
        except ClientDisconnectedError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except asyncio.CancelledError:  # still unfinished when the time for a graceful shutdown was over
            detail = "the service shut down before the request was scored"
            raise ProblemError("not_ready", detail, retry_after_s=RETRY_LOADING_S) from None
        return _encoded(request, response)

    for path, name in (("/score", "score"), ("/v1/score", "score_v1")):
        app.add_api_route(
            path,
            score,
            methods=["POST"],
            operation_id=name,
            responses=openapi.model_responses("ScoreResponse", openapi.SCORE_STATUSES),
            openapi_extra=openapi.score_request() | _security(app),
        )


async def _score(
    request: Request,
    service: ScoringService,
    client: Client,
    length: int | None,
    kind: str,
    trace: RequestTrace,
    deadline_s: float | None,
) -> ScoreResponse:
    """Admit the request, read its body and score it.

    Args:
        request: the request
        service: scores it
        client: its client
        length: announced bytes of the body; None if unknown
        kind: its Content-Type header
        trace: of the request
        deadline_s: on the event loop's clock; None for no deadline
    """
    limits = service.config.limits
    with service.admit(client, length) as ticket:
        body = await read_body(request, limits.max_body_bytes, limits.body_timeout_s)
        ticket.set("body bytes", len(body))
        work = service.score(ticket, body, kind, trace, deadline_s)
        del body  # only the service holds it now, which frees it early
        return await cancel_on_disconnect(request, work)


# Information ------------------------------------------------------------------------------------------


def _add_information_routes(app: FastAPI, service: ScoringService) -> None:
    async def evaluators(request: Request) -> Response:
        """List the configured evaluators with fingerprints and calibration."""
        _authenticate(request, trace_of(request), "score")
        return _encoded(request, service.describe())

    async def prometheus(request: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        if not service.config.auth.open_metrics:
            _authenticate(request, trace_of(request), "metrics")
        page = await asyncio.to_thread(service.metrics.render)
        return Response(page, headers=_headers(request), media_type=metrics.CONTENT_TYPE)

    app.add_api_route(
        "/v1/evaluators",
        evaluators,
        responses=openapi.model_responses("EvaluatorList", [401, 403, 422, 503]),
        openapi_extra=_security(app),
    )
    app.add_api_route(
        "/metrics",
        prometheus,
        operation_id="rendered_metrics_get",  # from an earlier name of the function; generated clients use it
        responses=openapi.text_responses("text/plain", [401, 403, 422]),
        openapi_extra={} if service.config.auth.open_metrics else _security(app),
    )


def _add_health_routes(app: FastAPI, service: ScoringService) -> None:
    async def live(request: Request) -> Response:
        """Report that the process runs, whatever the state of the models."""
        return _encoded(request, _LIVE)

    async def ready(request: Request) -> Response:
        """Report whether the models are loaded, warmed up and verified; 503 until then and at shutdown."""
        health = service.health
        return _encoded(request, health, 200 if health.status == "ready" else 503)

    app.add_api_route("/health/live", live, responses=openapi.model_responses("Health", []))
    app.add_api_route("/health/ready", ready, responses=openapi.readiness_responses())


# Pages ------------------------------------------------------------------------------------------------


def _add_pages(app: FastAPI) -> None:
    # An environment without the package serves everything else; its /docs stays blank.
    swagger_ui: list[str | tuple[str, str]] = [SWAGGER_UI_PACKAGE] if find_spec(SWAGGER_UI_PACKAGE[0]) else []
    files = _PageFiles(directory=STATIC_FILES, packages=swagger_ui)

    async def docs(request: Request) -> Response:
        """Show this document in Swagger UI."""
        response = await files.get_response("docs.html", request.scope)
        response.headers.update(_headers(request))
        return response

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    app.add_api_route("/docs", docs, responses=openapi.text_responses("text/html", []))
    # The files refer to each other as page/NAME, so that the service also works below a path of a proxy.
    app.add_api_route("/", page, include_in_schema=False)
    app.mount("/page", files)


class _PageFiles(StaticFiles):
    """Static files of the pages, which may load nothing from another host."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return Starlette's response with the security headers of the page."""
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = _DOCS_POLICY if path == "docs.html" else _PAGE_POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        # Revalidated each time, so that no two files are of different versions.
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


# Errors -----------------------------------------------------------------------------------------------


def _add_error_handlers(app: FastAPI) -> None:
    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and error.__cause__ is not None:
            _logger.error("a request failed", exc_info=error.__cause__)
        # Tracebacks lead to the body and, through futures, back to the error: a cycle of up to 200 MB.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return _problem_response(request, error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, detail = {
            404: ("not_found", "no such address; POST /v1/score to score, see GET /docs for all routes"),
            405: ("method_not_allowed", "this address does not support the method; see GET /docs"),
        }.get(error.status_code, (_INTERNAL_ERROR.code, _INTERNAL_ERROR.detail))
        return _problem_response(request, ProblemError(code, detail, headers=error.headers or {}))

    async def on_bug(request: Request, _: Exception) -> Response:
        return _problem_response(request, _INTERNAL_ERROR)

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def _problem_response(request: Request, error: ProblemError) -> Response:
    headers = _headers(request) | dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    trace_of(request).reason = error.code
    body = encode(error.to_problem(request_id(request)), JSON)
    return Response(body, int(error.status), headers, PROBLEM)


# Shared by the routes ---------------------------------------------------------------------------------


def _security(app: FastAPI) -> dict[str, Any]:
    requires_key = not app.state.service.config.auth.allow_anonymous
    return openapi.security(has_keys=app.state.keys is not None, requires_key=requires_key)


def _authenticate(request: Request, trace: RequestTrace, permission: Permission) -> Client:
    state = request.app.state
    anonymous = state.service.config.auth.allow_anonymous
    client = authenticate(request, state.keys, allow_anonymous=anonymous, permission=permission)
    trace.client = client.name or metrics.ANONYMOUS
    return client


def _headers(request: Request) -> dict[str, str]:
    return {"X-Request-Id": trace_of(request).id or ""}


def _kind(request: Request) -> str:
    return MSGPACK if prefers_msgpack(request) else JSON


def _encoded(request: Request, value: Struct, status: int = 200) -> Response:
    kind = _kind(request)
    return Response(encode(value, kind), status, _headers(request) | _VARY, kind)
