"""What can go wrong between the client and the service, and how an answer tells it. No torch.

The tree of exceptions is drawn at the top of ``client.py``.
"""

from __future__ import annotations

import httpx
import msgspec

from reward_service.protocol import Health, Problem

RETRYABLE_STATUS = frozenset({429, 503, 504})


class RewardClientError(Exception):
    """Anything that kept scores from coming back."""


class InputError(RewardClientError, ValueError):
    """The prompts or pictures cannot be sent; nothing was."""


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


class NotReadyError(RewardClientError):
    """The service did not become ready in time."""


class ProtocolError(RewardClientError):
    """The answer is not this protocol's: perhaps another program listens at this address."""


def raise_for_problem(answer: httpx.Response, first_pair: int = 0) -> None:
    """Nothing for a success.

    :param first_pair: place of the request's first pair in the caller's batch, whose indices the problem gets
    :raises ServiceError: of the kind that tells whether asking again can help
    """
    if answer.is_success:
        return
    try:
        problem = _shifted(msgspec.json.decode(answer.content, type=Problem), first_pair)
    except (ValueError, msgspec.DecodeError):
        problem = None
    retryable = answer.status_code in RETRYABLE_STATUS and (problem is None or problem.retryable)
    kind = OverloadedError if retryable else RejectedError
    raise kind(answer.status_code, problem, _retry_after_s(answer))


def _shifted(problem: Problem, first_pair: int) -> Problem:
    errors = [
        error if error.index is None else msgspec.structs.replace(error, index=first_pair + error.index)
        for error in problem.errors
    ]
    return msgspec.structs.replace(problem, errors=errors)


def _retry_after_s(answer: httpx.Response) -> float:
    try:
        return max(0.0, float(answer.headers.get("retry-after", 0)))
    except ValueError:  # the date form: our service never sends it
        return 0.0


def readiness(answer: httpx.Response) -> Health:
    """The state that an answer of ``/health/ready`` tells."""
    try:
        return msgspec.json.decode(answer.content, type=Health)
    except (ValueError, msgspec.DecodeError):
        return Health("loading", f"status {answer.status_code}, not a reward service's answer")


def _sentence(status: int, problem: Problem | None) -> str:
    if problem is None:
        return f"the reward service answered {status} without saying why"
    first = problem.errors[0] if problem.errors else None
    where = f"pair {first.index}: " if first and first.index is not None else ""
    detail = first.detail if first else problem.detail
    return f"the reward service answered {status} {problem.code}: {where}{detail}"
