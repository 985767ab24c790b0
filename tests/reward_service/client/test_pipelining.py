"""Concurrent requests of large batches: order, laziness, errors and cancellation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from reward_service.client import (
    AsyncRewardClient,
    ClientClosedError,
    InputError,
    OverloadedError,
    RejectedError,
    RewardClient,
)
from reward_service.images import Pixels
from reward_service.protocol import MSGPACK, PROBLEM, ScoreResponse, decode_request
from tests.support.service.fake_service import (
    PIXELS,
    URL,
    Handler,
    encoded_response,
    make_client,
    problem_response,
    score_response,
)

Score = Callable[..., ScoreResponse]


def score(handler: Handler, *batch: Any, **options: Any) -> ScoreResponse:
    return RewardClient(URL, transport=httpx.MockTransport(handler), **options).score(*batch)


def score_async(handler: Any, *batch: Any, **options: Any) -> ScoreResponse:
    async def run() -> ScoreResponse:
        async with AsyncRewardClient(URL, transport=httpx.MockTransport(handler), **options) as service:
            return await service.score(*batch)

    return asyncio.run(run())


def respond(request: httpx.Request) -> httpx.Response:
    return encoded_response(score_response(decode_request(request.content, MSGPACK)))


def gray_images(levels: range) -> Iterator[Pixels]:
    for level in levels:
        yield np.full((2, 2, 3), level, np.uint8)


@pytest.mark.parametrize("score", [score, score_async])
def test_scores_keep_the_order_of_the_pairs(score: Score) -> None:
    """Even if the first response arrives last, every score belongs to its own pair."""
    arrived: list[int] = []

    def respond_slowly_to_the_first(request: httpx.Request) -> httpx.Response:
        arrived.append(decode_request(request.content, MSGPACK).items[0].image.data[0])
        if arrived[-1] == 0:
            time.sleep(0.1)
        return respond(request)

    response = score(
        respond_slowly_to_the_first, iter(["x"] * 20), gray_images(range(20)), chunk_pairs=2, in_flight=3
    )
    assert [result.scores["clip"].raw for result in response.results] == [12.0 * n for n in range(20)]
    assert [result.index for result in response.results] == list(range(20))
    assert sorted(arrived) == list(range(0, 20, 2))


def test_threads_send_up_to_the_limit_at_once() -> None:
    """Three requests are in flight together, never a fourth; the barrier breaks if they are sequential."""
    together, most = threading.Barrier(3, timeout=20), 0
    inside: list[int] = []

    def slow(request: httpx.Request) -> httpx.Response:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        together.wait()
        inside.pop()
        return respond(request)

    score(slow, ["x"] * 6, [PIXELS] * 6, chunk_pairs=1, in_flight=3)
    assert most == 3


def test_tasks_send_up_to_the_limit_at_once() -> None:
    """The asynchronous client has three requests in flight together, never a fourth."""
    inside = most = 0

    async def slow(request: httpx.Request) -> httpx.Response:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.05)
        inside -= 1
        return respond(request)

    score_async(slow, ["x"] * 9, [PIXELS] * 9, chunk_pairs=1, in_flight=3)
    assert most == 3


@pytest.mark.parametrize(("score", "pairs"), [(score, 100_000), (score_async, 10_000)])
def test_a_huge_batch_is_built_on_demand(score: Score, pairs: int) -> None:
    """Of 100,000 pairs from generators, only the requests in flight and the next ones are built."""
    built = scored = most_ahead = 0
    counted = threading.Lock()

    def images() -> Iterator[Pixels]:
        nonlocal built, most_ahead
        for _ in range(pairs):
            built += 1
            most_ahead = max(most_ahead, built - scored)
            yield PIXELS[:1, :1]

    def counting(request: httpx.Request) -> httpx.Response:
        nonlocal scored
        response = respond(request)
        with counted:
            scored += 500
        return response

    response = score(counting, ("x" for _ in range(pairs)), images(), in_flight=2, chunk_pairs=500)
    assert len(response.results) == pairs
    assert most_ahead <= 4 * 500


@pytest.mark.parametrize("score", [score, score_async])
def test_the_first_error_stops_the_other_requests(score: Score) -> None:
    """After one request is rejected, the others' retries end and no further request is sent."""
    sent: list[int] = []

    def busy() -> httpx.Response:
        return httpx.Response(503, headers={"retry-after": "50"})

    def reject_the_third(request: httpx.Request) -> httpx.Response:
        sent.append(decode_request(request.content, MSGPACK).items[0].image.data[0])
        return problem_response(422, retryable=False) if sent[-1] == 2 else busy()

    started = time.monotonic()
    with pytest.raises(RejectedError):
        score(reject_the_third, ["x"] * 50, gray_images(range(50)), chunk_pairs=1, in_flight=3)
    assert time.monotonic() - started < 25
    time.sleep(0.05)  # requests that went on regardless would arrive by now
    assert sorted(sent) == [0, 1, 2]


@pytest.mark.parametrize("score", [score, score_async])
@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (["x"] * 3, gray_images(range(2)), "more prompts than images"),
        (iter(["x"] * 2), [PIXELS] * 3, "more images than prompts"),
        (iter([]), iter([]), "empty"),
        (["x"] * 3, [PIXELS, PIXELS, None], "image 2: a NoneType"),
    ],
)
def test_generators_are_checked_while_they_are_read(
    score: Score, prompts: Any, images: Any, message: str
) -> None:
    """Unequal lengths and invalid pairs are reported when they are reached."""
    with pytest.raises(InputError, match=message):
        score(respond, prompts, images, chunk_pairs=1)


@pytest.mark.parametrize("score", [score, score_async])
def test_errors_of_the_generators_are_not_wrapped(score: Score) -> None:
    """An exception raised by a generator of images is raised unchanged."""

    def broken() -> Iterator[Pixels]:
        yield from gray_images(range(3))
        raise LookupError("no more images")

    with pytest.raises(LookupError, match="no more"):
        score(respond, ["x"] * 9, broken(), chunk_pairs=1)


def test_a_client_closed_during_a_call_raises() -> None:
    """The error is the client's own instead of httpx's RuntimeError, and there are no retries."""

    def closing(request: httpx.Request) -> httpx.Response:
        service.close()
        return problem_response(503)

    service = make_client(closing)
    with pytest.raises(ClientClosedError, match="was closed"):
        service.score(["x"], [PIXELS])
    with pytest.raises(ClientClosedError):
        service.ready()


def test_an_async_client_works_in_several_event_loops() -> None:
    """Each loop gets its own connections; a closed client opens none."""
    service = AsyncRewardClient(URL, transport=httpx.MockTransport(respond))
    for _ in range(2):
        assert len(asyncio.run(service.score(["x"], [PIXELS])).results) == 1
    asyncio.run(service.close())
    with pytest.raises(ClientClosedError):
        asyncio.run(service.score(["x"], [PIXELS]))


def test_cancelling_a_call_cancels_its_requests() -> None:
    """When the task of a call is cancelled, its requests in flight end too."""
    started, ended = 0, 0

    async def endless(_: httpx.Request) -> httpx.Response:
        nonlocal started, ended
        started += 1
        try:
            await asyncio.sleep(60)
        finally:
            ended += 1
        raise AssertionError

    async def run() -> None:
        async with AsyncRewardClient(URL, transport=httpx.MockTransport(endless), chunk_pairs=1) as service:
            task = asyncio.create_task(service.score(["x"] * 9, [PIXELS] * 9))
            while started < 4:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended == 4

    asyncio.run(run())


def test_threads_can_share_a_client() -> None:
    """Twenty concurrent threads get their own scores."""
    with RewardClient(URL, transport=httpx.MockTransport(respond)) as service:
        found: dict[int, float] = {}

        def one(level: int) -> None:
            response = service.score(["x"], list(gray_images(range(level, level + 1))))
            found[level] = response.results[0].scores["clip"].raw

        threads = [threading.Thread(target=one, args=(level,)) for level in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {level: 12.0 * level for level in range(20)}


NESTED = {"status_code": 500, "content": b'{"type": ' + b"[" * 200_000, "headers": {"content-type": PROBLEM}}
LONG_AGO, FAR = "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 99999999999 07:28:00 GMT"


@pytest.mark.parametrize("score", [score, score_async])
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (NESTED, OverloadedError),
        ({"status_code": 503, "headers": {"retry-after": FAR}}, OverloadedError),
        ({"status_code": 503, "headers": {"retry-after": LONG_AGO, "date": FAR}}, OverloadedError),
    ],
)
def test_foreign_responses_raise_the_clients_own_errors(
    score: Score, fields: dict[str, Any], error: type[Exception]
) -> None:
    """Deeply nested bodies and impossible dates do not expose the decoder's exceptions."""
    with pytest.raises(error):
        score(lambda _: httpx.Response(**fields), ["x"], [PIXELS], retry_budget_s=0)
