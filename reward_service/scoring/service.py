"""Scoring service: the life cycle of the models, and the path of a request from its body to its response.

The models are loaded on a thread of their own, so that liveness can be reported at once. Requests are parsed,
decoded and tokenized on a small thread pool and scored on the scheduler's thread; nothing blocks the event
loop. This module needs no web server, and imports torch only to load the models.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from reward_service.config import ServiceConfig
from reward_service.engine.types import Pair, PairScores, PromptError
from reward_service.images import DecodedImage
from reward_service.observability.metrics import Metrics
from reward_service.observability.tracing import RequestTrace
from reward_service.protocol import (
    EvaluatorDescription,
    EvaluatorList,
    Health,
    Picture,
    ProblemError,
    ScoreResponse,
    item_problem,
)
from reward_service.requests.decoding import (
    FAST,
    LARGE,
    DecoderLane,
    DecodingJob,
    ImageDecoders,
    UnavailableError,
)
from reward_service.requests.parsing import (
    DecodedRequest,
    DecodedSlice,
    ParsedRequest,
    RequestParser,
    Slice,
)
from reward_service.requests.tokenizing import tokenize_request
from reward_service.scheduler.requests import (
    ClosedError,
    Completed,
    DeadlineMissedError,
    PairFailedError,
    QueueFullError,
    StuckError,
)
from reward_service.scoring.admission import Admission, Ticket
from reward_service.scoring.auth import Client
from reward_service.scoring.backend import Notify, ScoringBackend, open_backend, record_loaded
from reward_service.scoring.calibration import Calibration, load_calibration
from reward_service.scoring.responses import build_response, deadline_exceeded, durations, evaluator_down
from reward_service.settings import one_line

if TYPE_CHECKING:  # the engine imports torch, which takes seconds: imported by the loading thread
    from reward_service.engine.engine import RewardEngine

Build: TypeAlias = "Callable[[ServiceConfig], RewardEngine]"
Result = TypeVar("Result")

RETRY_LOADING_S = 2
_LAST_BATCH_S = 1.0
_ABANDONED_S = 0.1
_SLICE_LIMIT_S = 0.1
# Of pixels. Larger images take longer to resize than the towers take for a pair.
_ORDINARY_IMAGE_BYTES, _LARGE_IMAGE_BYTES = 3 * 2**19, 3 * 2**21
_PREPROCESS_S_PER_BYTE = 1e-8


class ScoringService:
    """Service that scores requests with the evaluators of a configuration.

    Args:
        config: the evaluators to load, and the limits
        build: builds the engine; None to load it from the configuration
        on_ready: called with one line when the service is ready
        on_failure: called with one line when the service can never score (again): the process should exit
        on_warning: called with one line about a condition that the operator should know
        metrics: updated by this service; None for new ones

    Raises:
        ConfigError: if the calibration table is unusable
    """

    def __init__(
        self,
        config: ServiceConfig,
        build: Build | None = None,
        on_ready: Notify = lambda _: None,
        on_failure: Notify = lambda _: None,
        on_warning: Notify = lambda _: None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config, self.metrics = config, metrics or Metrics()
        self.calibration: Calibration = load_calibration(config.calibration, tuple(config.enabled))
        self.admission = Admission(config.limits, self._retry_after_s)
        self._build = build or build_default_engine
        self._on_ready, self._on_failure, self._on_warning = on_ready, on_failure, on_warning
        self._parser = RequestParser(config)
        self._backend: ScoringBackend | None = None
        self._health = Health("loading", "the models are being loaded")
        self._started = False
        self._decoders = ImageDecoders(config, on_warning)
        self._stop_by_s = math.inf
        self._set_gauges()

    @property
    def health(self) -> Health:
        """Status of the service, with the reason if it is not ready."""
        return self._health

    @property
    def has_been_ready(self) -> bool:
        """True if the models were loaded at some time."""
        return self._backend is not None

    def start(self) -> None:
        """Start to load the models and return at once; further calls do nothing."""
        if not self._started:
            self._started = True
            threading.Thread(target=self._load, name="loading", daemon=True).start()

    def fail(self, message: str) -> None:
        """Set the health to `failed` for good and report the failure.

        Args:
            message: the reason, in one line
        """
        if self._health.status != "failed":
            self._health = Health("failed", message)
            self._on_failure(message)

    def stop_accepting(self) -> None:
        """Refuse new requests from now on; requests that were admitted are still finished."""
        self._stop_by_s = min(self._stop_by_s, time.monotonic() + self.config.drain_s)
        if self._health.status != "failed":
            self._health = Health("stopping", "the service is shutting down")

    def close(self) -> None:
        """Finish the admitted requests, within `drain_s` seconds since `stop_accepting`."""
        self.stop_accepting()
        if self._backend is not None:
            self._backend.close(max(_LAST_BATCH_S, self._stop_by_s - time.monotonic()))
        self._decoders.close()

    def admit(self, client: Client, body_bytes: int | None) -> Ticket:
        """Admit a request before its body is read.

        Args:
            client: the client that sends it
            body_bytes: announced length of the body; None if it is not announced

        Raises:
            ProblemError: if the service is not ready or has no room
        """
        self._ready_backend()
        return self.admission.admit(client, body_bytes)

    async def score(
        self,
        ticket: Ticket,
        body: bytes | bytearray,
        content_type: str,
        trace: RequestTrace,
        deadline_s: float | None = None,
    ) -> ScoreResponse:
        """Return the response to a score request; if cancelled, drop its work.

        Args:
            ticket: what `admit` returned; its counts follow the request's progress
            body: the request body
            content_type: the whole header
            trace: its ID goes into the response; gets the number of pairs and the timed stages
            deadline_s: on the monotonic clock; None for no deadline

        Raises:
            ProblemError: if the request is invalid or cannot be scored
        """
        started_s = time.perf_counter()
        parsed = await self._parse(body, content_type, ticket, trace)
        del body  # it can be tens of megabytes, and only `parsed` is needed from here on
        request = await self._decode(parsed, ticket, deadline_s)
        del parsed
        ticket.set("body bytes", 0)
        request = await self._tokenize(request, ticket, deadline_s)
        request = await self._preprocess(request, ticket, deadline_s)
        completed = await self._submit(request, ticket, deadline_s)
        response = build_response(
            request,
            completed,
            request_id=trace.id or "",
            fingerprints=self._loaded_backend().fingerprints,
            calibration=self.calibration,
            total_s=time.perf_counter() - started_s,
            retry_after_s=self._retry_after_s(),
        )
        self._record(response, durations(request, completed), trace)
        return response

    def describe(self) -> EvaluatorList:
        """Return the configured evaluators with their scales.

        Raises:
            ProblemError: if the service is not ready
        """
        from reward_service.engine.evaluators import FORMULAS

        backend = self._ready_backend()
        described = {}
        for name, evaluator in backend.engine.evaluators.items():
            scale = self.calibration.evaluators[name]
            described[name] = EvaluatorDescription(
                fingerprint=evaluator.fingerprint,
                calibration=scale.identity,
                formula=FORMULAS[evaluator.kind],
                mean=scale.mean,
                std=scale.std,
                weight=self.config.evaluators[name].weight,
                provisional=self.calibration.is_provisional(name, evaluator.fingerprint),
            )
        return EvaluatorList(described, str(backend.engine.device), backend.dtype)

    def _load(self) -> None:
        try:
            if self._build is build_default_engine:
                self._decoders.start()  # while the models are loaded
            engine = self._build(self.config)
            backend = open_backend(self.config, engine, self.metrics, self.fail, self._on_warning)
            if self._health.status != "loading":  # stopped in the meantime
                backend.close(0.0)
                return
            if notice := self.calibration.variant_warning(backend.fingerprints):
                self._on_warning(notice)
            record_loaded(backend, self.calibration, self.metrics)
            self._backend = backend
            self._health = Health("ready", f"{len(backend.fingerprints)} evaluators on {engine.device}")
            self._on_ready(self._health.detail)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported in one line
            self.fail(one_line(error) or type(error).__name__)

    def _set_gauges(self) -> None:
        admission, metrics = self.admission, self.metrics
        metrics.ready.set_function(lambda: self._health.status == "ready")
        metrics.queued_pairs.set_function(lambda: self._backend.queue.queued_pairs if self._backend else 0)
        metrics.inflight_bytes.set_function(
            lambda: admission.used["body bytes"] + admission.used["decoded bytes"]
        )

    def _ready_backend(self) -> ScoringBackend:
        """Return the backend; raise a `not_ready` problem unless the service is ready."""
        if self._backend is None or self._health.status != "ready":
            message = f"the service is {self._health.status}: {self._health.detail}"
            raise ProblemError("not_ready", message, retry_after_s=RETRY_LOADING_S)
        return self._backend

    def _loaded_backend(self) -> ScoringBackend:
        """Return the backend also while the service stops: requests that were admitted are finished."""
        return self._backend or self._ready_backend()

    def _retry_after_s(self) -> int:
        return self._backend.queue.retry_after_s() if self._backend else RETRY_LOADING_S

    async def _parse(
        self, body: bytes | bytearray, content_type: str, ticket: Ticket, trace: RequestTrace
    ) -> ParsedRequest:
        parsed = await self._off_loop(partial(self._parser.parse, body, content_type), ticket)
        trace.pairs = len(parsed.request.items)
        ticket.set("pairs", trace.pairs)
        self._check_breakers(parsed)
        return parsed

    def _check_breakers(self, parsed: ParsedRequest) -> None:
        """Raise `evaluator_down` before any image is decoded if the breakers already rule out a response."""
        down = self._loaded_backend().breakers.out_of_service(parsed.evaluators)
        if down and (not parsed.request.allow_partial or len(down) == len(parsed.evaluators)):
            raise evaluator_down(list(down), max(down.values()))

    async def _decode(
        self, parsed: ParsedRequest, ticket: Ticket, deadline_s: float | None
    ) -> DecodedRequest:
        with self._recording_cancellation(len(parsed.request.items), deadline_s):
            return self._parser.assemble(parsed, await self._decode_slices(parsed, ticket))

    @contextmanager
    def _recording_cancellation(self, pairs: int, deadline_s: float | None) -> Iterator[None]:
        """Count the pairs of a request that is cancelled before they are queued."""
        try:
            yield
        except asyncio.CancelledError:
            expired = deadline_s is not None and time.monotonic() >= deadline_s
            (self.metrics.on_expired if expired else self.metrics.on_cancelled)(pairs)
            raise

    async def _tokenize(
        self, request: DecodedRequest, ticket: Ticket, deadline_s: float | None
    ) -> DecodedRequest:
        with self._recording_cancellation(len(request.pairs), deadline_s):
            engine = self._loaded_backend().engine
            return await tokenize_request(request, engine, lambda work: self._off_loop(work, ticket))

    async def _preprocess(
        self, request: DecodedRequest, ticket: Ticket, deadline_s: float | None
    ) -> DecodedRequest:
        """Preprocess large images off the device's thread, where everybody's pairs would wait for them."""
        if all(pair.image.size <= _LARGE_IMAGE_BYTES for pair in request.pairs):
            return request
        engine, pairs = self._loaded_backend().engine, list(request.pairs)
        with self._recording_cancellation(len(pairs), deadline_s):
            for index, pair in enumerate(pairs):
                if pair.image.size > _LARGE_IMAGE_BYTES:
                    work = partial(engine.prepare, [pair], request.evaluators)
                    cost_s = pair.image.size * _PREPROCESS_S_PER_BYTE
                    [pairs[index]] = await self._off_loop(work, ticket, LARGE, cost_s)
        return replace(request, pairs=pairs)

    async def _decode_slices(self, parsed: ParsedRequest, ticket: Ticket) -> list[DecodedSlice]:
        """Decode as many slices at a time as there are decoder threads, so that requests take turns."""
        job = DecodingJob()
        decoded: list[DecodedSlice] = []
        slices = self._parser.slices(parsed)
        try:
            while window := list(islice(slices, self.config.decode_threads)):
                parts = await asyncio.gather(*(self._decode_slice(parsed, it, job, ticket) for it in window))
                decoded += [part for several in parts for part in several]
                if any(part.problems for part in decoded):
                    break
        except UnavailableError as error:
            raise ProblemError("not_ready", str(error), retry_after_s=RETRY_LOADING_S) from None
        except asyncio.CancelledError:
            # Most images end by themselves sooner than a new process is started.
            asyncio.get_running_loop().call_later(_ABANDONED_S, job.end)
            raise
        finally:
            job.abandon()  # for slices that are still queued or running
        return decoded

    async def _decode_slice(
        self, parsed: ParsedRequest, part: Slice, job: DecodingJob, ticket: Ticket
    ) -> list[DecodedSlice]:
        def decode(items: range, lane: DecoderLane) -> DecodedSlice:
            reserve = partial(ticket.reserve, "decoded bytes")
            decode_image = partial(self._decode_image, lane, job)
            return self._parser.decode(parsed, items, reserve, decode_image, _SLICE_LIMIT_S)

        decoded: list[DecodedSlice] = []
        pending = deque([part])
        while pending:
            part = pending.popleft()
            found = await self._off_loop(
                partial(decode, part.items, part.lane), ticket, part.lane, part.cost_s
            )
            decoded.append(found)
            if found.left:
                first = [Slice(found.left[:1], LARGE, part.cost_s)] if found.overrun else []
                rest = self._parser.slices(parsed, found.left[len(first) :])
                pending.extendleft(reversed([*first, *rest]))
        return decoded

    def _decode_image(
        self, lane: DecoderLane, job: DecodingJob, sent: Picture, reserve: Callable[[int], None]
    ) -> DecodedImage:
        return self._decoders.decode(lane, job, sent.data, sent.format, sent.shape, reserve)

    async def _off_loop(
        self, work: Callable[[], Result], ticket: Ticket, lane: DecoderLane = FAST, cost_s: float = 0.0
    ) -> Result:
        future = self._decoders.submit(lane, work, ticket.client.queue, ticket.weight, cost_s)
        return await asyncio.wrap_future(future)

    async def _submit(
        self, request: DecodedRequest, ticket: Ticket, deadline_s: float | None
    ) -> Completed[PairScores]:
        # In the order of the configuration, so that requests for the same evaluators share batches.
        names = tuple(name for name in self.config.enabled if name in request.evaluators)
        with _scheduler_errors_as_problems():
            future: Future[Completed[PairScores]] = self._loaded_backend().queue.submit(
                request.pairs,
                (names, request.deterministic),
                client=ticket.client.queue,
                weight=ticket.weight,
                deadline_s=deadline_s,
                pair_cost=_pair_cost(request.pairs),
            )
            # Cancelling the asyncio future also cancels the scheduler's.
            return await asyncio.wrap_future(future)

    def _record(self, response: ScoreResponse, seconds: dict[str, float], trace: RequestTrace) -> None:
        """Record scores and stages in the metrics, and the stages, which end now, in the trace."""
        for name in response.evaluators:
            self.metrics.scores.observe(name, (result.scores[name].z for result in response.results))
        self.metrics.decode.observe(seconds["decode"])
        end_ns = None
        for stage in reversed(seconds):
            end_ns = trace.add_span(stage, seconds[stage], end_ns)


def _pair_cost(pairs: Sequence[Pair]) -> int:
    """Return how many ordinary pairs the pair with the largest image takes as long as."""
    return math.ceil(max(pair.image.size for pair in pairs) / _ORDINARY_IMAGE_BYTES)


@contextmanager
def _scheduler_errors_as_problems() -> Iterator[None]:
    try:
        yield
    except QueueFullError as error:
        raise ProblemError("queue_full", str(error), retry_after_s=error.retry_after_s) from None
    except DeadlineMissedError:
        raise deadline_exceeded() from None
    except (ClosedError, StuckError) as error:
        raise ProblemError("not_ready", one_line(error), retry_after_s=RETRY_LOADING_S) from None
    except PairFailedError as error:
        if isinstance(error.__cause__, PromptError):
            detail = f"item {error.index}: {error.__cause__}"
            raise item_problem("invalid_request", detail, error.index) from error
        # The cause may quote the prompt; the log has it.
        evaluator = getattr(error.__cause__, "evaluator", None)
        cause = f"evaluator {evaluator} cannot score it" if evaluator else "it cannot be scored"
        detail = f"item {error.index}: {cause}; the service's log has the reason"
        raise item_problem("scoring_failed", detail, error.index) from error


def build_default_engine(config: ServiceConfig) -> RewardEngine:
    """Load the engine of a configuration."""
    from reward_service.engine.loading import build_engine

    return build_engine(config)
