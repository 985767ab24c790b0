"""Several requests under way at once: a bounded number, made as room appears, the first error ending all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Made = TypeVar("Made")
Answer = TypeVar("Answer")


def run_threads(
    ask: Callable[[Made, threading.Event], Answer], made: Iterator[Made], width: int
) -> list[Answer]:
    """The answers in order; a single request runs in the caller's own thread.

    :param ask: called with a request, and an event that says that its answer is of no use any more
    :param made: the requests; the next is taken when fewer than ``width`` are under way
    :raises Exception: the first that was raised; what is under way is left to end by itself
    """
    stop = threading.Event()
    ahead = list(islice(made, 2))
    if len(ahead) < 2:
        return [ask(request, stop) for request in ahead]
    pool = ThreadPoolExecutor(width, thread_name_prefix="reward-client")
    answers: dict[int, Answer] = {}
    running: dict[Future[Answer], int] = {}
    try:
        for place, request in enumerate(_then(ahead, made)):
            running[pool.submit(ask, request, stop)] = place
            del request  # its body is the pool's now; the next is made beside at most ``width`` others
            if len(running) == width:
                _collect(running, answers)
        while running:
            _collect(running, answers)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return [answers[place] for place in range(len(answers))]


def _collect(running: dict[Future[Answer], int], answers: dict[int, Answer]) -> None:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in sorted(done, key=running.__getitem__):
        answers[running.pop(future)] = future.result()


def _then(ahead: list[Made], made: Iterator[Made]) -> Iterator[Made]:
    while ahead:
        yield ahead.pop(0)
    yield from made


async def run_tasks(
    ask: Callable[[Made], Awaitable[Answer]], made: Iterator[Made], width: int
) -> list[Answer]:
    """The answers in order; requests are made on another thread, so that the event loop goes on.

    :param made: the requests; the next is taken when fewer than ``width`` are under way
    :raises Exception: the first that was raised, after what was under way has been cancelled
    """
    answers: dict[int, Answer] = {}
    running: dict[asyncio.Future[Answer], int] = {}
    place = 0
    try:
        while request := await asyncio.to_thread(next, made, None):
            running[asyncio.ensure_future(ask(request))] = place
            del request
            place += 1
            if len(running) == width:
                await _collect_tasks(running, answers)
        while running:
            await _collect_tasks(running, answers)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [answers[place] for place in range(len(answers))]


async def _collect_tasks(running: dict[asyncio.Future[Answer], int], answers: dict[int, Answer]) -> None:
    done, _ = await asyncio.wait(running, return_when=FIRST_COMPLETED)
    for task in sorted(done, key=running.__getitem__):
        answers[running.pop(task)] = task.result()
