"""A device whose faults can be switched on, beneath a real engine: torch's errors, as torch raises them."""

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

HELD_S = 30.0


class FaultyDevice:
    """Scores as the engine does, except for what is switched on and for the prompts below.

    `poison` raises, `nan` gives no number, `hang` never returns, `fatal` breaks the device.
    `memory_pairs`: more at a time do not fit. `broken`: evaluators that fail whatever they are given.
    """

    def __init__(self, engine: RewardEngine) -> None:
        self.engine = engine
        self._batch, self._check_finite = engine.score_batch, engine.check_finite
        engine.score_batch, engine.check_finite = self._run, self._spoil  # type: ignore[method-assign]
        self.mend()
        self.seen: list[str] = []
        self.free = threading.Event()
        self.free.set()

    def mend(self) -> None:
        """Switch everything off."""
        self.memory_pairs, self.broken = 10**9, set[str]()

    def _run(self, pairs: Sequence[Pair], chosen: Sequence[Any], deterministic: bool) -> list[PairScores]:
        prompts = [pair.prompt for pair in pairs]
        self.seen += prompts
        assert self.free.wait(HELD_S)
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
        self._without = [row for row, prompt in enumerate(prompts) if prompt == "nan"]
        return self._batch(pairs, chosen, deterministic)

    def _spoil(self, raw: Mapping[str, Any]) -> None:
        for row in self._without:
            raw["clip"][row] = math.nan
        self._check_finite(raw)


def faulty_engine(config: ServiceConfig) -> RewardEngine:
    """The engine of a configuration on such a device."""
    return FaultyDevice(build_engine(config)).engine
