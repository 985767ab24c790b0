"""A service of the miniature's models in this process, on a device that can be broken, and its bystanders."""

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
from tests.support.faults.bystander import Bystander, Truth, known_pairs, undisturbed
from tests.support.faults.device import FaultyDevice
from tests.support.service.serving import serving, wait_until

Undisturbed = Callable[..., AbstractContextManager[Bystander]]
LIMITS = Limits(max_body_bytes=2**21, header_timeout_s=1.5, body_timeout_s=0.8)
WATCH = Watch(breaker_pause_s=0.2, breaker_longest_pause_s=0.4, canary_every_s=3600.0)


@dataclass(frozen=True)
class Service:
    """A running service: where it listens, its device and its service."""

    url: str
    device: FaultyDevice
    service: ScoringService

    def nothing_left(self) -> bool:
        """Whether nobody's work, pairs or bytes are held any more; waits for it."""
        wait_until(lambda: not any(self.service.admission.used.values()), "an end of everything under way")
        return True

    def forget_memory(self) -> None:
        """Try batches of the full size again: a test before may have made it learn a smaller one."""
        assert self.service._backend is not None
        self.service._backend.queue._sizes = BatchSize(self.service.config.batch_pairs)

    @property
    def queued(self) -> int:
        """Pairs that wait for the device."""
        assert self.service._backend is not None
        return self.service._backend.queue.queued_pairs


@pytest.fixture(scope="session")
def config() -> ServiceConfig:
    changes = {"limits": LIMITS, "watch": WATCH}
    return load_config(overrides=["threads=1", "batch_pairs=16"]).model_copy(update=changes)


@pytest.fixture(scope="session")
def truth(config: ServiceConfig) -> Truth:
    """By an engine of its own."""
    return Truth.of(build_engine(config), known_pairs())


@pytest.fixture(scope="module")
def running(config: ServiceConfig) -> Iterator[Service]:
    device = FaultyDevice(build_engine(config))
    with serving(config, device.engine) as (server, port):
        service = server.config.app.state.service  # type: ignore[union-attr]
        yield Service(f"http://127.0.0.1:{port}", device, service)


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """The same one for all tests of a module: each leaves it as it was."""
    running.device.seen.clear()
    yield running
    running.device.mend()
    running.device.free.set()
    running.forget_memory()
    assert running.nothing_left()
    assert running.service.health.status == "ready"


@pytest.fixture
def others(service: Service, truth: Truth) -> Undisturbed:
    """A context in which another caller's answers are right before, during and after."""
    return partial(undisturbed, service.url, truth)


@pytest.fixture
def bystander(others: Undisturbed) -> Iterator[Any]:
    """Another caller all through the test."""
    with others() as one:
        yield one
