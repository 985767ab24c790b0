"""Proxies from the environment: selection for a URL, and their names without credentials. No torch."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.request import getproxies, proxy_bypass

import httpx

from reward_service.client.arguments import names_a_host
from reward_service.client.errors import InputError

_SOCKS = ("socks5", "socks5h")
_MAX_CAUSE_CHARS = 160
_SCHEMES = ("http", "https", *_SOCKS)
_CREDENTIALS = re.compile(r"(?<=//)[^/\s'\"]*@")


@dataclass(frozen=True)
class Proxy:
    """A proxy of the environment.

    Attributes:
        url: its address; may hold a password, so it is never shown
        variable: where it is configured, such as `HTTPS_PROXY`
    """

    url: httpx.URL
    variable: str

    def __repr__(self) -> str:
        return f"Proxy({self.name})"

    @property
    def name(self) -> str:
        """Its host and port, without credentials."""
        host = f"[{self.url.host}]" if ":" in self.url.host else self.url.host
        return host if self.url.port is None else f"{host}:{self.url.port}"


def find_proxy(url: httpx.URL) -> Proxy | None:
    """Return the proxy that the environment names for a URL; None for a direct connection.

    The rules are those of urllib: `HTTP_PROXY`, `HTTPS_PROXY` and `ALL_PROXY` in either case, hosts and
    domains in `NO_PROXY`, and the system's settings where there are any. Loopback addresses never have a
    proxy: it is another machine, whose loopback addresses are not ours.

    Raises:
        InputError: the proxy cannot be used
    """
    proxies = getproxies()
    scheme = next((name for name in (url.scheme, "all") if proxies.get(name)), None)
    if scheme is None or is_loopback(url.host) or _is_bypassed(url):
        return None
    variable = _variable(scheme)
    address = proxies[scheme].strip()
    try:
        found = httpx.URL(address if "://" in address else f"http://{address}")
    except httpx.InvalidURL:
        raise _error(url, f"{variable} is not a URL", variable) from None
    if found.scheme not in _SCHEMES or not names_a_host(found):
        raise _error(url, f"{variable} is not the URL of an HTTP or SOCKS5 proxy", variable)
    proxy = Proxy(found, variable)
    if found.scheme in _SOCKS and importlib.util.find_spec("socksio") is None:
        cause = f"{variable} names the SOCKS proxy {proxy.name}, which needs the package socksio"
        raise _error(url, cause, variable, "install it (pip install socksio)")
    return proxy


def describe_route(url: str | httpx.URL) -> str:
    """Return ` through the proxy HOST:PORT (VARIABLE)` for messages; empty for a direct connection."""
    try:
        proxy = find_proxy(httpx.URL(url))
    except (InputError, httpx.InvalidURL):
        return ""
    return "" if proxy is None else f" through the proxy {proxy.name} ({proxy.variable})"


def describe_failure(url: str | httpx.URL, error: Exception) -> str:
    """Return the cause of a failed request in one line.

    Args:
        url: what was requested
        error: what the HTTP library raised

    Returns:
        that the proxy cannot be used, or the error and the proxy's name; without credentials
    """
    try:
        find_proxy(httpx.URL(url))
    except InputError as unusable:
        return str(unusable)
    except httpx.InvalidURL:
        pass
    text = _CREDENTIALS.sub("", " ".join(str(error).split()))[:_MAX_CAUSE_CHARS]
    return (text or type(error).__name__) + describe_route(url)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").rpartition(".")[2] == "localhost"


def _is_bypassed(url: httpx.URL) -> bool:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return bool(proxy_bypass(url.host) or proxy_bypass(f"{url.host}:{port}"))


def _variable(scheme: str) -> str:
    """Return the name of the variable that getproxies read; it prefers lower case."""
    names = [name for name in os.environ if name.lower() == f"{scheme}_proxy" and os.environ[name]]
    return max(names, key=str.islower) if names else "the system's proxy setting"


def _error(url: httpx.URL, cause: str, variable: str, remedy: str = "correct it") -> InputError:
    return InputError(
        f"invalid proxy configuration: {cause}; {remedy}, unset {variable}, or add {url.host} to NO_PROXY"
    )
