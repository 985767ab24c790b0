"""Everything that can be wrong with a request, as RFC 9457 problem details. The input is never echoed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from reward_service.protocol import MAX_PROBLEM_ITEMS, Problem, ProblemItem

#: code -> (status, title, whether asking again can help)
CODES: dict[str, tuple[HTTPStatus, str, bool]] = {
    "malformed_request": (HTTPStatus.BAD_REQUEST, "The request cannot be read", False),
    "malformed_body": (HTTPStatus.BAD_REQUEST, "The body cannot be read", False),
    "unauthorized": (HTTPStatus.UNAUTHORIZED, "A key is needed", False),
    "forbidden": (HTTPStatus.FORBIDDEN, "The key may not do this", False),
    "body_timeout": (HTTPStatus.REQUEST_TIMEOUT, "The body came too slowly", True),
    "body_too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is too large", False),
    "pictures_too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The pictures are too large together", False),
    "unsupported_media_type": (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Unsupported media type", False),
    "invalid_request": (HTTPStatus.UNPROCESSABLE_ENTITY, "The request does not fit the schema", False),
    "empty_batch": (HTTPStatus.UNPROCESSABLE_ENTITY, "The batch is empty", False),
    "too_many_pairs": (HTTPStatus.UNPROCESSABLE_ENTITY, "The batch is too large", False),
    "unknown_evaluator": (HTTPStatus.UNPROCESSABLE_ENTITY, "Unknown evaluator", False),
    "bad_weights": (HTTPStatus.UNPROCESSABLE_ENTITY, "Unusable weights", False),
    "not_an_image": (HTTPStatus.UNPROCESSABLE_ENTITY, "Not an image", False),
    "bad_shape": (HTTPStatus.UNPROCESSABLE_ENTITY, "The shape does not fit", False),
    "image_too_large": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image is too large", False),
    "image_too_long": (HTTPStatus.UNPROCESSABLE_ENTITY, "The image is too elongated", False),
    "not_found": (HTTPStatus.NOT_FOUND, "No such address", False),
    "method_not_allowed": (HTTPStatus.METHOD_NOT_ALLOWED, "Method not allowed", False),
    "client_busy": (HTTPStatus.TOO_MANY_REQUESTS, "Too much of this client's is under way", True),
    "not_ready": (HTTPStatus.SERVICE_UNAVAILABLE, "Not ready", True),
    "queue_full": (HTTPStatus.SERVICE_UNAVAILABLE, "The queue is full", True),
    "too_many_connections": (HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections", True),
    "evaluator_down": (HTTPStatus.SERVICE_UNAVAILABLE, "An evaluator is out of service", True),
    "deadline_exceeded": (HTTPStatus.GATEWAY_TIMEOUT, "The deadline has passed", True),
    "scoring_failed": (HTTPStatus.INTERNAL_SERVER_ERROR, "A pair cannot be scored", False),
    "internal_error": (HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error", False),
}


class ProblemError(Exception):
    """A request that is answered with a problem.

    :param code: a key of :data:`CODES`
    :param detail: cause and remedy in one line
    :param items: the items at fault; the first ten are told
    :param retry_after_s: for the Retry-After header
    :param headers: further ones that the status calls for
    """

    def __init__(
        self,
        code: str,
        detail: str,
        items: Sequence[ProblemItem] = (),
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail
        self.items = tuple(items[:MAX_PROBLEM_ITEMS])
        self.retry_after_s = retry_after_s
        self.headers = headers or {}

    @property
    def status(self) -> HTTPStatus:
        """The HTTP status that goes with the code."""
        return CODES[self.code][0]

    def as_problem(self, request_id: str) -> Problem:
        """The body of the answer."""
        status, title, retryable = CODES[self.code]
        return Problem(
            title, int(status), self.code, self.detail, retryable, request_id, errors=list(self.items)
        )


def at_item(code: str, detail: str, index: int | None) -> ProblemError:
    """A problem of one item, or of the request if ``index`` is None."""
    return ProblemError(code, detail, [ProblemItem(code, detail, index)])
