"""What is different about a request that came through Ray's proxy, made the same as on a socket of ours."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from reward_service.problems import ProblemError
from reward_service.protocol import JSON, PROBLEM, encode
from reward_service.reception import request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_REQUEST_ID = "x-request-id"
_GONE: dict[str, str] = {"type": "http.disconnect"}
_LAST_STEPS_S = 5.0
_EXPOSED = ProblemError(
    "forbidden",
    "this service has no keys and answers on loopback only, behind HAProxy nowhere: set auth.keys, "
    "or auth.allow_anonymous=true where a trusted network surrounds it",
)


class Door:
    """An ASGI application behind Ray's proxy.

    :param app: the service
    :param loopback_only: refuse whoever comes by another address of this machine
    :param direct: the replica's own socket is behind HAProxy, which hides how callers came: refuse all then
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool, direct: bool = False) -> None:
        self._app, self._loopback_only, self._direct = app, loopback_only, direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":  # the service has no websockets and says so
            await self._app(scope, receive, send)
        elif self._loopback_only and (self._direct or not _is_loopback(scope)):
            await _refusal(scope)(scope, receive, send)
        else:
            await _until_gone(self._app, scope, receive, _one_id(scope, send))


async def _until_gone(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Ray cancels what a caller has left; the application is told by the message that ASGI has for it."""
    gone = asyncio.Event()

    async def receiving() -> Message:
        message, left = asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait())
        try:
            await asyncio.wait({message, left}, return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else _GONE
        finally:
            message.cancel()
            left.cancel()

    async def sending(message: Message) -> None:
        if not gone.is_set():
            await send(message)

    answering = asyncio.ensure_future(app(scope, receiving, sending))
    try:
        await asyncio.shield(answering)
    except asyncio.CancelledError:
        gone.set()
        await asyncio.wait({answering}, timeout=_LAST_STEPS_S)
        answering.cancel()
        raise


def _one_id(scope: Scope, send: Send) -> Send:
    """Without our X-Request-Id where it is the request's: the proxy puts that on every answer, once more."""
    given = Headers(scope=scope).get(_REQUEST_ID)

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if given is not None and headers.get(_REQUEST_ID) == given:
                del headers[_REQUEST_ID]
        await send(message)

    return sending


def _refusal(scope: Scope) -> Response:
    problem = _EXPOSED.as_problem(request_id(Request(scope)))
    return Response(encode(problem, JSON), int(_EXPOSED.status), media_type=PROBLEM)


def _is_loopback(scope: Scope) -> bool:
    """Whether the proxy was reached by a loopback address."""
    host = (scope.get("server") or ("",))[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
