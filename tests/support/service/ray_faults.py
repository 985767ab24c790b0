"""Ray Serve application with a device that a prompt can break or hold, deployed by its import path."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import serve

from reward_service import ray_app
from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.engine.types import FatalDeviceError
from reward_service.scoring import service as service

FATAL = "break the device"
#: Followed by a folder: the device creates `started` in it and waits for `released`.
HOLD = "hold the device: "


class BreakableReplica(ray_app.Replica):
    """Replica whose device fails permanently at one prompt and waits at another."""

    def __init__(self, config: str, overrides: list[str]) -> None:
        service.build_default_engine = _build_breakable_engine
        super().__init__(config, overrides)


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the real application with breakable replicas."""
    return ray_app.build_application(arguments, BreakableReplica)


def _build_breakable_engine(config: ServiceConfig) -> RewardEngine:
    from reward_service.engine.loading import build_engine

    engine = build_engine(config)
    real_score = engine.score

    def score(pairs: Any, *rest: Any, **options: Any) -> Any:
        if any(pair.prompt == FATAL for pair in pairs):
            raise FatalDeviceError("CUDA error: raised by a test")
        for pair in pairs:
            if pair.prompt.startswith(HOLD):
                _hold(Path(pair.prompt.removeprefix(HOLD)))
        return real_score(pairs, *rest, **options)

    engine.score = score  # type: ignore[method-assign]
    return engine


def _hold(folder: Path) -> None:
    (folder / "started").touch()
    while not (folder / "released").exists():
        time.sleep(0.05)
