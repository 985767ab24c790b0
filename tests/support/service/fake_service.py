"""Fake reward service for the client's tests: prepared responses, or scores that sum the image's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import msgspec
import numpy as np

from reward_service.client import RewardClient
from reward_service.protocol import (
    MSGPACK,
    EvaluatorIdentity,
    EvaluatorScore,
    ItemResult,
    Problem,
    ProblemItem,
    ScoreRequest,
    ScoreResponse,
    decode_request,
)

URL = "http://service.invalid"
Handler = Callable[[httpx.Request], httpx.Response]
PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def score_response(request: ScoreRequest, fingerprint: str = "f", raw: float | None = None) -> ScoreResponse:
    """Return a response with one evaluator, whose raw score is the sum of the raw image's bytes."""
    results = []
    for index, item in enumerate(request.items):
        score = EvaluatorScore(float(sum(item.image.data)) if raw is None else raw, 0.0, 0.5)
        results.append(ItemResult(index, 0.5, {"clip": score}, truncated_prompt=False, lossy_input=False))
    return ScoreResponse("id", results, {"clip": EvaluatorIdentity(fingerprint, "c")}, {"total": 1.0})


def encoded_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    body = msgspec.msgpack.encode(value) if isinstance(value, ScoreResponse) else msgspec.json.encode(value)
    kind = MSGPACK if isinstance(value, ScoreResponse) else "application/json"
    return httpx.Response(status, content=body, headers={"content-type": kind, **(headers or {})})


def problem_response(
    status: int, code: str = "queue_full", *, retryable: bool = True, retry_after: str | None = None
) -> httpx.Response:
    items = [ProblemItem(code, "the reason", 3)]
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return encoded_response(Problem("t", status, code, "d", retryable, "id", errors=items), status, headers)


class FakeService:
    """Handler that returns prepared responses in turn, then scores; records the requests."""

    def __init__(self, *responses: httpx.Response | Exception) -> None:
        self.responses = list(responses)
        self.requests: list[ScoreRequest] = []
        self.headers: list[httpx.Headers] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        self.requests.append(decode_request(request.content, MSGPACK))
        if not self.responses:
            return encoded_response(score_response(self.requests[-1]))
        first = self.responses.pop(0)
        if isinstance(first, Exception):
            raise first
        return first


def make_client(handler: Handler, pauses: list[float] | None = None, **options: Any) -> RewardClient:
    sleep = (lambda _: None) if pauses is None else pauses.append
    return RewardClient(URL, transport=httpx.MockTransport(handler), sleep=sleep, **options)


@contextmanager
def http_server(handler: Handler) -> Iterator[str]:
    """Serve a handler over real sockets; yields its address."""

    class RequestHandler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = handler(httpx.Request(self.command, URL + self.path, content=content))
            self.send_response(found.status_code)
            for name in ("content-type", "content-length"):
                self.send_header(name, found.headers[name])
            self.end_headers()
            self.wfile.write(found.content)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), RequestHandler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
