"""The application on our own server, over a socket: the tests that Ray's has to pass too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from tests.support.service import over_http
from tests.support.service.serving import serving


@pytest.fixture(scope="module")
def app(config: ServiceConfig, engine: RewardEngine) -> Iterator[str]:
    with serving(config, engine) as (_, port):
        yield f"http://127.0.0.1:{port}"


globals().update(over_http.tests())
