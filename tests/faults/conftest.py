"""Fixtures: a service with the miniature's models on a faulty device, and a client that must not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from reward_service.config import Limits, ServiceConfig, Watch, load_config
from reward_service.engine.loading import build_engine
from reward_service.scheduler.batching import BatchSize
from reward_service.scoring.service import ScoringService
from tests.support.faults.bystander import Bystander, ExpectedScores, known_pairs, undisturbed
from tests.support.faults.device import FaultyDevice
from tests.support.service.serving import running_server, wait_until

Undisturbed = Callable[..., AbstractContextManager[Bystander]]
LIMITS = Limits(max_body_bytes=2**21, header_timeout_s=3.0, body_timeout_s=2.0)
WATCH = Watch(breaker_pause_s=0.2, breaker_longest_pause_s=0.4, canary_every_s=3600.0)


@dataclass(frozen=True)
class RunningService:
    """Server of a scoring service on a faulty device."""

    url: str
    device: FaultyDevice
    service: ScoringService

    def all_released(self) -> bool:
        """Wait until no request holds pairs or bytes any more; return True."""
        wait_until(lambda: not any(self.service.admission.used.values()), "the end of all requests")
        return True

    def reset_batch_size(self) -> None:
        """Use batches of the full size again: an earlier test may have reduced the size."""
        assert self.service._backend is not None
        self.service._backend.queue._sizes = BatchSize(self.service.config.batch_pairs)

    @property
    def queued_pairs(self) -> int:
        """Number of pairs in the queue."""
        assert self.service._backend is not None
        return self.service._backend.queue.queued_pairs


@pytest.fixture(scope="session")
def config() -> ServiceConfig:
    changes = {"limits": LIMITS, "watch": WATCH}
    return load_config(overrides=["threads=1", "batch_pairs=16"]).model_copy(update=changes)


@pytest.fixture(scope="session")
def expected_scores(config: ServiceConfig) -> ExpectedScores:
    """Scores of the known pairs, by another engine."""
    return ExpectedScores.of(build_engine(config), known_pairs())


@pytest.fixture(scope="module")
def running(config: ServiceConfig) -> Iterator[RunningService]:
    device = FaultyDevice(build_engine(config))
    with running_server(config, device.engine) as (server, port):
        service = server.config.app.state.service  # type: ignore[union-attr]
        yield RunningService(f"http://127.0.0.1:{port}", device, service)


@pytest.fixture
def service(running: RunningService) -> Iterator[RunningService]:
    """The service of a module's tests, which each test leaves as it was."""
    running.device.seen.clear()
    yield running
    running.device.reset()
    running.device.free.set()
    running.reset_batch_size()
    assert running.all_released()
    assert running.service.health.status == "ready"


@pytest.fixture
def others(service: RunningService, expected_scores: ExpectedScores) -> Undisturbed:
    """Context manager that checks another client's scores before, during and after its block."""
    return partial(undisturbed, service.url, expected_scores)


@pytest.fixture
def bystander(others: Undisturbed) -> Iterator[Any]:
    """Another client, whose scores are checked during the whole test."""
    with others() as one:
        yield one
