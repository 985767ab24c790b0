"""Synchronous reward client against scripted responses."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from reward_service.client import (
    AsyncRewardClient,
    IdentityChangedError,
    InputError,
    NotReadyError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    UnreachableError,
)
from reward_service.images import decode
from reward_service.protocol import MSGPACK, Health, ScoreRequest, ScoreResponse, decode_request
from tests.support.service.fake_service import (
    PIXELS,
    URL,
    FakeService,
    encoded_response,
    make_client,
    problem_response,
    score_response,
)


def test_scores_are_returned_in_request_order() -> None:
    """Each pair gets the score of its own image; API key and client ID are sent as headers."""
    service = FakeService()
    images = [PIXELS, PIXELS[:1], PIXELS[:2]]
    with make_client(service, api_key="secret", client_id="run-1") as reward_client:
        response = reward_client.score(["a", "b", "c"], images, evaluators=["clip"], normalization="z")
    assert [r.scores["clip"].raw for r in response.results] == [float(image.sum()) for image in images]
    assert service.headers[0]["authorization"] == "Bearer secret"
    assert service.headers[0]["x-client-id"] == "run-1"
    assert service.requests[0].evaluators == ["clip"]
    assert service.requests[0].normalization == "z"


def test_every_image_type_is_sent_unchanged(tmp_path: Path) -> None:
    """Pillow, array, uint8 and float tensors, path and bytes all reach the service as the same pixels."""
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    floats = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
    kinds = [
        Image.fromarray(PIXELS),
        PIXELS,
        np.asfortranarray(PIXELS),
        torch.from_numpy(PIXELS),
        floats.requires_grad_(),
        floats.double(),
        path,
        str(path),
        path.read_bytes(),
    ]
    service = FakeService()
    make_client(service).score(["x"] * len(kinds), kinds)
    for item in service.requests[0].items:
        sent = decode(item.image.data, item.image.format, item.image.shape)
        np.testing.assert_array_equal(sent.rgb, PIXELS)
        assert not sent.lossy


def test_problems_carry_the_index_in_the_whole_batch() -> None:
    """In a batch of several requests, pair 3 of the second one is pair 1,027 of the batch."""
    images = [PIXELS] * 1030

    def reject_the_second(request: httpx.Request) -> httpx.Response:
        body = decode_request(request.content, MSGPACK)
        return (
            encoded_response(score_response(body))
            if len(body.items) > 6
            else problem_response(422, retryable=False)
        )

    with pytest.raises(RejectedError, match=r"pair 1027: the reason") as caught:
        make_client(reject_the_second, chunk_pairs=1024).score(["x"] * len(images), images)
    assert caught.value.problem is not None
    assert caught.value.problem.errors[0].index == 1027


@pytest.mark.parametrize("prompt", ["\ud800", object(), None, 3, b"bytes"])
def test_prompts_that_cannot_be_encoded_raise_an_input_error(prompt: Any) -> None:
    """The codec's own exception is not exposed, and nothing is sent."""
    service = FakeService()
    with pytest.raises(InputError, match="prompt 0 cannot be sent"):
        make_client(service).score([prompt], [PIXELS])
    assert service.requests == []


def test_a_batch_may_be_one_array_or_tensor() -> None:
    """N images in one array are split along the first axis."""
    service = FakeService()
    make_client(service).score(["x"] * 3, np.stack([PIXELS] * 3))
    make_client(service).score(["x"] * 2, torch.zeros(2, 3, 4, 5))
    assert [len(request.items) for request in service.requests] == [3, 2]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), "uint8"),
        (PIXELS[:, :, 0], "shape"),
        (PIXELS.transpose(2, 0, 1), "shape"),
        (torch.full((3, 4, 5), 1.5), r"\[0, 1\]"),
        (torch.full((3, 4, 5), float("nan")), r"\[0, 1\]"),
        (torch.zeros(4, 5, 3), "shape"),
        (torch.zeros(3, 0, 5), "no pixels"),
        (b"GIF89a", "not a PNG"),
        ("/no/such/file.png", "cannot be read"),
        (None, "NoneType"),
    ],
)
def test_invalid_images_are_refused(image: Any, message: str) -> None:
    """The error names the index and the cause, and nothing is sent."""
    service = FakeService()
    with pytest.raises(InputError, match=f"image 1: .*{message}"):
        make_client(service).score(["a", "b"], [PIXELS, image])
    assert service.requests == []


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ([], [], "empty"),
        (["a"], [], "1 prompts but 0 images"),
        ("abc", [PIXELS] * 3, "one string"),
        (["a"], Image.fromarray(PIXELS), "one image"),
        (["a", ""], [PIXELS] * 2, "prompt 1 is empty"),
    ],
)
def test_invalid_batches_are_refused(prompts: Any, images: Any, message: str) -> None:
    """Mistakes that would score the wrong pairs are reported before anything is sent."""
    with pytest.raises(InputError, match=message):
        make_client(FakeService()).score(prompts, images)


def test_large_batches_are_split_and_merged() -> None:
    """Chunks are limited by count and by bytes; results are numbered as in one request."""
    service = FakeService()
    reward_client = make_client(service, chunk_pairs=4, chunk_bytes=3 * (PIXELS.nbytes + 68), in_flight=1)
    response = reward_client.score(["x"] * 8, [PIXELS] * 3 + [PIXELS[:1]] * 5)
    assert [len(request.items) for request in service.requests] == [3, 4, 1]
    assert [result.index for result in response.results] == list(range(8))
    assert response.timing_ms == {"total": 3.0}


def test_evaluators_that_change_between_chunks_raise_an_error() -> None:
    """Scores of two different models are never mixed in one response."""
    prints = iter("ab")

    def handler(request: httpx.Request) -> httpx.Response:
        return encoded_response(score_response(decode_request(request.content, MSGPACK), next(prints)))

    with pytest.raises(IdentityChangedError, match="clip has another fingerprint"):
        make_client(handler, chunk_pairs=1).score(["x", "y"], [PIXELS] * 2)


def test_retryable_failures_are_retried() -> None:
    """429, 503, 504 and a refused connection are retried until the scores arrive."""
    service = FakeService(
        problem_response(429), problem_response(503), problem_response(504), httpx.ConnectError("refused")
    )
    pauses: list[float] = []
    assert len(make_client(service, pauses).score(["x"], [PIXELS]).results) == 1
    assert len(service.requests) == 5
    assert len(pauses) == 4


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_proxy_errors_without_a_problem_are_retried(status: int) -> None:
    """A proxy in front of the service responds without problem details if the service does not respond."""
    service = FakeService(httpx.Response(status, text="Internal Server Error"))
    assert len(make_client(service, []).score(["x"], [PIXELS]).results) == 1
    assert len(service.requests) == 2


def test_retry_after_is_honoured() -> None:
    """The wait is never shorter than Retry-After, and waits differ between clients."""
    found = []
    for _ in range(8):
        pauses: list[float] = []
        make_client(FakeService(problem_response(503, retry_after="7")), pauses).score(["x"], [PIXELS])
        found += pauses
    assert min(found) >= 7.0
    assert len(set(found)) > 1


def test_retries_end_when_the_budget_is_spent() -> None:
    """The budget is in seconds, not in attempts; the error repeats the service's problem."""
    service = FakeService(*[problem_response(503, retry_after="40")] * 9)
    with pytest.raises(OverloadedError, match="503 queue_full: pair 3: the reason"):
        make_client(service, [], retry_budget_s=30.0).score(["x"], [PIXELS])
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 413, 415, 422, 500])
def test_other_failures_are_not_retried(status: int) -> None:
    """A rejected request fails at once, and the error holds the problem."""
    service = FakeService(problem_response(status, "some_code", retryable=False))
    with pytest.raises(RejectedError) as caught:
        make_client(service).score(["x"], [PIXELS])
    assert (caught.value.status, len(service.requests)) == (status, 1)
    assert caught.value.problem is not None
    assert caught.value.problem.errors[0].index == 3


def test_an_unreachable_service_is_reported_with_a_remedy() -> None:
    """The error gives address, cause and remedy in one line."""
    service = FakeService(*[httpx.ConnectError("connection refused")] * 2)
    with pytest.raises(
        UnreachableError, match=r"http://service\.invalid \(connection refused\); start it"
    ) as error:
        make_client(service, retry_budget_s=0.0).score(["x"], [PIXELS])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>hello</html>"),
        encoded_response(score_response(ScoreRequest([]))),
        encoded_response(
            score_response(
                decode_request(b'{"items":[{"prompt":"x","image":{"data":""}}]}', "application/json"),
                raw=float("nan"),
            )
        ),
        encoded_response({"id": "x"}),
    ],
    ids=["html", "too few", "nan", "other json"],
)
def test_malformed_responses_raise_a_protocol_error(response: httpx.Response) -> None:
    """Missing results, numbers that are not finite, or another program's response are never scores."""
    with pytest.raises(ProtocolError, match="is not a reward service"):
        make_client(FakeService(response)).score(["x"], [PIXELS])


def test_a_missing_evaluator_raises_an_error() -> None:
    """A response without a requested score is a protocol error."""
    with pytest.raises(ProtocolError, match="missing"):
        make_client(FakeService()).score(["x"], [PIXELS], evaluators=["clip", "hpsv2"])


def test_wait_until_ready_waits_through_loading() -> None:
    """The client polls through refused connections and loading, and stops early if loading failed."""
    states: list[Any] = [
        httpx.ConnectError("refused"),
        encoded_response(Health("loading", "models"), 503),
        encoded_response(Health("ready"), 200),
    ]

    def handler(_: httpx.Request) -> httpx.Response:
        state = states.pop(0)
        if isinstance(state, Exception):
            raise state
        assert isinstance(state, httpx.Response)
        return state

    make_client(handler).wait_until_ready(5.0)
    assert states == []
    states += [
        encoded_response(Health("failed", "no weights"), 503),
        encoded_response(Health("loading"), 503),
    ]
    with pytest.raises(NotReadyError, match="failed: no weights"):
        make_client(handler).wait_until_ready(60.0)
    assert make_client(handler).ready() is False


def test_the_asynchronous_client_retries_and_scores() -> None:
    """Retries and scores are those of the synchronous client."""
    service = FakeService(problem_response(503))
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def run() -> ScoreResponse:
        transport = httpx.MockTransport(service)
        async with AsyncRewardClient(URL, transport=transport, sleep=sleep) as reward_client:
            return await reward_client.score(["x"], [PIXELS])

    assert asyncio.run(run()).results[0].scores["clip"].raw == float(PIXELS.sum())
    assert len(slept) == 1


@pytest.mark.parametrize(
    "module", ["client", "protocol", "settings", "config", "scheduler.scheduler", "scoring.calibration"]
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    """A program that only requests scores loads neither torch nor the web server."""
    heavy = "{'torch', 'fastapi', 'transformers'}"
    code = f"import sys, reward_service.{module}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_reward_without_its_scores_is_refused() -> None:
    """A reward is accepted only together with the scores of the evaluators named."""

    def bare(request: httpx.Request) -> httpx.Response:
        full = score_response(decode_request(request.content, MSGPACK))
        results = [msgspec.structs.replace(result, scores={}) for result in full.results]
        return encoded_response(msgspec.structs.replace(full, results=results, evaluators={}))

    def other(request: httpx.Request) -> httpx.Response:
        full = score_response(decode_request(request.content, MSGPACK))
        return encoded_response(msgspec.structs.replace(full, evaluators={"hpsv2": full.evaluators["clip"]}))

    for handler in (bare, other):
        with (
            pytest.raises(ProtocolError, match="not have exactly the scores"),
            make_client(handler) as service,
        ):
            service.score(["x"], [PIXELS])
