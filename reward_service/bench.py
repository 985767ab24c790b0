"""The loaded engine, with what guards it, what feeds it and what doubts it. No web."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

from reward_service import __version__
from reward_service.calibration import Calibration
from reward_service.canary import load_golden
from reward_service.config import ServiceConfig
from reward_service.guard import Guard, Lane, Rounds
from reward_service.metrics import Metrics
from reward_service.outcomes import Completed, StuckError
from reward_service.pairs import Pair, PairScores, ScoringError
from reward_service.scheduler import Scheduler
from reward_service.settings import one_line
from reward_service.staging import Prepare

if TYPE_CHECKING:  # the engine brings torch, which takes seconds: imported by the loading thread
    from reward_service.engine import RewardEngine

Queue: TypeAlias = Scheduler[Pair, PairScores]
Notice: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What scores, once the models are loaded."""

    engine: RewardEngine
    guard: Guard
    queue: Queue
    rounds: Rounds

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
        self.rounds.stop()
        return self.queue.close(timeout_s)


def open_bench(
    config: ServiceConfig, engine: RewardEngine, metrics: Metrics, on_fatal: Notice, on_notice: Notice
) -> Bench:
    """Warm an engine up, prove it by the canary and put it to work.

    :param on_fatal: told in one line, once, that nothing more can be scored
    :raises ScoringError: the models do not give the numbers they should
    :raises ConfigError: the golden scores cannot be read
    """

    def change(evaluator: str, up: bool, reason: str) -> None:
        metrics.on_change(evaluator, up, reason)
        on_notice(f"evaluator {evaluator} is {'back' if up else f'out of service: {reason}'}")

    engine.warm_up()
    engine.on_forward = metrics.on_forward
    golden = load_golden(config.canary) if config.canary else None
    guard = Guard(engine, golden, config.watch, on_change=change)
    if wrong := guard.prove():
        raise ScoringError("; ".join(wrong))
    if golden and (unproven := guard.unproven()):
        on_notice(f"no golden score of {', '.join(unproven)}; see reward-service canary --help")
    queue: Queue = Scheduler(
        guard,
        batch_pairs=config.batch_pairs,
        max_queued_pairs=config.limits.max_queued_pairs,
        prepare=_preparing(engine) if _ahead(config, engine) else None,
        hang_s=config.watch.stuck_s,
        on_stuck=lambda error: on_fatal(_sentence(error)),
        observer=metrics,
    )
    return Bench(engine, guard, queue, _rounds(config, guard, queue, on_fatal))


def tell_loaded(bench: Bench, calibration: Calibration, metrics: Metrics) -> None:
    """Have the metrics say what runs."""
    made_by = {name: (print_, calibration.evaluators[name].identity) for name, print_ in bench.prints.items()}
    metrics.on_loaded(made_by, __version__, str(bench.engine.device), bench.dtype)


def _ahead(config: ServiceConfig, engine: RewardEngine) -> bool:
    return engine.device.type != "cpu" if config.prepare_ahead is None else config.prepare_ahead


def _preparing(engine: RewardEngine) -> Prepare[Pair]:
    return lambda pairs, lane: engine.prepare(pairs, cast("Lane", lane)[0])


def _rounds(config: ServiceConfig, guard: Guard, queue: Queue, on_fatal: Notice) -> Rounds:
    lane = (tuple(config.enabled), True)

    def submit(pair: Pair) -> Future[PairScores]:
        scored: Future[PairScores] = Future()
        queue.submit([pair], lane, client="canary").add_done_callback(lambda done: _pass_on(done, scored))
        return scored

    return Rounds(guard, submit, config.watch.canary_every_s, on_fatal)


def _sentence(error: StuckError) -> str:
    cause = one_line(error.__cause__ or "")
    return f"{error} ({cause})" if cause else str(error)


def _pass_on(done: Future[Completed[PairScores]], scored: Future[PairScores]) -> None:
    if error := done.exception():
        scored.set_exception(error)
    else:
        scored.set_result(done.result().results[0])
