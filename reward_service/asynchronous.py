"""The client for asyncio. Import it from :mod:`reward_service.client`, where the exceptions are drawn."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import httpx
import tenacity

from reward_service.exchange import POLL_S, Call, Exchange, is_ready, opened
from reward_service.failures import OverloadedError, ProtocolError, UnreachableError, readiness
from reward_service.payload import CHUNK_BYTES, CHUNK_PAIRS, Chunk, Portions, merge, question
from reward_service.pictures import Encoding, ImageLike
from reward_service.pinning import Pinned, identity
from reward_service.pipelining import run_tasks
from reward_service.protocol import (
    EvaluatorIdentity,
    EvaluatorList,
    Health,
    Normalization,
    ScoreResponse,
)


class AsyncRewardClient(Exchange):
    """:class:`RewardClient` for asyncio: the same arguments, the same exceptions."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        client_id: str | None = None,
        timeout_s: float = 60.0,
        retry_budget_s: float = 60.0,
        pin: Pinned = None,
        encoding: Encoding = "raw",
        in_flight: int = 4,
        chunk_pairs: int = CHUNK_PAIRS,
        chunk_bytes: int = CHUNK_BYTES,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        super().__init__(
            base_url,
            api_key=api_key,
            client_id=client_id,
            timeout_s=timeout_s,
            retry_budget_s=retry_budget_s,
            pin=pin,
            portions=Portions(chunk_pairs, chunk_bytes, encoding),
            in_flight=in_flight,
        )
        self._sleep = sleep
        self._options["transport"] = transport
        # Connections belong to the event loop they were made in.
        self._connections: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    async def score(
        self,
        prompts: Iterable[str],
        images: Iterable[ImageLike],
        *,
        evaluators: Iterable[str] | None = None,
        weights: Mapping[str, float] | None = None,
        normalization: Normalization = "unit",
        deterministic: bool = False,
        allow_partial: bool = False,
        deadline_s: float | None = None,
    ) -> ScoreResponse:
        """See :meth:`RewardClient.score`."""
        asked = question(evaluators, weights, normalization, deterministic, allow_partial)
        call = self._call(asked, deadline_s)
        chunks = self._portions.chunks(prompts, images, asked)
        return merge(await run_tasks(lambda chunk: self._ask(chunk, call), chunks, self._in_flight))

    async def evaluators(self) -> EvaluatorList:
        """See :meth:`RewardClient.evaluators`."""

        async def once() -> EvaluatorList:
            return self._described(await self._send(self._get_request("/v1/evaluators")))

        rule = self._retry_rule(self._retry_budget_s)
        return await tenacity.AsyncRetrying(sleep=self._sleep, **rule)(once)

    async def identity(self) -> dict[str, EvaluatorIdentity]:
        """See :meth:`RewardClient.identity`."""
        return identity(await self.evaluators())

    async def ready(self) -> bool:
        """See :meth:`RewardClient.ready`."""
        try:
            return is_ready(await self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError):
            return False

    async def wait_until_ready(self, timeout_s: float) -> None:
        """See :meth:`RewardClient.wait_until_ready`."""
        deadline = time.monotonic() + timeout_s
        while (state := await self._state()).status != "ready":
            if state.status == "failed" or time.monotonic() >= deadline:
                raise self._gave_up_waiting(timeout_s, state)
            await self._sleep(POLL_S)

    async def close(self) -> None:
        """Close the connections; a call that is under way in another task fails."""
        self._closed = True
        if connections := self._connections.pop(asyncio.get_running_loop(), None):
            await connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, chunk: Chunk, call: Call) -> ScoreResponse:
        async def once() -> ScoreResponse:
            return self._scores(await self._send(self._score_request(chunk, call.deadline)), chunk, call)

        budget_s = self._budget_s(call.deadline)
        retrying = tenacity.AsyncRetrying(sleep=self._sleep, **self._retry_rule(budget_s))
        try:
            return await retrying(once)
        except (OverloadedError, UnreachableError) as error:
            raise self._gave_up(error, budget_s) from error

    async def _state(self) -> Health:
        try:
            return readiness(await self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError) as error:
            return Health("loading", str(error))

    async def _send(self, request: dict[str, Any]) -> httpx.Response:
        self._check_open()
        try:
            return await self._connected().request(**request)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise self._not_sent(error) from None
        except RuntimeError as error:  # httpx's word for a client that another task closed meanwhile
            self._check_open()
            raise error

    def _connected(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            self._connections[loop] = opened(httpx.AsyncClient, **self._options)
        return self._connections[loop]
