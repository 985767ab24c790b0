"""The HTTP face: what each request is answered with, good and bad."""

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
from tests.support.service.serving import asking

Answer = httpx.Response
READY_S = 20.0


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


def talk(app: FastAPI | str, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with asking(app) as client:
            return await conversation(client)

    return asyncio.run(run())


def post(
    app: FastAPI | str, body: Any, content_type: str = JSON, path: str = "/score", **headers: str
) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": content_type, **headers}
    return talk(app, lambda client: client.post(path, content=content, headers=headers))  # type: ignore[no-any-return]


def png(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def jpeg(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def test_a_score_is_the_engines_own(app: FastAPI, engine: RewardEngine, images: list[Pixels]) -> None:
    """Raw numbers come unchanged from the engine, in order, with z, unit and a reward between 0 and 1."""
    prompts = ["a red square", "a circle"]
    items = [
        {"prompt": prompt, "image": {"data": png(image)}}
        for prompt, image in zip(prompts, images[1:3], strict=True)
    ]
    answer = post(app, {"items": items})
    assert answer.status_code == 200
    body = answer.json()
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


def test_json_and_msgpack_are_one_schema(app: FastAPI, images: list[Pixels]) -> None:
    """The same pair in base64 PNG, raw bytes and msgpack gets the same numbers."""
    pixels = images[0]
    raw = {"data": pixels.tobytes(), "format": "raw", "shape": list(pixels.shape)}
    packed = msgspec.msgpack.encode({"items": [{"prompt": "x", "image": raw}]})
    answers = [
        post(app, {"items": [{"prompt": "x", "image": {"data": png(pixels)}}]}, path="/v1/score").json(),
        post(app, msgspec.json.encode({"items": [{"prompt": "x", "image": raw}]})).json(),
        msgspec.msgpack.decode(post(app, packed, MSGPACK, Accept=MSGPACK).content),
    ]
    scores = [answer["results"][0]["scores"] for answer in answers]
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
def test_the_form_of_the_answer_is_the_callers_wish(app: FastAPI, accept: str, kind: str) -> None:
    """msgpack where Accept names it and does not prefer JSON; a cache is told that it matters."""
    answer = talk(app, lambda client: client.get("/v1/evaluators", headers={"Accept": accept}))
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert answer.headers["vary"] == "Accept"


def test_pairs_dropped_before_they_were_queued_are_counted(
    config: ServiceConfig, engine: RewardEngine, item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While their images were being decoded: by their reason, as those that wait in the queue are."""
    service = ScoringService(config, build=lambda _: engine)
    service.start()
    wait_for(service, "ready")
    app, body = create_app(config, service), json.dumps({"items": [item] * 3}).encode()

    async def never(*_: Any) -> Any:
        await asyncio.sleep(READY_S)

    monkeypatch.setattr(service, "_decoded", never)

    async def leave(client: httpx.AsyncClient) -> None:
        asking = asyncio.ensure_future(client.post("/score", content=body, headers={"Content-Type": JSON}))
        while service.admission.used["pairs"] < 3:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    talk(app, leave)
    assert b"reward_cancelled_pairs_total 3.0" in service.metrics.render()
    assert post(app, body, **{"X-Deadline-Ms": "100"}).status_code == 504
    assert b"reward_expired_pairs_total 3.0" in service.metrics.render()
    service.close()


def test_evaluators_weights_and_normalization_are_the_callers(app: FastAPI, item: dict[str, Any]) -> None:
    """The reward is the weighted mean of the normalization asked for, over the evaluators asked for."""
    body = {"items": [item], "evaluators": ["clip", "pickscore"], "weights": {"clip": 3, "pickscore": 1}}
    scores = post(app, {**body, "normalization": "z"}).json()["results"][0]
    assert set(scores["scores"]) == {"clip", "pickscore"}
    expected = (3 * scores["scores"]["clip"]["z"] + scores["scores"]["pickscore"]["z"]) / 4
    assert scores["reward"] == pytest.approx(expected)
    only = post(app, {**body, "weights": {"clip": 2}, "normalization": "raw"}).json()["results"][0]
    assert only["reward"] == pytest.approx(only["scores"]["clip"]["raw"])


def test_the_order_of_evaluators_does_not_part_callers(
    app: FastAPI, service: ScoringService, item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who names the same evaluators in another order can share a batch, and is answered in that order."""
    assert service._backend is not None
    queue, lanes = service._backend.queue, []
    submit = queue.submit

    def noted(works: Any, lane: Any, **options: Any) -> Any:
        lanes.append(lane)
        return submit(works, lane, **options)

    monkeypatch.setattr(queue, "submit", noted)
    for names in (["hpsv2", "clip"], ["clip", "hpsv2"]):
        answer = post(app, {"items": [item], "evaluators": names})
        assert list(answer.json()["results"][0]["scores"]) == names
    assert lanes[0] == lanes[1] == (("clip", "hpsv2"), False)


def test_what_was_lost_is_reported(app: FastAPI, images: list[Pixels]) -> None:
    """A JPEG is marked lossy and a prompt beyond the context truncated."""
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
def test_bad_bodies_are_named(app: FastAPI, name: str) -> None:
    """Each bad body gets its own 4xx problem, not retryable, and none of its text comes back."""
    body, status, code = BAD[name]
    answer = post(app, body)
    assert answer.headers["content-type"] == PROBLEM
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["detail"]
    assert problem["retryable"] is False
    assert "hello" not in answer.text
    assert "aGVsbG8" not in answer.text


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
def test_bad_options_are_named(app: FastAPI, item: dict[str, Any], change: dict[str, Any], code: str) -> None:
    """Options that cannot be honoured are refused, never ignored."""
    answer = post(app, {"items": [item], **change})
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_the_item_at_fault_is_named(app: FastAPI, item: dict[str, Any]) -> None:
    """The problem carries each bad item's index, at most ten, and the message names the first."""
    items = [item, *[{"prompt": "x", "image": NOT_AN_IMAGE}] * 30]
    problem = post(app, {"items": items}).json()
    assert [error["index"] for error in problem["errors"]] == list(range(1, 11))
    assert "item 1" in problem["detail"]
    missing = post(app, {"items": [item, item, {"image": item["image"]}]}).json()
    assert missing["errors"][0]["index"] == 2
    assert "`prompt`" in missing["detail"]


def test_long_input_is_not_echoed(app: FastAPI) -> None:
    """An unknown key of a megabyte is answered in under two kilobytes."""
    answer = post(app, {"items": [], "<script>" + "x" * 1_000_000: 1})
    assert answer.status_code == 422
    assert len(answer.content) < 2000
    assert "<script>" not in answer.text


def test_media_types(app: FastAPI, item: dict[str, Any]) -> None:
    """Anything but JSON and msgpack is 415; parameters of the type do not matter."""
    assert post(app, {"items": [item]}, "text/plain").status_code == 415
    assert post(app, {"items": [item]}, "application/json; charset=utf-8").status_code == 200


def test_addresses_and_methods(app: FastAPI) -> None:
    """Unknown addresses and methods are problems too."""
    found = [
        talk(app, lambda client, path=path: client.get(path))
        for path in ("/nothing", "/health/live/", "/score")
    ]
    assert [(answer.status_code, answer.json()["code"]) for answer in found] == [
        (404, "not_found"),
        (404, "not_found"),
        (405, "method_not_allowed"),
    ]


def test_limits_are_kept(config: ServiceConfig, engine: RewardEngine, item: dict[str, Any]) -> None:
    """Bodies, batches and images beyond the limits are refused, with and without Content-Length."""
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
    answers = [
        post(app, b" " * 20_001),
        talk(app, lambda client: client.post("/score", content=in_pieces(), headers=too_long)),
        post(app, {"items": [item] * 3}),
        post(app, {"items": [{"prompt": "x", "image": {"data": png(large)}}]}),
    ]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [
        (413, "body_too_large"),
        (413, "body_too_large"),
        (422, "too_many_pairs"),
        (422, "image_too_large"),
    ]
    assert post(app, {"items": [item] * 2}).status_code == 200
    service.close()


def test_what_was_admitted_is_finished_while_stopping(
    config: ServiceConfig, engine: RewardEngine, item: dict[str, Any]
) -> None:
    """A request whose body was on its way when the end was asked for is answered; a later one is not."""
    service = ScoringService(config, build=lambda _: engine)
    service.start()
    wait_for(service, "ready")
    app = create_app(config, service)

    async def body() -> Any:
        service.stop_accepting()
        yield json.dumps({"items": [item]}).encode()

    headers = {"Content-Type": JSON}
    under_way = talk(app, lambda client: client.post("/score", content=body(), headers=headers))
    late = post(app, {"items": [item]})
    assert (under_way.status_code, late.status_code) == (200, 503)
    service.close()


def test_a_body_that_never_comes_is_answered_at_the_end(app: FastAPI) -> None:
    """Cancelled at shutdown, it is a retryable 503 and no traceback."""

    async def cancelled() -> Any:
        raise asyncio.CancelledError
        yield b""

    headers = {"Content-Type": JSON}
    answer = talk(app, lambda client: client.post("/score", content=cancelled(), headers=headers))
    assert (answer.status_code, answer.json()["retryable"]) == (503, True)


def test_life_while_loading_and_after_failure(config: ServiceConfig, item: dict[str, Any]) -> None:
    """Alive at once, not ready until loaded, asks to come back; a failed load is told in one line."""
    release = threading.Event()
    said: list[str] = []

    def build(_: ServiceConfig) -> RewardEngine:
        release.wait()
        raise RuntimeError("no\nweights")

    service = ScoringService(config, build=build, on_failure=said.append)
    app = create_app(config, service)
    service.start()
    live, ready = (
        talk(app, lambda client, path=path: client.get(path)) for path in ("/health/live", "/health/ready")
    )
    assert (live.status_code, ready.status_code, ready.json()["status"]) == (200, 503, "loading")
    early = post(app, {"items": [item]})
    assert (early.status_code, early.json()["retryable"]) == (503, True)
    assert int(early.headers["retry-after"]) >= 1
    release.set()
    wait_for(service, "failed")
    assert talk(app, lambda client: client.get("/health/ready")).json()["detail"] == "no weights"
    assert said == ["no weights"]


def test_a_pair_that_cannot_be_scored_fails_alone(
    config: ServiceConfig, engine: RewardEngine, item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poisoned prompt is a 500 that names its item; requests in the same batch are answered."""
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

    async def together(client: httpx.AsyncClient) -> list[Answer]:
        bodies = [{"items": [item]}, {"items": [item, {**item, "prompt": "poison"}]}, {"items": [item] * 3}]
        return await asyncio.gather(*[client.post("/score", json=body) for body in bodies])

    good, bad, also_good = talk(app, together)
    assert (good.status_code, also_good.status_code) == (200, 200)
    assert (bad.status_code, bad.json()["code"]) == (500, "scoring_failed")
    assert bad.json()["errors"][0]["index"] == 1
    service.close()


def test_request_ids_are_kept_if_plain(app: FastAPI, item: dict[str, Any]) -> None:
    """A caller's id comes back in body and header; one that could forge log lines does not."""
    kept = post(app, {"items": [item]}, **{"X-Request-Id": "run-7.a"})
    assert kept.json()["id"] == kept.headers["x-request-id"] == "run-7.a"
    assert post(app, {"items": [item]}, **{"X-Request-Id": "a b"}).json()["id"] != "a b"


def test_openapi_tells_the_truth(app: FastAPI) -> None:
    """Every reference resolves, and the statuses that the tests above see are documented."""
    document = talk(app, lambda client: client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    answers = document["paths"]["/v1/score"]["post"]["responses"]
    assert {"200", "400", "413", "415", "422", "500", "503"} <= set(answers)
    assert "HTTPValidationError" not in schemas


def test_evaluators_are_listed(app: FastAPI) -> None:
    """Fingerprint, calibration, formula and provisional state of each evaluator."""
    listed = talk(app, lambda client: client.get("/v1/evaluators")).json()
    assert listed["device"] == "cpu"
    assert listed["evaluators"]["pickscore"]["formula"] == "exp(logit_scale)·cos(e, t)"
    assert listed["evaluators"]["clip"]["provisional"] is True


def test_whatever_goes_wrong_while_loading_is_told(
    config: ServiceConfig, engine: RewardEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the models are there: it never loads for ever."""

    def fail(*_: Any) -> None:
        raise LookupError("no such thing")

    monkeypatch.setattr("reward_service.scoring.service.record_loaded", fail)
    failures: list[str] = []
    service = ScoringService(config, build=lambda _: engine, on_failure=failures.append)
    service.start()
    wait_for(service, "failed")
    assert failures == [service.health.detail] == ["no such thing"]
    service.close()
