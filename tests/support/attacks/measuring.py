"""Measurement of one attack: another client's waits, the service's memory, and its state afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from tests.support.attacks.observer import Waits
from tests.support.attacks.program import Program

LIGHT_S, LIVE_S, MEMORY = 1.5, 0.25, 1.1
#: Seconds from SIGTERM to the end: the service's drain time, and a little.
ENDED_S = 25.0
_PACKAGE = "tests.support.attacks"
# The sender ends by itself; a little more than its threads and its last line take.
_SENDER_S, _OBSERVERS_S = 120.0, 200.0
_QUIET_S, _SETTLE_S, _AFTER_S, _END_S = 60.0, 20.0, 2.0, 180.0


class Sent(msgspec.Struct):
    """Answers that an attack got, by status or by how a request ended, and its sender's CPU seconds."""

    answers: dict[str, int]
    cpu_s: float


@dataclass(frozen=True)
class Result:
    """Effects of an attack on the service and on another client.

    Attributes:
        name: name of the attack
        seconds: its duration
        sent: its answers
        light: waits of the client that scores
        live: waits of the probe
        before_mb: resident memory before it
        peak_mb: highest resident memory seen during it
        after_mb: resident memory afterwards, when it had time to settle
        busy_s: time that the service went on working after it
        ready: whether the service is ready afterwards
    """

    name: str
    seconds: float
    sent: Sent
    light: Waits
    live: Waits
    before_mb: float
    peak_mb: float
    after_mb: float
    busy_s: float
    ready: bool

    def missed(self) -> list[str]:
        """Return the bounds that are missed."""
        bounds = {
            "light": self.light.longest_s < LIGHT_S,
            "live": self.live.longest_s < LIVE_S,
            "memory": self.after_mb <= MEMORY * self.before_mb,
        }
        return [name for name, kept in bounds.items() if not kept] + self.faults()

    def faults(self) -> list[str]:
        """Return what went wrong whatever the speed of the machine."""
        wrong = {
            "a light request failed": self.light.failed,
            "a live request failed": self.live.failed,
            "not ready": not self.ready,
            "answered with 500": self.sent.answers.get("500"),
        }
        return [name for name, is_so in wrong.items() if is_so]


def measure(program: Program, name: str, seconds: float) -> Result:
    """Run an attack on a service and measure it.

    Args:
        program: the service
        name: name of the attack, or "nothing"
        seconds: its duration
    """
    program.wait_until_quiet(_QUIET_S)
    before_mb = program.memory_mb()
    with observed(program.url) as (light, live), _peak_memory(program) as peak:
        sent = _attack(program.url, name, seconds)
        ended_s = time.monotonic()
        time.sleep(_AFTER_S)
        light_waits, live_waits = light.stop(), live.stop()
    program.wait_until_quiet(_QUIET_S)
    busy_s = max(0.0, time.monotonic() - ended_s - _AFTER_S - 0.5)
    after_mb = _settled_mb(program, before_mb)
    return Result(
        name=name,
        seconds=seconds,
        sent=sent,
        light=light_waits,
        live=live_waits,
        before_mb=before_mb,
        peak_mb=max(peak),
        after_mb=after_mb,
        busy_s=busy_s,
        ready=program.ready,
    )


def end_during(program: Program, name: str) -> float:
    """Send SIGTERM two seconds into an attack; return the seconds until the program has ended."""
    sender = _sender(program.url, name, _END_S)
    try:
        time.sleep(_AFTER_S)
        begun_s = time.monotonic()
        program.process.terminate()
        program.process.wait(_END_S)
        return time.monotonic() - begun_s
    finally:
        sender.kill()
        sender.communicate()


def _settled_mb(program: Program, before_mb: float) -> float:
    """Return the memory as soon as it is back within its bound, or after a while."""
    end_s = time.monotonic() + _SETTLE_S
    while (now_mb := program.memory_mb()) > MEMORY * before_mb and time.monotonic() < end_s:
        time.sleep(0.5)
    return now_mb


def _attack(url: str, name: str, seconds: float) -> Sent:
    if name == "nothing":
        time.sleep(seconds)
        return Sent({}, 0.0)
    sender = _sender(url, name, seconds)
    try:
        output, _ = sender.communicate(timeout=seconds + _SENDER_S)
    finally:
        sender.kill()
    return msgspec.json.decode(output, type=Sent)


def _sender(url: str, name: str, seconds: float) -> subprocess.Popen[str]:
    """Return the sender of an attack that has just begun."""
    sender = _start("sender", url, name, str(seconds))
    assert sender.stdin is not None
    assert sender.stdout is not None
    if not sender.stdout.readline():
        raise RuntimeError(f"the sender of {name} ended before it was ready")
    sender.stdin.write("\n")
    sender.stdin.flush()
    return sender


class Observation:
    """Client beside an attack, in a process of its own; `stop` returns its waits."""

    def __init__(self, url: str, kind: str) -> None:
        self.process = _start("observer", url, kind)

    def stop(self) -> Waits:
        """End it after the request in progress."""
        output, _ = self.process.communicate("\n", timeout=_OBSERVERS_S)
        return msgspec.json.decode(output, type=Waits)


@contextmanager
def observed(url: str) -> Iterator[tuple[Observation, Observation]]:
    """Run the client that scores and the probe beside the block; yields them when their imports are over."""
    light, live = (Observation(url, kind) for kind in ("light", "live"))
    try:
        for each in (light, live):
            assert each.process.stdout is not None
            each.process.stdout.readline()
        yield light, live
    finally:
        for each in (light, live):
            each.process.kill()
            each.process.communicate()


def _start(module: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"{_PACKAGE}.{module}", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def _peak_memory(program: Program) -> Iterator[list[float]]:
    """Measure the memory five times a second during the block; yields the list that the numbers go to."""
    seen, ended = [program.memory_mb()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            seen.append(program.memory_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
