"""A reward service and its server for tests: in this process, on a free port, with the tests' small engine."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from fastapi import FastAPI
from PIL import Image

from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.images import Pixels
from reward_service.observability.logs import open_log
from reward_service.scoring.service import ScoringService
from reward_service.web.app import create_app
from reward_service.web.server import Server, options

READY_S = 20.0


def asking(app: FastAPI | str) -> httpx.AsyncClient:
    """A client of an application in this process, or of a server at an address."""
    if isinstance(app, str):
        return httpx.AsyncClient(base_url=app, timeout=30.0)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://judge")


def wait_until(true: Any, what: object = "it") -> None:
    """Wait for a condition to come true."""
    deadline = time.monotonic() + READY_S
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


@contextmanager
def judging(config: ServiceConfig, engine: RewardEngine, **options: Any) -> Iterator[ScoringService]:
    """A reward service that is ready."""
    service = ScoringService(config, build=lambda _: engine, **options)
    service.start()
    wait_until(lambda: service.health.status == "ready", service.health)
    try:
        yield service
    finally:
        service.close()


@contextmanager
def serving(config: ServiceConfig, engine: RewardEngine) -> Iterator[tuple[Server, int]]:
    """A server that listens and is ready, and its port."""
    service = ScoringService(config, build=lambda _: engine)
    with listening(config, service) as (server, port):
        wait_until(lambda: service.health.status == "ready", service.health)
        yield server, port


@contextmanager
def listening(config: ServiceConfig, service: ScoringService) -> Iterator[tuple[Server, int]]:
    """A server that listens, and its port."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        log = open_log(lambda _: None, "json")
        server = Server(options(create_app(config, service), config), lambda: None, service, log)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(READY_S)
            assert not thread.is_alive()


def png(pixels: Pixels) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
