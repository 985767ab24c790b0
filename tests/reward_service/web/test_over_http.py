"""Tests of the application over a socket, on the service's own server; Ray's has to pass them too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from tests.support.service import over_http
from tests.support.service.serving import running_server


@pytest.fixture(scope="module")
def app(config: ServiceConfig, engine: RewardEngine) -> Iterator[str]:
    with running_server(config, engine) as (_, port):
        yield f"http://127.0.0.1:{port}"


globals().update(over_http.tests())
