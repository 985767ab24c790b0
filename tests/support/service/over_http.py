"""What any server of the application has to pass: tests that need its address, as the fixture `app`.

Those of the application in this process are taken as they are; the others are about what a server or a proxy
could change: long bodies, pieces, connections, headers, callers who leave.
"""

from __future__ import annotations

import json
import socket
import time
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
from tests.reward_service.scoring import test_multipart
from tests.reward_service.web import test_app

JSON = {"Content-Type": "application/json"}


def test_the_client_gets_the_engines_scores(app: str, engine: RewardEngine, pixels: list[Pixels]) -> None:
    """A batch in many requests, raw pixels in msgpack: each pair's deterministic numbers, bit by bit."""
    prompts, images = list(PROMPTS) * 4, pixels * 4
    with RewardClient(app, chunk_pairs=3) as service:
        answer = service.score(prompts, images, deterministic=True)
    pairs = [Pair(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    expected = engine.score(pairs, deterministic=True)
    for result, scores in zip(answer.results, expected, strict=True):
        assert {name: score.raw for name, score in result.scores.items()} == scores.raw


def test_a_long_body_arrives_whole(app: str, engine: RewardEngine) -> None:
    """An image of 12 MB of raw pixels, which no proxy's buffer holds at once."""
    large = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)
    with RewardClient(app) as service:
        answer = service.score(["a red square"], [large], deterministic=True)
    expected = engine.score([Pair("a red square", large)], deterministic=True)[0].raw
    assert {name: score.raw for name, score in answer.results[0].scores.items()} == expected


def test_a_body_may_come_in_pieces(app: str, item: dict[str, Any]) -> None:
    """Without a Content-Length, as streams are sent."""
    body = json.dumps({"items": [item]}).encode()
    pieces = (body[start : start + 100] for start in range(0, len(body), 100))
    assert httpx.post(f"{app}/score", content=pieces, headers=JSON).status_code == 200


def test_too_long_a_body_is_refused_by_its_announcement(app: str) -> None:
    """413 with a problem before anything of it is sent."""
    with _half_sent(app, 2**40, b"") as caller:
        assert _answer(caller)[:2] == (413, "body_too_large")


def test_an_answer_has_one_request_id(app: str, item: dict[str, Any]) -> None:
    """The caller's, or one made for it; the same in header and body."""
    for given in ({}, {"X-Request-Id": "run-7.a"}):
        answer = httpx.post(f"{app}/score", json={"items": [item]}, headers=given)
        assert answer.headers.get_list("x-request-id") == [answer.json()["id"]]
    assert answer.json()["id"] == "run-7.a"


def test_head_is_get_without_a_body(app: str) -> None:
    """Status, type and length as of GET."""
    asked, got = (httpx.request(method, f"{app}/health/live") for method in ("HEAD", "GET"))
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-length"] == got.headers["content-length"] == str(len(got.content))


def test_pages_are_served(app: str) -> None:
    """The page with its files and policy, and the handbook."""
    page = httpx.get(f"{app}/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert [httpx.get(f"{app}{path}").status_code for path in ("/page/page.js", "/docs")] == [200, 200]
    assert httpx.get(f"{app}/page/../app.py").status_code == 404


def test_a_deadline_is_kept(app: str) -> None:
    """What cannot be scored in time, here for want of the rest of its body, is a retryable 504."""
    with _half_sent(app, 1000, b"{", "X-Deadline-Ms: 200\r\n") as caller:
        assert _answer(caller) == (504, "deadline_exceeded", True)


def test_callers_who_leave_are_counted_as_such(app: str, item: dict[str, Any]) -> None:
    """Their requests are 499, not failures, and what they held is free again."""
    body = json.dumps({"items": [item] * 900, "deterministic": True}).encode()
    before = _metric(app, "reward_requests_total", 'code="499"')
    callers = [_half_sent(app, len(body), body, f"X-Client-Id: c{number}\r\n") for number in range(3)]
    _wait(lambda: _metric(app, "reward_inflight_bytes") > 0)
    for caller in callers:
        caller.close()
    _wait(lambda: _metric(app, "reward_requests_total", 'code="499"') > before)
    _wait(lambda: _metric(app, "reward_inflight_bytes") == 0)
    assert _metric(app, "reward_requests_total", 'code="503"') == 0


def test_connections_are_kept(app: str) -> None:
    """A second request, also after one that was refused, comes over the same connection."""
    with httpx.Client(base_url=app) as caller:
        assert caller.post("/score", json={}).status_code == 422
        used = [caller.get("/health/live").extensions["network_stream"] for _ in range(3)]
    assert len({id(stream) for stream in used}) == 1


def test_a_rejection_is_told(app: str, images: list[Pixels]) -> None:
    """The service's own problem comes through to the client."""
    with RewardClient(app) as service, pytest.raises(RejectedError, match="422 unknown_evaluator"):
        service.score(["x"], images[:1], evaluators=["beauty"])


def tests() -> Iterator[tuple[str, Callable[..., None]]]:
    """Names and functions, for a module with a fixture `app` to take as its own."""
    here = globals()
    yield from ((name, test) for name, test in here.items() if name.startswith("test_") and callable(test))
    for module, names in _PORTABLE.items():
        yield from ((name, getattr(module, name)) for name in names)


_PORTABLE: dict[ModuleType, tuple[str, ...]] = {
    test_app: (
        "test_a_score_is_the_engines_own",
        "test_json_and_msgpack_are_one_schema",
        "test_the_form_of_the_answer_is_the_callers_wish",
        "test_evaluators_weights_and_normalization_are_the_callers",
        "test_what_was_lost_is_reported",
        "test_bad_bodies_are_named",
        "test_bad_options_are_named",
        "test_the_item_at_fault_is_named",
        "test_long_input_is_not_echoed",
        "test_media_types",
        "test_addresses_and_methods",
        "test_request_ids_are_kept_if_plain",
        "test_openapi_tells_the_truth",
        "test_evaluators_are_listed",
    ),
    test_multipart: ("test_a_form_scores_as_json_does", "test_unfit_forms_are_named"),
}


def _half_sent(app: str, announced: int, sent: bytes, more: str = "") -> socket.socket:
    """A connection on which a request's head is sent, and so much of its body."""
    url = httpx.URL(app)
    caller = socket.create_connection((url.host, url.port or 80), timeout=20)
    lines = f"POST /score HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n{more}"
    caller.sendall(f"{lines}Content-Length: {announced}\r\n\r\n".encode() + sent)
    return caller


def _answer(caller: socket.socket) -> tuple[int, str, bool]:
    """Status, code and retryability of a problem."""
    received = b""
    while not received.endswith(b"}"):
        piece = caller.recv(65536)
        assert piece, received
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    problem = json.loads(body)
    return int(head.split()[1]), problem["code"], problem["retryable"]


def _metric(app: str, name: str, label: str = "") -> float:
    """The sum of a metric's samples that have a label."""
    lines = httpx.get(f"{app}/metrics", timeout=20).text.splitlines()
    found = [line for line in lines if line.startswith((name + "{", name + " ")) and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def _wait(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
