"""Proxies from the environment: which one is used, and that every message names it without its password."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import httpx
import pytest

from reward_service.client import (
    AsyncRewardClient,
    InputError,
    NotReadyError,
    ProtocolError,
    RejectedError,
    RewardClient,
    UnreachableError,
    describe_failure,
)
from reward_service.client.proxies import describe_route, find_proxy
from reward_service.protocol import MSGPACK, decode_request
from tests.support.service.fake_service import PIXELS, encoded_response, http_server, score_response

PAIR = (["x"], [PIXELS])
SERVICE = "http://reward:8000"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove those of this machine."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({}, SERVICE, ""),
        ({"HTTP_PROXY": "http://squid:3128"}, SERVICE, " through the proxy squid:3128 (HTTP_PROXY)"),
        ({"http_proxy": "squid:3128"}, SERVICE, " through the proxy squid:3128 (http_proxy)"),
        ({"ALL_PROXY": "http://[fd00::1]:3128"}, SERVICE, " through the proxy [fd00::1]:3128 (ALL_PROXY)"),
        ({"HTTP_PROXY": "http://me:hunter2@squid"}, SERVICE, " through the proxy squid (HTTP_PROXY)"),
        ({"HTTPS_PROXY": "http://squid"}, SERVICE, ""),
        ({"HTTPS_PROXY": "http://squid"}, "https://reward", " through the proxy squid (HTTPS_PROXY)"),
        ({"HTTP_PROXY": "http://squid", "NO_PROXY": "a, reward"}, SERVICE, ""),
        ({"HTTP_PROXY": "http://squid", "NO_PROXY": "reward:8000"}, SERVICE, ""),
        ({"HTTP_PROXY": "http://squid", "no_proxy": "*"}, SERVICE, ""),
        ({"HTTP_PROXY": "http://squid", "NO_PROXY": ".corp"}, "http://reward.corp", ""),
        ({"HTTP_PROXY": "http://squid"}, "http://localhost.:8000", ""),
        ({"HTTP_PROXY": "http://squid"}, "http://[::1]:8000", ""),
        ({"HTTP_PROXY": "http://squid", "NO_PROXY": "fd00::2"}, "http://[fd00::2]:8000", ""),
        ({"HTTP_PROXY": "no such://squid"}, SERVICE, ""),
    ],
)
def test_the_proxy_of_an_address(
    variables: dict[str, str], url: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual rules; the messages name host, port and variable, never a password."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert describe_route(url) == expected


@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ("socks5h://me:hunter2@squid:1080", "SOCKS proxy squid:1080, .*pip install socksio"),
        ("socks5://squid:1080", "SOCKS proxy"),
        ("socks4://me:hunter2@squid:1080", "not the URL of an HTTP or SOCKS5 proxy"),
        ("http://me:hunter2@squid:port", "not a URL"),
        ("http://me:hunter2@squid:99999", "not the URL"),
        ("http://me:hunter2@[::1", "not a URL"),
        ("http://me:hunter2@:3128", "not the URL"),
    ],
)
def test_an_unusable_proxy_is_refused_in_one_line(
    kind: Any, proxy: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install or unset; a service that does not need the proxy works all the same."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    expected = f"invalid proxy .*{message}.*unset ALL_PROXY, or add reward"
    with pytest.raises(InputError, match=expected) as caught:
        kind(SERVICE)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("NO_PROXY", "reward")
    kind(SERVICE)


def forward(request: httpx.Request) -> httpx.Response:
    return encoded_response(score_response(decode_request(request.content, MSGPACK)))


def refuse(_: httpx.Request) -> httpx.Response:
    return httpx.Response(403, html="<p>denied by policy</p>")


def test_requests_go_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with credentials; the attribute `proxy` and the text of the client's own objects show none."""
    with http_server(forward) as proxy:
        address = proxy.removeprefix("http://")
        monkeypatch.setenv("HTTP_PROXY", f"http://me:hunter2@{address}")
        with RewardClient("http://service.invalid") as client:
            assert len(client.score(*PAIR).results) == 1
        assert client.proxy == address
        assert "hunter2" not in repr(find_proxy(httpx.URL(SERVICE)))


def test_every_error_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No response, another program's response, a page instead of scores, and the wait for readiness."""
    with http_server(refuse) as proxy:
        address = proxy.removeprefix("http://")
        monkeypatch.setenv("HTTP_PROXY", f"http://me:hunter2@{address}")
        route = rf"http://reward:8000 through the proxy {address} \(HTTP_PROXY\)"
        lines: list[str] = []
        with RewardClient(SERVICE, retry_budget_s=0, sleep=lambda _: None) as client:
            with pytest.raises(RejectedError, match=f"status 403 from {route}"):
                client.score(*PAIR)
            with pytest.raises(NotReadyError, match=f"{route} was not ready .*status 403"):
                client.wait_until_ready(0.5, lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(
        f"waiting up to 0.5 s for the reward service at http://reward:8000 through the proxy {address}"
    )
    with http_server(lambda _: httpx.Response(200, html="<p>hello</p>")) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with RewardClient(SERVICE) as client, pytest.raises(ProtocolError, match="through the proxy 127"):
            client.score(*PAIR)
    with (
        RewardClient(SERVICE, retry_budget_s=0) as client,
        pytest.raises(UnreachableError, match=r"http://reward:8000 through the proxy 127\.0\.0\.1:"),
    ):
        client.score(*PAIR)


def test_the_asynchronous_client_names_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits, and when it fails."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    lines: list[str] = []

    async def run() -> None:
        async with AsyncRewardClient(SERVICE) as client:
            await client.wait_until_ready(0.1, lines.append)

    with pytest.raises(NotReadyError, match=r"through the proxy 127\.0\.0\.1:9 \(HTTP_PROXY\)"):
        asyncio.run(run())
    assert [line for line in lines if "through the proxy 127.0.0.1:9" not in line] == []


def test_failures_are_described_without_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Libraries quote addresses with user names in their errors."""
    error = ValueError("no connection to http://me:hunter2@squid:3128/x\nfor https://hub")
    assert describe_failure("https://hub", error) == "no connection to http://squid:3128/x for https://hub"
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hunter2@squid:3128")
    described = describe_failure("https://hub", ConnectionError())
    assert described == "ConnectionError through the proxy squid:3128 (HTTPS_PROXY)"


def test_missing_certificates_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable, rather than a FileNotFoundError without a file."""
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    with pytest.raises(InputError, match=r"SSL_CERT_FILE .*cannot be read"):
        RewardClient("https://reward")
