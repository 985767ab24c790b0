"""Transport-independent core of both reward clients: requests, retry policy and response validation."""

from __future__ import annotations

import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import httpx
import msgspec
import tenacity

from reward_service.client.arguments import (
    MAX_IN_FLIGHT,
    parse_base_url,
    parse_count,
    parse_credentials,
    parse_seconds,
)
from reward_service.client.connections import ConnectionEvents
from reward_service.client.encoding import Encoding, check_encoding
from reward_service.client.errors import (
    DECODING_ERRORS,
    ClientClosedError,
    DeadlineError,
    InputError,
    NotReadyError,
    OverloadedError,
    ProtocolError,
    RewardClientError,
    UnreachableError,
    parse_health,
    raise_for_problem,
)
from reward_service.client.identity import IdentityPin, PinOption
from reward_service.client.payload import CHUNK_BYTES, CHUNK_PAIRS, Chunk, Chunking, ScoreOptions
from reward_service.client.proxies import describe_route, find_proxy
from reward_service.protocol import (
    JSON,
    MAX_BODY_BYTES,
    MAX_PAIRS,
    MSGPACK,
    EvaluatorList,
    Health,
    ScoreResponse,
    decode_response,
)

Transport = TypeVar("Transport")

POLL_INTERVAL_S = 0.2
_CONNECT_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 8.0
RETRYABLE_ERRORS = (OverloadedError, UnreachableError)
#: What httpx raises for a request; a RuntimeError for an HTTP client that was closed meanwhile.
FAILURES = (httpx.TransportError, httpx.DecodingError, RuntimeError)
_MAX_DEADLINE_MS = 86_400_000  # a day: the most that the service accepts


class Deadline:
    """Point in time after which the scores of a call are useless; never, if `seconds` is None.

    Raises:
        InputError: `seconds` is not a positive number
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = None if seconds is None else parse_seconds("deadline_s", seconds)
        self._end = None if self._seconds is None else time.monotonic() + self._seconds

    def remaining_s(self) -> float:
        """Return the remaining seconds, infinity without a deadline.

        Raises:
            DeadlineError: the deadline has passed
        """
        remaining = float("inf") if self._end is None else self._end - time.monotonic()
        if remaining <= 0:
            raise DeadlineError(f"the scores did not arrive within the {self._seconds:g} s of the deadline")
        return remaining


class Waiting:
    """Progress of `wait_until_ready`.

    Args:
        timeout_s: longest wait
        report: receives the first report

    Raises:
        InputError: `timeout_s` is not a number of seconds
    """

    def __init__(self, timeout_s: float, report: Callable[[str], None] | None) -> None:
        self.timeout_s = parse_seconds("timeout_s", timeout_s, zero=True)
        self._end = time.monotonic() + self.timeout_s
        self._report = report

    def is_over(self) -> bool:
        """Return whether the time is over."""
        return time.monotonic() >= self._end

    def report_once(self, line: str) -> None:
        """Report a line, if it is the first one."""
        if self._report is not None:
            self._report(line)
            self._report = None


@dataclass(frozen=True)
class ScoreCall:
    """One call of `score`, which may take several requests."""

    options: ScoreOptions
    deadline: Deadline
    pin: IdentityPin


class ClientCore(ABC, Generic[Transport]):
    """Common part of the synchronous and the asynchronous client. Performs no I/O itself.

    The arguments are those of `RewardClient`.

    Attributes:
        base_url: the service's address
        proxy: host and port of the proxy that requests go through, without credentials; None: directly
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        client_id: str | None = None,
        timeout_s: float = 60.0,
        retry_budget_s: float = 60.0,
        pin: PinOption = None,
        encoding: Encoding = "raw",
        in_flight: int = 4,
        chunk_pairs: int = CHUNK_PAIRS,
        chunk_bytes: int = CHUNK_BYTES,
        transport: Transport | None = None,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        url = parse_base_url(base_url)
        self.base_url = str(url).rstrip("/")
        proxy = None if transport is not None else find_proxy(url)
        self.proxy = None if proxy is None else proxy.name
        self._address = self.base_url + ("" if proxy is None else describe_route(url))
        self._timeout_s = parse_seconds("timeout_s", timeout_s)
        self._retry_budget_s = parse_seconds("retry_budget_s", retry_budget_s, zero=True)
        self._sleep = sleep
        self._pin = None if pin is None else IdentityPin(pin)
        self._chunking = _parse_chunking(chunk_pairs, chunk_bytes, encoding)
        limit = "as each request in flight has a thread and a connection"
        self._in_flight = parse_count("in_flight", in_flight, MAX_IN_FLIGHT, limit)
        self._closed = False
        self._http_options: dict[str, Any] = {
            "base_url": self.base_url,
            "headers": {"Accept": MSGPACK, **parse_credentials(api_key, client_id)},
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=self._in_flight),
            "transport": transport,
            # The proxy has been chosen, so that messages can name it.
            "proxy": None if proxy is None else proxy.url,
            "trust_env": False,
            "verify": transport is None and _ssl_context(),
        }
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Prepare the connections; the last step of `__init__`."""

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied: it holds connections and an API key; "
            "threads and forked processes may share it; elsewhere create another one, such as in the "
            "worker_init_fn of a DataLoader"
        )

    # Requests --------------------------------------------------------------------------------------------

    def _start_call(self, options: ScoreOptions, deadline_s: float | None) -> ScoreCall:
        # Even without a pin, all requests of one call must be scored by the same evaluators.
        return ScoreCall(options, Deadline(deadline_s), self._pin or IdentityPin("first"))

    def _score_request(self, chunk: Chunk, deadline: Deadline) -> dict[str, Any]:
        """Return httpx's arguments for a chunk; retries of it keep its request ID."""
        remaining_s = deadline.remaining_s()
        headers = {"Content-Type": MSGPACK, "X-Request-Id": chunk.request_id}
        if remaining_s != float("inf"):
            headers["X-Deadline-Ms"] = str(min(max(100, int(1000 * remaining_s)), _MAX_DEADLINE_MS))
        return {
            "method": "POST",
            "url": "/v1/score",
            "content": chunk.body,
            "headers": headers,
            "timeout": self._timeout(remaining_s),
        }

    def _get_request(self, path: str) -> dict[str, Any]:
        return {"method": "GET", "url": path, "headers": {"Accept": JSON}, "timeout": self._timeout()}

    def _timeout(self, remaining_s: float = float("inf")) -> httpx.Timeout:
        longest = min(self._timeout_s, remaining_s)
        # A running service accepts a connection quickly; only its response may take long.
        return httpx.Timeout(longest, connect=min(_CONNECT_TIMEOUT_S, longest))

    def _connections_to_try(self) -> Iterator[bool]:
        """Yield False for each connection that may have been kept, then True for a new one."""
        yield from [False] * self._in_flight
        yield True

    def _raise_unless_closed_by_server(
        self, error: Exception, events: ConnectionEvents, *, last: bool
    ) -> None:
        """Raise the client's own error, unless the request is to be sent again at once.

        It is if the server had closed a kept connection: scoring has no side effects, and such a connection
        says nothing about the server's state.
        """
        if last or not events.server_had_closed(error):
            raise self._transport_error(error) from None

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()

    # Retries ---------------------------------------------------------------------------------------------

    def _retry_policy(self, budget_s: float) -> dict[str, Any]:
        """Return tenacity's arguments: exponential backoff with jitter until the budget is spent."""
        jittered = tenacity.wait_random_exponential(multiplier=_FIRST_BACKOFF_S, max=_LONGEST_BACKOFF_S)

        def wait_s(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            # Never earlier than Retry-After; the jitter spreads the retries of many clients.
            return getattr(error, "retry_after_s", 0.0) + jittered(state)

        return {
            "retry": tenacity.retry_if_exception_type(RETRYABLE_ERRORS),
            "wait": wait_s,
            # stop_before_delay: no sleep that would end after the budget.
            "stop": tenacity.stop_before_delay(budget_s),
            "reraise": True,
        }

    def _budget_s(self, deadline: Deadline) -> float:
        return min(self._retry_budget_s, deadline.remaining_s())

    def _exhausted_error(self, error: RewardClientError, budget_s: float) -> RewardClientError:
        """Return the error to raise after the last retry: a `DeadlineError` if the deadline ended them."""
        problem = getattr(error, "problem", None)
        too_late = budget_s < self._retry_budget_s or (problem and problem.code == "deadline_exceeded")
        return DeadlineError(f"too late: {error}") if too_late else error

    # Responses -------------------------------------------------------------------------------------------

    def _parse_scores(self, response: httpx.Response, chunk: Chunk, call: ScoreCall) -> ScoreResponse:
        raise_for_problem(response, self._address, chunk.first)
        try:
            scores = decode_response(response.content, response.headers.get("content-type", ""))
        except DECODING_ERRORS as error:
            raise self._protocol_error(str(error)) from None
        if len(scores.results) != chunk.pairs:
            raise self._protocol_error(f"{len(scores.results)} results for {chunk.pairs} pairs")
        self._check_complete(scores, call.options)
        complete = call.options.evaluators is None and not call.options.allow_partial
        call.pin.check(scores.evaluators, complete=complete)
        return scores

    def _check_complete(self, scores: ScoreResponse, options: ScoreOptions) -> None:
        if scores.failed and not options.allow_partial:
            raise self._protocol_error("a partial response, though allow_partial was not set")
        names = set(scores.evaluators)
        if options.evaluators is not None and names | set(scores.failed) != set(options.evaluators):
            raise self._protocol_error("a requested evaluator is missing, or another one was added")
        if any(set(result.scores) != names for result in scores.results):
            raise self._protocol_error("an evaluator's score is missing")

    def _parse_evaluators(self, response: httpx.Response) -> EvaluatorList:
        raise_for_problem(response, self._address)
        try:
            return msgspec.json.decode(response.content, type=EvaluatorList)
        except DECODING_ERRORS as error:
            raise self._protocol_error(str(error)) from None

    def _must_wait(self, health: Health, waiting: Waiting) -> bool:
        """Return whether `wait_until_ready` must continue.

        Raises:
            NotReadyError: the service has failed, or the time is over
        """
        if health.status == "ready":
            return False
        state = f"{health.status}: {health.detail}"
        if health.status == "failed" or waiting.is_over():
            raise NotReadyError(
                f"the reward service at {self._address} was not ready within {waiting.timeout_s:g} s "
                f"({state}); see its log, or wait longer"
            )
        waiting.report_once(
            f"waiting up to {waiting.timeout_s:g} s for the reward service at {self._address} ({state})"
        )
        return True

    # Errors ----------------------------------------------------------------------------------------------

    def _transport_error(self, error: Exception) -> RewardClientError:
        """Return the client's own error for one of httpx."""
        if self._closed:
            return _closed_error()
        if isinstance(error, RuntimeError):
            raise error
        if isinstance(error, httpx.DecodingError):
            return self._protocol_error(str(error))
        cause = "timed out" if isinstance(error, httpx.TimeoutException) else str(error)
        return UnreachableError(
            f"no response from the reward service at {self._address} ({cause or type(error).__name__}); "
            "start it with `reward-service serve` or correct the address"
        )

    def _protocol_error(self, cause: str) -> ProtocolError:
        return ProtocolError(f"{self._address} is not a reward service ({cause}); check the address")


def reports_ready(response: httpx.Response) -> bool:
    """Return whether a response of `/health/ready` is a reward service's and reports it ready."""
    return response.status_code == httpx.codes.OK and parse_health(response).status == "ready"


def _closed_error() -> ClientClosedError:
    return ClientClosedError("this client was closed; create another, or close it later")


def _ssl_context() -> ssl.SSLContext:
    """Return the TLS settings, with the certificates of SSL_CERT_FILE or SSL_CERT_DIR if one is set.

    Raises:
        InputError: the certificates cannot be read
    """
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise InputError(
            f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read ({error.strerror}); "
            "correct or unset the variable"
        ) from None


def _parse_chunking(pairs: int, size: int, encoding: Encoding) -> Chunking:
    check_encoding(encoding)
    limit = "the limit of the service"
    return Chunking(
        parse_count("chunk_pairs", pairs, MAX_PAIRS, limit),
        parse_count("chunk_bytes", size, MAX_BODY_BYTES, limit),
        encoding,
    )
