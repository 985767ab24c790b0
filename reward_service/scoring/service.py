"""What the web layer serves: the models' life, and one request's way from bytes to a response. No web.

The models load on a thread of their own, so that the service can say at once that it lives. Decoding runs
on a small pool, scoring on the scheduler's thread; neither on the event loop.

The loaded engine, with what guards it, what feeds it and what doubts it. No web.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

from reward_service import __version__
from reward_service.config import ServiceConfig
from reward_service.engine.types import Pair, PairScores, ScoringError
from reward_service.observability.metrics import Metrics
from reward_service.scheduler.requests import Completed, StuckError
from reward_service.scheduler.scheduler import Prepare, Scheduler
from reward_service.scoring.breaker import CanaryLoop, EvaluatorBreakers, Lane
from reward_service.scoring.calibration import Calibration
from reward_service.scoring.canary import load_golden
from reward_service.settings import one_line

if TYPE_CHECKING:  # the engine brings torch, which takes seconds: imported by the loading thread
    from reward_service.engine.engine import RewardEngine
import asyncio
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

from reward_service.observability.tracing import current
from reward_service.protocol import (
    EvaluatorDescription,
    EvaluatorList,
    Health,
    ProblemError,
    ScoreResponse,
    at_item,
)
from reward_service.scheduler.requests import ClosedError, DeadlineError, PairFailedError, QueueFullError
from reward_service.scoring.admission import Admission, Ticket
from reward_service.scoring.auth import Client
from reward_service.scoring.calibration import load_calibration
from reward_service.scoring.requests import DecodedRequest, DecodedSlice, ParsedRequest, RequestParser
from reward_service.scoring.responses import DOWN, _down, identities, item_results, working

Queue: TypeAlias = Scheduler[Pair, PairScores]
Notice: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class ScoringBackend:
    """What scores, once the models are loaded."""

    engine: RewardEngine
    breakers: EvaluatorBreakers
    queue: Queue
    canary_loop: CanaryLoop

    @property
    def prints(self) -> dict[str, str]:
        """Fingerprints by evaluator."""
        return {name: evaluator.fingerprint for name, evaluator in self.engine.evaluators.items()}

    @property
    def dtype(self) -> str:
        """Of the trunks."""
        return str(self.engine.dtype).removeprefix("torch.")

    def close(self, timeout_s: float) -> bool:
        """Finish what was admitted; whether that was done in time."""
        self.canary_loop.stop()
        return self.queue.close(timeout_s)


def open_backend(
    config: ServiceConfig, engine: RewardEngine, metrics: Metrics, on_fatal: Notice, on_notice: Notice
) -> ScoringBackend:
    """Warm an engine up, prove it by the canary and put it to work.

    Args:
        on_fatal: told in one line, once, that nothing more can be scored

    Raises:
        ScoringError: the models do not give the numbers they should
        ConfigError: the golden scores cannot be read
    """

    def change(evaluator: str, up: bool, reason: str) -> None:
        metrics.on_change(evaluator, up, reason)
        on_notice(f"evaluator {evaluator} is {'back' if up else f'out of service: {reason}'}")

    engine.warm_up()
    engine.on_forward = metrics.on_forward
    golden = load_golden(config.canary) if config.canary else None
    breakers = EvaluatorBreakers(engine, golden, config.watch, on_change=change)
    if wrong := breakers.prove():
        raise ScoringError("; ".join(wrong))
    if golden and (unproven := breakers.unproven()):
        on_notice(f"no golden score of {', '.join(unproven)}; see reward-service canary --help")
    queue: Queue = Scheduler(
        breakers,
        batch_pairs=config.batch_pairs,
        max_queued_pairs=config.limits.max_queued_pairs,
        prepare=_preparing(engine) if _ahead(config, engine) else None,
        hang_s=config.watch.stuck_s,
        on_stuck=lambda error: on_fatal(_sentence(error)),
        observer=metrics,
    )
    return ScoringBackend(engine, breakers, queue, _canary_loop(config, breakers, queue, on_fatal))


def record_loaded(backend: ScoringBackend, calibration: Calibration, metrics: Metrics) -> None:
    """Have the metrics say what runs."""
    made_by = {
        name: (print_, calibration.evaluators[name].identity) for name, print_ in backend.prints.items()
    }
    metrics.on_loaded(made_by, __version__, str(backend.engine.device), backend.dtype)


def _ahead(config: ServiceConfig, engine: RewardEngine) -> bool:
    return engine.device.type != "cpu" if config.prepare_ahead is None else config.prepare_ahead


def _preparing(engine: RewardEngine) -> Prepare[Pair]:
    return lambda pairs, lane: engine.prepare(pairs, cast("Lane", lane)[0])


def _canary_loop(
    config: ServiceConfig, breakers: EvaluatorBreakers, queue: Queue, on_fatal: Notice
) -> CanaryLoop:
    lane = (tuple(config.enabled), True)

    def submit(pair: Pair) -> Future[PairScores]:
        scored: Future[PairScores] = Future()
        queue.submit([pair], lane, client="canary").add_done_callback(lambda done: _pass_on(done, scored))
        return scored

    return CanaryLoop(breakers, submit, config.watch.canary_every_s, on_fatal)


def _sentence(error: StuckError) -> str:
    cause = one_line(error.__cause__ or "")
    return f"{error} ({cause})" if cause else str(error)


def _pass_on(done: Future[Completed[PairScores]], scored: Future[PairScores]) -> None:
    if error := done.exception():
        scored.set_exception(error)
    else:
        scored.set_result(done.result().results[0])


Build: TypeAlias = "Callable[[ServiceConfig], RewardEngine]"
Result = TypeVar("Result")

RETRY_LOADING_S = 2
_LAST_BATCH_S = 1.0


class ScoringService:
    """The evaluators of a configuration as a service.

    Args:
        config: what to load and how much to take
        build: makes the engine
        on_ready: called with one line once it can score
        on_failure: called with one line when it will never score: the process should end
        on_notice: called with one line about what works but should be known

    Raises:
        ConfigError: the calibration table is unusable
    """

    def __init__(
        self,
        config: ServiceConfig,
        build: Build | None = None,
        on_ready: Callable[[str], None] = lambda _: None,
        on_failure: Callable[[str], None] = lambda _: None,
        on_notice: Callable[[str], None] = lambda _: None,
        metrics: Metrics | None = None,
    ) -> None:
        self.config, self.metrics = config, metrics or Metrics()
        self.calibration: Calibration = load_calibration(config.calibration, tuple(config.enabled))
        self.admission = Admission(config.limits, self._retry_after_s)
        self._build = build or _build_engine
        self._on_ready, self._on_failure, self._on_notice = on_ready, on_failure, on_notice
        self._parser = RequestParser(config)
        self._backend: ScoringBackend | None = None
        self._health = Health("loading", "the models are being loaded")
        self._started = False
        self._decoders = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._stop_by_s = math.inf
        self._observe()

    @property
    def health(self) -> Health:
        """Whether it can score, and what it is waiting for if not."""
        return self._health

    @property
    def served(self) -> bool:
        """Whether it has been ready."""
        return self._backend is not None

    def start(self) -> None:
        """Begin to load the models, the first time; returns at once."""
        if not self._started:
            self._started = True
            threading.Thread(target=self._load, name="loading", daemon=True).start()

    def fail(self, message: str) -> None:
        """Nothing can be scored any more: say so to everybody who asks, and to who runs this.

        Args:
            message: one line
        """
        if self._health.status != "failed":
            self._health = Health("failed", message)
            self._on_failure(message)

    def stop_accepting(self) -> None:
        """Say that it is not ready any more; what was admitted is still finished."""
        self._stop_by_s = min(self._stop_by_s, time.monotonic() + self.config.drain_s)
        if self._health.status != "failed":
            self._health = Health("stopping", "the service is shutting down")

    def close(self) -> None:
        """Finish what was admitted, within the configured time since `stop_accepting`."""
        self.stop_accepting()
        if self._backend is not None:
            self._backend.close(max(_LAST_BATCH_S, self._stop_by_s - time.monotonic()))
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def enter(self, client: Client, body_bytes: int | None) -> Ticket:
        """Let a request in before its body is read.

        Args:
            body_bytes: as announced; None if they are not

        Raises:
            ProblemError: not ready, or too much is under way
        """
        self._ready()
        return self.admission.enter(client, body_bytes)

    async def score(
        self,
        ticket: Ticket,
        body: bytes | bytearray,
        content_type: str,
        request_id: str,
        deadline_s: float | None = None,
    ) -> ScoreResponse:
        """Answer a score request. Cancelled, it drops the request's work.

        Args:
            deadline_s: on the monotonic clock

        Raises:
            ProblemError: whatever keeps it from being scored
        """
        started = time.perf_counter()
        parsed = await self._off_loop(partial(self._parser.parse, body, content_type))
        del body
        current().pairs = len(parsed.request.items)
        ticket.set("pairs", len(parsed.request.items))
        self._refuse_if_down(parsed)
        try:
            request = self._parser.admitted(parsed, await self._decoded(parsed, ticket))
        except asyncio.CancelledError:
            late = deadline_s is not None and time.monotonic() >= deadline_s
            (self.metrics.on_expired if late else self.metrics.on_cancelled)(len(parsed.request.items))
            raise
        del parsed
        ticket.set("body bytes", 0)
        completed = await self._completed(request, ticket, deadline_s)
        return self._response(request, completed, request_id, time.perf_counter() - started)

    def describe(self) -> EvaluatorList:
        """What is configured.

        Raises:
            ProblemError: not ready
        """
        from reward_service.engine.evaluators import FORMULAS

        backend = self._ready()
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
                provisional=self.calibration.provisional_for(name, evaluator.fingerprint),
            )
        return EvaluatorList(described, str(backend.engine.device), backend.dtype)

    def _load(self) -> None:
        try:
            engine = self._build(self.config)
            backend = open_backend(self.config, engine, self.metrics, self.fail, self._on_notice)
            if self._health.status != "loading":  # told to stop in the meantime
                backend.close(0.0)
                return
            if notice := self.calibration.notice(backend.prints):
                self._on_notice(notice)
            record_loaded(backend, self.calibration, self.metrics)
            self._backend = backend
            self._health = Health("ready", f"{len(backend.prints)} evaluators on {engine.device}")
            self._on_ready(self._health.detail)
        except Exception as error:  # noqa: BLE001 - reported in one line, whatever it was
            self.fail(one_line(error) or type(error).__name__)

    def _observe(self) -> None:
        used = self.admission
        self.metrics.ready.set_function(lambda: self._health.status == "ready")
        self.metrics.queued_pairs.set_function(
            lambda: self._backend.queue.queued_pairs if self._backend else 0
        )
        self.metrics.inflight_bytes.set_function(lambda: used.used["body bytes"] + used.used["decoded bytes"])

    def _ready(self) -> ScoringBackend:
        if self._backend is None or self._health.status != "ready":
            message = f"the service is {self._health.status}: {self._health.detail}"
            raise ProblemError("not_ready", message, retry_after_s=RETRY_LOADING_S)
        return self._backend

    def _retry_after_s(self) -> int:
        return self._backend.queue.retry_after_s() if self._backend else RETRY_LOADING_S

    def _refuse_if_down(self, parsed: ParsedRequest) -> None:
        """Say at once what cannot be had for some time."""
        backend = self._backend or self._ready()
        down = backend.breakers.down(parsed.evaluators)
        if down and (not parsed.request.allow_partial or len(down) == len(parsed.evaluators)):
            raise _down(list(down), max(down.values()))

    async def _decoded(self, parsed: ParsedRequest, ticket: Ticket) -> list[DecodedSlice]:
        """Slice by slice, as many at a time as there are decoders, so that requests take turns."""

        def decode(part: range) -> DecodedSlice:
            return self._parser.decode(parsed, part, lambda size: ticket.grow("decoded bytes", size))

        found: list[DecodedSlice] = []
        parts = self._parser.slices(parsed)
        while window := list(islice(parts, self.config.decode_threads)):
            found += await asyncio.gather(*(self._off_loop(partial(decode, part)) for part in window))
            if any(part.wrong for part in found):
                break
        return found

    async def _off_loop(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    async def _completed(
        self, request: DecodedRequest, ticket: Ticket, deadline_s: float | None
    ) -> Completed[PairScores]:
        # What was admitted before its body was read is finished, also while stopping.
        backend = self._backend or self._ready()
        # In the configuration's order, whatever the caller's: the same evaluators share batches.
        names = tuple(name for name in self.config.enabled if name in request.evaluators)
        with _as_problems():
            future: Future[Completed[PairScores]] = backend.queue.submit(
                request.pairs,
                (names, request.deterministic),
                client=ticket.client.queue,
                weight=ticket.weight,
                deadline_s=deadline_s,
            )
            # Cancelling the one cancels the other.
            return await asyncio.wrap_future(future)

    def _response(
        self, request: DecodedRequest, completed: Completed[PairScores], request_id: str, total_s: float
    ) -> ScoreResponse:
        names = working(request, completed.results)
        failed = {name: DOWN for name in request.evaluators if name not in names}
        if failed and (not request.allow_partial or not names):
            raise _down(list(failed), self._retry_after_s())
        # Loaded even while stopping: it has just scored.
        prints = (self._backend or self._ready()).prints
        results = item_results(request, completed.results, self.calibration)
        for name in names:
            self.metrics.scores.observe(name, (result.scores[name].z for result in results))
        return ScoreResponse(
            request_id,
            results,
            identities({name: prints[name] for name in names}, self.calibration),
            self._timing(request, completed, total_s),
            failed,
        )

    def _timing(
        self, request: DecodedRequest, completed: Completed[PairScores], total_s: float
    ) -> dict[str, float]:
        """Milliseconds by stretch, told to metrics and log too."""
        seconds = {"decode": request.decode_s, "queue": completed.queued_s, "run": completed.run_s}
        self.metrics.decode.observe(request.decode_s)
        ended_ns = None
        for name in reversed(seconds):
            ended_ns = current().passed(name, seconds[name], ended_ns)
        return {name: round(1000 * value, 3) for name, value in (seconds | {"total": total_s}).items()}


@contextmanager
def _as_problems() -> Iterator[None]:
    """The scheduler's errors as problems."""
    try:
        yield
    except QueueFullError as error:
        raise ProblemError("queue_full", str(error), retry_after_s=error.retry_after_s) from None
    except DeadlineError:
        raise ProblemError("deadline_exceeded", "it could not be scored before X-Deadline-Ms") from None
    except (ClosedError, StuckError) as error:
        raise ProblemError("not_ready", one_line(error), retry_after_s=RETRY_LOADING_S) from None
    except PairFailedError as error:
        cause = one_line(error.__cause__)[:200]
        raise at_item("scoring_failed", f"item {error.index}: {cause}", error.index) from error


def _build_engine(config: ServiceConfig) -> RewardEngine:
    from reward_service.engine.loading import build_engine

    return build_engine(config)
