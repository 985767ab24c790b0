"""Ask the service: `RewardClient`, and `AsyncRewardClient` for asyncio. Never imports torch.

A failed score is always an exception, never a number. Asking twice does no harm: scoring changes nothing.

Several requests under way at once: a bounded number, made as room appears, the first error ending all.

The client for asyncio. Import it from `reward_service.client`, where the exceptions are drawn.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, Self, TypeVar

import httpx
import tenacity

from reward_service.client.base import POLL_S, Call, Exchange, Pinned, identity, is_ready, opened
from reward_service.client.errors import (
    OverloadedError,
    ProtocolError,
    UnreachableError,
    readiness,
)
from reward_service.client.payload import (
    CHUNK_BYTES,
    CHUNK_PAIRS,
    Chunk,
    Encoding,
    ImageLike,
    Portions,
    merge,
    question,
)
from reward_service.protocol import EvaluatorIdentity, EvaluatorList, Health, Normalization, ScoreResponse

Made = TypeVar("Made")
Answer = TypeVar("Answer")


def run_threads(
    ask: Callable[[Made, threading.Event], Answer], made: Iterator[Made], width: int
) -> list[Answer]:
    """The answers in order; a single request runs in the caller's own thread.

    Args:
        ask: called with a request, and an event that says that its answer is of no use any more
        made: the requests; the next is taken when fewer than `width` are under way

    Raises:
        Exception: the first that was raised; what is under way is left to end by itself
    """
    stop = threading.Event()
    ahead = list(islice(made, 2))
    if len(ahead) < 2:
        return [ask(request, stop) for request in ahead]
    pool = ThreadPoolExecutor(width, thread_name_prefix="reward-client")
    answers: dict[int, Answer] = {}
    running: dict[Future[Answer], int] = {}
    try:
        for place, request in enumerate(_then(ahead, made)):
            running[pool.submit(ask, request, stop)] = place
            del request  # its body is the pool's now; the next is made beside at most ``width`` others
            if len(running) == width:
                _collect(running, answers)
        while running:
            _collect(running, answers)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return [answers[place] for place in range(len(answers))]


def _collect(running: dict[Future[Answer], int], answers: dict[int, Answer]) -> None:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=running.__getitem__):
        answers[running.pop(future)] = future.result()


def _then(ahead: list[Made], made: Iterator[Made]) -> Iterator[Made]:
    while ahead:
        yield ahead.pop(0)
    yield from made


async def run_tasks(
    ask: Callable[[Made], Awaitable[Answer]], made: Iterator[Made], width: int
) -> list[Answer]:
    """The answers in order; requests are made on another thread, so that the event loop goes on.

    Args:
        made: the requests; the next is taken when fewer than `width` are under way

    Raises:
        Exception: the first that was raised, after what was under way has been cancelled
    """
    answers: dict[int, Answer] = {}
    running: dict[asyncio.Future[Answer], int] = {}
    place = 0
    try:
        while request := await asyncio.to_thread(next, made, None):
            running[asyncio.ensure_future(ask(request))] = place
            del request
            place += 1
            if len(running) == width:
                await _collect_tasks(running, answers)
        while running:
            await _collect_tasks(running, answers)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [answers[place] for place in range(len(answers))]


async def _collect_tasks(running: dict[asyncio.Future[Answer], int], answers: dict[int, Answer]) -> None:
    done, _ = await asyncio.wait(running, return_when=FIRST_COMPLETED)
    for task in sorted(done, key=running.__getitem__):
        answers[running.pop(task)] = task.result()


class AsyncRewardClient(Exchange):
    """`RewardClient` for asyncio: the same arguments, the same exceptions."""

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
        """See `RewardClient.score`."""
        asked = question(evaluators, weights, normalization, deterministic, allow_partial)
        call = self._call(asked, deadline_s)
        chunks = self._portions.chunks(prompts, images, asked)
        return merge(await run_tasks(lambda chunk: self._ask(chunk, call), chunks, self._in_flight))

    async def evaluators(self) -> EvaluatorList:
        """See `RewardClient.evaluators`."""

        async def once() -> EvaluatorList:
            return self._described(await self._send(self._get_request("/v1/evaluators")))

        rule = self._retry_rule(self._retry_budget_s)
        return await tenacity.AsyncRetrying(sleep=self._sleep, **rule)(once)

    async def identity(self) -> dict[str, EvaluatorIdentity]:
        """See `RewardClient.identity`."""
        return identity(await self.evaluators())

    async def ready(self) -> bool:
        """See `RewardClient.ready`."""
        try:
            return is_ready(await self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError):
            return False

    async def wait_until_ready(self, timeout_s: float) -> None:
        """See `RewardClient.wait_until_ready`."""
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


class RewardClient(Exchange):
    """Synchronous client; may be shared by threads and survives a fork. A context manager.

    Args:
        base_url: such as `http://127.0.0.1:8000`, or with a path under which a proxy serves it
        api_key: sent as a bearer token
        client_id: the name under which the service shares its time among a key's callers
        timeout_s: longest wait for one answer
        retry_budget_s: total time spent on retrying one request; 0 asks once
        pin: the scorer to insist on: what `identity` gave, or `first` for the first that answers
        encoding: how pixels travel, always lossless: `raw`, or `webp` or `png` on a slow network
        in_flight: most requests of one call that are under way at once
        chunk_pairs: most pairs of one request; lower it if the service allows fewer
        chunk_bytes: about the most bytes of one request; `in_flight` of these are held in memory
        transport: for tests
        sleep: for tests

    Raises:
        InputError: one of these cannot be used
    """

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
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] | None = None,
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
        self._connections: dict[int, httpx.Client] = {os.getpid(): opened(httpx.Client, **self._options)}

    def score(
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
        """Score the first prompt with the first image and so on; large batches go out in several requests.

        Args:
            prompts: strings; any iterable, so that a large batch need never be in memory as a whole
            images: Pillow images, arrays (H, W, 3), tensors (3, H, W), paths, or the bytes of PNG, JPEG or
                WebP files; or one array (N, H, W, 3) or tensor (N, 3, H, W). uint8, or float in [0, 1], which
                is rounded once. A uint8 tensor may also be (H, W, 3)
            evaluators: names; None for all that the service has
            weights: evaluator → weight of its normalized score in the reward; None for the service's own
            allow_partial: take the others' scores when an evaluator is out of service: the response's
                `failed` names those whose scores some pair lacks, and a reward made of one is None
            deadline_s: seconds after which the scores are of no use; the service is told

        Returns:
            results in the order of the pairs

        Raises:
            RewardClientError: see the tree at the top of this file
        """
        asked = question(evaluators, weights, normalization, deterministic, allow_partial)
        call = self._call(asked, deadline_s)
        chunks = self._portions.chunks(prompts, images, asked)
        return merge(run_threads(lambda chunk, stop: self._ask(chunk, call, stop), chunks, self._in_flight))

    def evaluators(self) -> EvaluatorList:
        """What the service has configured, with fingerprints.

        Raises:
            RewardClientError: no such answer
        """
        retrying = tenacity.Retrying(
            sleep=self._sleep or time.sleep, **self._retry_rule(self._retry_budget_s)
        )
        return retrying(lambda: self._described(self._send(self._get_request("/v1/evaluators"))))

    def identity(self) -> dict[str, EvaluatorIdentity]:
        """Who scores now: to keep with a run's results, and to pin.

        Raises:
            RewardClientError: no such answer
        """
        return identity(self.evaluators())

    def ready(self) -> bool:
        """Whether the service is there and ready to score."""
        try:
            return is_ready(self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError):
            return False

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the service is ready.

        Raises:
            NotReadyError: it was not within `timeout_s`, or its models cannot be loaded
        """
        deadline = time.monotonic() + timeout_s
        while (state := self._state()).status != "ready":
            if state.status == "failed" or time.monotonic() >= deadline:
                raise self._gave_up_waiting(timeout_s, state)
            (self._sleep or time.sleep)(POLL_S)

    def close(self) -> None:
        """Close the connections; a call that is under way on another thread fails."""
        self._closed = True
        if connections := self._connections.pop(os.getpid(), None):
            connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, chunk: Chunk, call: Call, stop: threading.Event) -> ScoreResponse:
        def once() -> ScoreResponse:
            if stop.is_set():
                raise CancelledError
            return self._scores(self._send(self._score_request(chunk, call.deadline)), chunk, call)

        budget_s = self._budget_s(call.deadline)
        # Waiting for the event, not sleeping: a call that failed elsewhere does not go on here.
        sleep: Any = self._sleep or stop.wait
        retrying = tenacity.Retrying(sleep=sleep, **self._retry_rule(budget_s))
        try:
            return retrying(once)
        except (OverloadedError, UnreachableError) as error:
            raise self._gave_up(error, budget_s) from error

    def _state(self) -> Health:
        try:
            return readiness(self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError) as error:
            return Health("loading", str(error))

    def _send(self, request: dict[str, Any]) -> httpx.Response:
        self._check_open()
        try:
            return self._connected().request(**request)
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise self._not_sent(error) from None
        except RuntimeError as error:  # httpx's word for a client that another thread closed meanwhile
            self._check_open()
            raise error

    def _connected(self) -> httpx.Client:
        """This process's connections: after a fork, the parent's are not ours to write to."""
        process = os.getpid()
        if process not in self._connections:
            self._connections.setdefault(process, opened(httpx.Client, **self._options))
        return self._connections[process]
