"""Listening address: forms of a host, and who reaches it."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from reward_service.config import Auth, ServiceConfig
from reward_service.settings import ConfigError
from reward_service.web.addresses import check_exposure, resolve, url


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("localhost.", True),
        (" localhost ", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("127.1", True),
        ("0.0.0.0", False),
        ("0", False),
        ("::", False),
        ("[::]", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    """Decided by what the host resolves to, not by its spelling."""
    assert resolve(host, 0).is_loopback == expected


def test_host_with_one_address_for_others_is_no_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them count."""

    def found(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("127.0.0.1", "192.0.2.1")]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert not resolve("localhost", 0).is_loopback


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "--host is empty"),
        ("  ", "--host is empty"),
        ("[]", "--host is empty"),
        ("127.0.0.1:8000", "use --host 127.0.0.1 --port 8000"),
        ("localhost:8000", "use --host localhost --port 8000"),
        ("[::1]:8000", "use --host ::1 --port 8000"),
        (":8000", "use --host 127.0.0.1 --port 8000"),
        ("http://localhost:8000", "is a URL"),
        ("*", "0.0.0.0 for all"),
        ("\0", "cannot listen on"),
    ],
)
def test_wrong_host_is_explained(host: str, message: str) -> None:
    """With the right form, and never as an address that others reach."""
    with pytest.raises(ConfigError) as caught:
        resolve(host, 8000)
    assert message in str(caught.value)
    assert "reachable" not in str(caught.value)


def test_exposure_needs_keys(config: ServiceConfig) -> None:
    """An address for other machines, unless everybody is allowed."""
    everywhere = config.model_copy(update={"host": "0.0.0.0"})
    with pytest.raises(ConfigError, match="reachable from other machines"):
        check_exposure(everywhere, resolve("0.0.0.0", 0))
    check_exposure(config, resolve("localhost.", 0))
    open_to_all = everywhere.model_copy(update={"auth": Auth(allow_anonymous=True)})
    check_exposure(open_to_all, resolve("0.0.0.0", 0))


def test_url_has_brackets_once() -> None:
    """Also where the host has them already."""
    assert {url("::1", 1), url("[::1]", 1)} == {"http://[::1]:1"}
