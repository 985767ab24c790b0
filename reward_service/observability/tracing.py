"""Spans for OpenTelemetry, made when a request is over, of the times that were noted on its way.

Off unless an endpoint is configured; then nothing of OpenTelemetry is imported. No torch, no web.

What is told of each request: metrics, one line of log, spans. A layer around the application.

The application notes in `current` what only it knows; nothing here is told to the caller.

What a running service reports to, from its start to its end, expected or not. No torch, no web.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
import time
from contextvars import ContextVar
from dataclasses import field, replace

from reward_service.observability.logs import Log
from reward_service.observability.metrics import ANONYMOUS, Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
import faulthandler
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from reward_service.config import ServiceConfig
from reward_service.observability.logs import Sink, libraries_log_to, open_log

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_ENVIRONMENT = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_EXPORT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Stretch:
    """A named part of a request, in nanoseconds since 1970."""

    name: str
    begin_ns: int
    end_ns: int


class Tracer:
    """Makes a span of each request, with one span in it for each of its parts.

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
        whole: Stretch,
        parts: Sequence[Stretch],
        headers: Mapping[str, str],
        attributes: Mapping[str, str | int],
        *,
        failed: bool,
    ) -> str:
        """Make a request's spans.

        Args:
            headers: the request's, for `traceparent` and `tracestate`

        Returns:
            the trace's id, 32 hexadecimal digits
        """
        from opentelemetry import trace

        span = self._tracer.start_span(
            whole.name,
            context=self._propagator.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes=dict(attributes),
            start_time=whole.begin_ns,
        )
        inside = trace.set_span_in_context(span)
        for part in parts:
            self._tracer.start_span(part.name, context=inside, start_time=part.begin_ns).end(part.end_ns)
        if failed:
            span.set_status(trace.Status(trace.StatusCode.ERROR))
        span.end(whole.end_ns)
        return trace.format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        self._provider.shutdown()


def open_tracer(endpoint: str | None) -> Tracer | None:
    """A tracer that sends to an OTLP/HTTP collector; None if neither argument nor environment names one."""
    if not endpoint and not any(os.environ.get(name) for name in _ENVIRONMENT):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Without an address of ours the exporter reads the environment's.
    address = f"{endpoint.rstrip('/').removesuffix('/v1/traces')}/v1/traces" if endpoint else None
    return Tracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=address, timeout=_EXPORT_TIMEOUT_S)))


def trace_id_of(traceparent: str) -> str | None:
    """The trace id in a W3C `traceparent` header; None if it is no such header."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1] if found and found[1].strip("0") else None


#: Asked every few seconds by machines: counted, but neither logged nor traced.
QUIET = ("/health/live", "/health/ready", "/metrics")


@dataclass
class Story:
    """What happened to one request.

    `reason` is its problem's code, `parts` are its timed stretches.
    """

    id: str | None = None
    client: str | None = None
    pairs: int | None = None
    reason: str | None = None
    status: int = 499
    bytes_in: int = 0
    parts: list[Stretch] = field(default_factory=list)

    def passed(self, name: str, seconds: float, ended_ns: int | None = None) -> int:
        """Note a part that took so long and has ended now, or at `ended_ns`.

        Returns:
            when it began, where the one before it may have ended
        """
        end = time.time_ns() if ended_ns is None else ended_ns
        begin = end - round(seconds * 1e9)
        self.parts.append(Stretch(name, begin, end))
        return begin


_story: ContextVar[Story] = ContextVar("story")


def current() -> Story:
    """The story of the request under way; one that nobody reads outside of any."""
    return _story.get(Story())


class Observed:
    """An ASGI application whose requests are counted, logged and traced.

    Args:
        log: None to log nothing
        tracer: None to trace nothing
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
        story, begin_ns = Story(), time.time_ns()
        started_s = time.perf_counter()

        async def listening() -> Message:
            message = await receive()
            story.bytes_in += len(message.get("body", b""))
            return message

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                story.status = message["status"]
            await send(message)

        token = _story.set(story)
        try:
            await self._app(scope, listening, telling)
        finally:
            _story.reset(token)
            elapsed_s = time.perf_counter() - started_s
            self._tell(scope, story, Stretch("", begin_ns, begin_ns + round(elapsed_s * 1e9)))

    def _tell(self, scope: Scope, story: Story, whole: Stretch) -> None:
        path = self._metrics.route(scope["path"])
        self._metrics.on_answer(path, story.status, story.reason)
        if story.pairs and story.status < 400:
            self._metrics.client_pairs.labels(story.client or ANONYMOUS).inc(story.pairs)
        if path in QUIET:
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        trace_id = trace_id_of(headers.get("traceparent", ""))
        if self._tracer:
            trace_id = self._trace(scope["method"], path, story, whole, headers)
        if self._log:
            milliseconds = {
                f"{part.name}_ms": round((part.end_ns - part.begin_ns) / 1e6, 3)
                for part in [*story.parts, Stretch("total", whole.begin_ns, whole.end_ns)]
            }
            (self._log.warning if story.status >= 500 else self._log.info)(
                "request",
                id=story.id,
                client=story.client,
                method=scope["method"],
                route=path,
                status=story.status,
                reason=story.reason,
                pairs=story.pairs,
                bytes=story.bytes_in,
                trace_id=trace_id,
                **milliseconds,
            )

    def _trace(self, method: str, path: str, story: Story, whole: Stretch, headers: dict[str, str]) -> str:
        assert self._tracer is not None
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": path,
            "http.response.status_code": story.status,
            "reward.pairs": story.pairs or 0,
            "reward.request_id": story.id or "",
        }
        # In the answer's timing_ms it is called run.
        parts = [replace(part, name="forward") if part.name == "run" else part for part in story.parts]
        named = Stretch(f"{method} {path}", whole.begin_ns, whole.end_ns)
        return self._tracer.record(named, parts, headers, attributes, failed=story.status >= 500)


#: The scheduler's name for the thread that runs the models.
DEVICE_THREAD = "device"
_LAST_LINES_S = 2.0
_LAST_WORDS_S = 5.0


@dataclass(frozen=True)
class Reporting:
    """The log, what writes it, and the tracer if spans are wanted."""

    log: Log
    sink: Sink
    tracer: Tracer | None


@contextmanager
def reporting(config: ServiceConfig) -> Iterator[Reporting]:
    """Log and trace as configured; what is left is written at the end, for some seconds at most."""
    sink = Sink()
    log = open_log(sink, config.logs.format)
    with libraries_log_to(log):
        tracer = open_tracer(config.tracing.endpoint)
        try:
            yield Reporting(log, sink, tracer)
        finally:
            if tracer:
                tracer.close()
            sink.flush(_LAST_LINES_S)


def end_soon(reason: str, log: Log, within_s: float = _LAST_WORDS_S) -> None:
    """See to it that the process is over soon, with status 1 if it hasn't ended by itself until then.

    A device that hangs can hold up an orderly end for ever: in a thread, in a destructor, while the
    interpreter shuts down. faulthandler's watchdog needs none of them; it writes nothing, for a log that
    nobody reads would hold up even that.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if names.get(ident) == DEVICE_THREAD:
            log.critical("this is where the device's thread is", stack="".join(traceback.format_stack(frame)))
    log.critical(f"{reason}; the process ends so that it can be started anew")
    faulthandler.dump_traceback_later(within_s, exit=True, file=os.open(os.devnull, os.O_WRONLY))
