"""Ask the judge: :class:`RewardClient`, and :class:`AsyncRewardClient` for asyncio. Never imports torch.

Exceptions::

    RewardClientError
    ├── InputError            the prompts or pictures cannot be sent; nothing was
    ├── ServiceError          the service answered with a problem: .status, .problem
    │   ├── RejectedError         it will answer so again (4xx, or a pair that cannot be scored)
    │   └── OverloadedError       429, 503 or 504 until the retry budget was spent
    ├── UnreachableError      no answer until the retry budget was spent
    ├── NotReadyError         wait_until_ready ran out of time
    └── ProtocolError         an answer that is not this protocol's, or a score that is not a number

A failed score is always an exception, never a number.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import httpx
import msgspec
import tenacity

from reward_service.failures import (
    InputError,
    NotReadyError,
    OverloadedError,
    ProtocolError,
    RejectedError,
    RewardClientError,
    ServiceError,
    UnreachableError,
    raise_for_problem,
    readiness,
)
from reward_service.payload import ImageLike, chunks, merge
from reward_service.protocol import (
    MSGPACK,
    EvaluatorList,
    Health,
    Normalization,
    ScoreRequest,
    ScoreResponse,
    decode_response,
    encode,
)

__all__ = [
    "AsyncRewardClient",
    "ImageLike",
    "InputError",
    "NotReadyError",
    "OverloadedError",
    "ProtocolError",
    "RejectedError",
    "RewardClient",
    "RewardClientError",
    "ServiceError",
    "UnreachableError",
]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
POLL_S = 0.2


class _Shared:
    """What the two clients share: addresses, headers, retry rule, and reading answers."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        client_id: str | None,
        timeout_s: float,
        retry_budget_s: float,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"the service address {base_url!r} must start with http:// or https://")
        self._retry_budget_s = retry_budget_s
        headers = {"Accept": MSGPACK}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        if client_id:
            headers["X-Client-Id"] = client_id
        self._options: dict[str, Any] = {
            "base_url": self.base_url,
            "headers": headers,
            # A service that is there accepts quickly; only its answer may take long.
            "timeout": httpx.Timeout(timeout_s, connect=min(5.0, timeout_s)),
        }

    def _retry_rule(self) -> dict[str, Any]:
        jittered = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            # Never earlier than the service asked for; the jitter keeps many clients apart.
            return getattr(error, "retry_after_s", 0.0) + jittered(state)

        return {
            "retry": tenacity.retry_if_exception_type((OverloadedError, UnreachableError)),
            "wait": pause,
            # stop_before_delay: a pause that would end after the budget is not begun.
            "stop": tenacity.stop_before_delay(self._retry_budget_s),
            "reraise": True,
        }

    def _unreachable(self, error: httpx.TransportError) -> UnreachableError:
        cause = str(error) or type(error).__name__
        if isinstance(error, httpx.TimeoutException):
            cause = "timed out"
        return UnreachableError(
            f"no answer from the reward service at {self.base_url} ({cause}); "
            "start it with `reward-service serve` or correct the address"
        )

    def _body(self, request: ScoreRequest) -> bytes:
        try:
            return encode(request, MSGPACK)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(f"cannot be sent ({error}); use plain strings and Python's numbers") from None

    def _scores(self, answer: httpx.Response, request: ScoreRequest, first: int) -> ScoreResponse:
        raise_for_problem(answer, first)
        try:
            response = decode_response(answer.content, answer.headers.get("content-type", ""))
        except (ValueError, msgspec.DecodeError) as error:
            raise self._foreign(str(error)) from None
        if len(response.results) != len(request.items):
            raise self._foreign(f"{len(response.results)} results for {len(request.items)} pairs")
        wanted = set(request.evaluators or response.evaluators)
        if any(set(result.scores) != wanted for result in response.results):
            raise self._foreign("an evaluator's score is missing")
        return response

    def _evaluators(self, answer: httpx.Response) -> EvaluatorList:
        raise_for_problem(answer)
        try:
            return msgspec.json.decode(answer.content, type=EvaluatorList)
        except (ValueError, msgspec.DecodeError) as error:
            raise self._foreign(str(error)) from None

    def _foreign(self, cause: str) -> ProtocolError:
        return ProtocolError(f"{self.base_url} is no reward service ({cause}); check the address")

    def _gave_up_waiting(self, timeout_s: float, last: str) -> NotReadyError:
        return NotReadyError(
            f"the reward service at {self.base_url} was not ready within {timeout_s:g} s ({last}); "
            "see its log, or wait longer"
        )


class RewardClient(_Shared):
    """Synchronous client; may be shared by threads. Use it as a context manager or call :meth:`close`.

    :param base_url: such as ``http://127.0.0.1:8000``
    :param api_key: sent as a bearer token
    :param client_id: the name under which the service shares its time among callers
    :param timeout_s: longest wait for one answer
    :param retry_budget_s: total time spent on retrying one request; 0 asks once
    :param transport: for tests
    :param sleep: for tests
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        client_id: str | None = None,
        timeout_s: float = 60.0,
        retry_budget_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(base_url, api_key, client_id, timeout_s, retry_budget_s)
        self._sleep = sleep
        self._http = httpx.Client(transport=transport, **self._options)

    def score(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageLike],
        *,
        evaluators: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        normalization: Normalization = "unit",
        deterministic: bool = False,
    ) -> ScoreResponse:
        """Score ``prompts[i]`` with ``images[i]``; large batches go out in several requests.

        :param images: Pillow pictures, uint8 arrays (H, W, 3), tensors (uint8 (H, W, 3), or float (3, H, W)
            in [0, 1], rounded once), paths, or the bytes of PNG, JPEG or WebP files
        :raises RewardClientError: see the tree at the top of this file
        """
        requests = chunks(prompts, images, evaluators, weights, normalization, deterministic)
        return merge([self._ask(request, first) for first, request in requests])

    def evaluators(self) -> EvaluatorList:
        """What the service has configured, with fingerprints.

        :raises RewardClientError: no such answer
        """
        retrying = tenacity.Retrying(sleep=self._sleep, **self._retry_rule())
        return retrying(lambda: self._evaluators(self._send("GET", "/v1/evaluators", None)))

    def ready(self) -> bool:
        """Whether the service is there and ready to score."""
        try:
            return self._send("GET", "/health/ready", None).status_code == httpx.codes.OK
        except UnreachableError:
            return False

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the service is ready.

        :raises NotReadyError: it was not within ``timeout_s``, or its models cannot be loaded
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._send("GET", "/health/ready", None)
                state = readiness(answer)
            except UnreachableError as error:
                state = Health("loading", str(error))
            if state.status == "ready":
                return
            if state.status == "failed" or time.monotonic() >= deadline:
                raise self._gave_up_waiting(timeout_s, f"{state.status}: {state.detail}")
            self._sleep(POLL_S)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: ScoreRequest, first: int) -> ScoreResponse:
        body = self._body(request)
        retrying = tenacity.Retrying(sleep=self._sleep, **self._retry_rule())
        return retrying(lambda: self._scores(self._send("POST", "/v1/score", body), request, first))

    def _send(self, method: str, path: str, body: bytes | None) -> httpx.Response:
        try:
            return self._http.request(method, path, content=body, headers=_body_headers(body))
        except httpx.TransportError as error:
            raise self._unreachable(error) from None


class AsyncRewardClient(_Shared):
    """:class:`RewardClient` for asyncio: the same arguments, the same exceptions."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        client_id: str | None = None,
        timeout_s: float = 60.0,
        retry_budget_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        super().__init__(base_url, api_key, client_id, timeout_s, retry_budget_s)
        self._sleep = sleep
        self._http = httpx.AsyncClient(transport=transport, **self._options)

    async def score(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageLike],
        *,
        evaluators: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        normalization: Normalization = "unit",
        deterministic: bool = False,
    ) -> ScoreResponse:
        """See :meth:`RewardClient.score`."""
        requests = chunks(prompts, images, evaluators, weights, normalization, deterministic)
        return merge([await self._ask(request, first) for first, request in requests])

    async def evaluators(self) -> EvaluatorList:
        """See :meth:`RewardClient.evaluators`."""

        async def once() -> EvaluatorList:
            return self._evaluators(await self._send("GET", "/v1/evaluators", None))

        return await tenacity.AsyncRetrying(sleep=self._sleep, **self._retry_rule())(once)

    async def ready(self) -> bool:
        """See :meth:`RewardClient.ready`."""
        try:
            return (await self._send("GET", "/health/ready", None)).status_code == httpx.codes.OK
        except UnreachableError:
            return False

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, request: ScoreRequest, first: int) -> ScoreResponse:
        body = self._body(request)

        async def once() -> ScoreResponse:
            answer = await self._send("POST", "/v1/score", body)
            return self._scores(answer, request, first)

        return await tenacity.AsyncRetrying(sleep=self._sleep, **self._retry_rule())(once)

    async def _send(self, method: str, path: str, body: bytes | None) -> httpx.Response:
        try:
            return await self._http.request(method, path, content=body, headers=_body_headers(body))
        except httpx.TransportError as error:
            raise self._unreachable(error) from None


def _body_headers(body: bytes | None) -> dict[str, str]:
    return {"Accept": "application/json"} if body is None else {"Content-Type": MSGPACK}
