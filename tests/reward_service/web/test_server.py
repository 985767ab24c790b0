"""The server on real sockets: callers who are slow, stall, lie, leave or are too many, and an orderly end."""

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
from tests.support.faults.calling import closed
from tests.support.service.checkpoints import Checkpoints
from tests.support.service.serving import png, serving, wait_until

LIMITS = Limits(max_body_bytes=100_000, header_timeout_s=0.4, body_timeout_s=0.8, max_connections=40)
Running = tuple[Server, int]


@pytest.fixture(scope="module")
def running(config: ServiceConfig, engine: RewardEngine) -> Iterator[Running]:
    with serving(config.model_copy(update={"limits": LIMITS}), engine) as served:
        yield served


@pytest.fixture(scope="module")
def body(images: list[Pixels]) -> bytes:
    image = {"data": base64.b64encode(png(images[0])).decode()}
    return json.dumps({"items": [{"prompt": "a red square", "image": image}]}).encode()


def head(length: int | str, path: str = "/score", more: str = "") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return f"{lines}Content-Length: {length}\r\n\r\n".encode()


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running[1]), timeout=10)


def answered(caller: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and problem of an answer; waits for it."""
    received = b""
    while (found := received.partition(b"\r\n\r\n"))[1] == b"" or not found[2].endswith(b"}"):
        piece = caller.recv(65536)
        assert piece, received
        received += piece
    return int(received.split()[1]), json.loads(found[2])


def code_of(caller: socket.socket) -> tuple[int, str]:
    status, problem = answered(caller)
    return status, problem["code"]


def cut_off(caller: socket.socket, more: bytes) -> bool:
    try:
        caller.sendall(more)
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def still_serves(running: Running, body: bytes) -> bool:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"http://127.0.0.1:{running[1]}/score", content=body, headers=headers, timeout=10)
    return answer.status_code == 200


def admission(running: Running) -> Admission:
    return running[0].config.app.state.service.admission  # type: ignore[union-attr,no-any-return]


def nothing_left(running: Running) -> bool:
    wait_until(lambda: admission(running).idle, "an end of everything under way")
    return not any(admission(running).used.values())


def test_a_slow_body_is_given_up(running: Running, body: bytes) -> None:
    """Bytes that drip in, and a body that stalls, are answered 408 in time, and what they held is free."""
    with closing(connect(running)) as slow, closing(connect(running)) as stalled:
        for caller in (slow, stalled):
            caller.sendall(head(len(body)) + body[:10])
        for _ in range(4):
            time.sleep(0.1)
            slow.sendall(b" ")
        assert [code_of(caller) for caller in (slow, stalled)] == [(408, "body_timeout")] * 2
        assert nothing_left(running)
    assert still_serves(running, body)


def test_a_slow_head_is_given_up(running: Running, body: bytes) -> None:
    """A connection that says nothing, or half a head, is closed; also one that was fine before."""
    with closing(connect(running)) as silent, closing(connect(running)) as half:
        half.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answered(half)[0] == 200
        half.sendall(b"POST /score HTT")
        assert closed(silent)
        assert closed(half)
    assert still_serves(running, body)


def test_an_idle_connection_may_ask_again(running: Running) -> None:
    """The limit for a head's time does not touch a connection between two requests."""
    with closing(connect(running)) as caller:
        for pause_s in (0.0, 3 * LIMITS.header_timeout_s, 0.0):
            time.sleep(pause_s)
            caller.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answered(caller)[0] == 200


def test_a_body_that_breaks_off_leaves_nothing(running: Running, body: bytes) -> None:
    """Half a body and a closed connection, by a Content-Length that lied or a caller that died."""
    for rest in (b"", body[:10], body[:-1]):
        with closing(connect(running)) as caller:
            caller.sendall(head(len(body)) + rest)
    assert nothing_left(running)
    assert still_serves(running, body)


def test_a_body_longer_than_announced_is_no_request(running: Running, body: bytes) -> None:
    """What follows the announced bytes is read as another request, which it isn't."""
    with closing(connect(running)) as caller:
        caller.sendall(head(10) + body)
        assert code_of(caller) == (400, "malformed_body")
        assert closed(caller)
    assert still_serves(running, body)


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 30, "1, 2"])
def test_a_nonsensical_length_is_refused(running: Running, length: str) -> None:
    """Never read as some other number."""
    with closing(connect(running)) as caller:
        caller.sendall(head(length))
        assert answered(caller)[0] in (400, 413)


def test_a_long_body_is_refused_before_it_is_sent(running: Running, body: bytes) -> None:
    """By its announced length at once, without one once it is too long; an endless one is cut off."""
    with closing(connect(running)) as announced:
        announced.sendall(head(LIMITS.max_body_bytes + 1, more="Expect: 100-continue\r\n"))
        assert code_of(announced) == (413, "body_too_large")
    with closing(connect(running)) as endless:
        start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        endless.sendall(start)
        chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        wait_until(lambda: cut_off(endless, chunk), "an end of the connection")
    assert nothing_left(running)
    assert still_serves(running, body)


def test_a_body_in_chunks_counts_as_the_longest(config: ServiceConfig, engine: RewardEngine) -> None:
    """Also with a Content-Length beside them that says it is short."""
    limits = Limits(max_body_bytes=100_000, max_client_bytes=150_000, body_timeout_s=5.0)
    with serving(config.model_copy(update={"limits": limits}), engine) as running:
        for more in ("", "Content-Length: 1\r\n"):
            start = head(0, more=more).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            with closing(connect(running)) as first, closing(connect(running)) as second:
                first.sendall(start + b"1\r\n{\r\n")
                wait_until(
                    lambda: admission(running).used["body bytes"] == limits.max_body_bytes, "the first one"
                )
                second.sendall(start)
                assert code_of(second) == (429, "client_busy")
            assert nothing_left(running)


NOT_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "version": b"GET / HTTP/x\r\n\r\n",
    "address": b"GET /\xff HTTP/1.1\r\n\r\n",
    "long head": b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * 100_000,
    "no host": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_what_is_not_http_is_a_problem_too(running: Running, name: str) -> None:
    """Anything but a request is 400 with a problem like all others."""
    with closing(connect(running)) as caller:
        caller.sendall(NOT_HTTP[name])
        assert code_of(caller) == (400, "malformed_request")
        assert closed(caller)


def test_idle_connections_make_room(running: Running, body: bytes) -> None:
    """More callers than may be connected: the longest idle one goes, and nobody who asks is refused."""
    idle = [connect(running) for _ in range(3 * LIMITS.max_connections)]
    assert still_serves(running, body)
    assert closed(idle[0])
    for caller in idle:
        caller.close()


def test_too_many_requests_at_once_are_refused(running: Running, body: bytes) -> None:
    """When every connection has a request under way, one more is told to come back."""
    busy = [connect(running) for _ in range(LIMITS.max_connections)]
    for caller in busy:
        caller.sendall(head(len(body)) + body[:10])
    time.sleep(0.2)
    with closing(connect(running)) as late:
        late.sendall(head(len(body)) + body)
        assert code_of(late) == (503, "too_many_connections")
    # Below the application, but counted like any other answer.
    rendered = running[0]._judge.metrics.render().decode()
    assert 'reward_rejections_total{reason="too_many_connections"} 1.0' in rendered
    assert 'reward_requests_total{code="503",route="other"} 1.0' in rendered
    for caller in busy:
        caller.close()
    assert nothing_left(running)
    assert still_serves(running, body)


@pytest.fixture
def gate(
    engine: RewardEngine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[threading.Event, list[str]]]:
    """Keeps the engine from scoring until it is set, and the prompts that it was asked for."""
    opened, seen, real = threading.Event(), list[str](), engine.score

    def score(pairs: Any, *rest: Any, **options: Any) -> Any:
        seen.extend(pair.prompt for pair in pairs)
        assert opened.wait(20)
        return real(pairs, *rest, **options)

    monkeypatch.setattr(engine, "score", score)
    yield opened, seen
    opened.set()


def named(body: bytes, prompt: str) -> bytes:
    return body.replace(b"a red square", prompt.encode())


def test_work_of_callers_who_left_is_dropped(
    running: Running, body: bytes, gate: tuple[threading.Event, list[str]]
) -> None:
    """Gone while it waits: never scored. Gone while it runs, or before its body was read: nobody notices."""
    opened, seen = gate
    callers = {}
    for prompt in ("runs", "waits", "stays"):
        callers[prompt] = connect(running)
        sent = named(body, prompt)
        callers[prompt].sendall(head(len(sent)) + sent)
        wait_until(lambda: "runs" in seen, "a batch")
    admission = running[0].config.app.state.service.admission  # type: ignore[union-attr]
    queue = running[0].config.app.state.service._backend.queue  # type: ignore[union-attr]
    wait_until(lambda: queue.queued_pairs == 2, "two in the queue")
    callers["runs"].close()
    callers["waits"].close()
    wait_until(lambda: queue.queued_pairs == 1, "one left")
    opened.set()
    with closing(callers["stays"]):
        assert answered(callers["stays"])[0] == 200
    assert seen == ["runs", "stays"]
    wait_until(lambda: admission.idle, "an end of everything under way")


def test_a_deadline_is_kept(running: Running, body: bytes, gate: tuple[threading.Event, list[str]]) -> None:
    """An answer that cannot come in time is 504, retryable, and comes at the deadline, not after it."""
    opened, _ = gate
    begun = time.monotonic()
    with closing(connect(running)) as caller:
        caller.sendall(head(len(body), more="X-Deadline-Ms: 300\r\n") + body)
        status, problem = answered(caller)
    assert (status, problem["code"], problem["retryable"]) == (504, "deadline_exceeded", True)
    assert 0.25 < time.monotonic() - begun < 15
    opened.set()
    assert nothing_left(running)


def test_a_deadline_counts_while_the_body_comes(running: Running, body: bytes) -> None:
    """A deadline before the body is there is the one that is told."""
    with closing(connect(running)) as caller:
        caller.sendall(head(len(body), more="X-Deadline-Ms: 100\r\n") + body[:5])
        assert code_of(caller) == (504, "deadline_exceeded")


def test_an_orderly_end(
    config: ServiceConfig, engine: RewardEngine, body: bytes, gate: tuple[threading.Event, list[str]]
) -> None:
    """Readiness goes first, new work is refused, what was admitted is answered, then the server ends."""
    opened, seen = gate
    opened.set()
    with serving(config, engine) as running:
        opened.clear()
        server = running[0]
        admitted = connect(running)
        admitted.sendall(head(len(body)) + body)
        wait_until(lambda: "a red square" in seen, "a batch")
        server._on_signal(signal.SIGTERM, None)
        with closing(connect(running)) as late:
            late.sendall(head(len(body)) + body)
            assert code_of(late) == (503, "not_ready")
        ready = httpx.get(f"http://127.0.0.1:{running[1]}/health/ready", timeout=10)
        assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
        opened.set()
        with closing(admitted):
            assert answered(admitted)[0] == 200
        wait_until(lambda: server.should_exit, "the end")


def test_an_end_is_bounded(
    config: ServiceConfig, engine: RewardEngine, body: bytes, gate: tuple[threading.Event, list[str]]
) -> None:
    """What cannot be answered within the time for it is told so, and the server ends all the same."""
    opened, seen = gate
    opened.set()
    with serving(config.model_copy(update={"drain_s": 0.5}), engine) as running:
        opened.clear()
        caller = connect(running)
        caller.sendall(head(len(body)) + body)
        wait_until(lambda: "a red square" in seen, "a batch")
        running[0]._on_signal(signal.SIGTERM, None)
        with closing(caller):
            status, problem = answered(caller)
        assert (status, problem["code"], problem["retryable"]) == (503, "not_ready", True)


def test_keys_are_read_again_under_load(
    config: ServiceConfig, engine: RewardEngine, body: bytes, tmp_path: Path
) -> None:
    """While callers ask, a new key replaces the old one: each is right or wrong, and no answer is lost."""
    path = tmp_path / "keys.yaml"
    old, _ = new_key(path, "a")
    with serving(config.model_copy(update={"auth": Auth(keys=path)}), engine) as (server, port):
        statuses: list[int] = []

        async def ask(client: httpx.AsyncClient, key: str) -> None:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            statuses.append((await client.post("/score", content=body, headers=headers)).status_code)

        async def rotate() -> str:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                asked = [asyncio.create_task(ask(client, old)) for _ in range(20)]
                path.unlink()
                new, _ = new_key(path, "a")
                server._on_hangup(signal.SIGHUP, None)
                await asyncio.gather(*asked)
                while (
                    await client.get("/v1/evaluators", headers={"Authorization": f"Bearer {new}"})
                ).is_error:
                    await asyncio.sleep(0.02)
                await asyncio.gather(*[ask(client, new) for _ in range(5)])
                await ask(client, old)
            return new

        asyncio.run(asyncio.wait_for(rotate(), 60))
    assert set(statuses[:20]) <= {200, 401}
    assert statuses[20:] == [200] * 5 + [401]


@pytest.mark.slow
def test_two_thousand_idle_connections_are_survived(checkpoints: Checkpoints, body: bytes) -> None:
    """A process with the usual limit of 1,024 open files serves beside 2,000 idle callers, and ends well."""
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
        idle = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(2000)]
        for _ in range(3):
            headers = {"Content-Type": "application/json"}
            assert httpx.post(f"{address}/score", content=body, headers=headers, timeout=20).is_success
        process.send_signal(signal.SIGHUP)
        assert httpx.get(f"{address}/health/live", timeout=20).is_success
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        for caller in idle:
            caller.close()
    finally:
        process.kill()
        process.communicate()
