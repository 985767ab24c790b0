"""One request and its answer, without the sending: addresses, headers, when to ask again, what came back.

Who scored: the identity of a service's evaluators, remembered so that a change cannot pass unnoticed.
"""

from __future__ import annotations

import ipaddress
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import httpx
import msgspec
import tenacity

from reward_service.client.errors import (
    UNREADABLE,
    ClientClosedError,
    DeadlineError,
    IdentityChangedError,
    InputError,
    NotReadyError,
    OverloadedError,
    ProtocolError,
    RewardClientError,
    UnreachableError,
    raise_for_problem,
    readiness,
)
from reward_service.client.payload import Chunk, Portions, Question, check_encoding
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
#: What may be insisted on: an identity, also as read from JSON; that of the first answer; or none.
Pinned: TypeAlias = Identity | Mapping[str, Any] | Literal["first"] | None


def identity(described: EvaluatorList) -> dict[str, EvaluatorIdentity]:
    """Who scores, by what the service says of itself."""
    return {
        name: EvaluatorIdentity(it.fingerprint, it.calibration) for name, it in described.evaluators.items()
    }


class Pin:
    """The identity that answers are held against; may be shared by threads.

    Args:
        given: the identity to insist on, or `first` for that of the first answer

    Raises:
        InputError: it is neither
    """

    def __init__(self, given: Identity | Mapping[str, Any] | Literal["first"]) -> None:
        self._lock = threading.Lock()
        self._open = given == "first"
        self._known: dict[str, EvaluatorIdentity] = {} if self._open else _read(given)
        self._all = None if self._open else frozenset(self._known)

    def check(self, answered: Identity, *, everyone: bool) -> None:
        """Nothing if the answer is the pinned scorer's.

        Args:
            everyone: whether all of the service's evaluators were asked, so that none may join or leave

        Raises:
            IdentityChangedError: it is another's
        """
        with self._lock:
            changes = [change for name, it in answered.items() if (change := self._change(name, it))]
            if everyone and self._all not in (None, frozenset(answered)):
                changes.append(f"the evaluators are {_list(answered)}, no longer {_list(self._all or ())}")
            if changes:
                raise IdentityChangedError(
                    f"the scorer has changed: {'; '.join(changes)}. Scores before and after must not be "
                    "compared; go back to the first scorer, or score everything again"
                )
            if self._open:
                self._known.update(answered)
                self._all = frozenset(answered) if everyone else self._all

    def _change(self, name: str, found: EvaluatorIdentity) -> str | None:
        pinned = self._known.get(name)
        if pinned is None:
            return None if self._open else f"{name} was not pinned"
        parts = [part for part in found.__struct_fields__ if getattr(found, part) != getattr(pinned, part)]
        return f"{name} has another {' and '.join(parts)}" if parts else None


def _read(given: Any) -> dict[str, EvaluatorIdentity]:
    try:
        known = msgspec.convert(dict(given), dict[str, EvaluatorIdentity])
    except (TypeError, ValueError, msgspec.ValidationError):
        raise InputError("pin must be 'first', or what client.identity() gave, also read from JSON") from None
    if not known:
        raise InputError("pin names no evaluator; take it from client.identity(), or use 'first'")
    return known


def _list(names: Any) -> str:
    return ", ".join(sorted(names))


FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
CONNECT_S = 5.0
POLL_S = 0.2
TOO_LATE = "deadline_exceeded"
_KEY = re.compile(r"[!-~]+")
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Deadline:
    """When a call's scores are of no use any more; never, if `seconds` is None.

    Raises:
        InputError: `seconds` is not a time to come
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise InputError(f"deadline_s must be a positive number of seconds, not {seconds}")
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds that are left.

        Raises:
            DeadlineError: none
        """
        left = float("inf") if self._end is None else self._end - time.monotonic()
        if left <= 0:
            raise self.missed()
        return left

    def missed(self) -> DeadlineError:
        """The error to raise when it has passed, or will have before an answer can come."""
        return DeadlineError(f"the scores were not there within the {self._seconds:g} s the call was given")


@dataclass(frozen=True)
class Call:
    """One call of `score`: what is asked, until when, and whose answers it takes."""

    asked: Question
    deadline: Deadline
    pin: Pin


class Exchange:
    """What the two clients share. The arguments are those of `RewardClient`."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        client_id: str | None,
        timeout_s: float,
        retry_budget_s: float,
        pin: Pinned,
        portions: Portions,
        in_flight: int,
    ) -> None:
        url = _address(base_url)
        self.base_url = str(url).rstrip("/")
        self._timeout_s, self._retry_budget_s = timeout_s, retry_budget_s
        self._pin = None if pin is None else Pin(pin)
        self._portions, self._in_flight = _checked(portions), _positive("in_flight", in_flight)
        self._closed = False
        self._options: dict[str, Any] = {
            "base_url": self.base_url,
            "headers": {"Accept": MSGPACK, **_credentials(api_key, client_id)},
            # A proxy of the environment leads away from this machine.
            "trust_env": not _is_loopback(url.host),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=self._in_flight),
        }

    def _call(self, asked: Question, deadline_s: float | None) -> Call:
        # Even without a pin, the requests of one call must be answered by one scorer.
        return Call(asked, Deadline(deadline_s), self._pin or Pin("first"))

    def _score_request(self, chunk: Chunk, deadline: Deadline) -> dict[str, Any]:
        """What goes to the wire; the request id is the same however often it is asked."""
        left_s = deadline.left_s()
        headers = {"Content-Type": MSGPACK, "X-Request-Id": chunk.request_id}
        if left_s != float("inf"):
            headers["X-Deadline-Ms"] = str(max(100, int(1000 * left_s)))
        return {
            "method": "POST",
            "url": "/v1/score",
            "content": chunk.body,
            "headers": headers,
            "timeout": self._timeout(left_s),
        }

    def _get_request(self, path: str) -> dict[str, Any]:
        return {"method": "GET", "url": path, "headers": {"Accept": JSON}, "timeout": self._timeout()}

    def _timeout(self, left_s: float = float("inf")) -> httpx.Timeout:
        longest = min(self._timeout_s, left_s)
        # A service that is there accepts quickly; only its answer may take long.
        return httpx.Timeout(longest, connect=min(CONNECT_S, longest))

    def _retry_rule(self, budget_s: float) -> dict[str, Any]:
        jittered = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            # Never earlier than the service asked for; the jitter keeps many clients apart.
            return getattr(error, "retry_after_s", 0.0) + jittered(state)

        return {
            "retry": tenacity.retry_if_exception_type((OverloadedError, UnreachableError)),
            "wait": pause,
            # stop_before_delay: a pause that would end after the budget is not begun.
            "stop": tenacity.stop_before_delay(budget_s),
            "reraise": True,
        }

    def _budget_s(self, deadline: Deadline) -> float:
        return min(self._retry_budget_s, deadline.left_s())

    def _gave_up(self, error: RewardClientError, budget_s: float) -> RewardClientError:
        """The error to raise once asking again is over: the deadline's, if it ended the retries."""
        problem = getattr(error, "problem", None)
        too_late = budget_s < self._retry_budget_s or (problem and problem.code == TOO_LATE)
        return DeadlineError(f"too late: {error}") if too_late else error

    def _scores(self, answer: httpx.Response, chunk: Chunk, call: Call) -> ScoreResponse:
        raise_for_problem(answer, chunk.first)
        try:
            response = decode_response(answer.content, answer.headers.get("content-type", ""))
        except UNREADABLE as error:
            raise self._foreign(str(error)) from None
        if len(response.results) != chunk.pairs:
            raise self._foreign(f"{len(response.results)} results for {chunk.pairs} pairs")
        self._check_complete(response, call.asked)
        everyone = call.asked.evaluators is None and not call.asked.allow_partial
        call.pin.check(response.evaluators, everyone=everyone)
        return response

    def _check_complete(self, response: ScoreResponse, asked: Question) -> None:
        if response.failed and not asked.allow_partial:
            raise self._foreign("a partial answer that was not asked for")
        answered = set(response.evaluators)
        if asked.evaluators is not None and answered | set(response.failed) != set(asked.evaluators):
            raise self._foreign("an evaluator that was asked is missing, or another answered")
        if any(set(result.scores) != answered for result in response.results):
            raise self._foreign("an evaluator's score is missing")

    def _described(self, answer: httpx.Response) -> EvaluatorList:
        raise_for_problem(answer)
        try:
            return msgspec.json.decode(answer.content, type=EvaluatorList)
        except UNREADABLE as error:
            raise self._foreign(str(error)) from None

    def _not_sent(self, error: Exception) -> RewardClientError:
        """httpx's error in the caller's words."""
        if self._closed:
            return _closed()
        if isinstance(error, httpx.DecodingError):
            return self._foreign(str(error))
        cause = "timed out" if isinstance(error, httpx.TimeoutException) else str(error)
        return UnreachableError(
            f"no answer from the reward service at {self.base_url} ({cause or type(error).__name__}); "
            "start it with `reward-service serve` or correct the address"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    def _foreign(self, cause: str) -> ProtocolError:
        return ProtocolError(f"{self.base_url} is no reward service ({cause}); check the address")

    def _gave_up_waiting(self, timeout_s: float, state: Health) -> NotReadyError:
        return NotReadyError(
            f"the reward service at {self.base_url} was not ready within {timeout_s:g} s "
            f"({state.status}: {state.detail}); see its log, or wait longer"
        )


def is_ready(answer: httpx.Response) -> bool:
    """Whether an answer of `/health/ready` is a reward service's and says so."""
    return answer.status_code == httpx.codes.OK and readiness(answer).status == "ready"


def opened(kind: Any, **options: Any) -> Any:
    """An httpx client.

    Raises:
        InputError: the environment names a proxy that cannot be used
    """
    try:
        return kind(**options)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise InputError(f"the environment's proxy cannot be used ({error}); mend or unset it") from None


def _closed() -> ClientClosedError:
    return ClientClosedError("this client was closed; make another, or close it later")


def _address(base_url: Any) -> httpx.URL:
    """A base URL that can be asked. What is refused is not repeated: it may hold a password."""
    try:
        url = httpx.URL(str(base_url).strip())
    except httpx.InvalidURL as error:
        raise InputError(f"the service address is no URL: {error}") from None
    if url.userinfo:
        raise InputError("the service address holds a user name or password; give the key as api_key")
    port_ok = url.port is None or 0 < url.port < 2**16
    if url.scheme not in ("http", "https") or not url.host or not port_ok or url.query or url.fragment:
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
        if not isinstance(api_key, str) or not _KEY.fullmatch(api_key):  # a secret: it is not shown
            raise InputError("api_key must be plain ASCII without spaces or line breaks; strip it")
        headers["Authorization"] = f"Bearer {api_key}"
    if client_id:
        if not isinstance(client_id, str) or not _CLIENT_ID.fullmatch(client_id):
            raise InputError(
                "client_id must be 1 to 64 letters, digits, dots, dashes and underscores, all plain ASCII"
            )
        headers["X-Client-Id"] = client_id
    return headers


def _checked(portions: Portions) -> Portions:
    check_encoding(portions.encoding)
    for name, value, most in (
        ("chunk_pairs", portions.pairs, MAX_PAIRS),
        ("chunk_bytes", portions.bytes, MAX_BODY_BYTES),
    ):
        if _positive(name, value) > most:
            raise InputError(f"{name} must be at most {most:,}, the most a service takes")
    return portions


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise InputError(f"{name} must be at least 1, not {value}")
    return value
