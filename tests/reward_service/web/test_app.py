"""HTTP application: responses to valid and invalid requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from reward_service.config import Limits, ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.engine.types import Pair
from reward_service.images import Pixels
from reward_service.protocol import JSON, MSGPACK, PROBLEM
from reward_service.scoring.service import ScoringService
from reward_service.web.app import create_app
from tests.support.service.serving import http_client

READY_S = 120.0


def wait_for(service: ScoringService, status: str) -> None:
    deadline = time.monotonic() + READY_S
    while service.health.status != status:
        assert time.monotonic() < deadline, service.health
        time.sleep(0.01)


@pytest.fixture(scope="module")
def service(config: ServiceConfig, engine: RewardEngine) -> Iterator[ScoringService]:
    service = ScoringService(config, build=lambda _: engine)
    service.start()
    wait_for(service, "ready")
    yield service
    service.close()


@pytest.fixture(scope="module")
def app(config: ServiceConfig, service: ScoringService) -> FastAPI:
    return create_app(config, service)


def run_client(app: FastAPI | str, requests: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with http_client(app) as client:
            return await requests(client)

    return asyncio.run(run())


def post(
    app: FastAPI | str, body: Any, content_type: str = JSON, path: str = "/score", **headers: str
) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": content_type, **headers}
    return run_client(app, lambda client: client.post(path, content=content, headers=headers))  # type: ignore[no-any-return]


def png(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def jpeg(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def test_scores_equal_the_engines(app: FastAPI, engine: RewardEngine, images: list[Pixels]) -> None:
    """Raw scores come unchanged from the engine, in order, with z, unit and a reward between 0 and 1."""
    prompts = ["a red square", "a circle"]
    items = [
        {"prompt": prompt, "image": {"data": png(image)}}
        for prompt, image in zip(prompts, images[1:3], strict=True)
    ]
    response = post(app, {"items": items})
    assert response.status_code == 200
    body = response.json()
    expected = engine.score([Pair(p, i) for p, i in zip(prompts, images[1:3], strict=True)])
    for result, scores in zip(body["results"], expected, strict=True):
        assert {name: score["raw"] for name, score in result["scores"].items()} == pytest.approx(
            scores.raw, abs=1e-4
        )
        assert 0.0 < result["reward"] < 1.0
        assert not result["lossy_input"]
    assert [result["index"] for result in body["results"]] == [0, 1]
    assert set(body["evaluators"]) == {"aesthetic", "clip", "pickscore", "hpsv2"}
    assert len({identity["fingerprint"] for identity in body["evaluators"].values()}) == 4


def test_json_and_msgpack_have_the_same_schema(app: FastAPI, images: list[Pixels]) -> None:
    """The same pair as base64 PNG, as raw bytes and in msgpack gets the same scores."""
    pixels = images[0]
    raw = {"data": pixels.tobytes(), "format": "raw", "shape": list(pixels.shape)}
    packed = msgspec.msgpack.encode({"items": [{"prompt": "x", "image": raw}]})
    responses = [
        post(app, {"items": [{"prompt": "x", "image": {"data": png(pixels)}}]}, path="/v1/score").json(),
        post(app, msgspec.json.encode({"items": [{"prompt": "x", "image": raw}]})).json(),
        msgspec.msgpack.decode(post(app, packed, MSGPACK, Accept=MSGPACK).content),
    ]
    scores = [response["results"][0]["scores"] for response in responses]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", JSON),
        ("*/*", JSON),
        (MSGPACK, MSGPACK),
        ("Application/MsgPack; q=0.5", MSGPACK),
        ("application/json, application/msgpack", MSGPACK),
        ("application/json, application/msgpack;q=0.1", JSON),
        ("application/msgpack;q=0, application/json", JSON),
        ("application/msgpack;q=lots", JSON),
        ("application/msgpackish", JSON),
        (";,;q=,", JSON),
    ],
)
def test_response_type_follows_accept(app: FastAPI, accept: str, kind: str) -> None:
    """msgpack if Accept names it and does not prefer JSON; the response varies by Accept."""
    response = run_client(app, lambda client: client.get("/v1/evaluators", headers={"Accept": accept}))
    assert (response.status_code, response.headers["content-type"]) == (200, kind)
    assert response.headers["vary"] == "Accept"


def test_pairs_dropped_while_decoding_are_counted(
    config: ServiceConfig, engine: RewardEngine, item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted by reason, as pairs that are dropped from the queue are."""
    service = ScoringService(config, build=lambda _: engine)
    service.start()
    wait_for(service, "ready")
    app, body = create_app(config, service), json.dumps({"items": [item] * 3}).encode()

    async def never(*_: Any) -> Any:
        await asyncio.sleep(READY_S)

    monkeypatch.setattr(service, "_decode_slices", never)

    async def leave(client: httpx.AsyncClient) -> None:
        task = asyncio.ensure_future(client.post("/score", content=body, headers={"Content-Type": JSON}))
        while service.admission.used["pairs"] < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_client(app, leave)
    assert b"reward_cancelled_pairs_total 3.0" in service.metrics.render()
    assert post(app, body, **{"X-Deadline-Ms": "100"}).status_code == 504
    assert b"reward_expired_pairs_total 3.0" in service.metrics.render()
    service.close()


def test_request_selects_evaluators_weights_and_normalization(app: FastAPI, item: dict[str, Any]) -> None:
    """The reward is the weighted mean of the requested normalization over the requested evaluators."""
    body = {"items": [item], "evaluators": ["clip", "pickscore"], "weights": {"clip": 3, "pickscore": 1}}
    scores = post(app, {**body, "normalization": "z"}).json()["results"][0]
    assert set(scores["scores"]) == {"clip", "pickscore"}
    expected = (3 * scores["scores"]["clip"]["z"] + scores["scores"]["pickscore"]["z"]) / 4
    assert scores["reward"] == pytest.approx(expected)
    only = post(app, {**body, "weights": {"clip": 2}, "normalization": "raw"}).json()["results"][0]
    assert only["reward"] == pytest.approx(only["scores"]["clip"]["raw"])


def test_order_of_evaluators_does_not_split_batches(
    app: FastAPI, service: ScoringService, item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for the same evaluators in another order share a batch; each response has its own order."""
    assert service._backend is not None
    queue, lanes = service._backend.queue, []
    submit = queue.submit

    def record_lane(works: Any, lane: Any, **options: Any) -> Any:
        lanes.append(lane)
        return submit(works, lane, **options)

    monkeypatch.setattr(queue, "submit", record_lane)
    for names in (["hpsv2", "clip"], ["clip", "hpsv2"]):
        response = post(app, {"items": [item], "evaluators": names})
        assert list(response.json()["results"][0]["scores"]) == names
    assert lanes[0] == lanes[1] == (("clip", "hpsv2"), False)


def test_lossy_input_is_reported(app: FastAPI, images: list[Pixels]) -> None:
    """A JPEG is marked as lossy, and a prompt beyond the context as truncated."""
    data = base64.b64encode(jpeg(images[4])).decode()
    result = post(app, {"items": [{"prompt": "word " * 40, "image": {"data": data}}]}).json()["results"][0]
    assert result["lossy_input"]
    assert result["truncated_prompt"]


NOT_AN_IMAGE = {"data": base64.b64encode(b"hello").decode()}
BAD = {
    "not JSON": (b'{"items": ', 400, "malformed_body"),
    "not UTF-8": (b'{"items": [{"prompt": "\xff"}]}', 400, "malformed_body"),
    "no items": (b"{}", 422, "invalid_request"),
    "empty batch": (b'{"items": []}', 422, "empty_batch"),
    "no prompt": (json.dumps({"items": [{"image": NOT_AN_IMAGE}]}).encode(), 422, "invalid_request"),
    "empty prompt": (
        json.dumps({"items": [{"prompt": "", "image": NOT_AN_IMAGE}]}).encode(),
        422,
        "invalid_request",
    ),
    "not an image": (
        json.dumps({"items": [{"prompt": "x", "image": NOT_AN_IMAGE}]}).encode(),
        422,
        "not_an_image",
    ),
    "not base64": (b'{"items": [{"prompt": "x", "image": {"data": "!"}}]}', 422, "invalid_request"),
    "data: address": (
        b'{"items": [{"prompt": "x", "image": {"data": "data:image/png;base64,AAAA"}}]}',
        422,
        "invalid_request",
    ),
    "unknown key": (b'{"items": [{"prompt": "x", "image": 1}]}', 422, "invalid_request"),
    "null": (b"null", 422, "invalid_request"),
    "deep": (b'{"items": ' + b"[" * 100_000, 422, "invalid_request"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_body_is_a_problem(app: FastAPI, name: str) -> None:
    """Each invalid body gets its own 4xx problem, not retryable, which echoes none of its text."""
    body, status, code = BAD[name]
    response = post(app, body)
    assert response.headers["content-type"] == PROBLEM
    problem = response.json()
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["detail"]
    assert problem["retryable"] is False
    assert "hello" not in response.text
    assert "aGVsbG8" not in response.text


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"evaluators": ["beauty"]}, "unknown_evaluator"),
        ({"weights": {"beauty": 1}}, "unknown_evaluator"),
        ({"weights": {"clip": 0}}, "bad_weights"),
        ({"evaluators": ["clip"], "weights": {"hpsv2": 1}}, "bad_weights"),
        ({"evaluators": []}, "invalid_request"),
        ({"normalization": "percent"}, "invalid_request"),
    ],
)
def test_invalid_option_is_a_problem(
    app: FastAPI, item: dict[str, Any], change: dict[str, Any], code: str
) -> None:
    """Unusable options are rejected, never ignored."""
    response = post(app, {"items": [item], **change})
    assert (response.status_code, response.json()["code"]) == (422, code)


def test_problem_names_the_invalid_items(app: FastAPI, item: dict[str, Any]) -> None:
    """The problem has the index of each invalid item, at most ten, and its detail names the first."""
    items = [item, *[{"prompt": "x", "image": NOT_AN_IMAGE}] * 30]
    problem = post(app, {"items": items}).json()
    assert [error["index"] for error in problem["errors"]] == list(range(1, 11))
    assert "item 1" in problem["detail"]
    missing = post(app, {"items": [item, item, {"image": item["image"]}]}).json()
    assert missing["errors"][0]["index"] == 2
    assert "`prompt`" in missing["detail"]


def test_long_input_is_not_echoed(app: FastAPI) -> None:
    """The response to an unknown field of a megabyte is shorter than two kilobytes."""
    response = post(app, {"items": [], "<script>" + "x" * 1_000_000: 1})
    assert response.status_code == 422
    assert len(response.content) < 2000
    assert "<script>" not in response.text


def test_media_type_is_checked(app: FastAPI, item: dict[str, Any]) -> None:
    """Anything but JSON and msgpack is 415; parameters of the type are ignored."""
    assert post(app, {"items": [item]}, "text/plain").status_code == 415
    assert post(app, {"items": [item]}, "application/json; charset=utf-8").status_code == 200


def test_unknown_address_or_method_is_a_problem(app: FastAPI) -> None:
    """Unknown addresses and methods are problems too."""
    found = [
        run_client(app, lambda client, path=path: client.get(path))
        for path in ("/nothing", "/health/live/", "/score")
    ]
    assert [(response.status_code, response.json()["code"]) for response in found] == [
        (404, "not_found"),
        (404, "not_found"),
        (405, "method_not_allowed"),
    ]


def test_limits_are_enforced(config: ServiceConfig, engine: RewardEngine, item: dict[str, Any]) -> None:
    """Bodies, batches and images beyond the limits are rejected, with and without Content-Length."""
    limits = Limits(max_body_bytes=20_000, max_pairs=2, max_image_pixels=2000)
    small = config.model_copy(update={"limits": limits})
    service = ScoringService(small, build=lambda _: engine)
    service.start()
    wait_for(service, "ready")
    app = create_app(small, service)

    async def in_pieces() -> Any:
        for _ in range(30):
            yield b" " * 1000

    too_long = {"Content-Type": JSON}
    large = np.zeros((60, 60, 3), np.uint8)
    responses = [
        post(app, b" " * 20_001),
        run_client(app, lambda client: client.post("/score", content=in_pieces(), headers=too_long)),
        post(app, {"items": [item] * 3}),
        post(app, {"items": [{"prompt": "x", "image": {"data": png(large)}}]}),
    ]
    assert [(response.status_code, response.json()["code"]) for response in responses] == [
        (413, "body_too_large"),
        (413, "body_too_large"),
        (422, "too_many_pairs"),
        (422, "image_too_large"),
    ]
    assert post(app, {"items": [item] * 2}).status_code == 200
    service.close()


def test_admitted_request_is_finished_while_stopping(
    config: ServiceConfig, engine: RewardEngine, item: dict[str, Any]
) -> None:
    """A request whose body is still being received at shutdown is scored; a later request is rejected."""
    service = ScoringService(config, build=lambda _: engine)
    service.start()
    wait_for(service, "ready")
    app = create_app(config, service)

    async def body() -> Any:
        service.stop_accepting()
        yield json.dumps({"items": [item]}).encode()

    headers = {"Content-Type": JSON}
    under_way = run_client(app, lambda client: client.post("/score", content=body(), headers=headers))
    late = post(app, {"items": [item]})
    assert (under_way.status_code, late.status_code) == (200, 503)
    service.close()


def test_request_without_body_gets_a_response_at_shutdown(app: FastAPI) -> None:
    """Cancelled at shutdown, it gets a retryable 503 and leaves no traceback."""

    async def cancelled() -> Any:
        raise asyncio.CancelledError
        yield b""

    headers = {"Content-Type": JSON}
    response = run_client(app, lambda client: client.post("/score", content=cancelled(), headers=headers))
    assert (response.status_code, response.json()["retryable"]) == (503, True)


def test_health_while_loading_and_after_failure(config: ServiceConfig, item: dict[str, Any]) -> None:
    """Live at once, not ready until loaded, with Retry-After; a failed load is reported in one line."""
    release = threading.Event()
    failures: list[str] = []

    def build(_: ServiceConfig) -> RewardEngine:
        release.wait()
        raise RuntimeError("no\nweights")

    service = ScoringService(config, build=build, on_failure=failures.append)
    app = create_app(config, service)
    service.start()
    live, ready = (
        run_client(app, lambda client, path=path: client.get(path))
        for path in ("/health/live", "/health/ready")
    )
    assert (live.status_code, ready.status_code, ready.json()["status"]) == (200, 503, "loading")
    early = post(app, {"items": [item]})
    assert (early.status_code, early.json()["retryable"]) == (503, True)
    assert int(early.headers["retry-after"]) >= 1
    release.set()
    wait_for(service, "failed")
    assert run_client(app, lambda client: client.get("/health/ready")).json()["detail"] == "no weights"
    assert failures == ["no weights"]


def test_unscorable_pair_fails_its_request_only(
    config: ServiceConfig, engine: RewardEngine, item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request of a poisoned prompt gets a 500 that names the item; others in the batch are scored."""
    real = engine.score

    def poisoned(pairs: Any, *rest: Any, **options: Any) -> Any:
        if any(pair.prompt == "poison" for pair in pairs):
            raise ArithmeticError("not a finite number")
        return real(pairs, *rest, **options)

    monkeypatch.setattr(engine, "score", poisoned)
    service = ScoringService(config, build=lambda _: engine)
    service.start()
    wait_for(service, "ready")
    app = create_app(config, service)

    async def together(client: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [{"items": [item]}, {"items": [item, {**item, "prompt": "poison"}]}, {"items": [item] * 3}]
        return await asyncio.gather(*[client.post("/score", json=body) for body in bodies])

    good, bad, also_good = run_client(app, together)
    assert (good.status_code, also_good.status_code) == (200, 200)
    assert (bad.status_code, bad.json()["code"]) == (500, "scoring_failed")
    assert bad.json()["errors"][0]["index"] == 1
    service.close()


def test_valid_request_id_is_returned(app: FastAPI, item: dict[str, Any]) -> None:
    """A valid client ID is in body and header; one that could forge log lines is replaced."""
    kept = post(app, {"items": [item]}, **{"X-Request-Id": "run-7.a"})
    assert kept.json()["id"] == kept.headers["x-request-id"] == "run-7.a"
    assert post(app, {"items": [item]}, **{"X-Request-Id": "a b"}).json()["id"] != "a b"


def test_openapi_references_resolve(app: FastAPI) -> None:
    """Every reference resolves, and the statuses that the tests above see are documented."""
    document = run_client(app, lambda client: client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    responses = document["paths"]["/v1/score"]["post"]["responses"]
    assert {"200", "400", "413", "415", "422", "500", "503"} <= set(responses)
    assert "HTTPValidationError" not in schemas


def test_evaluators_are_listed(app: FastAPI) -> None:
    """The list has fingerprint, calibration, formula and provisional state of each evaluator."""
    listed = run_client(app, lambda client: client.get("/v1/evaluators")).json()
    assert listed["device"] == "cpu"
    assert listed["evaluators"]["pickscore"]["formula"] == "exp(logit_scale)·cos(e, t)"
    assert listed["evaluators"]["clip"]["provisional"] is True


def test_any_error_while_loading_is_reported(
    config: ServiceConfig, engine: RewardEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error after the models are loaded also sets the health to failed."""

    def fail(*_: Any) -> None:
        raise LookupError("no such thing")

    monkeypatch.setattr("reward_service.scoring.service.record_loaded", fail)
    failures: list[str] = []
    service = ScoringService(config, build=lambda _: engine, on_failure=failures.append)
    service.start()
    wait_for(service, "failed")
    assert failures == [service.health.detail] == ["no such thing"]
    service.close()
