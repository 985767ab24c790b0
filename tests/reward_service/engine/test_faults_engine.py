"""What the engine makes of torch's errors, and of numbers that are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from reward_service.config import ServiceConfig, Watch
from reward_service.engine.engine import RewardEngine, device_fault
from reward_service.engine.loading import build_engine
from reward_service.engine.types import FatalDeviceError, OutOfMemoryError, Pair, ScoringError
from reward_service.images import Pixels
from reward_service.scheduler.scheduler import Completed, PairFailedError, Scheduler, StuckError
from reward_service.scoring.breaker import EvaluatorBreakers

WAIT_S = 20.0
CUDA_ADVICE = "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later"


@pytest.fixture
def engine(config: ServiceConfig) -> RewardEngine:
    """One that a test may break."""
    return build_engine(config)


@pytest.fixture
def pairs(images: list[Pixels]) -> list[Pair]:
    return [Pair(f"image {number}", image) for number, image in enumerate(images)]


def breaking(engine: RewardEngine, name: str, when: Callable[[torch.Tensor], Exception | None]) -> None:
    """Let an evaluator's tower fail on images."""
    tower = engine.evaluators[name].tower
    encode = tower._encode

    def failing(pixels: torch.Tensor) -> torch.Tensor:
        if (error := when(pixels)) is not None:
            raise error
        return encode(pixels)

    tower._encode = failing


@pytest.fixture
def serve() -> Iterator[Callable[[RewardEngine], Scheduler[Pair, Any]]]:
    """The engine behind guard and scheduler, as the service has it."""
    made: list[Scheduler[Pair, Any]] = []

    def serve(engine: RewardEngine) -> Scheduler[Pair, Any]:
        breakers = EvaluatorBreakers(engine, None, Watch())
        breakers.prove()
        made.append(Scheduler(breakers, batch_pairs=8, max_queued_pairs=100))
        return made[0]

    yield serve
    for scheduler in made:
        scheduler.close(WAIT_S)


def everything(engine: RewardEngine) -> tuple[tuple[str, ...], bool]:
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
def test_torchs_errors_are_told_apart(error: Exception, kind: type[Exception] | None) -> None:
    """Too little memory, a broken device, and everything else, each by type or by torch's own words."""
    fault = device_fault(error)
    assert type(fault) is (kind or type(None))
    assert fault is None or "\n" not in str(fault)
    assert "kernel errors" not in str(fault)


def test_a_real_allocation_that_fails_is_out_of_memory(engine: RewardEngine, pairs: list[Pair]) -> None:
    """torch's own error of this machine, not an imitation."""
    breaking(engine, "pickscore", lambda _: torch.empty(2**60) and None)  # type: ignore[func-returns-value]
    with pytest.raises(OutOfMemoryError) as caught:
        engine.score(pairs)
    # With the context its traceback would stay, and with that the failed pass's tensors.
    assert caught.value.__context__ is None


def test_a_failure_names_its_evaluator(engine: RewardEngine, pairs: list[Pair]) -> None:
    """Whatever else fails while an evaluator scores is that evaluator's, with torch's words."""
    breaking(engine, "hpsv2", lambda _: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(ScoringError, match=r"hpsv2.*shapes cannot be multiplied") as caught:
        engine.score(pairs)
    assert caught.value.evaluator == "hpsv2"
    assert engine.score(pairs, ["clip"])[0].raw


def test_memory_for_few_pairs_is_enough_for_many(
    engine: RewardEngine, pairs: list[Pair], serve: Callable[[RewardEngine], Scheduler[Pair, Any]]
) -> None:
    """A device that holds three images at a time scores a batch of seven, as it would with more."""
    expected = [pair.raw for pair in engine.score(pairs)]
    full = torch.OutOfMemoryError("CUDA out of memory")
    breaking(engine, "pickscore", lambda pixels: full if len(pixels) > 3 else None)
    scheduler = serve(engine)
    results = scheduler.submit(pairs, everything(engine)).result(WAIT_S).results
    for result, raw in zip(results, expected, strict=True):
        assert result.raw == pytest.approx(raw, abs=1e-4)
        assert not result.failed


def test_one_pair_without_a_number_fails_alone(
    engine: RewardEngine, pairs: list[Pair], serve: Callable[[RewardEngine], Scheduler[Pair, Any]]
) -> None:
    """A NaN is found in the batch; who shared it gets scores, and the evaluator stays in service."""
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
    lane = everything(engine)
    futures: list[Future[Completed[Any]]] = [
        scheduler.submit(part, lane) for part in (pairs[:3], pairs[3:6], pairs[6:])
    ]
    with pytest.raises(PairFailedError) as caught:
        futures[1].result(WAIT_S)
    assert caught.value.index == 1
    assert "clip gave a score that is not a finite number" in str(caught.value.__cause__)
    assert [len(futures[place].result(WAIT_S).results) for place in (0, 2)] == [3, 1]
    assert not scheduler.submit(pairs[:1], lane).result(WAIT_S).results[0].failed


def test_a_broken_evaluator_does_not_cost_the_others(
    engine: RewardEngine, pairs: list[Pair], serve: Callable[[RewardEngine], Scheduler[Pair, Any]]
) -> None:
    """The tower that fails takes its evaluators out of service; the rest are as exact as ever."""
    expected = engine.score(pairs, ["aesthetic", "clip", "pickscore"])
    scheduler = serve(engine)
    breaking(engine, "hpsv2", lambda _: RuntimeError("broken"))
    results = scheduler.submit(pairs, everything(engine)).result(WAIT_S).results
    for result, other in zip(results, expected, strict=True):
        assert result.raw == pytest.approx(other.raw, abs=1e-4)
        assert set(result.failed) == {"hpsv2"}


def test_a_broken_device_ends_everything(
    engine: RewardEngine, pairs: list[Pair], serve: Callable[[RewardEngine], Scheduler[Pair, Any]]
) -> None:
    """Nothing is tried again on it, and nothing more is taken."""
    scheduler = serve(engine)
    tried: list[int] = []
    breaking(engine, "clip", lambda pixels: tried.append(1) or torch.AcceleratorError("device-side assert"))  # type: ignore[func-returns-value]
    with pytest.raises(StuckError):
        scheduler.submit(pairs, everything(engine)).result(WAIT_S)
    assert len(tried) == 1
    with pytest.raises(StuckError):
        scheduler.submit(pairs, everything(engine))


def test_each_tower_is_timed_once_a_batch(engine: RewardEngine, pairs: list[Pair]) -> None:
    """Images and prompts of a tower together, under its configured name."""
    told: list[tuple[str, float]] = []
    engine.on_forward = lambda tower, seconds: told.append((tower, seconds))
    engine.score(pairs, ["aesthetic", "clip", "hpsv2"])
    assert sorted(name for name, _ in told) == ["clip", "hps"]
    assert all(0 < seconds < WAIT_S for _, seconds in told)
