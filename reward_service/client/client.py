"""HTTP clients of the reward service, synchronous and for asyncio. No torch.

A failed score is always an exception, never a number. Scoring changes nothing, so retries are harmless.
A large batch is sent as several requests: a limited number at once, each built when there is room for it; the
first error ends the call.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from typing import Any, Self, TypeVar

import httpx
import tenacity

from reward_service.client.base import (
    FAILURES,
    POLL_INTERVAL_S,
    RETRYABLE_ERRORS,
    ClientCore,
    ScoreCall,
    Waiting,
    reports_ready,
)
from reward_service.client.connections import ConnectionEvents, LoopConnections, PerProcess
from reward_service.client.encoding import ImageLike
from reward_service.client.errors import ProtocolError, UnreachableError, parse_health
from reward_service.client.identity import identity_of
from reward_service.client.payload import Chunk, merge_responses, parse_options
from reward_service.protocol import EvaluatorIdentity, EvaluatorList, Health, Normalization, ScoreResponse

Request = TypeVar("Request")
Response = TypeVar("Response")


class RewardClient(ClientCore[httpx.BaseTransport]):
    """Synchronous client; a context manager. Thread-safe, and usable after a fork.

    Args:
        base_url: such as `http://127.0.0.1:8000`, or with a path under which a proxy serves it
        api_key: sent as a bearer token
        client_id: name for the service's fair queue, if several clients share one API key
        timeout_s: timeout of one request
        retry_budget_s: total time for retries of one request; 0 sends it only once
        pin: evaluators to insist on: a result of `identity`, or `first` for those of the first response
        encoding: how pixels are sent, always lossless: `raw`, or `webp` or `png` on a slow network
        in_flight: maximum number of concurrent requests of one call
        chunk_pairs: maximum number of pairs in one request; lower it if the service allows fewer
        chunk_bytes: approximate maximum size of one request; `in_flight` of these are held in memory
        transport: httpx transport, for tests
        sleep: replacement for the sleep between retries, for tests

    Raises:
        InputError: an argument is not usable
    """

    def _open(self) -> None:
        self._http_clients = PerProcess(lambda: httpx.Client(**self._http_options))

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
        """Score each image with the prompt at the same position; large batches are sent in several requests.

        Args:
            prompts: strings; any iterable, so that a large batch need never be in memory as a whole
            images: Pillow images, arrays (H, W, 3), tensors (3, H, W), paths, or the bytes of PNG, JPEG or
                WebP files; or one array (N, H, W, 3) or tensor (N, 3, H, W). uint8, or float in [0, 1], which
                is rounded once. A uint8 tensor may also be (H, W, 3)
            evaluators: names; None for all that the service has
            weights: evaluator → weight of its normalized score in the reward; None for the service's own
            normalization: the kind of score that the reward is the weighted mean of
            deterministic: make scores independent of the rest of the batch; slower
            allow_partial: accept the other evaluators' scores if one is out of service: the response's
                `failed` names those whose scores some pair lacks, and a reward that needs one is None
            deadline_s: seconds after which the scores are useless; sent to the service as well

        Returns:
            results in the order of the pairs

        Raises:
            RewardClientError: see the tree in the docstring of `reward_service.client`
        """
        options = parse_options(evaluators, weights, normalization, deterministic, allow_partial)
        call = self._start_call(options, deadline_s)
        chunks = self._chunking.split(prompts, images, options)
        return merge_responses(
            map_in_threads(lambda chunk, stop: self._score_chunk(chunk, call, stop), chunks, self._in_flight)
        )

    def evaluators(self) -> EvaluatorList:
        """Return the configured evaluators of the service, with fingerprints.

        Raises:
            RewardClientError: the service did not list them
        """
        retrying = tenacity.Retrying(
            sleep=self._sleep or time.sleep, **self._retry_policy(self._retry_budget_s)
        )
        return retrying(lambda: self._parse_evaluators(self._send(self._get_request("/v1/evaluators"))))

    def identity(self) -> dict[str, EvaluatorIdentity]:
        """Return the identity of the evaluators: to store with a run's results, and to pin.

        Raises:
            RewardClientError: the service did not list them
        """
        return identity_of(self.evaluators())

    def ready(self) -> bool:
        """Return whether the service responds and is ready to score."""
        try:
            return reports_ready(self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError):
            return False

    def wait_until_ready(self, timeout_s: float, report: Callable[[str], None] | None = None) -> None:
        """Wait until the service is ready.

        Args:
            timeout_s: longest wait; 0 to check only once
            report: receives one line if the service is not ready at once: its address, any proxy, its state

        Raises:
            NotReadyError: it was not ready within `timeout_s`, or its models cannot be loaded
            InputError: `timeout_s` is not a number of seconds
        """
        waiting = Waiting(timeout_s, report)
        while self._must_wait(self._health(), waiting):
            (self._sleep or time.sleep)(POLL_INTERVAL_S)

    def close(self) -> None:
        """Close the connections; a call in progress on another thread fails."""
        self._closed = True
        if http_client := self._http_clients.pop():
            http_client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score_chunk(self, chunk: Chunk, call: ScoreCall, stop: threading.Event) -> ScoreResponse:
        def attempt() -> ScoreResponse:
            if stop.is_set():
                raise CancelledError
            return self._parse_scores(self._send(self._score_request(chunk, call.deadline)), chunk, call)

        budget_s = self._budget_s(call.deadline)
        # Waits for the event instead of sleeping: a call that failed on another thread ends here too.
        sleep: Any = self._sleep or stop.wait
        try:
            return tenacity.Retrying(sleep=sleep, **self._retry_policy(budget_s))(attempt)
        except RETRYABLE_ERRORS as error:
            raise self._exhausted_error(error, budget_s) from error

    def _health(self) -> Health:
        try:
            return parse_health(self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError) as error:
            return Health("loading", str(error))

    def _send(self, request: dict[str, Any]) -> httpx.Response:
        for last in self._connections_to_try():
            self._check_open()
            events = ConnectionEvents()
            try:
                return self._http_clients.get().request(**request, extensions={"trace": events.record})
            except FAILURES as error:
                self._raise_unless_closed_by_server(error, events, last=last)
        raise AssertionError("unreachable")


class AsyncRewardClient(ClientCore[httpx.AsyncBaseTransport]):
    """`RewardClient` for asyncio: the same arguments, the same exceptions."""

    def _open(self) -> None:
        self._by_loop: PerProcess[dict[asyncio.AbstractEventLoop, LoopConnections]] = PerProcess(dict)

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
        options = parse_options(evaluators, weights, normalization, deterministic, allow_partial)
        call = self._start_call(options, deadline_s)
        chunks = self._chunking.split(prompts, images, options)
        return merge_responses(
            await map_in_tasks(lambda chunk: self._score_chunk(chunk, call), chunks, self._in_flight)
        )

    async def evaluators(self) -> EvaluatorList:
        """See `RewardClient.evaluators`."""

        async def attempt() -> EvaluatorList:
            return self._parse_evaluators(await self._send(self._get_request("/v1/evaluators")))

        policy = self._retry_policy(self._retry_budget_s)
        return await tenacity.AsyncRetrying(sleep=self._sleep or asyncio.sleep, **policy)(attempt)

    async def identity(self) -> dict[str, EvaluatorIdentity]:
        """See `RewardClient.identity`."""
        return identity_of(await self.evaluators())

    async def ready(self) -> bool:
        """See `RewardClient.ready`."""
        try:
            return reports_ready(await self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError):
            return False

    async def wait_until_ready(self, timeout_s: float, report: Callable[[str], None] | None = None) -> None:
        """See `RewardClient.wait_until_ready`."""
        waiting = Waiting(timeout_s, report)
        while self._must_wait(await self._health(), waiting):
            await (self._sleep or asyncio.sleep)(POLL_INTERVAL_S)

    async def close(self) -> None:
        """Close the connections, in all event loops; a call in progress in another task fails."""
        self._closed = True
        for loop, connections in list((self._by_loop.pop() or {}).items()):
            await connections.close(loop)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _score_chunk(self, chunk: Chunk, call: ScoreCall) -> ScoreResponse:
        async def attempt() -> ScoreResponse:
            return self._parse_scores(
                await self._send(self._score_request(chunk, call.deadline)), chunk, call
            )

        budget_s = self._budget_s(call.deadline)
        retrying = tenacity.AsyncRetrying(sleep=self._sleep or asyncio.sleep, **self._retry_policy(budget_s))
        try:
            return await retrying(attempt)
        except RETRYABLE_ERRORS as error:
            raise self._exhausted_error(error, budget_s) from error

    async def _health(self) -> Health:
        try:
            return parse_health(await self._send(self._get_request("/health/ready")))
        except (UnreachableError, ProtocolError) as error:
            return Health("loading", str(error))

    async def _send(self, request: dict[str, Any]) -> httpx.Response:
        for last in self._connections_to_try():
            self._check_open()
            events, http_client = ConnectionEvents(), await self._http_client()
            try:
                return await http_client.request(**request, extensions={"trace": events.record_async})
            except FAILURES as error:
                self._raise_unless_closed_by_server(error, events, last=last)
        raise AssertionError("unreachable")

    async def _http_client(self) -> httpx.AsyncClient:
        loop, by_loop = asyncio.get_running_loop(), self._by_loop.get()
        if loop not in by_loop:
            for closed in [it for it in by_loop if it.is_closed()]:
                by_loop.pop(closed, None)
            by_loop[loop] = LoopConnections(httpx.AsyncClient(**self._http_options))
            await by_loop[loop].close_with_loop(lambda: by_loop.pop(loop, None))
        return by_loop[loop].http_client


def map_in_threads(
    send: Callable[[Request, threading.Event], Response], requests: Iterator[Request], max_in_flight: int
) -> list[Response]:
    """Send requests from a thread pool and return the responses in order.

    A single request is sent from the current thread.

    Args:
        send: called with a request, and an event that is set when its response is no longer needed
        requests: taken one by one, each when fewer than `max_in_flight` are in flight

    Raises:
        Exception: the first that was raised; requests in flight are left to end by themselves
    """
    stop = threading.Event()
    first = list(islice(requests, 2))
    if len(first) < 2:
        return [send(request, stop) for request in first]
    pool = ThreadPoolExecutor(max_in_flight, thread_name_prefix="reward-client")
    responses: dict[int, Response] = {}
    in_flight: dict[Future[Response], int] = {}
    try:
        for index, request in enumerate(chain(_drain(first), requests)):
            in_flight[pool.submit(send, request, stop)] = index
            del request  # only the pool holds the body: never more than `max_in_flight` and the next one
            if len(in_flight) == max_in_flight:
                _collect_futures(in_flight, responses)
        while in_flight:
            _collect_futures(in_flight, responses)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return [responses[index] for index in range(len(responses))]


def _drain(requests: list[Request]) -> Iterator[Request]:
    """Yield the requests and forget each, so that its body can be freed."""
    while requests:
        yield requests.pop(0)


def _collect_futures(in_flight: dict[Future[Response], int], responses: dict[int, Response]) -> None:
    done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=in_flight.__getitem__):
        responses[in_flight.pop(future)] = future.result()


async def map_in_tasks(
    send: Callable[[Request], Awaitable[Response]], requests: Iterator[Request], max_in_flight: int
) -> list[Response]:
    """Send requests from asyncio tasks and return the responses in order.

    Args:
        send: called with a request
        requests: taken one by one, each when fewer than `max_in_flight` are in flight; on another thread, so
            that encoding images does not block the event loop

    Raises:
        Exception: the first that was raised, after the requests in flight have been cancelled
    """
    responses: dict[int, Response] = {}
    in_flight: dict[asyncio.Future[Response], int] = {}
    index = 0
    try:
        while request := await asyncio.to_thread(next, requests, None):
            in_flight[asyncio.ensure_future(send(request))] = index
            del request
            index += 1
            if len(in_flight) == max_in_flight:
                await _collect_tasks(in_flight, responses)
        while in_flight:
            await _collect_tasks(in_flight, responses)
    finally:
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)
    return [responses[index] for index in range(len(responses))]


async def _collect_tasks(
    in_flight: dict[asyncio.Future[Response], int], responses: dict[int, Response]
) -> None:
    done, _ = await asyncio.wait(in_flight, return_when=FIRST_COMPLETED)
    for task in sorted(done, key=in_flight.__getitem__):
        responses[in_flight.pop(task)] = task.result()
