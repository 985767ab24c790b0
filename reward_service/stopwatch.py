"""How long each tower took in a batch, on the device's own clock and without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Times stretches of one batch by name; a name's stretches add up."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stretches: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        if not self._cuda:
            started_s = time.perf_counter()
            yield
            self._stretches.append((name, time.perf_counter() - started_s))
            return
        # A GPU is only told what to do here: what it does is between two events in its own queue.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """Seconds by name; call it once the batch's results are on the host."""
        total: defaultdict[str, float] = defaultdict(float)
        for name, stretch_s in self._stretches:
            total[name] += stretch_s
        for name, begin, end in self._events:
            total[name] += begin.elapsed_time(end) / 1000
        return dict(total)
