"""Request traces: spans, log lines and metrics of requests."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from reward_service.observability.logs import open_log
from reward_service.observability.metrics import Metrics
from reward_service.observability.tracing import (
    ObservabilityMiddleware,
    RequestTrace,
    Tracer,
    open_tracer,
    trace_id_of,
)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Respond, and record in the trace what the service records."""
    trace: RequestTrace = scope["state"]["trace"]
    trace.id, trace.client, trace.pairs = "request-1", "team", 3
    await receive()
    trace.add_span("decode", 0.25)
    run_begin_ns = trace.add_span("run", 0.5)
    trace.add_span("queue", 1.0, run_begin_ns)
    status = 503 if scope["path"] == "/busy" else 200
    trace.reason = "queue_full" if status == 503 else None
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def send_request(exporter: InMemorySpanExporter | None, path: str, **headers: str) -> dict[str, Any]:
    """Send a request; return its line of the log, or {} if there is none."""
    lines: list[str] = []
    tracer = Tracer(SimpleSpanProcessor(exporter)) if exporter else None
    metrics = Metrics()
    metrics.routes = ("/v1/score", "/busy", "/health/ready")
    app = ObservabilityMiddleware(application, metrics, open_log(lines.append, "json"), tracer)

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            await client.post(path, content=b"12345", headers=headers)

    asyncio.run(run())
    return json.loads(lines[0]) if lines else {}


def test_request_is_a_span_with_child_spans(exporter: InMemorySpanExporter) -> None:
    """The span continues the client's trace; its children are adjacent and have the recorded durations."""
    line = send_request(exporter, "/v1/score", traceparent=TRACEPARENT)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /v1/score", "decode", "queue", "forward"}
    whole = spans["POST /v1/score"]
    assert f"{whole.context.trace_id:032x}" == line["trace_id"] == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert whole.kind is SpanKind.SERVER
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["reward.pairs"] == 3
    for name, seconds in (("decode", 0.25), ("queue", 1.0), ("forward", 0.5)):
        assert spans[name].parent.span_id == whole.context.span_id
        assert (spans[name].end_time - spans[name].start_time) / 1e9 == pytest.approx(seconds, abs=1e-6)
    assert spans["queue"].end_time == spans["forward"].start_time


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "00-xyz-1-1"])
def test_invalid_traceparent_starts_a_new_trace(exporter: InMemorySpanExporter, header: str) -> None:
    """An invalid header is not an error; the log line has the ID of the new trace."""
    line = send_request(exporter, "/v1/score", traceparent=header)
    whole = exporter.get_finished_spans()[-1]
    assert whole.parent is None
    assert f"{whole.context.trace_id:032x}" == line["trace_id"] != TRACE
    assert trace_id_of(header) is None


def test_server_error_is_marked(exporter: InMemorySpanExporter) -> None:
    """A 5xx sets the span's status to error and the log level to warning, with the problem code."""
    line = send_request(exporter, "/busy")
    assert exporter.get_finished_spans()[-1].status.status_code is StatusCode.ERROR
    assert (line["level"], line["status"], line["reason"]) == ("warning", 503, "queue_full")


def test_log_line_of_a_request() -> None:
    """The line has client, route, sizes and timings, and the client's trace ID even if tracing is off."""
    line = send_request(None, "/v1/score", traceparent=TRACEPARENT)
    assert line.pop("total_ms") > 0
    assert line.pop("timestamp")
    assert line == {
        "event": "request",
        "level": "info",
        "id": "request-1",
        "client": "team",
        "method": "POST",
        "route": "/v1/score",
        "status": 200,
        "pairs": 3,
        "bytes": 5,
        "trace_id": TRACE,
        "decode_ms": 250.0,
        "run_ms": 500.0,
        "queue_ms": 1000.0,
    }


def test_probes_are_neither_logged_nor_traced(exporter: InMemorySpanExporter) -> None:
    """Health checks and scrapes every few seconds do not fill log and traces."""
    assert send_request(exporter, "/health/ready") == {}
    assert exporter.get_finished_spans() == ()


def test_opentelemetry_is_not_imported_without_endpoint() -> None:
    """Without an endpoint, tracing is off and costs no import."""
    program = (
        "import sys; from reward_service.observability.tracing import open_tracer; "
        "assert open_tracer(None) is None; assert not [m for m in sys.modules if 'opentelemetry' in m]"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://127.0.0.1:9/v1/traces/"])
def test_endpoint_is_passed_to_the_exporter(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address may include OTLP's path; without one the exporter reads the environment."""
    endpoints: list[str | None] = []

    class Exporter(InMemorySpanExporter):
        def __init__(self, endpoint: str | None, timeout: float) -> None:
            super().__init__()
            endpoints.append(endpoint)

    module = "opentelemetry.exporter.otlp.proto.http.trace_exporter.OTLPSpanExporter"
    monkeypatch.setattr(module, Exporter)
    first = open_tracer(endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    second = open_tracer(None)
    assert endpoints == ["http://127.0.0.1:9/v1/traces", None]
    for tracer in (first, second):
        assert tracer is not None
        tracer.close()
