"""What can go wrong between the client and the service, and how an answer tells it. No torch.

The tree of exceptions is drawn at the top of `client.py`.
"""

from __future__ import annotations

import math
import time
from email.utils import parsedate_to_datetime

import httpx
import msgspec

from reward_service.protocol import Health, Problem

#: Of answers that say nothing themselves: a proxy's words for "not now". A bare 500 is Ray's for a replica
#: that died over a request; one of the service's own always says whether asking again can help.
RETRYABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})
#: What decoding another program's answer can raise; msgspec's own error is a ValueError.
UNREADABLE = (ValueError, RecursionError)


class RewardClientError(Exception):
    """Anything that kept scores from coming back."""


class InputError(RewardClientError, ValueError):
    """The arguments, a prompt or an image cannot be sent; they were not."""


class ServiceError(RewardClientError):
    """The service answered with a problem."""

    def __init__(self, status: int, problem: Problem | None, retry_after_s: float = 0.0) -> None:
        super().__init__(_sentence(status, problem))
        self.status = status
        self.problem = problem
        self.retry_after_s = retry_after_s


class RejectedError(ServiceError):
    """Asking again would not help: .problem says what to change."""


class OverloadedError(ServiceError):
    """The service was busy or not ready until the retry budget was spent."""


class UnreachableError(RewardClientError):
    """The service gave no answer until the retry budget was spent."""


class DeadlineError(RewardClientError):
    """The scores were not there by the deadline that the call was given."""


class NotReadyError(RewardClientError):
    """The service did not become ready in time."""


class IdentityChangedError(RewardClientError):
    """Another scorer than the pinned one answered; its numbers must not be mixed with the earlier ones."""


class ClientClosedError(RewardClientError):
    """The client was used after it had been closed."""


class ProtocolError(RewardClientError):
    """The answer is not this protocol's: perhaps another program listens at this address."""


def raise_for_problem(answer: httpx.Response, first_pair: int = 0) -> None:
    """Nothing for a success.

    Args:
        first_pair: place of the request's first pair in the caller's batch, whose indices the problem gets

    Raises:
        ServiceError: of the kind that tells whether asking again can help
    """
    if answer.is_success:
        return
    problem = _problem(answer, first_pair)
    retryable = problem.retryable if problem else answer.status_code in RETRYABLE_STATUS
    kind = OverloadedError if retryable else RejectedError
    raise kind(answer.status_code, problem, _retry_after_s(answer))


def _problem(answer: httpx.Response, first_pair: int) -> Problem | None:
    try:
        problem = msgspec.json.decode(answer.content, type=Problem)
    except UNREADABLE:
        return None
    errors = [
        error if error.index is None else msgspec.structs.replace(error, index=first_pair + error.index)
        for error in problem.errors
    ]
    return msgspec.structs.replace(problem, errors=errors)


def _retry_after_s(answer: httpx.Response) -> float:
    """Seconds to wait by the Retry-After header: a number, or a date (RFC 9110, section 10.2.3)."""
    value = answer.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value, answer.headers.get("date", ""))
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _seconds_until(date: str, sent: str) -> float:
    try:
        then = parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    try:  # by the service's own clock, which need not be ours
        now = parsedate_to_datetime(sent).timestamp()
    except (ValueError, OverflowError):
        now = time.time()
    return then - now


def readiness(answer: httpx.Response) -> Health:
    """The state that an answer of `/health/ready` tells."""
    try:
        return msgspec.json.decode(answer.content, type=Health)
    except UNREADABLE:
        return Health("loading", f"status {answer.status_code}, not a reward service's answer")


def _sentence(status: int, problem: Problem | None) -> str:
    if problem is None:
        return (
            f"status {status} without a reward service's reason: another program or a proxy answered; "
            "check the address"
        )
    first = problem.errors[0] if problem.errors else None
    where = f"pair {first.index}: " if first and first.index is not None else ""
    detail = first.detail if first else problem.detail
    return f"the reward service answered {status} {problem.code}: {where}{detail}"
