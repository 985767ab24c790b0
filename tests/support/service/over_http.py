"""Tests that any server of the application has to pass; they take its address as the fixture `app`.

Some are the tests of the application in this process; the others are about behaviour that a server or a proxy
could change: long bodies, chunked bodies, connections, headers, clients that disconnect.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest

from reward_service.client import RejectedError, RewardClient
from reward_service.engine.engine import RewardEngine
from reward_service.engine.types import Pair
from reward_service.images import Pixels
from tests.reward_service.conftest import PROMPTS
from tests.reward_service.requests import test_multipart
from tests.reward_service.web import test_app
from tests.support.service.serving import TIMEOUT_S, wait_until

JSON = {"Content-Type": "application/json"}


def test_client_gets_the_engines_scores(app: str, engine: RewardEngine, images: list[Pixels]) -> None:
    """A batch in many requests, raw pixels in msgpack: deterministic scores are equal bit by bit."""
    prompts, batch = list(PROMPTS) * 4, images * 4
    with RewardClient(app, chunk_pairs=3) as service:
        response = service.score(prompts, batch, deterministic=True)
    pairs = [Pair(prompt, image) for prompt, image in zip(prompts, batch, strict=True)]
    expected = engine.score(pairs, deterministic=True)
    for result, scores in zip(response.results, expected, strict=True):
        assert {name: score.raw for name, score in result.scores.items()} == scores.raw


def test_long_body_arrives_whole(app: str, engine: RewardEngine) -> None:
    """An image of 12 MB of raw pixels, which no proxy buffers at once."""
    large = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    with RewardClient(app) as service:
        response = service.score(["a red square"], [large], deterministic=True)
    expected = engine.score([Pair("a red square", large)], deterministic=True)[0].raw
    assert {name: score.raw for name, score in response.results[0].scores.items()} == expected


def test_chunked_body_is_accepted(app: str, item: dict[str, Any]) -> None:
    """Without a Content-Length, as streams are sent."""
    body = json.dumps({"items": [item]}).encode()
    pieces = (body[start : start + 100] for start in range(0, len(body), 100))
    assert httpx.post(f"{app}/score", content=pieces, headers=JSON, timeout=TIMEOUT_S).status_code == 200


def test_too_long_body_is_rejected_by_content_length(app: str) -> None:
    """It gets a 413 problem before any of the body is sent."""
    with partial_request(app, 2**40, b"") as client:
        assert read_problem(client)[:2] == (413, "body_too_large")


def test_response_has_one_request_id(app: str, item: dict[str, Any]) -> None:
    """The client's ID or a new one; the same in header and body."""
    for given in ({}, {"X-Request-Id": "run-7.a"}):
        response = httpx.post(f"{app}/score", json={"items": [item]}, headers=given, timeout=TIMEOUT_S)
        assert response.headers.get_list("x-request-id") == [response.json()["id"]]
    assert response.json()["id"] == "run-7.a"


def test_head_is_get_without_a_body(app: str) -> None:
    """Status, type and length are those of GET."""
    head, get = (httpx.request(method, f"{app}/health/live") for method in ("HEAD", "GET"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.content))


def test_pages_are_served(app: str) -> None:
    """The page with its files and policy, and the API documentation with Swagger UI's files."""
    page = httpx.get(f"{app}/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert [
        httpx.get(f"{app}{path}").status_code for path in ("/page/page.js", "/docs", "/page/swagger-ui.css")
    ] == [200] * 3
    assert httpx.get(f"{app}/page/../app.py").status_code == 404


def test_deadline_is_enforced(app: str) -> None:
    """A request that cannot be scored in time, since its body is incomplete, gets a retryable 504."""
    with partial_request(app, 1000, b"{", "X-Deadline-Ms: 200\r\n") as client:
        assert read_problem(client) == (504, "deadline_exceeded", True)


def test_disconnected_clients_are_counted(app: str, item: dict[str, Any]) -> None:
    """Their requests are counted as 499, not as failures, and their resources are released."""
    body = json.dumps({"items": [item] * 900, "deterministic": True}).encode()
    before = metric(app, "reward_requests_total", 'code="499"')
    clients = [partial_request(app, len(body), body, f"X-Client-Id: c{number}\r\n") for number in range(3)]
    wait_until(lambda: metric(app, "reward_inflight_bytes") > 0)
    for client in clients:
        client.close()
    wait_until(lambda: metric(app, "reward_requests_total", 'code="499"') > before)
    wait_until(lambda: metric(app, "reward_inflight_bytes") == 0)
    assert metric(app, "reward_requests_total", 'code="503"') == 0


def test_connections_are_kept_alive(app: str) -> None:
    """A second request, also after one that was rejected, uses the same connection."""
    with httpx.Client(base_url=app, timeout=TIMEOUT_S) as client:
        assert client.post("/score", json={}).status_code == 422
        used = [client.get("/health/live").extensions["network_stream"] for _ in range(3)]
    assert len({id(stream) for stream in used}) == 1


def test_rejection_reaches_the_client(app: str, images: list[Pixels]) -> None:
    """The client raises the service's own problem."""
    with RewardClient(app) as service, pytest.raises(RejectedError, match="422 unknown_evaluator"):
        service.score(["x"], images[:1], evaluators=["beauty"])


def tests() -> Iterator[tuple[str, Callable[..., None]]]:
    """Yield names and functions, for a module with a fixture `app` to import them."""
    here = globals()
    yield from ((name, test) for name, test in here.items() if name.startswith("test_") and callable(test))
    for module, names in _PORTABLE.items():
        yield from ((name, getattr(module, name)) for name in names)


_PORTABLE: dict[ModuleType, tuple[str, ...]] = {
    test_app: (
        "test_scores_equal_the_engines",
        "test_json_and_msgpack_have_the_same_schema",
        "test_response_type_follows_accept",
        "test_request_selects_evaluators_weights_and_normalization",
        "test_lossy_input_is_reported",
        "test_invalid_body_is_a_problem",
        "test_invalid_option_is_a_problem",
        "test_problem_names_the_invalid_items",
        "test_long_input_is_not_echoed",
        "test_media_type_is_checked",
        "test_unknown_address_or_method_is_a_problem",
        "test_valid_request_id_is_returned",
        "test_openapi_references_resolve",
        "test_evaluators_are_listed",
    ),
    test_multipart: ("test_form_gets_the_same_scores_as_json", "test_invalid_form_is_a_problem"),
}


def partial_request(app: str, announced: int, sent: bytes, more: str = "") -> socket.socket:
    """Open a connection and send the headers of a request and a part of its body."""
    url = httpx.URL(app)
    client = socket.create_connection((url.host, url.port or 80), timeout=TIMEOUT_S)
    lines = f"POST /score HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n{more}"
    client.sendall(f"{lines}Content-Length: {announced}\r\n\r\n".encode() + sent)
    return client


def read_problem(client: socket.socket) -> tuple[int, str, bool]:
    """Receive a problem; return its status, code and whether it is retryable."""
    received = b""
    while not received.endswith(b"}"):
        piece = client.recv(65536)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    problem = json.loads(body)
    return int(head.split()[1]), problem["code"], problem["retryable"]


def metric(app: str, name: str, label: str = "") -> float:
    """Return the sum of a metric's samples with a label."""
    lines = httpx.get(f"{app}/metrics", timeout=TIMEOUT_S).text.splitlines()
    found = [line for line in lines if line.startswith((name + "{", name + " ")) and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)
