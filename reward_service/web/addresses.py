"""Listening address of the service: its form, its reach and its socket."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any

from reward_service.config import ServiceConfig
from reward_service.settings import ConfigError, one_line

#: Connections that wait to be accepted.
BACKLOG = 2048
_WITH_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*):(?P<port>[^:\[\]]*)")
_WITH_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """Host and port as configured, and what the host resolves to.

    Attributes:
        host: name or number
        port: 0 for any free one
        found: results of `socket.getaddrinfo`
    """

    host: str
    port: int
    found: tuple[tuple[Any, ...], ...]

    @property
    def is_loopback(self) -> bool:
        """True if every address of the host is reachable from this machine only."""
        return all(_is_loopback(entry[4][0]) for entry in self.found)


def resolve(host: str, port: int) -> Address:
    """Resolve the host that the service listens on.

    Raises:
        ConfigError: it is no host, or cannot be resolved; the message has the right form
    """
    name = _plain_host(host)
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from None
    return Address(name, port, tuple(found))


def check_exposure(config: ServiceConfig, address: Address) -> None:
    """Refuse to serve everybody by mistake.

    Raises:
        ConfigError: other machines reach the address, and there are no API keys
    """
    auth = config.auth
    if auth.keys is None and not auth.allow_anonymous and not address.is_loopback:
        raise ConfigError(
            f"--host {config.host!r} is reachable from other machines, but the service has no API keys: "
            "create one with reward-service keys new NAME --file /PATH/keys.yaml and set "
            "auth.keys=/PATH/keys.yaml, use --host 127.0.0.1, "
            "or set auth.allow_anonymous=true if the network is trusted"
        )


def listen(address: Address) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address belongs to another machine or program
    """
    family, kind, protocol, _, sockaddr = address.found[0]
    try:
        # With the protocol, which accepted sockets inherit: asyncio sets TCP_NODELAY only for IPPROTO_TCP.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(sockaddr)
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(address.host, address.port, error) from None
    return listener


def url(host: str, port: int) -> str:
    """Return the address for people and clients."""
    name = host.strip("[]")
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _plain_host(host: str) -> str:
    """Return a host without the brackets of a URL and without the final dot of a domain name."""
    plain = host.strip()
    if plain.startswith("[") and plain.endswith("]"):
        plain = plain[1:-1]
    if not plain:
        raise ConfigError("--host is empty; use 127.0.0.1 for this machine only, 0.0.0.0 for all addresses")
    if plain == "*":
        raise ConfigError("--host '*' is no address; use 0.0.0.0 for all IPv4 addresses, :: for IPv6")
    if _WITH_SCHEME.fullmatch(plain):
        raise ConfigError(f"--host {host!r} is a URL; use the name alone: --host 127.0.0.1 --port 8000")
    if given := _WITH_PORT.fullmatch(plain):
        name, port = given["host"].strip("[]") or "127.0.0.1", given["port"] or "8000"
        raise ConfigError(f"--host {host!r} has a port; use --host {name} --port {port}")
    return plain.removesuffix(".")


def _is_loopback(number: str) -> bool:
    parsed = ipaddress.ip_address(number)
    mapped = getattr(parsed, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or parsed).is_loopback


def _cannot_listen(host: str, port: int, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or one_line(error)
    return ConfigError(
        f"cannot listen on {host}:{port} ({reason}); "
        "choose another --host or another --port (0 selects a free one)"
    )
