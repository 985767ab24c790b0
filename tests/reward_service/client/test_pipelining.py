"""Large batches: several requests at once, in order, lazily, and with one end."""

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
from tests.support.service.fake_service import PIXELS, URL, Handler, answer, client, problem, response_to

Ask = Callable[..., ScoreResponse]


def ask(handler: Handler, *batch: Any, **options: Any) -> ScoreResponse:
    return RewardClient(URL, transport=httpx.MockTransport(handler), **options).score(*batch)


def ask_async(handler: Any, *batch: Any, **options: Any) -> ScoreResponse:
    async def run() -> ScoreResponse:
        async with AsyncRewardClient(URL, transport=httpx.MockTransport(handler), **options) as service:
            return await service.score(*batch)

    return asyncio.run(run())


def scored(request: httpx.Request) -> httpx.Response:
    return answer(response_to(decode_request(request.content, MSGPACK)))


def grey(levels: range) -> Iterator[Pixels]:
    for level in levels:
        yield np.full((2, 2, 3), level, np.uint8)


@pytest.mark.parametrize("ask", [ask, ask_async])
def test_scores_keep_their_order_whoever_answers_first(ask: Ask) -> None:
    """The first request is answered last; every score still stands at its own pair."""
    arrived: list[int] = []

    def first_is_slow(request: httpx.Request) -> httpx.Response:
        arrived.append(decode_request(request.content, MSGPACK).items[0].image.data[0])
        if arrived[-1] == 0:
            time.sleep(0.1)
        return scored(request)

    response = ask(first_is_slow, iter(["x"] * 20), grey(range(20)), chunk_pairs=2, in_flight=3)
    assert [result.scores["clip"].raw for result in response.results] == [12.0 * n for n in range(20)]
    assert [result.index for result in response.results] == list(range(20))
    assert sorted(arrived) == list(range(0, 20, 2))


def test_requests_overlap_up_to_the_bound() -> None:
    """Three are under way together, never a fourth; the barrier would break if they came one by one."""
    together, most = threading.Barrier(3, timeout=20), 0
    inside: list[int] = []

    def slow(request: httpx.Request) -> httpx.Response:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        together.wait()
        inside.pop()
        return scored(request)

    ask(slow, ["x"] * 6, [PIXELS] * 6, chunk_pairs=1, in_flight=3)
    assert most == 3


def test_tasks_overlap_up_to_the_bound() -> None:
    """The same for asyncio."""
    inside = most = 0

    async def slow(request: httpx.Request) -> httpx.Response:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.05)
        inside -= 1
        return scored(request)

    ask_async(slow, ["x"] * 9, [PIXELS] * 9, chunk_pairs=1, in_flight=3)
    assert most == 3


@pytest.mark.parametrize(("ask", "pairs"), [(ask, 100_000), (ask_async, 10_000)])
def test_a_huge_batch_is_made_piece_by_piece(ask: Ask, pairs: int) -> None:
    """100,000 pairs from generators: never are many more made than have been answered."""
    made = answered = most_ahead = 0
    counted = threading.Lock()

    def images() -> Iterator[Pixels]:
        nonlocal made, most_ahead
        for _ in range(pairs):
            made += 1
            most_ahead = max(most_ahead, made - answered)
            yield PIXELS[:1, :1]

    def counting(request: httpx.Request) -> httpx.Response:
        nonlocal answered
        response = scored(request)
        with counted:
            answered += 500
        return response

    response = ask(counting, ("x" for _ in range(pairs)), images(), in_flight=2, chunk_pairs=500)
    assert len(response.results) == pairs
    assert most_ahead <= 4 * 500


@pytest.mark.parametrize("ask", [ask, ask_async])
def test_the_first_error_ends_the_rest(ask: Ask) -> None:
    """One request is rejected: the others are neither waited for in their pauses nor begun."""
    asked: list[int] = []

    def busy() -> httpx.Response:
        return httpx.Response(503, headers={"retry-after": "50"})

    def third_is_bad(request: httpx.Request) -> httpx.Response:
        asked.append(decode_request(request.content, MSGPACK).items[0].image.data[0])
        return problem(422, retryable=False) if asked[-1] == 2 else busy()

    started = time.monotonic()
    with pytest.raises(RejectedError):
        ask(third_is_bad, ["x"] * 50, grey(range(50)), chunk_pairs=1, in_flight=3)
    assert time.monotonic() - started < 25
    time.sleep(0.05)  # whoever went on regardless would be seen by now
    assert sorted(asked) == [0, 1, 2]


@pytest.mark.parametrize("ask", [ask, ask_async])
@pytest.mark.parametrize(
    ("prompts", "images", "words"),
    [
        (["x"] * 3, grey(range(2)), "more prompts than images"),
        (iter(["x"] * 2), [PIXELS] * 3, "more images than prompts"),
        (iter([]), iter([]), "empty"),
        (["x"] * 3, [PIXELS, PIXELS, None], "image 2: a NoneType"),
    ],
)
def test_generators_are_checked_as_they_go(ask: Ask, prompts: Any, images: Any, words: str) -> None:
    """Unequal lengths and bad pairs are found when they are reached."""
    with pytest.raises(InputError, match=words):
        ask(scored, prompts, images, chunk_pairs=1)


@pytest.mark.parametrize("ask", [ask, ask_async])
def test_the_callers_own_errors_come_through(ask: Ask) -> None:
    """What a generator of images raises is its caller's business."""

    def broken() -> Iterator[Pixels]:
        yield from grey(range(3))
        raise LookupError("no more images")

    with pytest.raises(LookupError, match="no more"):
        ask(scored, ["x"] * 9, broken(), chunk_pairs=1)


def test_a_client_closed_meanwhile_says_so() -> None:
    """Not httpx's RuntimeError, and no retries into a closed pool."""

    def closing(request: httpx.Request) -> httpx.Response:
        service.close()
        return problem(503)

    service = client(closing)
    with pytest.raises(ClientClosedError, match="was closed"):
        service.score(["x"], [PIXELS])
    with pytest.raises(ClientClosedError):
        service.ready()


def test_an_async_client_may_see_several_event_loops() -> None:
    """Each loop gets its own connections; after close none is made."""
    service = AsyncRewardClient(URL, transport=httpx.MockTransport(scored))
    for _ in range(2):
        assert len(asyncio.run(service.score(["x"], [PIXELS])).results) == 1
    asyncio.run(service.close())
    with pytest.raises(ClientClosedError):
        asyncio.run(service.score(["x"], [PIXELS]))


def test_a_cancelled_task_leaves_nothing_behind() -> None:
    """The caller gives up: its requests are cancelled with it."""
    begun, ended = 0, 0

    async def endless(_: httpx.Request) -> httpx.Response:
        nonlocal begun, ended
        begun += 1
        try:
            await asyncio.sleep(60)
        finally:
            ended += 1
        raise AssertionError

    async def run() -> None:
        async with AsyncRewardClient(URL, transport=httpx.MockTransport(endless), chunk_pairs=1) as service:
            task = asyncio.create_task(service.score(["x"] * 9, [PIXELS] * 9))
            while begun < 4:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended == 4

    asyncio.run(run())


def test_many_threads_share_a_client() -> None:
    """Twenty callers at once get their own scores."""
    with RewardClient(URL, transport=httpx.MockTransport(scored)) as service:
        found: dict[int, float] = {}

        def one(level: int) -> None:
            response = service.score(["x"], list(grey(range(level, level + 1))))
            found[level] = response.results[0].scores["clip"].raw

        threads = [threading.Thread(target=one, args=(level,)) for level in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {level: 12.0 * level for level in range(20)}


NESTED = {"status_code": 500, "content": b'{"type": ' + b"[" * 200_000, "headers": {"content-type": PROBLEM}}
LONG_AGO, FAR = "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 99999999999 07:28:00 GMT"


@pytest.mark.parametrize("ask", [ask, ask_async])
@pytest.mark.parametrize(
    ("told", "error"),
    [
        (NESTED, OverloadedError),
        ({"status_code": 503, "headers": {"retry-after": FAR}}, OverloadedError),
        ({"status_code": 503, "headers": {"retry-after": LONG_AGO, "date": FAR}}, OverloadedError),
    ],
)
def test_what_another_program_answers_is_one_of_our_errors(
    ask: Ask, told: dict[str, Any], error: type[Exception]
) -> None:
    """However odd its body and its dates."""
    with pytest.raises(error):
        ask(lambda _: httpx.Response(**told), ["x"], [PIXELS], retry_budget_s=0)
