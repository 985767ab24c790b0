"""Faulty device beneath a real engine; its faults are torch's own errors and can be switched on."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.types import Pair, PairScores, ScoringError

HOLD_TIMEOUT_S = 240.0


class FaultyDevice:
    """Engine's device with faults that are switched on by attributes or selected by the prompt.

    The prompt `poison` raises an error, `nan` gets NaN as a score, `hang` never returns, and `fatal` makes
    the device fail permanently.

    Attributes:
        memory_pairs: largest batch that fits into memory
        broken: evaluators that fail on every batch
        seen: prompts of the batches so far
        free: batches wait until it is set
    """

    def __init__(self, engine: RewardEngine) -> None:
        self.engine = engine
        self._batch, self._check_finite = engine.score_batch, engine.check_finite
        engine.score_batch, engine.check_finite = self._run, self._insert_nan  # type: ignore[method-assign]
        self.reset()
        self.seen: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def reset(self) -> None:
        """Switch all faults off."""
        self.memory_pairs, self.broken = 10**9, set[str]()

    def _run(self, pairs: Sequence[Pair], chosen: Sequence[Any], deterministic: bool) -> list[PairScores]:
        prompts = [pair.prompt for pair in pairs]
        self.seen += prompts
        assert self.free.wait(HOLD_TIMEOUT_S)
        if "hang" in prompts:
            threading.Event().wait()
        if "fatal" in prompts:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        if len(pairs) > self.memory_pairs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if "poison" in prompts:
            raise RuntimeError("poison")
        for evaluator in chosen:
            if evaluator.name in self.broken:
                raise ScoringError(f"evaluator {evaluator.name} failed", evaluator.name)
        self._nan_rows = [row for row, prompt in enumerate(prompts) if prompt == "nan"]
        return self._batch(pairs, chosen, deterministic)

    def _insert_nan(self, raw: Mapping[str, Any]) -> None:
        for row in self._nan_rows:
            raw["clip"][row] = math.nan
        self._check_finite(raw)


def faulty_engine(config: ServiceConfig) -> RewardEngine:
    """Return the engine of a configuration on a faulty device."""
    return FaultyDevice(build_engine(config)).engine
