"""Scoring service and HTTP server for tests, in this process, with the tests' small engine."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
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
from reward_service.web.server import Server, uvicorn_config

TIMEOUT_S = 120.0


def http_client(app: FastAPI | str) -> httpx.AsyncClient:
    """Return a client of an application in this process, or of a server by its address."""
    if isinstance(app, str):
        return httpx.AsyncClient(base_url=app, timeout=TIMEOUT_S)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://service")


def wait_until(condition: Callable[[], object], what: object = "the condition") -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


@contextmanager
def ready_service(config: ServiceConfig, engine: RewardEngine, **options: Any) -> Iterator[ScoringService]:
    """Start a scoring service, wait until it is ready, and close it at the end."""
    service = ScoringService(config, build=lambda _: engine, **options)
    service.start()
    wait_until(lambda: service.health.status == "ready", service.health)
    try:
        yield service
    finally:
        service.close()


@contextmanager
def running_server(config: ServiceConfig, engine: RewardEngine) -> Iterator[tuple[Server, int]]:
    """Run a server with a ready service; yields the server and its port."""
    service = ScoringService(config, build=lambda _: engine)
    with listening_server(config, service) as (server, port):
        wait_until(lambda: service.health.status == "ready", service.health)
        yield server, port


@contextmanager
def listening_server(
    config: ServiceConfig, service: ScoringService, wrap: Callable[[FastAPI], Any] = lambda app: app
) -> Iterator[tuple[Server, int]]:
    """Run a server, whatever the state of its service; yields the server and its port.

    Args:
        config: of the service
        service: the service
        wrap: returns the ASGI application to serve, from the service's
    """
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        log = open_log(lambda _: None, "json")
        app = create_app(config, service)
        options = uvicorn_config(app, config)
        options.app = wrap(app)
        server = Server(options, lambda: None, service, log)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def png(pixels: Pixels) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
