"""The application on Ray Serve with a device that a prompt can break, for a deployment to name."""

from __future__ import annotations

from typing import Any

from ray import serve

from reward_service import ray_app
from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.engine.types import FatalDeviceError
from reward_service.scoring import service as service

FATAL = "break the device"


class Breakable(ray_app.Replica):
    """A replica whose device fails for good at one prompt."""

    def __init__(self, config: str, overrides: list[str]) -> None:
        service._build_engine = _breakable
        super().__init__(config, overrides)


def app(arguments: dict[str, Any]) -> serve.Application:
    """The real application, of such replicas."""
    return ray_app.application(arguments, Breakable)


def _breakable(config: ServiceConfig) -> RewardEngine:
    from reward_service.engine.loading import build_engine

    engine = build_engine(config)
    real = engine.score

    def score(pairs: Any, *rest: Any, **options: Any) -> Any:
        if any(pair.prompt == FATAL for pair in pairs):
            raise FatalDeviceError("CUDA error: made by a test")
        return real(pairs, *rest, **options)

    engine.score = score  # type: ignore[method-assign]
    return engine
