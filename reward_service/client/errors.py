"""Exceptions of the reward client, and their construction from HTTP responses. No torch.

The tree of exceptions is shown in the docstring of the package `reward_service.client`.
"""

from __future__ import annotations

import math
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec

from reward_service.protocol import Health, Problem

#: Status codes to retry when the response carries no problem: a proxy's "not now". A bare 500 is Ray Serve's
#: for a replica that died during a request; the service's own problems always say if a retry can help.
RETRYABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})
#: What decoding a response of unknown origin can raise; msgspec's own error is a ValueError.
DECODING_ERRORS = (ValueError, RecursionError)


class RewardClientError(Exception):
    """Base class of everything that can prevent scores from being returned."""


class InputError(RewardClientError, ValueError):
    """The arguments, a prompt or an image cannot be sent; nothing was sent."""


class ServiceError(RewardClientError):
    """The service responded with a problem.

    Attributes:
        status: HTTP status
        problem: the problem details; None if the response had none
        retry_after_s: seconds to wait before a retry, from the header `Retry-After`; 0 without one

    Args:
        address: address of the service and the proxy before it, for the message
    """

    def __init__(
        self, status: int, problem: Problem | None, retry_after_s: float = 0.0, address: str = "the service"
    ) -> None:
        super().__init__(_problem_message(status, problem, address))
        self.status = status
        self.problem = problem
        self.retry_after_s = retry_after_s
        self._address = address

    def __reduce__(self) -> Any:
        """Return what pickle needs: the error of a worker process is sent to its parent."""
        return type(self), (self.status, self.problem, self.retry_after_s, self._address)


class RejectedError(ServiceError):
    """The request was rejected and a retry would not help: `problem` says what to change."""


class OverloadedError(ServiceError):
    """The service was busy or not ready until the retry budget was spent."""


class UnreachableError(RewardClientError):
    """The service did not respond until the retry budget was spent."""


class DeadlineError(RewardClientError):
    """The scores did not arrive before the deadline of the call."""


class NotReadyError(RewardClientError):
    """The service did not become ready in time."""


class IdentityChangedError(RewardClientError):
    """Other evaluators than the pinned ones scored; their scores must not be mixed with earlier ones."""


class ClientClosedError(RewardClientError):
    """The client was used after it had been closed."""


class ProtocolError(RewardClientError):
    """The response does not follow the protocol: perhaps another program listens at this address."""


def raise_for_problem(response: httpx.Response, address: str, first_pair: int = 0) -> None:
    """Raise the error that an unsuccessful response stands for.

    Args:
        response: response of any route
        address: address of the service and the proxy before it, for the message
        first_pair: index of the request's first pair in the whole batch; added to the problem's indices

    Raises:
        OverloadedError: a retry can help
        RejectedError: a retry would not help
    """
    if response.is_success:
        return
    problem = _parse_problem(response, first_pair)
    retryable = problem.retryable if problem else response.status_code in RETRYABLE_STATUS
    error = OverloadedError if retryable else RejectedError
    raise error(response.status_code, problem, _retry_after_s(response), address)


def parse_health(response: httpx.Response) -> Health:
    """Return the state that a response of `/health/ready` reports; `loading` if it is not the service's."""
    try:
        return msgspec.json.decode(response.content, type=Health)
    except DECODING_ERRORS:
        return Health("loading", f"status {response.status_code}, not a reward service's response")


def _parse_problem(response: httpx.Response, first_pair: int) -> Problem | None:
    try:
        problem = msgspec.json.decode(response.content, type=Problem)
    except DECODING_ERRORS:
        return None
    errors = [
        error if error.index is None else msgspec.structs.replace(error, index=first_pair + error.index)
        for error in problem.errors
    ]
    return msgspec.structs.replace(problem, errors=errors)


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds of the header `Retry-After`: a number, or a date (RFC 9110, section 10.2.3)."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value, response.headers.get("date", ""))
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _seconds_until(date: str, sent: str) -> float:
    try:
        then = parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    try:  # by the service's own clock, which may differ from ours
        now = parsedate_to_datetime(sent).timestamp()
    except (ValueError, OverflowError):
        now = time.time()
    return then - now


def _problem_message(status: int, problem: Problem | None, address: str) -> str:
    if problem is None:
        return (
            f"status {status} from {address} without the problem details of a reward service: "
            "another program or a proxy responded; check the address"
        )
    first = problem.errors[0] if problem.errors else None
    pair = f"pair {first.index}: " if first and first.index is not None else ""
    detail = first.detail if first else problem.detail
    return f"the reward service responded {status} {problem.code}: {pair}{detail}"
