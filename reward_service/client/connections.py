"""Lifetime of connections: per process, per event loop, and of those that the server has closed. No torch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Generic, TypeVar

import httpx

Value = TypeVar("Value")

_CLOSE_TIMEOUT_S = 5.0
_BROKEN_CONNECTION = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)


class PerProcess(Generic[Value]):
    """Value that each process makes for itself at its first use there.

    After a fork, the parent's sockets are not the child's to write to, and its locks may be held for ever.

    Args:
        make: makes the value of a process
    """

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._values: dict[int, Value] = {}

    def get(self) -> Value:
        """Return the value of this process."""
        process = os.getpid()
        if process not in self._values:
            self._values.setdefault(process, self._make())
        return self._values[process]

    def pop(self) -> Value | None:
        """Remove the value of this process and return it; None if there is none."""
        return self._values.pop(os.getpid(), None)


class ConnectionEvents:
    """Events of the connection that one attempt of a request used, as httpcore reports them."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def record(self, name: str, _: Mapping[str, Any]) -> None:
        """Record an event."""
        self._names.add(name)

    async def record_async(self, name: str, _: Mapping[str, Any]) -> None:
        """Record an event of an asynchronous connection."""
        self._names.add(name)

    def server_had_closed(self, error: Exception) -> bool:
        """Return whether the error is that of a kept connection which ended before any response.

        The server may close a kept connection at any time, also while a request is on its way.
        """
        kept = not any("connect_tcp" in name for name in self._names)
        sent = any("send_request_headers" in name for name in self._names)
        responded = any(name.endswith("receive_response_headers.complete") for name in self._names)
        return isinstance(error, _BROKEN_CONNECTION) and kept and sent and not responded


class LoopConnections:
    """Connections of one event loop; they can be used in it only.

    Args:
        http_client: their owner
    """

    def __init__(self, http_client: httpx.AsyncClient) -> None:
        self.http_client = http_client
        self._lifetime: AsyncGenerator[None, None] | None = None

    async def close_with_loop(self, closed: Callable[[], object]) -> None:
        """Close the connections when the running event loop ends.

        Before an event loop ends, asyncio closes the asynchronous generators that were begun in it.

        Args:
            closed: called before they are closed
        """

        async def lifetime() -> AsyncGenerator[None, None]:
            try:
                yield
            finally:
                closed()
                await self.http_client.aclose()

        self._lifetime = lifetime()
        await anext(self._lifetime)

    async def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the connections in their own event loop, from any other one."""
        if loop is asyncio.get_running_loop():
            await self._close()
        elif loop.is_running():
            closing = asyncio.run_coroutine_threadsafe(self._close(), loop)
            await asyncio.wait([asyncio.wrap_future(closing)], timeout=_CLOSE_TIMEOUT_S)
        elif not (loop.is_closed() or asyncio.all_tasks(loop)):
            await asyncio.to_thread(lambda: loop.run_until_complete(self._close()))

    async def _close(self) -> None:
        if self._lifetime is not None:
            await self._lifetime.aclose()
