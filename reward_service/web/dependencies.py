"""A request at the door: who asks, until when, and its body; refused as early as can be. No scoring."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from reward_service.protocol import JSON, MSGPACK, ProblemError, at_item
from reward_service.scoring.auth import Client, Keyring
from reward_service.scoring.requests import MULTIPART
from reward_service.web.openapi import CLIENT_ID, MAX_DEADLINE_MS, MIN_DEADLINE_MS

Result = TypeVar("Result")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_ID = re.compile(CLIENT_ID.strip("^$"))
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_QUALITY = re.compile(r"[01](\.[0-9]{0,3})?")
_CHALLENGE = 'Bearer realm="reward-service"'


class ClientGoneError(Exception):
    """The caller has left; nobody reads an answer."""


def request_id(request: Request) -> str:
    """The caller's id if it is a plain one, else a new one; the same for the whole request."""
    if not hasattr(request.state, "id"):
        given = request.headers.get("x-request-id", "")
        request.state.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return str(request.state.id)


def client_of(request: Request, keys: Keyring | None, *, allow_anonymous: bool, to: str) -> Client:
    """Who asks.

    Args:
        keys: None where nobody needs one
        to: what the caller wants to do

    Raises:
        ProblemError: no key or a wrong one, or one that may not do this
    """
    part = request.headers.get("x-client-id", "")
    if part and not _CLIENT_ID.fullmatch(part):
        detail = "the header X-Client-Id must be 1 to 64 letters, digits, dots, dashes and underscores"
        raise at_item("invalid_request", detail, None)
    given = request.headers.get("authorization")
    if keys is None or (given is None and allow_anonymous):
        return Client(part=part)
    if given is None:
        detail = "send the header Authorization: Bearer KEY; whoever runs the service hands out keys"
        raise ProblemError("unauthorized", detail, headers={"WWW-Authenticate": _CHALLENGE})
    bearer = _BEARER.fullmatch(given)
    client = keys.authenticate(bearer[1], part) if bearer else None
    if client is None:
        challenge = f'{_CHALLENGE}, error="invalid_token"'
        detail = "this is none of the service's keys; the header must be Authorization: Bearer KEY"
        raise ProblemError("unauthorized", detail, headers={"WWW-Authenticate": challenge})
    if to not in client.permissions:
        raise ProblemError("forbidden", f"this key is not for {to}; see `may` in the file of keys")
    return client


def content_type(request: Request) -> str:
    """The header, whole.

    Raises:
        ProblemError: it is not of a kind that is read here, or the body is compressed
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() not in (JSON, MSGPACK, MULTIPART):
        detail = f"send the header Content-Type: {JSON}, {MSGPACK} or {MULTIPART}"
        raise ProblemError("unsupported_media_type", detail)
    # A few compressed bytes can become gigabytes, and images are compressed already.
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        detail = "send the body as it is, without Content-Encoding"
        raise ProblemError("unsupported_media_type", detail, headers={"Accept-Encoding": "identity"})
    return given


def deadline(request: Request) -> float | None:
    """When the answer is of no use any more, on the event loop's clock; None if it always is.

    Raises:
        ProblemError: the header is no number of milliseconds
    """
    given = request.headers.get("x-deadline-ms")
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,8}", given) or not MIN_DEADLINE_MS <= int(given) <= MAX_DEADLINE_MS:
        numbers = f"a whole number of milliseconds, {MIN_DEADLINE_MS} to {MAX_DEADLINE_MS}"
        detail = f"the header X-Deadline-Ms must be {numbers}"
        raise at_item("invalid_request", detail, None)
    return asyncio.get_running_loop().time() + int(given) / 1000


def announced_bytes(request: Request, limit: int) -> int | None:
    """The body's bytes as the header has them; None if it does not, or if they come in chunks all the same.

    Raises:
        ProblemError: they are more than `limit`
    """
    given = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers:  # then Content-Length means nothing (RFC 9112, section 6.3)
        return None
    if not (given.isascii() and given.isdecimal()):
        return None
    if len(given) > 18 or int(given) > limit:
        raise _too_large(limit)
    return int(given)


def wants_msgpack(request: Request) -> bool:
    """Whether the answer is to be msgpack: Accept names it, and gives JSON no preference."""
    wishes = {JSON: 0.0, MSGPACK: 0.0}
    for wish in request.headers.get("accept", "").lower().split(","):
        name, *options = (part.strip() for part in wish.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        wishes[name] = float(quality) if _QUALITY.fullmatch(quality) else 0.0
    return wishes[MSGPACK] > 0 and wishes[MSGPACK] >= wishes[JSON]


async def read_body(request: Request, limit: int, timeout_s: float) -> bytearray:
    """The body, refused as soon as it is known to be too long.

    Raises:
        ProblemError: it is, it comes too slowly, or it breaks off
    """
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                if len(body) + len(part) > limit:
                    raise _too_large(limit)
                body += part
    except TimeoutError:
        detail = f"the body did not come within {timeout_s:g} s; send fewer or smaller images a request"
        raise ProblemError("body_timeout", detail) from None
    except ClientDisconnect:
        raise ProblemError("malformed_body", "the body broke off; send it whole") from None
    return body


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do it as long as somebody waits for it; to be called once the body is read.

    Raises:
        ClientGoneError: the caller left; `work` was cancelled
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return await working
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(limit: int) -> ProblemError:
    detail = f"more than {limit / 2**20:g} MiB; send fewer or smaller images a request"
    return ProblemError("body_too_large", detail)
