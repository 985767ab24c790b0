"""HTTP server on real sockets: slow, stalled, invalid and excess clients, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_service.config import Auth, Limits, ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.images import Pixels
from reward_service.scoring.admission import Admission
from reward_service.scoring.auth import new_key
from reward_service.web.server import Server
from tests.support.faults.requests import is_closed
from tests.support.service.checkpoints import Checkpoints
from tests.support.service.serving import png, running_server, wait_until

TIMEOUT_S = 120.0
LIMITS = Limits(max_body_bytes=100_000, header_timeout_s=1.5, body_timeout_s=2.5, max_connections=40)
Running = tuple[Server, int]


@pytest.fixture(scope="module")
def running(config: ServiceConfig, engine: RewardEngine) -> Iterator[Running]:
    with running_server(config.model_copy(update={"limits": LIMITS}), engine) as served:
        yield served


@pytest.fixture(scope="module")
def body(images: list[Pixels]) -> bytes:
    image = {"data": base64.b64encode(png(images[0])).decode()}
    return json.dumps({"items": [{"prompt": "a red square", "image": image}]}).encode()


def head(length: int | str, path: str = "/score", more: str = "") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return f"{lines}Content-Length: {length}\r\n\r\n".encode()


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running[1]), timeout=TIMEOUT_S)


def receive(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Receive a response; return its status and JSON body."""
    response = HTTPResponse(client)
    response.begin()
    return response.status, json.loads(response.read())


def code_of(client: socket.socket) -> tuple[int, str]:
    status, problem = receive(client)
    return status, problem["code"]


def is_cut_off(client: socket.socket, more: bytes) -> bool:
    try:
        client.sendall(more)
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def still_serves(running: Running, body: bytes) -> bool:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(
        f"http://127.0.0.1:{running[1]}/score", content=body, headers=headers, timeout=TIMEOUT_S
    )
    return response.status_code == 200


def admission_of(running: Running) -> Admission:
    return running[0].config.app.state.service.admission  # type: ignore[union-attr,no-any-return]


def everything_released(running: Running) -> bool:
    wait_until(lambda: admission_of(running).idle, "the end of all requests")
    return not any(admission_of(running).used.values())


def test_slow_body_times_out(running: Running, body: bytes) -> None:
    """A body that arrives slowly or stalls gets a 408 in time, and its resources are released."""
    with closing(connect(running)) as slow, closing(connect(running)) as stalled:
        for client in (slow, stalled):
            client.sendall(head(len(body)) + body[:10])
        for _ in range(4):
            time.sleep(0.1)
            slow.sendall(b" ")
        assert [code_of(client) for client in (slow, stalled)] == [(408, "body_timeout")] * 2
        assert everything_released(running)
    assert still_serves(running, body)


def test_slow_headers_time_out(running: Running, body: bytes) -> None:
    """A connection without a request or with partial headers is closed, also after a valid request."""
    with closing(connect(running)) as silent, closing(connect(running)) as half:
        half.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert receive(half)[0] == 200
        half.sendall(b"POST /score HTT")
        assert is_closed(silent)
        assert is_closed(half)
    assert still_serves(running, body)


def test_idle_connection_can_be_reused(running: Running) -> None:
    """The timeout of headers does not apply between two requests."""
    with closing(connect(running)) as client:
        for pause_s in (0.0, 3 * LIMITS.header_timeout_s, 0.0):
            time.sleep(pause_s)
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert receive(client)[0] == 200


def test_incomplete_body_releases_everything(running: Running, body: bytes) -> None:
    """A connection closed in the middle of a body leaves nothing admitted."""
    for rest in (b"", body[:10], body[:-1]):
        with closing(connect(running)) as client:
            client.sendall(head(len(body)) + rest)
    assert everything_released(running)
    assert still_serves(running, body)


def test_bytes_beyond_content_length_are_not_a_request(running: Running, body: bytes) -> None:
    """Bytes after the announced length are parsed as another request, which is invalid."""
    with closing(connect(running)) as client:
        client.sendall(head(10) + body)
        assert code_of(client) == (400, "malformed_body")
        assert is_closed(client)
    assert still_serves(running, body)


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 30, "1, 2"])
def test_invalid_content_length_is_rejected(running: Running, length: str) -> None:
    """It is never read as some other number."""
    with closing(connect(running)) as client:
        client.sendall(head(length))
        assert receive(client)[0] in (400, 413)


def test_long_body_is_rejected_early(running: Running, body: bytes) -> None:
    """By its announced length at once, without one once it is too long; an endless body is cut off."""
    with closing(connect(running)) as announced:
        announced.sendall(head(LIMITS.max_body_bytes + 1, more="Expect: 100-continue\r\n"))
        assert code_of(announced) == (413, "body_too_large")
    with closing(connect(running)) as endless:
        start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        endless.sendall(start)
        chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        wait_until(lambda: is_cut_off(endless, chunk), "the end of the connection")
    assert everything_released(running)
    assert still_serves(running, body)


def test_chunked_body_is_counted_as_the_longest(config: ServiceConfig, engine: RewardEngine) -> None:
    """Also if a Content-Length beside Transfer-Encoding announces a short one."""
    limits = Limits(max_body_bytes=100_000, max_client_bytes=150_000, body_timeout_s=5.0)
    with running_server(config.model_copy(update={"limits": limits}), engine) as running:
        for more in ("", "Content-Length: 1\r\n"):
            start = head(0, more=more).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            with closing(connect(running)) as first, closing(connect(running)) as second:
                first.sendall(start + b"1\r\n{\r\n")
                wait_until(
                    lambda: admission_of(running).used["body bytes"] == limits.max_body_bytes,
                    "the first request",
                )
                second.sendall(start)
                assert code_of(second) == (429, "client_busy")
            assert everything_released(running)


NOT_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "version": b"GET / HTTP/x\r\n\r\n",
    "address": b"GET /\xff HTTP/1.1\r\n\r\n",
    "line ends": b"GET / HTTP/1.1\nHost: x\n\n",
    "coding": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_invalid_http_is_a_problem(running: Running, name: str) -> None:
    """Bytes that are not HTTP get a 400 with problem details like any other error."""
    with closing(connect(running)) as client:
        client.sendall(NOT_HTTP[name])
        assert code_of(client) == (400, "malformed_request")
        assert is_closed(client)


def test_idle_connections_make_room(running: Running, body: bytes) -> None:
    """If too many clients are connected, the longest idle connection is closed and no request is refused."""
    idle = [connect(running) for _ in range(3 * LIMITS.max_connections)]
    assert still_serves(running, body)
    assert is_closed(idle[0])
    for client in idle:
        client.close()


def test_too_many_requests_are_refused(config: ServiceConfig, engine: RewardEngine, body: bytes) -> None:
    """If every connection has a request in progress, a further one gets a retryable 503."""
    patient = LIMITS.model_copy(update={"header_timeout_s": TIMEOUT_S, "body_timeout_s": TIMEOUT_S})
    with running_server(config.model_copy(update={"limits": patient}), engine) as running:
        busy = [connect(running) for _ in range(patient.max_connections)]
        for client in busy:
            client.sendall(head(len(body)) + body[:10])
        wait_until(lambda: admission_of(running).used["pairs"] == len(busy), "all requests")
        with closing(connect(running)) as late:
            late.sendall(head(len(body)) + body)
            assert code_of(late) == (503, "too_many_connections")
        # Sent below the application, but counted like any other response.
        rendered = running[0].config.app.state.service.metrics.render().decode()  # type: ignore[union-attr]
        assert 'reward_rejections_total{reason="too_many_connections"} 1.0' in rendered
        assert 'reward_requests_total{code="503",route="other"} 1.0' in rendered
        for client in busy:
            client.close()
        assert everything_released(running)
        assert still_serves(running, body)


@pytest.fixture
def gate(
    engine: RewardEngine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Event, list[str]]]:
    """Event that the engine waits for before it scores, and the prompts that it received."""
    opened, seen, real = threading.Event(), list[str](), engine.score

    def score(pairs: Any, *rest: Any, **options: Any) -> Any:
        seen.extend(pair.prompt for pair in pairs)
        assert opened.wait(TIMEOUT_S)
        return real(pairs, *rest, **options)

    monkeypatch.setattr(engine, "score", score)
    yield opened, seen
    opened.set()


def with_prompt(body: bytes, prompt: str) -> bytes:
    return body.replace(b"a red square", prompt.encode())


def test_work_of_disconnected_clients_is_dropped(
    running: Running, body: bytes, gate: tuple[threading.Event, list[str]]
) -> None:
    """A queued request is never scored; if it already runs, the other requests are not affected."""
    opened, seen = gate
    clients = {}
    for prompt in ("runs", "waits", "stays"):
        clients[prompt] = connect(running)
        sent = with_prompt(body, prompt)
        clients[prompt].sendall(head(len(sent)) + sent)
        wait_until(lambda: "runs" in seen, "the batch")
    admission = running[0].config.app.state.service.admission  # type: ignore[union-attr]
    queue = running[0].config.app.state.service._backend.queue  # type: ignore[union-attr]
    wait_until(lambda: queue.queued_pairs == 2, "two queued pairs")
    clients["runs"].close()
    clients["waits"].close()
    wait_until(lambda: queue.queued_pairs == 1, "one queued pair")
    opened.set()
    with closing(clients["stays"]):
        assert receive(clients["stays"])[0] == 200
    assert seen == ["runs", "stays"]
    wait_until(lambda: admission.idle, "the end of all requests")


def test_deadline_is_enforced(running: Running, body: bytes, gate: tuple[threading.Event, list[str]]) -> None:
    """A request that cannot be scored in time gets a retryable 504, at the deadline and not before."""
    opened, _ = gate
    begun = time.monotonic()
    with closing(connect(running)) as client:
        client.sendall(head(len(body), more="X-Deadline-Ms: 300\r\n") + body)
        status, problem = receive(client)
    assert (status, problem["code"], problem["retryable"]) == (504, "deadline_exceeded", True)
    assert 0.25 < time.monotonic() - begun < 15
    opened.set()
    assert everything_released(running)


def test_deadline_includes_receiving_the_body(running: Running, body: bytes) -> None:
    """A deadline before the body is complete gives a 504, not a 408."""
    with closing(connect(running)) as client:
        client.sendall(head(len(body), more="X-Deadline-Ms: 100\r\n") + body[:5])
        assert code_of(client) == (504, "deadline_exceeded")


def test_graceful_shutdown(
    config: ServiceConfig, engine: RewardEngine, body: bytes, gate: tuple[threading.Event, list[str]]
) -> None:
    """Readiness ends first, new requests are refused, admitted ones are finished, then the server stops."""
    opened, seen = gate
    opened.set()
    with running_server(config, engine) as running:
        opened.clear()
        server = running[0]
        admitted = connect(running)
        admitted.sendall(head(len(body)) + body)
        wait_until(lambda: "a red square" in seen, "the batch")
        server._on_signal(signal.SIGTERM, None)
        with closing(connect(running)) as late:
            late.sendall(head(len(body)) + body)
            assert code_of(late) == (503, "not_ready")
        ready = httpx.get(f"http://127.0.0.1:{running[1]}/health/ready", timeout=TIMEOUT_S)
        assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
        opened.set()
        with closing(admitted):
            assert receive(admitted)[0] == 200
        wait_until(lambda: server.should_exit, "the shutdown")


def test_shutdown_is_bounded(
    config: ServiceConfig, engine: RewardEngine, body: bytes, gate: tuple[threading.Event, list[str]]
) -> None:
    """Requests unfinished after `drain_s` get a retryable 503, and the server stops all the same."""
    opened, seen = gate
    opened.set()
    with running_server(config.model_copy(update={"drain_s": 0.5}), engine) as running:
        opened.clear()
        client = connect(running)
        client.sendall(head(len(body)) + body)
        wait_until(lambda: "a red square" in seen, "the batch")
        running[0]._on_signal(signal.SIGTERM, None)
        with closing(client):
            status, problem = receive(client)
        assert (status, problem["code"], problem["retryable"]) == (503, "not_ready", True)


def test_keys_are_reloaded_under_load(
    config: ServiceConfig, engine: RewardEngine, body: bytes, tmp_path: Path
) -> None:
    """While clients send requests, a new key replaces the old one: each is 200 or 401, and none is lost."""
    path = tmp_path / "keys.yaml"
    old, _ = new_key(path, "a")
    with running_server(config.model_copy(update={"auth": Auth(keys=path)}), engine) as (server, port):
        statuses: list[int] = []

        async def send(client: httpx.AsyncClient, key: str) -> None:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            statuses.append((await client.post("/score", content=body, headers=headers)).status_code)

        async def rotate() -> str:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
                requests = [asyncio.create_task(send(client, old)) for _ in range(20)]
                path.unlink()
                new, _ = new_key(path, "a")
                server._on_hangup(signal.SIGHUP, None)
                await asyncio.gather(*requests)
                while (
                    await client.get("/v1/evaluators", headers={"Authorization": f"Bearer {new}"})
                ).is_error:
                    await asyncio.sleep(0.02)
                await asyncio.gather(*[send(client, new) for _ in range(5)])
                await send(client, old)
            return new

        asyncio.run(asyncio.wait_for(rotate(), 2 * TIMEOUT_S))
    assert set(statuses[:20]) <= {200, 401}
    assert statuses[20:] == [200] * 5 + [401]


@pytest.mark.slow
def test_two_thousand_idle_connections(checkpoints: Checkpoints, body: bytes) -> None:
    """With a soft limit of 1,024 open files, requests are served beside 2,000 idle clients."""
    command = [sys.executable, "-m", "reward_service", "serve", "--config", str(checkpoints.config)]
    command += ["--port", "0", "--set", "watch.canary_every_s=3600"]
    limited = f"ulimit -S -n 1024; exec {' '.join(command)}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(["sh", "-c", limited], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        address = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200, "readiness")
        idle = [socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) for _ in range(2000)]
        for _ in range(3):
            headers = {"Content-Type": "application/json"}
            assert httpx.post(f"{address}/score", content=body, headers=headers, timeout=TIMEOUT_S).is_success
        process.send_signal(signal.SIGHUP)
        assert httpx.get(f"{address}/health/live", timeout=TIMEOUT_S).is_success
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        for client in idle:
            client.close()
    finally:
        process.kill()
        process.communicate()
