"""Scoring backend: the loaded engine with its circuit breakers, its scheduler and its canary loop."""

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

if TYPE_CHECKING:  # the engine imports torch, which takes seconds: imported by the loading thread
    from reward_service.engine.engine import RewardEngine

Queue: TypeAlias = Scheduler[Pair, PairScores]
Notify: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class ScoringBackend:
    """Loaded engine with its circuit breakers, its scheduler and its canary loop."""

    engine: RewardEngine
    breakers: EvaluatorBreakers
    queue: Queue
    canary_loop: CanaryLoop

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints by evaluator."""
        return {name: evaluator.fingerprint for name, evaluator in self.engine.evaluators.items()}

    @property
    def dtype(self) -> str:
        """Name of the dtype of the trunks, such as `float32`."""
        return str(self.engine.dtype).removeprefix("torch.")

    def close(self, timeout_s: float) -> bool:
        """Finish the queued pairs; return whether all were finished within the timeout."""
        self.canary_loop.stop()
        return self.queue.close(timeout_s)


def open_backend(
    config: ServiceConfig, engine: RewardEngine, metrics: Metrics, on_fatal: Notify, on_warning: Notify
) -> ScoringBackend:
    """Warm up an engine, verify it with the canary pair and start its scheduler.

    Args:
        config: of the service
        engine: the loaded engine
        metrics: updated by scheduler, breakers and engine
        on_fatal: called once, with one line, when nothing more can be scored
        on_warning: called with one line about a condition that the operator should know

    Raises:
        ScoringError: if a canary score differs from its golden score
        ConfigError: if the golden scores cannot be read
    """

    def on_change(evaluator: str, up: bool, reason: str) -> None:
        metrics.on_evaluator_change(evaluator, up)
        on_warning(f"evaluator {evaluator} is {'back' if up else f'out of service: {reason}'}")

    engine.warm_up()
    engine.on_forward = metrics.on_forward
    golden = load_golden(config.canary) if config.canary else None
    breakers = EvaluatorBreakers(engine, golden, config.watch, on_change=on_change)
    if mismatches := breakers.self_test():
        raise ScoringError("; ".join(mismatches))
    if golden and (unproven := breakers.without_golden_score()):
        on_warning(f"no golden score for {', '.join(unproven)}; see reward-service canary --help")
    queue: Queue = Scheduler(
        breakers,
        batch_pairs=config.batch_pairs,
        max_queued_pairs=config.limits.max_queued_pairs,
        prepare=_preparation(engine) if _prepares_ahead(config, engine) else None,
        hang_s=config.watch.stuck_s,
        on_stuck=lambda error: on_fatal(_with_cause(error)),
        observer=metrics,
    )
    return ScoringBackend(engine, breakers, queue, _start_canary_loop(config, breakers, queue, on_fatal))


def record_loaded(backend: ScoringBackend, calibration: Calibration, metrics: Metrics) -> None:
    """Record version, device, fingerprints and calibration in the metrics."""
    identities = {
        name: (fingerprint, calibration.evaluators[name].identity)
        for name, fingerprint in backend.fingerprints.items()
    }
    metrics.on_loaded(identities, __version__, str(backend.engine.device), backend.dtype)


def _prepares_ahead(config: ServiceConfig, engine: RewardEngine) -> bool:
    return engine.device.type != "cpu" if config.prepare_ahead is None else config.prepare_ahead


def _preparation(engine: RewardEngine) -> Prepare[Pair]:
    return lambda pairs, lane: engine.prepare(pairs, cast("Lane", lane)[0])


def _start_canary_loop(
    config: ServiceConfig, breakers: EvaluatorBreakers, queue: Queue, on_fatal: Notify
) -> CanaryLoop:
    lane = (tuple(config.enabled), True)

    def submit(pair: Pair) -> Future[PairScores]:
        scored: Future[PairScores] = Future()
        queue.submit([pair], lane, client="canary").add_done_callback(lambda done: _copy_result(done, scored))
        return scored

    return CanaryLoop(breakers, submit, config.watch.canary_every_s, on_fatal)


def _copy_result(done: Future[Completed[PairScores]], scored: Future[PairScores]) -> None:
    if error := done.exception():
        scored.set_exception(error)
    else:
        scored.set_result(done.result().results[0])


def _with_cause(error: StuckError) -> str:
    cause = one_line(error.__cause__ or "")
    return f"{error} ({cause})" if cause else str(error)
