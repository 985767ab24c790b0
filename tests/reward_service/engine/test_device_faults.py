"""Engine faults: classification of torch's errors, and NaN scores, alone and behind the scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from reward_service.config import ServiceConfig, Watch
from reward_service.engine.engine import RewardEngine, device_error
from reward_service.engine.loading import build_engine
from reward_service.engine.types import FatalDeviceError, OutOfMemoryError, Pair, ScoringError
from reward_service.images import Pixels
from reward_service.scheduler.scheduler import Completed, PairFailedError, Scheduler, StuckError
from reward_service.scoring.breaker import EvaluatorBreakers

WAIT_S = 20.0
CUDA_ADVICE = "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"


@pytest.fixture
def engine(config: ServiceConfig) -> RewardEngine:
    """An engine of its own for each test, which may break it."""
    return build_engine(config)


@pytest.fixture
def pairs(images: list[Pixels]) -> list[Pair]:
    return [Pair(f"image {number}", image) for number, image in enumerate(images)]


def inject_fault(
    engine: RewardEngine, name: str, error_for: Callable[[torch.Tensor], Exception | None]
) -> None:
    """Make an evaluator's tower fail on images, if `error_for` returns an error for them."""
    tower = engine.evaluators[name].tower
    encode = tower._encode

    def failing(pixels: torch.Tensor) -> torch.Tensor:
        if (error := error_for(pixels)) is not None:
            raise error
        return encode(pixels)

    tower._encode = failing


@pytest.fixture
def serve() -> Iterator[Callable[[RewardEngine], Scheduler[Pair, Any]]]:
    """The engine behind circuit breakers and scheduler, as in the service."""
    schedulers: list[Scheduler[Pair, Any]] = []

    def serve(engine: RewardEngine) -> Scheduler[Pair, Any]:
        breakers = EvaluatorBreakers(engine, None, Watch())
        breakers.self_test()
        schedulers.append(Scheduler(breakers, batch_pairs=8, max_queued_pairs=100))
        return schedulers[0]

    yield serve
    for scheduler in schedulers:
        scheduler.close(WAIT_S)


def all_evaluators(engine: RewardEngine) -> tuple[tuple[str, ...], bool]:
    return tuple(engine.evaluators), False


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), OutOfMemoryError),
        (RuntimeError("CUDA error: out of memory"), OutOfMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (torch.AcceleratorError("anything at all"), FatalDeviceError),
        (RuntimeError(CUDA_ADVICE), FatalDeviceError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), FatalDeviceError),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), FatalDeviceError),
        (RuntimeError("shapes cannot be multiplied"), None),
        (ValueError("CUDA error: in a prompt"), None),
    ],
)
def test_device_errors_are_classified(error: Exception, kind: type[Exception] | None) -> None:
    """Out of memory, broken device or neither, by type or by torch's own message."""
    fault = device_error(error)
    assert type(fault) is (kind or type(None))
    assert fault is None or "\n" not in str(fault)
    assert "kernel errors" not in str(fault)


def test_failed_allocation_raises_out_of_memory(engine: RewardEngine, pairs: list[Pair]) -> None:
    """With torch's own error on this machine, not an imitation."""
    inject_fault(engine, "pickscore", lambda _: torch.empty(2**60) and None)  # type: ignore[func-returns-value]
    with pytest.raises(OutOfMemoryError) as caught:
        engine.score(pairs)
    # The context would keep the traceback, and with it the tensors of the failed pass.
    assert caught.value.__context__ is None


def test_failure_names_its_evaluator(engine: RewardEngine, pairs: list[Pair]) -> None:
    """Any other failure during scoring is attributed to the evaluator, with torch's message."""
    inject_fault(engine, "hpsv2", lambda _: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(ScoringError, match=r"hpsv2.*shapes cannot be multiplied") as caught:
        engine.score(pairs)
    assert caught.value.evaluator == "hpsv2"
    assert engine.score(pairs, ["clip"])[0].raw


def test_scheduler_splits_batches_on_out_of_memory(
    engine: RewardEngine, pairs: list[Pair], serve: Callable[[RewardEngine], Scheduler[Pair, Any]]
) -> None:
    """A device with memory for three images scores a batch of seven, with the same results."""
    expected = [pair.raw for pair in engine.score(pairs)]
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory")
    inject_fault(engine, "pickscore", lambda pixels: out_of_memory if len(pixels) > 3 else None)
    scheduler = serve(engine)
    results = scheduler.submit(pairs, all_evaluators(engine)).result(WAIT_S).results
    for result, raw in zip(results, expected, strict=True):
        assert result.raw == pytest.approx(raw, abs=1e-4)
        assert not result.failed


def test_nan_fails_only_its_own_request(
    engine: RewardEngine, pairs: list[Pair], serve: Callable[[RewardEngine], Scheduler[Pair, Any]]
) -> None:
    """Other requests of the batch get scores, and the evaluator stays in service."""
    evaluator = engine.evaluators["clip"]
    bad = evaluator.tower.embed_texts([pairs[4].prompt]).vectors[0]

    class Spoiled(type(evaluator)):  # type: ignore[misc]
        def score(self, image: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
            assert text is not None
            scores: torch.Tensor = super().score(image, text)
            same = (text - bad).abs().amax(dim=1) < 1e-5
            return scores.masked_fill(same, float("nan"))

    fields = {field.name: getattr(evaluator, field.name) for field in dataclasses.fields(evaluator)}
    engine.evaluators["clip"] = Spoiled(**fields)
    scheduler = serve(engine)
    lane = all_evaluators(engine)
    futures: list[Future[Completed[Any]]] = [
        scheduler.submit(part, lane) for part in (pairs[:3], pairs[3:6], pairs[6:])
    ]
    with pytest.raises(PairFailedError) as caught:
        futures[1].result(WAIT_S)
    assert caught.value.index == 1
    assert "clip returned a score that is not a finite number" in str(caught.value.__cause__)
    assert [len(futures[place].result(WAIT_S).results) for place in (0, 2)] == [3, 1]
    assert not scheduler.submit(pairs[:1], lane).result(WAIT_S).results[0].failed


def test_broken_evaluator_leaves_the_others_in_service(
    engine: RewardEngine, pairs: list[Pair], serve: Callable[[RewardEngine], Scheduler[Pair, Any]]
) -> None:
    """A failing tower takes its own evaluators out of service; the others' scores do not change."""
    expected = engine.score(pairs, ["aesthetic", "clip", "pickscore"])
    scheduler = serve(engine)
    inject_fault(engine, "hpsv2", lambda _: RuntimeError("broken"))
    results = scheduler.submit(pairs, all_evaluators(engine)).result(WAIT_S).results
    for result, other in zip(results, expected, strict=True):
        assert result.raw == pytest.approx(other.raw, abs=1e-4)
        assert set(result.failed) == {"hpsv2"}


def test_broken_device_stops_the_scheduler(
    engine: RewardEngine, pairs: list[Pair], serve: Callable[[RewardEngine], Scheduler[Pair, Any]]
) -> None:
    """Nothing is retried on the device, and no further request is accepted."""
    scheduler = serve(engine)
    attempts: list[int] = []
    inject_fault(
        engine, "clip", lambda pixels: attempts.append(1) or torch.AcceleratorError("device-side assert")
    )  # type: ignore[func-returns-value]
    with pytest.raises(StuckError):
        scheduler.submit(pairs, all_evaluators(engine)).result(WAIT_S)
    assert len(attempts) == 1
    with pytest.raises(StuckError):
        scheduler.submit(pairs, all_evaluators(engine))


def test_forward_time_is_reported_once_per_tower_and_batch(engine: RewardEngine, pairs: list[Pair]) -> None:
    """Images and prompts of a tower together, under the tower's configured name."""
    reported: list[tuple[str, float]] = []
    engine.on_forward = lambda tower, seconds: reported.append((tower, seconds))
    engine.score(pairs, ["aesthetic", "clip", "hpsv2"])
    assert sorted(name for name, _ in reported) == ["clip", "hps"]
    assert all(0 < seconds < WAIT_S for _, seconds in reported)
