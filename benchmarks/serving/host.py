"""Service in its own process that reports its work on request: `python -m benchmarks.serving.host`.

It is `reward-service serve` in everything but the engine, which is recorded, and may be of full size or have
a device that sleeps. The first line of JSON on stdin configures it (`Setup`). After `listening on URL` on
stdout, each further line on stdin is a command, and its result is a line of JSON on stdout:

`cpu`      seconds of CPU time: of the process, and of the engine in it
`batches`  batches of the device since the last such command: `Batch`
`rescore`  score those batches once more without the service; seconds
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import msgspec

from reward_service.runtime.process import configure_openmp

if TYPE_CHECKING:
    from reward_service.engine.engine import RewardEngine
    from reward_service.engine.types import Pair, PairScores

_logger = logging.getLogger(__name__)


class Setup(msgspec.Struct, frozen=True):
    """Service to start: overrides of the miniature's configuration, and its engine.

    Attributes:
        overrides: `KEY=VALUE` settings of the service
        cores: CPU cores that the process is bound to
        sleep_s: use a device that takes this long for any batch
        full: use towers of ViT-L/14 and ViT-H/14 with random weights
        layers: number of layers of each of these towers; None for all
        dtype: dtype of these towers
    """

    overrides: list[str]
    cores: list[int]
    sleep_s: float | None = None
    full: bool = False
    layers: int | None = None
    dtype: str = "float32"


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """One run of the engine, on the monotonic clock; `light`: pairs whose prompt begins with "light"."""

    start_s: float
    end_s: float
    pairs: int
    light: int


class Cpu(msgspec.Struct, frozen=True):
    """Seconds of CPU time."""

    process: float
    engine: float


class EngineRecorder:
    """Recorder of the engine's batches; it wraps the engine's `score`.

    Args:
        score: the wrapped method
        keep: keep the pairs too, for `rescore`
    """

    def __init__(self, score: Callable[..., Any], *, keep: bool) -> None:
        self._score, self._keep = score, keep
        self._done: list[Batch] = []
        self._kept: list[Callable[[], Any]] = []
        self._device_s = 0.0

    def __call__(self, pairs: Sequence[Pair], *options: Any, **more: Any) -> Any:
        """Score a batch and record it."""
        cpu_s, start_s = time.thread_time(), time.monotonic()
        try:
            return self._score(pairs, *options, **more)
        finally:
            self._device_s += time.thread_time() - cpu_s
            light = sum(pair.prompt.startswith("light") for pair in pairs)
            self._done.append(Batch(start_s, time.monotonic(), len(pairs), light))
            if self._keep:
                unprepared = [replace(pair, preprocessed={}) for pair in pairs]
                self._kept.append(partial(self._score, unprepared, *options, **more))

    def cpu(self) -> Cpu:
        """Return the CPU time; the engine's is that of its `score`, its own threads and torch's threads."""
        return Cpu(time.process_time(), self._device_s + _helper_threads_s())

    def batches(self) -> list[Batch]:
        """Return the batches since the last call."""
        done, self._done = self._done, []
        self._last, self._kept = self._kept, []
        return done

    def rescore(self) -> float:
        """Score the batches returned last again, on a thread as the scheduler does; return the seconds."""
        elapsed: list[float] = []

        def run() -> None:
            started = time.perf_counter()
            for score in self._last:
                score()
            elapsed.append(time.perf_counter() - started)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return elapsed[0]


def _helper_threads_s() -> float:
    """Return the CPU seconds of the threads that preprocess images and of those that Python did not start."""
    other = {
        thread.native_id
        for thread in threading.enumerate()
        if not thread.name.startswith(("preprocess", "prefetch"))
    }
    nanoseconds = 0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) not in other:
            with suppress(OSError):  # the thread has just ended
                nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def sleeping_score(engine: RewardEngine, seconds: float) -> Callable[..., list[PairScores]]:
    """Return a replacement for the engine's `score`: a device that takes this long for any batch."""
    from reward_service.engine.types import PairScores

    def score(
        pairs: Sequence[Pair], names: Sequence[str] | None = None, *, deterministic: bool = False
    ) -> list[PairScores]:
        del deterministic
        time.sleep(seconds)
        raw = dict.fromkeys(engine.evaluators if names is None else names, 0.25)
        return [PairScores(raw, truncated_prompt=False) for _ in pairs]

    return score


def full_size_engine(setup: Setup, batch_pairs: int) -> RewardEngine:
    """Return an engine over towers of ViT-L/14 and ViT-H/14 with random weights."""
    import torch

    from benchmarks.common.models import random_engine

    with tempfile.TemporaryDirectory() as folder:
        towers = ("clip", "pickscore")
        dtype = getattr(torch, setup.dtype)
        return random_engine(Path(folder), towers, setup.layers, torch.device("cpu"), dtype, batch_pairs)


def main() -> None:
    """Serve until SIGTERM."""
    setup = msgspec.json.decode(sys.stdin.readline(), type=Setup)
    os.sched_setaffinity(0, setup.cores)
    configure_openmp()
    from reward_service.config import load_config
    from reward_service.scoring import service
    from reward_service.web import server

    def build(config: Any) -> RewardEngine:
        import torch

        from reward_service.engine.loading import build_engine

        torch.set_num_threads(config.threads)
        engine = full_size_engine(setup, config.batch_pairs) if setup.full else build_engine(config)
        score = engine.score if setup.sleep_s is None else sleeping_score(engine, setup.sleep_s)
        recorder = EngineRecorder(score, keep=setup.full)
        engine.score = recorder  # type: ignore[method-assign]
        threading.Thread(target=_serve_commands, args=(recorder,), daemon=True).start()
        return engine

    config = load_config(overrides=[f"threads={len(setup.cores)}", "port=0", *setup.overrides])
    with patch.object(service, "build_default_engine", build):
        failure = server.serve(config, lambda line: print(line, flush=True))
    sys.exit(failure)


def _serve_commands(recorder: EngineRecorder) -> None:
    commands: dict[str, Callable[[], object]] = {
        "cpu": recorder.cpu,
        "batches": recorder.batches,
        "rescore": recorder.rescore,
    }
    # When this thread ends, the process ends: the parent waits for a result, or it has ended itself.
    try:
        for line in sys.stdin:
            print(msgspec.json.encode(commands[line.strip()]()).decode(), flush=True)
    except Exception:
        _logger.exception("a command of the benchmark failed")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
