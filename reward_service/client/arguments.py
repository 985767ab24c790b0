"""Validation of the clients' arguments. Every unusable one raises `InputError` before anything is sent."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import httpx

from reward_service.client.errors import InputError

#: Eleven days. Operating systems refuse a socket's timeout of more than 2**31 milliseconds.
MAX_SECONDS = 1e6
#: Each request in flight has a thread and a connection.
MAX_IN_FLIGHT = 1024

_MAX_BITS_SHOWN, _MAX_CHARS_SHOWN = 64, 40
_API_KEY = re.compile(r"[!-~]+")
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def parse_base_url(base_url: Any) -> httpx.URL:
    """Return a usable base URL. An unusable one may hold a password and is not repeated in the error."""
    try:
        url = httpx.URL(str(base_url).strip())
        url.raw_host.decode("ascii").encode("idna")  # as the socket will do
    except (httpx.InvalidURL, UnicodeError) as error:
        raise InputError(f"the service address is not a URL: {error}") from None
    if url.userinfo:
        raise InputError("the service address holds a user name or password; give the key as api_key")
    if url.scheme not in ("http", "https") or not names_a_host(url) or url.query or url.fragment:
        raise InputError(
            f"the service address {str(url)!r} must start with http:// or https:// and be like "
            "http://127.0.0.1:8000 or https://host/path"
        )
    return url


def names_a_host(url: httpx.URL) -> bool:
    """Return whether a URL has a host without quoted characters, and a possible port, if any."""
    valid_port = url.port is None or 0 < url.port < 2**16
    return bool(url.host) and valid_port and (b"%" not in url.raw_host or ":" in url.host)


def parse_credentials(api_key: Any, client_id: Any) -> Mapping[str, str]:
    """Return the headers of an API key and a client ID, each of which may be None."""
    headers = {}
    if api_key:
        if not isinstance(api_key, str) or not _API_KEY.fullmatch(api_key):  # a secret: never shown
            raise InputError("api_key must be plain ASCII without spaces or line breaks; strip it")
        headers["Authorization"] = f"Bearer {api_key}"
    if client_id:
        if not isinstance(client_id, str) or not _CLIENT_ID.fullmatch(client_id):
            raise InputError(
                "client_id must be 1 to 64 letters, digits, dots, dashes and underscores, all plain ASCII"
            )
        headers["X-Client-Id"] = client_id
    return headers


def parse_seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """Return a duration in seconds as a float.

    Args:
        name: name of the argument, for the message
        value: what was given
        zero: whether 0 is allowed

    Raises:
        InputError: not a number, not positive, or more than `MAX_SECONDS`
    """
    seconds = math.nan if isinstance(value, (bool, str)) else _as_float(value)
    if not (0 <= seconds <= MAX_SECONDS) or (seconds == 0 and not zero):
        expected = "0 or a positive number of seconds" if zero else "a positive number of seconds"
        raise InputError(f"{name} must be {expected}, at most {MAX_SECONDS:,.0f}, not {_shown(value)}")
    return seconds


def parse_count(name: str, value: Any, limit: int, reason: str) -> int:
    """Return a whole number of at least 1.

    Args:
        name: name of the argument, for the message
        value: what was given
        limit: largest value
        reason: origin of the limit, for the message

    Raises:
        InputError: not a whole number from 1 to `limit`
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number > limit:
        raise InputError(f"{name} must be at most {limit:,}, {reason}")
    if number < 1:
        raise InputError(f"{name} must be a whole number of at least 1, not {_shown(value)}")
    return number


def parse_weight(value: Any) -> float:
    """Return an evaluator's weight: a finite number of at least 0.

    Raises:
        InputError: it is not
    """
    weight = _as_float(value)
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError("a weight must be a finite number of at least 0")
    return weight


def _as_float(value: Any) -> float:
    """Return a number, also numpy's or torch's, as a float; NaN for anything else."""
    try:
        return float(value)
    except Exception:  # noqa: BLE001 - arrays and tensors raise errors of their own
        return math.nan


def _shown(value: Any) -> str:
    """Return a wrong value for a message: a number or a short string itself, otherwise its type."""
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= _MAX_BITS_SHOWN):
        return str(value)
    is_short = isinstance(value, str) and len(value) <= _MAX_CHARS_SHOWN
    return repr(value) if is_short else f"a {type(value).__name__}"
