"""What is told of each request: metrics, one line of log, spans. A layer around the application.

The application notes in :func:`current` what only it knows; nothing here is told to the caller.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from reward_service.logs import Log
from reward_service.metrics import ANONYMOUS, Metrics
from reward_service.tracing import Stretch, Tracer, trace_id_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Asked every few seconds by machines: counted, but neither logged nor traced.
QUIET = ("/health/live", "/health/ready", "/metrics")


@dataclass
class Story:
    """What happened to one request.

    ``reason`` is its problem's code, ``parts`` are its timed stretches.
    """

    id: str | None = None
    client: str | None = None
    pairs: int | None = None
    reason: str | None = None
    status: int = 499
    bytes_in: int = 0
    parts: list[Stretch] = field(default_factory=list)

    def passed(self, name: str, seconds: float, ended_ns: int | None = None) -> int:
        """Note a part that took so long and has ended now, or at ``ended_ns``.

        :returns: when it began, where the one before it may have ended
        """
        end = time.time_ns() if ended_ns is None else ended_ns
        begin = end - round(seconds * 1e9)
        self.parts.append(Stretch(name, begin, end))
        return begin


_story: ContextVar[Story] = ContextVar("story")


def current() -> Story:
    """The story of the request under way; one that nobody reads outside of any."""
    return _story.get(Story())


class Observed:
    """An ASGI application whose requests are counted, logged and traced.

    :param log: None to log nothing
    :param tracer: None to trace nothing
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, log: Log | None = None, tracer: Tracer | None = None
    ) -> None:
        self._app, self._metrics, self._log, self._tracer = app, metrics, log, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        story, begin_ns = Story(), time.time_ns()
        started_s = time.perf_counter()

        async def listening() -> Message:
            message = await receive()
            story.bytes_in += len(message.get("body", b""))
            return message

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                story.status = message["status"]
            await send(message)

        token = _story.set(story)
        try:
            await self._app(scope, listening, telling)
        finally:
            _story.reset(token)
            elapsed_s = time.perf_counter() - started_s
            self._tell(scope, story, Stretch("", begin_ns, begin_ns + round(elapsed_s * 1e9)))

    def _tell(self, scope: Scope, story: Story, whole: Stretch) -> None:
        path = self._metrics.route(scope["path"])
        self._metrics.on_answer(path, story.status, story.reason)
        if story.pairs and story.status < 400:
            self._metrics.client_pairs.labels(story.client or ANONYMOUS).inc(story.pairs)
        if path in QUIET:
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        trace_id = trace_id_of(headers.get("traceparent", ""))
        if self._tracer:
            trace_id = self._trace(scope["method"], path, story, whole, headers)
        if self._log:
            milliseconds = {
                f"{part.name}_ms": round((part.end_ns - part.begin_ns) / 1e6, 3)
                for part in [*story.parts, Stretch("total", whole.begin_ns, whole.end_ns)]
            }
            (self._log.warning if story.status >= 500 else self._log.info)(
                "request",
                id=story.id,
                client=story.client,
                method=scope["method"],
                route=path,
                status=story.status,
                reason=story.reason,
                pairs=story.pairs,
                bytes=story.bytes_in,
                trace_id=trace_id,
                **milliseconds,
            )

    def _trace(self, method: str, path: str, story: Story, whole: Stretch, headers: dict[str, str]) -> str:
        assert self._tracer is not None
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": path,
            "http.response.status_code": story.status,
            "reward.pairs": story.pairs or 0,
            "reward.request_id": story.id or "",
        }
        # In the answer's timing_ms it is called run.
        parts = [replace(part, name="forward") if part.name == "run" else part for part in story.parts]
        named = Stretch(f"{method} {path}", whole.begin_ns, whole.end_ns)
        return self._tracer.record(named, parts, headers, attributes, failed=story.status >= 500)
