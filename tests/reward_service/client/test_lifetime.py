"""Lifetime of the client: event loops, processes, kept connections that the server closes, copies."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx
import msgspec
import pytest

from reward_service.client import (
    AsyncRewardClient,
    RewardClient,
    RewardClientError,
    ServiceError,
    UnreachableError,
)
from reward_service.protocol import MSGPACK, decode_request
from tests.support.service.fake_service import PIXELS, URL, make_client, problem_response, score_response

PAIR = (["x"], [PIXELS])
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/msgpack\r\nContent-Length: "
WAIT_S = 60
End = Callable[[socket.socket], None]


def close(connection: socket.socket) -> None:
    """Close in order."""


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def close_within_the_body(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"999\r\n\r\nabc")


class Server:
    """Service that scores some requests of each connection and ends it at the next one, without a response.

    Args:
        scored: number of requests that are scored on each connection
        end: ends the connection
    """

    def __init__(self, scored: int, end: End = close) -> None:
        self._scored, self._end = scored, end
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests = 0
        self.closed = threading.Semaphore(0)  # released when a client has closed a connection
        self._pool = ThreadPoolExecutor(32)
        self._connections: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._pool.submit(self._accept)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        self._pool.shutdown()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._pool.submit(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            for _ in range(self._scored):
                body = read_body(file)
                if body is None:
                    self.closed.release()
                    return
                self.requests += 1
                scores = msgspec.msgpack.encode(score_response(decode_request(body, MSGPACK)))
                connection.sendall(HEAD + b"%d\r\n\r\n" % len(scores) + scores)
            if read_body(file) is None:
                self.closed.release()
                return
            self.requests += 1
            self._end(connection)


def read_body(file: BinaryIO) -> bytes | None:
    """Return the body of the next request; None at the end of the connection."""
    size = 0
    while (line := file.readline()).strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            size = int(value)
    return file.read(size) if line else None


# ------------------------------------------------------------------------------------------ kept connections


@pytest.mark.parametrize("end", [close, reset])
def test_request_on_a_connection_that_the_server_had_closed_is_sent_again(end: End) -> None:
    """Without any retry budget: such a failure says nothing about the service, and scoring is idempotent."""
    with Server(1, end) as server, RewardClient(server.url, retry_budget_s=0) as client:
        for _ in range(3):
            assert len(client.score(*PAIR).results) == 1
        assert server.requests == 5  # the second and the third were sent twice


def test_asynchronous_requests_on_closed_connections_are_sent_again() -> None:
    """Also if all kept connections were closed at once."""

    async def run(url: str) -> None:
        async with AsyncRewardClient(url, retry_budget_s=0, chunk_pairs=1) as client:
            for _ in range(3):
                assert len((await client.score(["x"] * 8, [PIXELS] * 8)).results) == 8

    with Server(1) as server:
        asyncio.run(run(server.url))


def test_failures_of_new_connections_are_not_repeated() -> None:
    """Only the retry budget decides about these: the service may be failing."""
    with (
        Server(0) as server,
        RewardClient(server.url, retry_budget_s=0) as client,
        pytest.raises(UnreachableError),
    ):
        client.score(*PAIR)
    assert server.requests == 1


def test_a_response_that_has_begun_is_not_repeated() -> None:
    """The server had received the request and was responding: that connection was not closed before it."""
    with Server(1, close_within_the_body) as server, RewardClient(server.url, retry_budget_s=0) as client:
        client.score(*PAIR)
        with pytest.raises(UnreachableError):
            client.score(*PAIR)
        assert server.requests == 2


# ----------------------------------------------------------------------------------------------- event loops


def test_connections_of_each_event_loop_end_with_it() -> None:
    """A client that is used from three event loops leaves no socket, and can still be used and closed."""
    with Server(9) as server:
        client = AsyncRewardClient(server.url)
        for _ in range(3):
            assert len(asyncio.run(client.score(*PAIR)).results) == 1
            assert server.closed.acquire(timeout=WAIT_S)
        asyncio.run(client.close())


def test_close_ends_the_connections_of_other_event_loops() -> None:
    """Of one that runs in another thread, and of one that is stopped."""
    scored, done = threading.Event(), threading.Event()

    async def score_and_wait(client: AsyncRewardClient) -> None:
        await client.score(*PAIR)
        scored.set()
        await asyncio.to_thread(done.wait)

    with Server(9) as server, ThreadPoolExecutor(1) as pool:
        client = AsyncRewardClient(server.url)
        stopped = asyncio.new_event_loop()
        try:
            stopped.run_until_complete(client.score(*PAIR))
            running = pool.submit(lambda: asyncio.run(score_and_wait(client)))
            assert scored.wait(WAIT_S)
            asyncio.run(client.close())
            for _ in range(2):
                assert server.closed.acquire(timeout=WAIT_S)
            done.set()
            running.result()
        finally:
            done.set()
            stopped.close()


# ----------------------------------------------------------------------------------------- processes, copies


# Python 3.12 warns of a fork beside threads, which is the case under test.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_does_not_inherit_a_held_lock() -> None:
    """A worker that is forked while another thread compares identities can score."""
    with Server(9) as server, RewardClient(server.url, pin="first") as client:
        client.score(*PAIR)
        assert client._pin is not None
        with client._pin._locks.get():
            if (child := os.fork()) == 0:
                os._exit(0 if len(client.score(*PAIR).results) == 1 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(client.score(*PAIR).results) == 1


@pytest.mark.parametrize("kind", [RewardClient, AsyncRewardClient])
@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_clients_cannot_be_pickled_or_copied(kind: Any, duplicate: Callable[[Any], Any]) -> None:
    """The message says what to do instead, rather than naming a lock; the key is in no pickle."""
    with pytest.raises(TypeError, match=rf"a {kind.__name__} cannot be .*create another one") as caught:
        duplicate(kind(URL, api_key="hunter2"))
    assert "hunter2" not in str(caught.value)


def from_worker(error: RewardClientError) -> RewardClientError:
    """Return an error as a parent process gets it from a worker."""
    found: RewardClientError = pickle.loads(pickle.dumps(error))  # noqa: S301 - its own pickle
    return found


@pytest.mark.parametrize("status", [422, 503])
def test_errors_survive_the_way_from_a_worker_process(status: int) -> None:
    """A pool of processes hands them over as pickles: the same type, message and problem."""
    service = make_client(lambda _: problem_response(status, retryable=status == 503), retry_budget_s=0)
    with pytest.raises(ServiceError) as caught:
        service.score(*PAIR)
    copied = from_worker(caught.value)
    assert type(copied) is type(caught.value)
    assert str(copied) == str(caught.value)
    assert isinstance(copied, ServiceError)
    assert copied.problem == caught.value.problem


def test_errors_without_a_problem_survive_too() -> None:
    """Their message names the address."""
    with pytest.raises(ServiceError, match=r"status 404 from http://service\.invalid without") as caught:
        make_client(lambda _: httpx.Response(404)).score(*PAIR)
    assert str(from_worker(caught.value)) == str(caught.value)


def test_the_client_needs_no_module_of_unix() -> None:
    """It can be imported where the standard library has neither fcntl nor resource, as on Windows."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'pwd', 'grp', 'termios']));"
        "import reward_service.client, reward_service.adapters; reward_service.client.RewardClient('http://x')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
