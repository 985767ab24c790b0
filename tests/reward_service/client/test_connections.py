"""Connections of the client: addresses, API keys, proxies, retries, deadlines and pins."""

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
    FakeService,
    encoded_response,
    http_server,
    make_client,
    problem_response,
    score_response,
)

PAIR = (["x"], [PIXELS])
KNOWN = {"clip": EvaluatorIdentity("f", "c")}


class RecordingService:
    """Scores every request and records its path."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        return encoded_response(score_response(decode_request(request.content, MSGPACK)))


@pytest.mark.parametrize(
    ("path", "requested"),
    [("", "/v1/score"), ("/", "/v1/score"), ("/a/b", "/a/b/v1/score"), ("/a/", "/a/v1/score")],
)
def test_a_base_url_may_have_a_path(path: str, requested: str) -> None:
    """A path, as behind a proxy, is kept; a slash at its end changes nothing."""
    service = RecordingService()
    with http_server(service) as url, RewardClient(url + path) as reward_client:
        reward_client.score(*PAIR)
    assert service.paths == [requested]


@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "start with http"),
        ("ftp://service", "start with http"),
        ("http://", "be like"),
        ("http://service:80000", "be like"),
        ("http://service:x", "is not a URL"),
        ("http://service/?a=1", "be like"),
        ("http://two words", "be like"),
        ("http://a..b", "is not a URL"),
        ("http://user:hunter2@service", "give the key as api_key"),
        (None, "start with http"),
    ],
)
def test_invalid_base_urls_are_refused(kind: Any, url: Any, message: str) -> None:
    """The constructor refuses them in one line, without repeating a password."""
    with pytest.raises(InputError, match=message) as caught:
        kind(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [{"api_key": "clé"}, {"api_key": "two words"}, {"api_key": "key\n"}, {"client_id": "ünïque"},
              {"client_id": "x" * 65}, {"client_id": "a b"}, {"api_key": b"bytes"}],
)  # fmt: skip
def test_invalid_header_values_raise_an_input_error(arguments: Any) -> None:
    """The constructor refuses them instead of a codec at the first request; the key is not shown."""
    with pytest.raises(InputError) as caught:
        RewardClient(URL, **arguments)
    assert str(next(iter(arguments.values()))) not in str(caught.value)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_loopback_addresses_ignore_the_proxy(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """A proxy from the environment is used for other hosts only; an unusable one is then reported at once."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with http_server(RecordingService()) as url, RewardClient(url) as service:
        assert len(service.score(*PAIR).results) == 1
    if proxy.startswith("socks"):
        with pytest.raises(InputError, match="invalid proxy configuration"):
            RewardClient("http://service.invalid")


# Python 3.12 warns of a fork beside threads, which is the case under test.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_opens_its_own_connections() -> None:
    """The child neither writes to the parent's socket nor waits for its locks; both can score."""
    service = RecordingService()
    with http_server(service) as url, RewardClient(url) as reward_client:
        reward_client.score(*PAIR)
        if (child := os.fork()) == 0:
            os._exit(0 if len(reward_client.score(*PAIR).results) == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(reward_client.score(*PAIR).results) == 1
    assert len(service.paths) == 3


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (httpx.Response(200, html="<p>hello</p>"), ProtocolError),
        (httpx.Response(200, content=b"\xff\xfe"), ProtocolError),
        (httpx.Response(404, html="<p>no such page</p>"), RejectedError),
        (httpx.Response(302, headers={"location": "/login"}), RejectedError),
    ],
)
def test_another_program_at_the_address_is_reported(response: httpx.Response, error: Any) -> None:
    """Its pages are neither scores nor readiness; the error says to check the address."""
    with pytest.raises(error, match="check the address"):
        make_client(lambda _: response).score(*PAIR)
    assert make_client(lambda _: response).ready() is False
    with pytest.raises(NotReadyError, match="not a reward service"):
        make_client(lambda _: response).wait_until_ready(0)
    with pytest.raises(error, match="check the address"):
        make_client(lambda _: response).identity()


def test_retries_keep_the_request_id() -> None:
    """Traces and log lines of one request share its ID; another request has another ID."""
    service = FakeService(problem_response(503), httpx.ReadError("reset"))
    make_client(service, chunk_pairs=1, in_flight=1).score(["x", "y"], [PIXELS] * 2)
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
    """The wait lasts until that date by the service's clock; a past or invalid date adds nothing."""
    headers = {"retry-after": date if isinstance(date, str) else formatdate(time.time() + date, usegmt=True)}
    if now is not None:
        headers["date"] = formatdate(time.time() + now, usegmt=True)
    pauses: list[float] = []
    make_client(FakeService(httpx.Response(503, headers=headers)), pauses).score(*PAIR)
    assert least <= pauses[0] <= most


def test_retryable_problems_are_retried_with_any_status() -> None:
    """The field `retryable` decides, not the status; a proxy's bare 502 is retried."""
    service = FakeService(
        problem_response(408, "body_timeout"),
        problem_response(500, "odd", retryable=True),
        httpx.Response(502),
    )
    assert len(make_client(service).score(*PAIR).results) == 1
    with pytest.raises(RejectedError):
        make_client(FakeService(problem_response(503, "odd", retryable=False))).score(*PAIR)


def test_a_deadline_is_sent_and_kept() -> None:
    """Each attempt sends the remaining time; a wait that would outlast it is not started."""
    service = FakeService(problem_response(503), httpx.Response(503, headers={"retry-after": "30"}))
    with pytest.raises(DeadlineError, match=r"too late: .*503"):
        make_client(service, []).score(*PAIR, deadline_s=20)
    left = [int(headers["x-deadline-ms"]) for headers in service.headers]
    assert 20_000 >= left[0] >= left[1] > 1000
    make_client(service).score(*PAIR)
    assert "x-deadline-ms" not in service.headers[-1]


def test_a_deadline_missed_by_the_service_is_a_deadline_error() -> None:
    """The service's 504 raises the same error, also if the retry budget ended first."""
    with pytest.raises(DeadlineError, match="deadline_exceeded"):
        make_client(FakeService(problem_response(504, "deadline_exceeded")), retry_budget_s=0).score(
            *PAIR, deadline_s=60
        )


def test_a_deadline_covers_all_requests_of_a_call() -> None:
    """Later chunks do not get the whole time again."""

    def slow(request: httpx.Request) -> httpx.Response:
        time.sleep(0.15)
        return encoded_response(score_response(decode_request(request.content, MSGPACK)))

    with pytest.raises(DeadlineError, match=r"within the 0\.4 s"):
        make_client(slow, chunk_pairs=1, in_flight=1).score(["x"] * 9, [PIXELS] * 9, deadline_s=0.4)


def respond_with_fingerprints(*prints: str) -> Any:
    """Return a handler whose fingerprint changes from response to response."""
    left = list(prints)

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/evaluators":
            it = EvaluatorDescription(left[0], "c", "formula", 0, 1, 1, provisional=False)
            return encoded_response(EvaluatorList({"clip": it}, "cpu", "float32"))
        body = decode_request(request.content, MSGPACK)
        return encoded_response(score_response(body, left.pop(0) if len(left) > 1 else left[0]))

    return handler


@pytest.mark.parametrize(
    "pin",
    [KNOWN, {"clip": {"fingerprint": "f", "calibration": "c"}}, msgspec.to_builtins(KNOWN), "first"],
)
def test_pinned_evaluators_that_change_raise_an_error(pin: Any) -> None:
    """A change between calls raises, again at every later call, so that scores are never mixed."""
    service = make_client(respond_with_fingerprints("f", "f", "g"), pin=pin)
    for _ in range(2):
        service.score(*PAIR)
    for _ in range(2):
        with pytest.raises(IdentityChangedError, match="clip has another fingerprint"):
            service.score(*PAIR)


def test_another_calibration_or_evaluator_is_a_change() -> None:
    """z and unit depend on the calibration, and the reward on the set of evaluators."""
    for known, message in (
        ({"clip": EvaluatorIdentity("f", "other")}, "clip has another calibration"),
        ({**KNOWN, "hpsv2": EvaluatorIdentity("h", "c")}, "evaluators are clip, no longer clip, hpsv2"),
        ({"hpsv2": EvaluatorIdentity("h", "c")}, "clip was not pinned"),
    ):
        with pytest.raises(IdentityChangedError, match=message):
            make_client(respond_with_fingerprints("f"), pin=known).score(*PAIR)
    make_client(respond_with_fingerprints("f"), pin={**KNOWN, "hpsv2": KNOWN["clip"]}).score(
        *PAIR, evaluators=["clip"]
    )


@pytest.mark.parametrize("pin", ["last", {}, {"clip": "f"}, 3, {"clip": {"fingerprint": 1}}])
def test_invalid_pins_are_refused(pin: Any) -> None:
    """The constructor refuses an invalid pin."""
    with pytest.raises(InputError, match="pin"):
        RewardClient(URL, pin=pin)


def test_an_identity_can_be_pinned() -> None:
    """The result of identity() is a valid pin, in both clients."""
    identity = make_client(respond_with_fingerprints("f")).identity()
    assert identity == KNOWN
    make_client(respond_with_fingerprints("f"), pin=identity).score(*PAIR)

    async def run() -> None:
        transport = httpx.MockTransport(respond_with_fingerprints("g"))
        async with AsyncRewardClient(URL, transport=transport, pin=identity) as service:
            assert (await service.identity())["clip"].fingerprint == "g"
            with pytest.raises(IdentityChangedError):
                await service.score(*PAIR)

    asyncio.run(run())


def partial(request: httpx.Request) -> httpx.Response:
    body = decode_request(request.content, MSGPACK)
    response = msgspec.structs.replace(score_response(body), failed={"hpsv2": "evaluator_down"})
    if body.items[0].prompt == "whole":
        return encoded_response(score_response(body))
    results = [msgspec.structs.replace(result, reward=None) for result in response.results]
    return encoded_response(msgspec.structs.replace(response, results=results))


@pytest.mark.parametrize("evaluators", [None, ["clip", "hpsv2"]])
def test_partial_responses_need_allow_partial(evaluators: Any) -> None:
    """With it, the response names the failed evaluators and has no reward; without it, it is an error."""
    with pytest.raises(ProtocolError, match="partial"):
        make_client(partial).score(*PAIR, evaluators=evaluators)
    response = make_client(partial).score(*PAIR, evaluators=evaluators, allow_partial=True)
    assert response.failed == {"hpsv2": "evaluator_down"}
    assert (set(response.results[0].scores), response.results[0].reward) == ({"clip"}, None)


def test_a_batch_is_partial_if_one_of_its_requests_is() -> None:
    """The merged response names the evaluators whose scores some pair lacks."""
    service = make_client(partial, chunk_pairs=1, in_flight=1, pin="first")
    response: ScoreResponse = service.score(["whole", "x"], [PIXELS] * 2, allow_partial=True)
    assert response.failed == {"hpsv2": "evaluator_down"}
    assert [result.reward is None for result in response.results] == [False, True]


def test_the_asynchronous_client_waits_until_ready() -> None:
    """It polls through refused connections and loading, as the synchronous client does."""
    states: list[Any] = [
        httpx.ConnectError("refused"),
        encoded_response(Health("loading"), 503),
        encoded_response(Health("ready")),
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


def test_a_refused_connection_is_unreachable() -> None:
    """With a real refused connection the budget is kept, and the error gives address and remedy."""
    with http_server(RecordingService()) as url:
        pass
    with (
        RewardClient(url, retry_budget_s=0.3) as service,
        pytest.raises(UnreachableError, match=rf"{url} .*start it with"),
    ):
        service.score(*PAIR)
    with pytest.raises(OverloadedError):
        make_client(lambda _: problem_response(503), retry_budget_s=0).evaluators()
