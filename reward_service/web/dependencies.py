"""Request preconditions: request ID, API key, content type, deadline, body size. No scoring."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from reward_service.observability.tracing import RequestTrace
from reward_service.protocol import JSON, MAX_HEAD_BYTES, MAX_HEADERS, MSGPACK, ProblemError, item_problem
from reward_service.requests.forms import MULTIPART
from reward_service.scoring.auth import Client, Keyring, Permission
from reward_service.web.openapi import CLIENT_ID, MAX_DEADLINE_MS, MIN_DEADLINE_MS

Result = TypeVar("Result")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_ID = re.compile(CLIENT_ID.strip("^$"))
_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_QUALITY = re.compile(r"[01](\.[0-9]{0,3})?")
_CHALLENGE = 'Bearer realm="reward-service"'
_MAX_LENGTH_DIGITS = 18
_MAX_ACCEPT_CHARS = 1024

LARGE_HEAD = ProblemError(
    "headers_too_large",
    f"request line and headers exceed {MAX_HEAD_BYTES // 1024} KiB or {MAX_HEADERS} headers; send fewer",
)


class ClientDisconnectedError(Exception):
    """The client has disconnected; nobody would receive a response."""


def request_id(request: Request) -> str:
    """Return the client's `X-Request-Id` if it is valid, else a new ID; the same for the whole request."""
    state: dict[str, Any] = request.scope.setdefault("state", {})
    if "id" not in state:
        given = request.headers.get("x-request-id", "")
        state["id"] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
    return str(state["id"])


def trace_of(request: Request) -> RequestTrace:
    """Return the trace of a request, with its request ID."""
    trace: RequestTrace = request.scope["state"]["trace"]
    trace.id = trace.id or request_id(request)
    return trace


def authenticate(
    request: Request, keys: Keyring | None, *, allow_anonymous: bool, permission: Permission
) -> Client:
    """Return the client that sent a request.

    Args:
        request: the request
        keys: the API keys; None if the service has none
        allow_anonymous: accept requests without a key
        permission: what the request needs

    Raises:
        ProblemError: if the key is missing or unknown, or lacks the permission
    """
    part = request.headers.get("x-client-id", "")
    if part and not _CLIENT_ID.fullmatch(part):
        detail = "the header X-Client-Id must be 1 to 64 letters, digits, dots, dashes and underscores"
        raise item_problem("invalid_request", detail, None)
    given = request.headers.get("authorization")
    if keys is None or (given is None and allow_anonymous):
        return Client(part=part)
    if given is None:
        detail = "no API key; send the header Authorization: Bearer KEY, the service's operator issues keys"
        raise ProblemError("unauthorized", detail, headers={"WWW-Authenticate": _CHALLENGE})
    bearer = _BEARER.fullmatch(given)
    client = keys.authenticate(bearer[1], part) if bearer else None
    if client is None:
        challenge = f'{_CHALLENGE}, error="invalid_token"'
        detail = "unknown API key; expected the header Authorization: Bearer KEY"
        raise ProblemError("unauthorized", detail, headers={"WWW-Authenticate": challenge})
    if permission not in client.permissions:
        detail = f"this API key lacks the permission {permission}; add it to `may` in the keys file"
        raise ProblemError("forbidden", detail)
    return client


def content_type(request: Request) -> str:
    """Return the Content-Type header of a score request, whole.

    Raises:
        ProblemError: if the type is not supported or the body is compressed
    """
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() not in (JSON, MSGPACK, MULTIPART):
        detail = f"unsupported Content-Type; expected {JSON}, {MSGPACK} or {MULTIPART}"
        raise ProblemError("unsupported_media_type", detail)
    # A few compressed bytes can become gigabytes, and images are compressed already.
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        detail = "compressed bodies are not supported; send the body without Content-Encoding"
        raise ProblemError("unsupported_media_type", detail, headers={"Accept-Encoding": "identity"})
    return given


def deadline(request: Request) -> float | None:
    """Return the deadline of `X-Deadline-Ms` in seconds on the event loop's clock, or None without one.

    Raises:
        ProblemError: if the header is not a number of milliseconds
    """
    given = request.headers.get("x-deadline-ms")
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,8}", given) or not MIN_DEADLINE_MS <= int(given) <= MAX_DEADLINE_MS:
        expected = f"a whole number of milliseconds, {MIN_DEADLINE_MS} to {MAX_DEADLINE_MS}"
        detail = f"the header X-Deadline-Ms must be {expected}"
        raise item_problem("invalid_request", detail, None)
    return asyncio.get_running_loop().time() + int(given) / 1000


def content_length(request: Request, limit: int) -> int | None:
    """Return the announced length of the body in bytes, or None if it is unknown or the body is chunked.

    Raises:
        ProblemError: if it is more than `limit`
    """
    given = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers:  # Content-Length is ignored then (RFC 9112, section 6.3)
        return None
    if not (given.isascii() and given.isdecimal()):
        return None
    if len(given) > _MAX_LENGTH_DIGITS or int(given) > limit:
        raise _body_too_large(limit)
    return int(given)


def prefers_msgpack(request: Request) -> bool:
    """Return True if Accept names msgpack with a quality not below that of JSON.

    A header too long to be meant counts as absent.
    """
    accept = request.headers.get("accept", "").lower()
    if MSGPACK not in accept or len(accept) > _MAX_ACCEPT_CHARS:
        return False
    qualities = {JSON: 0.0, MSGPACK: 0.0}
    for entry in accept.split(","):
        name, *options = (part.strip() for part in entry.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        qualities[name] = float(quality) if _QUALITY.fullmatch(quality) else 0.0
    return qualities[MSGPACK] > 0 and qualities[MSGPACK] >= qualities[JSON]


async def read_body(request: Request, limit: int, timeout_s: float) -> bytearray:
    """Read the body, at most `limit` bytes and for at most `timeout_s` seconds.

    Raises:
        ProblemError: if the body is too long, too slow or incomplete
    """
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                if len(body) + len(part) > limit:
                    raise _body_too_large(limit)
                body += part
    except TimeoutError:
        detail = f"the body was not received within {timeout_s:g} s; send fewer or smaller images per request"
        raise ProblemError("body_timeout", detail) from None
    except ClientDisconnect:
        raise ProblemError("malformed_body", "the body is incomplete; send all of it") from None
    return body


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, but cancel it if the client disconnects. Read the body before.

    Raises:
        ClientDisconnectedError: if the client disconnected
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return await working
    finally:
        working.cancel()
        disconnected.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _body_too_large(limit: int) -> ProblemError:
    detail = f"the body is larger than {limit / 2**20:g} MiB; send fewer or smaller images per request"
    return ProblemError("body_too_large", detail)
