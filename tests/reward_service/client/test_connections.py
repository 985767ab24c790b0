"""The client's way to the service: addresses, keys, proxies, retries, deadlines, pins."""

from __future__ import annotations

import asyncio
import os
import time
from email.utils import formatdate
from typing import Any

import httpx
import msgspec
import pytest

from reward_service.client import (
    AsyncRewardClient,
    DeadlineError,
    IdentityChangedError,
    InputError,
    NotReadyError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    RewardClient,
    UnreachableError,
)
from reward_service.protocol import (
    MSGPACK,
    EvaluatorDescription,
    EvaluatorIdentity,
    EvaluatorList,
    Health,
    ScoreResponse,
    decode_request,
)
from tests.support.service.fake_service import (
    PIXELS,
    URL,
    Service,
    answer,
    client,
    listening,
    problem,
    response_to,
)

PAIR = (["x"], [PIXELS])
KNOWN = {"clip": EvaluatorIdentity("f", "c")}


class Counted:
    """Scores, and remembers the paths it was asked at."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        return answer(response_to(decode_request(request.content, MSGPACK)))


@pytest.mark.parametrize(
    ("path", "asked"),
    [("", "/v1/score"), ("/", "/v1/score"), ("/a/b", "/a/b/v1/score"), ("/a/", "/a/v1/score")],
)
def test_the_address_may_have_a_path(path: str, asked: str) -> None:
    """As behind a proxy; a slash at its end changes nothing."""
    service = Counted()
    with listening(service) as url, RewardClient(url + path) as reward_client:
        reward_client.score(*PAIR)
    assert service.paths == [asked]


@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("127.0.0.1:8000", "start with http"),
        ("ftp://judge", "start with http"),
        ("http://", "be like"),
        ("http://judge:80000", "be like"),
        ("http://judge:x", "no URL"),
        ("http://judge/?a=1", "be like"),
        ("http://user:hunter2@judge", "give the key as api_key"),
        (None, "start with http"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(kind: Any, url: Any, words: str) -> None:
    """When the client is made, in one line, and without repeating a password."""
    with pytest.raises(InputError, match=words) as caught:
        kind(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "given", [{"api_key": "clé"}, {"api_key": "two words"}, {"api_key": "key\n"}, {"client_id": "ünïque"},
              {"client_id": "x" * 65}, {"client_id": "a b"}, {"api_key": b"bytes"}],
)  # fmt: skip
def test_what_fits_no_header_is_an_input_error(given: Any) -> None:
    """Not a codec's error at the first request; the key itself is not shown."""
    with pytest.raises(InputError) as caught:
        RewardClient(URL, **given)
    assert str(next(iter(given.values()))) not in str(caught.value)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_no_proxy_stands_between_loopback_addresses(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """A proxy of the environment leads to other machines; elsewhere one that cannot work is told at once."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with listening(Counted()) as url, RewardClient(url) as service:
        assert len(service.score(*PAIR).results) == 1
    if proxy.startswith("socks"):
        with pytest.raises(InputError, match="proxy cannot be used"):
            RewardClient("http://judge.invalid")


def test_a_fork_makes_its_own_connections() -> None:
    """The child neither writes to the parent's socket nor waits for its locks; both go on."""
    service = Counted()
    with listening(service) as url, RewardClient(url) as reward_client:
        reward_client.score(*PAIR)
        if (child := os.fork()) == 0:
            os._exit(0 if len(reward_client.score(*PAIR).results) == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(reward_client.score(*PAIR).results) == 1
    assert len(service.paths) == 3


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (httpx.Response(200, html="<p>hello</p>"), ProtocolError),
        (httpx.Response(200, content=b"\xff\xfe"), ProtocolError),
        (httpx.Response(404, html="<p>no such page</p>"), RejectedError),
        (httpx.Response(302, headers={"location": "/login"}), RejectedError),
    ],
)
def test_another_program_at_the_address(found: httpx.Response, error: Any) -> None:
    """Its pages are no scores and no readiness; the message says to check the address."""
    with pytest.raises(error, match="check the address"):
        client(lambda _: found).score(*PAIR)
    assert client(lambda _: found).ready() is False
    with pytest.raises(NotReadyError, match="not a reward service"):
        client(lambda _: found).wait_until_ready(0)
    with pytest.raises(error, match="check the address"):
        client(lambda _: found).identity()


def test_a_request_keeps_its_id_over_retries() -> None:
    """Its traces and log lines belong together; another request has another id."""
    service = Service(problem(503), httpx.ReadError("reset"))
    client(service, chunk_pairs=1, in_flight=1).score(["x", "y"], [PIXELS] * 2)
    ids = [headers["x-request-id"] for headers in service.headers]
    assert len(ids) == 4
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert all(len(it) <= 64 for it in ids)


@pytest.mark.parametrize(
    ("date", "now", "least", "most"),
    [
        (30.0, None, 20, 40),
        (30.0, 10.0, 19, 29),
        (-30.0, None, 0, 1),
        ("never", None, 0, 1),
        ("inf", None, 0, 1),
    ],
)
def test_retry_after_may_be_a_date(date: Any, now: float | None, least: float, most: float) -> None:
    """Seconds until that date by the service's own clock; a date gone by, or none at all, adds nothing."""
    headers = {"retry-after": date if isinstance(date, str) else formatdate(time.time() + date, usegmt=True)}
    if now is not None:
        headers["date"] = formatdate(time.time() + now, usegmt=True)
    pauses: list[float] = []
    client(Service(httpx.Response(503, headers=headers)), pauses).score(*PAIR)
    assert least <= pauses[0] <= most


def test_what_the_service_says_can_be_retried_is() -> None:
    """By its word, whatever the status; a proxy's 502 counts as not now."""
    service = Service(problem(408, "body_timeout"), problem(500, "odd", retryable=True), httpx.Response(502))
    assert len(client(service).score(*PAIR).results) == 1
    with pytest.raises(RejectedError):
        client(Service(problem(503, "odd", retryable=False))).score(*PAIR)


def test_a_deadline_is_told_and_kept() -> None:
    """Each attempt says what is left; a pause that would outlast it is not begun."""
    service = Service(problem(503), httpx.Response(503, headers={"retry-after": "30"}))
    with pytest.raises(DeadlineError, match=r"too late: .*503"):
        client(service, []).score(*PAIR, deadline_s=20)
    left = [int(headers["x-deadline-ms"]) for headers in service.headers]
    assert 20_000 >= left[0] >= left[1] > 1000
    client(service).score(*PAIR)
    assert "x-deadline-ms" not in service.headers[-1]


def test_a_deadline_that_the_service_missed() -> None:
    """Its 504 is the same error, also when the retry budget ended first."""
    with pytest.raises(DeadlineError, match="deadline_exceeded"):
        client(Service(problem(504, "deadline_exceeded")), retry_budget_s=0).score(*PAIR, deadline_s=60)


def test_a_deadline_covers_all_requests_of_a_call() -> None:
    """The last chunk does not get the whole time again."""

    def slow(request: httpx.Request) -> httpx.Response:
        time.sleep(0.15)
        return answer(response_to(decode_request(request.content, MSGPACK)))

    with pytest.raises(DeadlineError, match=r"within the 0\.4 s"):
        client(slow, chunk_pairs=1, in_flight=1).score(["x"] * 9, [PIXELS] * 9, deadline_s=0.4)


def scoring_as(*prints: str) -> Any:
    """A service whose fingerprint changes from answer to answer."""
    left = list(prints)

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/evaluators":
            it = EvaluatorDescription(left[0], "c", "formula", 0, 1, 1, provisional=False)
            return answer(EvaluatorList({"clip": it}, "cpu", "float32"))
        asked = decode_request(request.content, MSGPACK)
        return answer(response_to(asked, left.pop(0) if len(left) > 1 else left[0]))

    return handler


@pytest.mark.parametrize(
    "pin",
    [KNOWN, {"clip": {"fingerprint": "f", "calibration": "c"}}, msgspec.to_builtins(KNOWN), "first"],
)
def test_a_pinned_scorer_that_changes_is_an_error(pin: Any) -> None:
    """Between calls too, and it stays one: numbers of two scorers never come from one client."""
    service = client(scoring_as("f", "f", "g"), pin=pin)
    for _ in range(2):
        service.score(*PAIR)
    for _ in range(2):
        with pytest.raises(IdentityChangedError, match="clip has another fingerprint"):
            service.score(*PAIR)


def test_a_calibration_or_an_evaluator_more_is_a_change_too() -> None:
    """z and unit hang on the table, and the reward on who takes part."""
    for known, words in (
        ({"clip": EvaluatorIdentity("f", "other")}, "clip has another calibration"),
        ({**KNOWN, "hpsv2": EvaluatorIdentity("h", "c")}, "evaluators are clip, no longer clip, hpsv2"),
        ({"hpsv2": EvaluatorIdentity("h", "c")}, "clip was not pinned"),
    ):
        with pytest.raises(IdentityChangedError, match=words):
            client(scoring_as("f"), pin=known).score(*PAIR)
    client(scoring_as("f"), pin={**KNOWN, "hpsv2": KNOWN["clip"]}).score(*PAIR, evaluators=["clip"])


@pytest.mark.parametrize("pin", ["last", {}, {"clip": "f"}, 3, {"clip": {"fingerprint": 1}}])
def test_a_pin_that_is_none_is_refused(pin: Any) -> None:
    """When the client is made."""
    with pytest.raises(InputError, match="pin"):
        RewardClient(URL, pin=pin)


def test_the_identity_can_be_asked_kept_and_pinned() -> None:
    """What identity() gives is what pin takes, in both clients."""
    identity = client(scoring_as("f")).identity()
    assert identity == KNOWN
    client(scoring_as("f"), pin=identity).score(*PAIR)

    async def run() -> None:
        transport = httpx.MockTransport(scoring_as("g"))
        async with AsyncRewardClient(URL, transport=transport, pin=identity) as service:
            assert (await service.identity())["clip"].fingerprint == "g"
            with pytest.raises(IdentityChangedError):
                await service.score(*PAIR)

    asyncio.run(run())


def partial(request: httpx.Request) -> httpx.Response:
    asked = decode_request(request.content, MSGPACK)
    response = msgspec.structs.replace(response_to(asked), failed={"hpsv2": "evaluator_down"})
    if asked.items[0].prompt == "whole":
        return answer(response_to(asked))
    results = [msgspec.structs.replace(result, reward=None) for result in response.results]
    return answer(msgspec.structs.replace(response, results=results))


@pytest.mark.parametrize("evaluators", [None, ["clip", "hpsv2"]])
def test_a_partial_answer_comes_only_where_it_was_asked_for(evaluators: Any) -> None:
    """Then it says who failed, and has no reward; otherwise it is an error."""
    with pytest.raises(ProtocolError, match="partial"):
        client(partial).score(*PAIR, evaluators=evaluators)
    response = client(partial).score(*PAIR, evaluators=evaluators, allow_partial=True)
    assert response.failed == {"hpsv2": "evaluator_down"}
    assert (set(response.results[0].scores), response.results[0].reward) == ({"clip"}, None)


def test_a_batch_is_marked_if_any_request_of_it_was_partial() -> None:
    """Whoever looks at the whole batch sees that some pair lacks a score."""
    service = client(partial, chunk_pairs=1, in_flight=1, pin="first")
    response: ScoreResponse = service.score(["whole", "x"], [PIXELS] * 2, allow_partial=True)
    assert response.failed == {"hpsv2": "evaluator_down"}
    assert [result.reward is None for result in response.results] == [False, True]


def test_waiting_asynchronously() -> None:
    """As the synchronous client does."""
    states: list[Any] = [
        httpx.ConnectError("refused"),
        answer(Health("loading"), 503),
        answer(Health("ready")),
    ]

    def handler(_: httpx.Request) -> httpx.Response:
        state = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(state, Exception):
            raise state
        assert isinstance(state, httpx.Response)
        return state

    async def run() -> None:
        async with AsyncRewardClient(URL, transport=httpx.MockTransport(handler)) as service:
            await service.wait_until_ready(20)
            assert await service.ready()

    asyncio.run(run())


def test_nobody_there() -> None:
    """A real refused connection: the budget is kept, and the address and the remedy are named."""
    with listening(Counted()) as url:
        pass
    with (
        RewardClient(url, retry_budget_s=0.3) as service,
        pytest.raises(UnreachableError, match=rf"{url} .*start it with"),
    ):
        service.score(*PAIR)
    with pytest.raises(OverloadedError):
        client(lambda _: problem(503), retry_budget_s=0).evaluators()
