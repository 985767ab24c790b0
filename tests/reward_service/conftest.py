"""Fixtures of the reward service's tests."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from reward_service.config import ServiceConfig, load_config
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.images import Pixels
from tests.support.service.checkpoints import Checkpoints, write_checkpoints
from tests.support.service.serving import png

SIZES = ((32, 32), (33, 47), (80, 35), (7, 90), (128, 64), (31, 31), (100, 39))
PROMPTS = (
    "a red square",
    "the “curly” quotes &amp; an entity",
    "ünïcode ﬁsh and 12 circles",
    "x",
    "and " * 60,
    "A   RED\n square",
    "don't <b>stop</b>",
)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def config(checkpoints: Checkpoints) -> ServiceConfig:
    return load_config(checkpoints.config)


@pytest.fixture(scope="session")
def engine(config: ServiceConfig) -> RewardEngine:
    return build_engine(config)


@pytest.fixture(scope="session")
def images() -> list[Pixels]:
    """Structured noise of odd sizes."""
    rng = np.random.default_rng(3)
    images = []
    for height, width in SIZES:
        coarse = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3))
        fine = rng.integers(-40, 40, (height, width, 3))
        blocks = coarse.repeat(5, axis=0).repeat(5, axis=1)[:height, :width]
        images.append((blocks + fine).clip(0, 255).astype(np.uint8))
    return images


@pytest.fixture
def item(images: list[Pixels]) -> dict[str, Any]:
    """A pair as in a JSON request."""
    data = base64.b64encode(png(images[1])).decode()
    return {"prompt": "a red square", "image": {"data": data, "format": "png"}}
