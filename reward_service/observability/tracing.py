"""Request traces: the metrics, the log line and the OpenTelemetry spans of each HTTP request.

`ObservabilityMiddleware` creates one `RequestTrace` per request and puts it into the ASGI scope's `state`.
The application adds what only it knows; when the response is sent, the middleware reports the trace. Nothing
in it is sent to the client.

Spans are created when a request is finished, from the times recorded in its trace. Tracing is off unless an
endpoint is configured; OpenTelemetry is not even imported then. This module needs neither torch nor a web
server.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from reward_service.observability.logs import Log
from reward_service.observability.metrics import ANONYMOUS, Metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Polled by machines every few seconds: counted, but neither logged nor traced.
UNLOGGED_ROUTES = ("/health/live", "/health/ready", "/metrics")
#: Status of a request whose client disconnected before a response was sent (nginx's convention).
CLIENT_CLOSED_REQUEST = 499

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_EXPORT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Span:
    """Named time span in nanoseconds since 1970."""

    name: str
    begin_ns: int
    end_ns: int


@dataclass
class RequestTrace:
    """Facts about one request, collected while it is served.

    Attributes:
        id: the request ID
        client: name of the client in the keys file, or `anonymous`
        pairs: number of pairs in a score request
        reason: problem code of the response, None if it is not a problem
        status: HTTP status of the response
        bytes_in: bytes of the body received so far
        spans: timed parts of the request
    """

    id: str | None = None
    client: str | None = None
    pairs: int | None = None
    reason: str | None = None
    status: int = CLIENT_CLOSED_REQUEST
    bytes_in: int = 0
    spans: list[Span] = field(default_factory=list)

    def add_span(self, name: str, seconds: float, end_ns: int | None = None) -> int:
        """Record a part of the request by its duration.

        Args:
            name: name of the span
            seconds: its duration
            end_ns: its end in nanoseconds since 1970; None for now

        Returns:
            its begin in nanoseconds since 1970
        """
        end = time.time_ns() if end_ns is None else end_ns
        begin = end - round(seconds * 1e9)
        self.spans.append(Span(name, begin, end))
        return begin


class ObservabilityMiddleware:
    """ASGI middleware that counts, logs and traces every HTTP request.

    Args:
        app: the application; it finds the `RequestTrace` as `scope["state"]["trace"]`
        metrics: counts the responses
        log: gets one line for each request; None to log nothing
        tracer: gets the spans of each request; None to trace nothing
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, log: Log | None = None, tracer: Tracer | None = None
    ) -> None:
        self._app, self._metrics, self._log, self._tracer = app, metrics, log, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        trace, begin_ns = RequestTrace(), time.time_ns()
        started_s = time.perf_counter()

        async def count_bytes() -> Message:
            message = await receive()
            trace.bytes_in += len(message.get("body", b""))
            return message

        async def record_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            await send(message)

        traced_scope = dict(scope, state={**scope.get("state", {}), "trace": trace})
        try:
            await self._app(traced_scope, count_bytes, record_status)
        finally:
            elapsed_s = time.perf_counter() - started_s
            self._report(scope, trace, Span("total", begin_ns, begin_ns + round(elapsed_s * 1e9)))

    def _report(self, scope: Scope, trace: RequestTrace, total: Span) -> None:
        route = self._metrics.route(scope["path"])
        self._metrics.on_response(route, trace.status, trace.reason)
        if trace.pairs and trace.status < 400:
            self._metrics.client_pairs.labels(trace.client or ANONYMOUS).inc(trace.pairs)
        if route in UNLOGGED_ROUTES:
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        trace_id = trace_id_of(headers.get("traceparent", ""))
        if self._tracer:
            trace_id = self._send_spans(self._tracer, scope["method"], route, trace, total, headers)
        if self._log:
            self._write_line(self._log, scope["method"], route, trace, total, trace_id)

    @staticmethod
    def _write_line(
        log: Log, method: str, route: str, trace: RequestTrace, total: Span, trace_id: str | None
    ) -> None:
        milliseconds = {
            f"{span.name}_ms": round((span.end_ns - span.begin_ns) / 1e6, 3) for span in [*trace.spans, total]
        }
        (log.warning if trace.status >= 500 else log.info)(
            "request",
            id=trace.id,
            client=trace.client,
            method=method,
            route=route,
            status=trace.status,
            reason=trace.reason,
            pairs=trace.pairs,
            bytes=trace.bytes_in,
            trace_id=trace_id,
            **milliseconds,
        )

    @staticmethod
    def _send_spans(
        tracer: Tracer, method: str, route: str, trace: RequestTrace, total: Span, headers: Mapping[str, str]
    ) -> str:
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": trace.status,
            "reward.pairs": trace.pairs or 0,
            "reward.request_id": trace.id or "",
        }
        # In the response's timing_ms this part is named "run".
        parts = [replace(span, name="forward") if span.name == "run" else span for span in trace.spans]
        whole = replace(total, name=f"{method} {route}")
        return tracer.record(whole, parts, headers, attributes, failed=trace.status >= 500)


class Tracer:
    """OpenTelemetry exporter: one span for each request, with a child span for each of its parts.

    Args:
        processor: gets the spans
    """

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "reward-service")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("reward_service")
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        whole: Span,
        parts: Sequence[Span],
        headers: Mapping[str, str],
        attributes: Mapping[str, str | int],
        *,
        failed: bool,
    ) -> str:
        """Create and export the spans of a request.

        Args:
            whole: the span of the request
            parts: its child spans
            headers: the request's headers, for `traceparent` and `tracestate`
            attributes: of the request's span
            failed: mark the request's span as an error

        Returns:
            the trace ID, 32 hexadecimal digits
        """
        from opentelemetry import trace

        span = self._tracer.start_span(
            whole.name,
            context=self._propagator.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes=dict(attributes),
            start_time=whole.begin_ns,
        )
        parent = trace.set_span_in_context(span)
        for part in parts:
            self._tracer.start_span(part.name, context=parent, start_time=part.begin_ns).end(part.end_ns)
        if failed:
            span.set_status(trace.Status(trace.StatusCode.ERROR))
        span.end(whole.end_ns)
        return trace.format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Export the remaining spans, for a few seconds at most."""
        self._provider.shutdown()


def open_tracer(endpoint: str | None) -> Tracer | None:
    """Return a tracer that exports to an OTLP/HTTP collector.

    Args:
        endpoint: address of the collector; None for the one of the environment

    Returns:
        None if neither `endpoint` nor an environment variable names a collector
    """
    if not endpoint and not any(os.environ.get(name) for name in _ENDPOINT_VARIABLES):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # If the address is None, the exporter reads the environment variables.
    address = f"{endpoint.rstrip('/').removesuffix('/v1/traces')}/v1/traces" if endpoint else None
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=address, timeout=_EXPORT_TIMEOUT_S)))


def trace_id_of(traceparent: str) -> str | None:
    """Return the trace ID in a W3C `traceparent` header, or None if the header is invalid."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1] if found and found[1].strip("0") else None
