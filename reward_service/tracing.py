"""Spans for OpenTelemetry, made when a request is over, of the times that were noted on its way.

Off unless an endpoint is configured; then nothing of OpenTelemetry is imported. No torch, no web.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

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

    :param processor: gets the spans
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

        :param headers: the request's, for ``traceparent`` and ``tracestate``
        :returns: the trace's id, 32 hexadecimal digits
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
    """The trace id in a W3C ``traceparent`` header; None if it is no such header."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1] if found and found[1].strip("0") else None
