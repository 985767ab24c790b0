"""Transport-independent core of both reward clients: requests, retry policy and response validation."""

from __future__ import annotations

import ipaddress
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import httpx
import msgspec
import tenacity

from reward_service.client.errors import (
    DECODING_ERRORS,
    ClientClosedError,
    DeadlineError,
    IdentityChangedError,
    InputError,
    NotReadyError,
    OverloadedError,
    ProtocolError,
    RewardClientError,
    UnreachableError,
    parse_health,
    raise_for_problem,
)
from reward_service.client.payload import (
    CHUNK_BYTES,
    CHUNK_PAIRS,
    Chunk,
    Chunking,
    Encoding,
    ScoreOptions,
    check_encoding,
)
from reward_service.protocol import (
    JSON,
    MAX_BODY_BYTES,
    MAX_PAIRS,
    MSGPACK,
    EvaluatorIdentity,
    EvaluatorList,
    Health,
    ScoreResponse,
    decode_response,
)

#: Evaluator → what produces its numbers. As JSON: {name: {"fingerprint": …, "calibration": …}}.
Identity: TypeAlias = Mapping[str, EvaluatorIdentity]
#: Argument `pin`: an identity, also as read from JSON; `first` for that of the first response; or None.
PinOption: TypeAlias = Identity | Mapping[str, Any] | Literal["first"] | None

Transport = TypeVar("Transport")

POLL_INTERVAL_S = 0.2
_CONNECT_TIMEOUT_S = 5.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.25, 8.0
RETRYABLE_ERRORS = (OverloadedError, UnreachableError)
_API_KEY = re.compile(r"[!-~]+")
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def identity_of(evaluators: EvaluatorList) -> dict[str, EvaluatorIdentity]:
    """Return the identity of the evaluators that the service lists."""
    return {
        name: EvaluatorIdentity(it.fingerprint, it.calibration) for name, it in evaluators.evaluators.items()
    }


class IdentityPin:
    """The identity that every response is compared with. Thread-safe.

    Args:
        pin: the expected identity, or `first` to adopt that of the first response

    Raises:
        InputError: `pin` is neither
    """

    def __init__(self, pin: Identity | Mapping[str, Any] | Literal["first"]) -> None:
        self._lock = threading.Lock()
        self._adopting = pin == "first"
        self._pinned: dict[str, EvaluatorIdentity] = {} if self._adopting else _parse_pin(pin)
        self._all_names = None if self._adopting else frozenset(self._pinned)

    def check(self, found: Identity, *, complete: bool) -> None:
        """Raise an error if a response has another identity than the pinned one.

        Args:
            found: identity of the evaluators in the response
            complete: all evaluators of the service were requested, so that none may be added or missing

        Raises:
            IdentityChangedError: another fingerprint, calibration or set of evaluators
        """
        with self._lock:
            changes = [change for name, it in found.items() if (change := self._change(name, it))]
            if complete and self._all_names not in (None, frozenset(found)):
                changes.append(f"the evaluators are {_join(found)}, no longer {_join(self._all_names or ())}")
            if changes:
                raise IdentityChangedError(
                    f"the service's evaluators have changed: {'; '.join(changes)}. Scores from before and "
                    "after must not be compared; restore the first evaluators, or score everything again"
                )
            if self._adopting:
                self._pinned.update(found)
                self._all_names = frozenset(found) if complete else self._all_names

    def _change(self, name: str, found: EvaluatorIdentity) -> str | None:
        pinned = self._pinned.get(name)
        if pinned is None:
            return None if self._adopting else f"{name} was not pinned"
        parts = [part for part in found.__struct_fields__ if getattr(found, part) != getattr(pinned, part)]
        return f"{name} has another {' and '.join(parts)}" if parts else None


class Deadline:
    """Point in time after which the scores of a call are useless; never, if `seconds` is None.

    Raises:
        InputError: `seconds` is not positive
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise InputError(f"deadline_s must be a positive number of seconds, not {seconds}")
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining_s(self) -> float:
        """Return the remaining seconds, infinity without a deadline.

        Raises:
            DeadlineError: the deadline has passed
        """
        remaining = float("inf") if self._end is None else self._end - time.monotonic()
        if remaining <= 0:
            raise DeadlineError(f"the scores did not arrive within the {self._seconds:g} s of the deadline")
        return remaining


@dataclass(frozen=True)
class ScoreCall:
    """One call of `score`, which may take several requests."""

    options: ScoreOptions
    deadline: Deadline
    pin: IdentityPin


class ClientCore(ABC, Generic[Transport]):
    """Common part of the synchronous and the asynchronous client. Performs no I/O itself.

    The arguments are those of `RewardClient`.
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
        url = _parse_base_url(base_url)
        self.base_url = str(url).rstrip("/")
        self._timeout_s, self._retry_budget_s, self._sleep = timeout_s, retry_budget_s, sleep
        self._pin = None if pin is None else IdentityPin(pin)
        self._chunking = _parse_chunking(chunk_pairs, chunk_bytes, encoding)
        self._in_flight = _positive("in_flight", in_flight)
        self._closed = False
        self._http_options: dict[str, Any] = {
            "base_url": self.base_url,
            "headers": {"Accept": MSGPACK, **_credentials(api_key, client_id)},
            # A proxy from the environment is another machine, whose loopback addresses are not ours.
            "trust_env": not _is_loopback(url.host),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=self._in_flight),
            "transport": transport,
        }
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Prepare the connections; the last step of `__init__`."""

    # Requests --------------------------------------------------------------------------------------------

    def _start_call(self, options: ScoreOptions, deadline_s: float | None) -> ScoreCall:
        # Even without a pin, all requests of one call must be scored by the same evaluators.
        return ScoreCall(options, Deadline(deadline_s), self._pin or IdentityPin("first"))

    def _score_request(self, chunk: Chunk, deadline: Deadline) -> dict[str, Any]:
        """Return httpx's arguments for a chunk; retries of it keep its request ID."""
        remaining_s = deadline.remaining_s()
        headers = {"Content-Type": MSGPACK, "X-Request-Id": chunk.request_id}
        if remaining_s != float("inf"):
            headers["X-Deadline-Ms"] = str(max(100, int(1000 * remaining_s)))
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
        raise_for_problem(response, chunk.first)
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
        raise_for_problem(response)
        try:
            return msgspec.json.decode(response.content, type=EvaluatorList)
        except DECODING_ERRORS as error:
            raise self._protocol_error(str(error)) from None

    def _must_wait(self, health: Health, timeout_s: float, end: float) -> bool:
        """Return whether `wait_until_ready` must continue, until the monotonic time `end`.

        Raises:
            NotReadyError: the service has failed, or the time is over
        """
        if health.status == "ready":
            return False
        if health.status == "failed" or time.monotonic() >= end:
            raise NotReadyError(
                f"the reward service at {self.base_url} was not ready within {timeout_s:g} s "
                f"({health.status}: {health.detail}); see its log, or wait longer"
            )
        return True

    # Errors ----------------------------------------------------------------------------------------------

    def _transport_error(self, error: Exception) -> RewardClientError:
        """Return the client's own error for one of httpx."""
        if self._closed:
            return _closed_error()
        if isinstance(error, httpx.DecodingError):
            return self._protocol_error(str(error))
        cause = "timed out" if isinstance(error, httpx.TimeoutException) else str(error)
        return UnreachableError(
            f"no response from the reward service at {self.base_url} ({cause or type(error).__name__}); "
            "start it with `reward-service serve` or correct the address"
        )

    def _protocol_error(self, cause: str) -> ProtocolError:
        return ProtocolError(f"{self.base_url} is not a reward service ({cause}); check the address")


def reports_ready(response: httpx.Response) -> bool:
    """Return whether a response of `/health/ready` is a reward service's and reports it ready."""
    return response.status_code == httpx.codes.OK and parse_health(response).status == "ready"


def open_http_client(kind: Any, **options: Any) -> Any:
    """Return a new httpx client of the given class.

    Raises:
        InputError: the environment names a proxy that is not usable
    """
    try:
        return kind(**options)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise InputError(f"invalid proxy configuration ({error}); fix or unset the proxy variables") from None


def _closed_error() -> ClientClosedError:
    return ClientClosedError("this client was closed; create another, or close it later")


def _parse_pin(pin: Any) -> dict[str, EvaluatorIdentity]:
    try:
        pinned = msgspec.convert(dict(pin), dict[str, EvaluatorIdentity])
    except (TypeError, ValueError, msgspec.ValidationError):
        raise InputError(
            "pin must be 'first', or a result of client.identity(), which may be read from JSON"
        ) from None
    if not pinned:
        raise InputError("pin names no evaluator; use the result of client.identity(), or 'first'")
    return pinned


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _parse_base_url(base_url: Any) -> httpx.URL:
    """Return a usable base URL. An unusable one may hold a password and is not repeated in the error."""
    try:
        url = httpx.URL(str(base_url).strip())
    except httpx.InvalidURL as error:
        raise InputError(f"the service address is not a URL: {error}") from None
    if url.userinfo:
        raise InputError("the service address holds a user name or password; give the key as api_key")
    valid_port = url.port is None or 0 < url.port < 2**16
    if url.scheme not in ("http", "https") or not url.host or not valid_port or url.query or url.fragment:
        raise InputError(
            f"the service address {str(url)!r} must start with http:// or https:// and be like "
            "http://127.0.0.1:8000 or https://host/path"
        )
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _credentials(api_key: Any, client_id: Any) -> Mapping[str, str]:
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


def _parse_chunking(pairs: int, size: int, encoding: Encoding) -> Chunking:
    check_encoding(encoding)
    for name, value, limit in (
        ("chunk_pairs", pairs, MAX_PAIRS),
        ("chunk_bytes", size, MAX_BODY_BYTES),
    ):
        if _positive(name, value) > limit:
            raise InputError(f"{name} must be at most {limit:,}, the limit of the service")
    return Chunking(pairs, size, encoding)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}")
    return value
