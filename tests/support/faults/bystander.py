"""A caller who must not notice: asks all the time, and holds every answer against the engine's own scores."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward_service.client import RewardClient
from reward_service.engine.engine import RewardEngine
from reward_service.engine.types import Pair
from reward_service.protocol import ScoreResponse

#: docs/numerics.md: what company in a batch may move a raw score by, in float32.
TOLERANCE = {"aesthetic": 1e-5, "clip": 1e-6, "hpsv2": 1e-6, "pickscore": 1e-4}
PATIENCE_S = 60.0
_SIDES = ((64, 64), (40, 72), (90, 31), (33, 33), (128, 96))
_WORDS = ("a red circle", "two blue squares", "a green dog", "nothing at all", "ünïcode ﬁsh")


def known_pairs(count: int = 15) -> list[Pair]:
    """Pairs of several sizes, always the same."""
    rng = np.random.default_rng(6)
    return [
        Pair(f"{_WORDS[index % 5]} {index}", rng.integers(0, 256, (*_SIDES[index % 5], 3), np.uint8))
        for index in range(count)
    ]


@dataclass(frozen=True)
class Truth:
    """Pairs and what the engine itself gives them, evaluator by evaluator."""

    pairs: Sequence[Pair]
    raw: Sequence[dict[str, float]]

    @classmethod
    def of(cls, engine: RewardEngine, pairs: Sequence[Pair]) -> Truth:
        return cls(pairs, [scored.raw for scored in engine.score(pairs)])

    def mistakes(self, rows: Sequence[int], response: ScoreResponse) -> list[str]:
        """One line for each score of the pairs at `rows` that is missing or not the engine's own."""
        wrong = [] if len(response.results) == len(rows) else ["another number of results than of pairs"]
        for row, result in zip(rows, response.results, strict=False):
            for name, own in self.raw[row].items():
                score = result.scores.get(name)
                if score is None or not abs(score.raw - own) <= TOLERANCE[name]:
                    wrong.append(f"pair {row}, {name}: {score and score.raw} instead of {own}")
        return wrong


class Bystander(threading.Thread):
    """Asks for three pairs at a time until it is stopped."""

    def __init__(self, url: str, truth: Truth, **options: Any) -> None:
        super().__init__(name="bystander", daemon=True)
        self._judge = RewardClient(url, **{"client_id": "bystander", "retry_budget_s": 0.0, **options})
        self._truth, self._over = truth, threading.Event()
        self.right, self.wrong = 0, list[str]()

    def run(self) -> None:
        rows = itertools.cycle(range(len(self._truth.pairs)))
        with self._judge:
            while not self._over.is_set():
                self._ask(list(itertools.islice(rows, 3)))
                time.sleep(0.01)

    def _ask(self, rows: Sequence[int]) -> None:
        pairs = [self._truth.pairs[row] for row in rows]
        try:
            response = self._judge.score([it.prompt for it in pairs], [it.image for it in pairs])
        except Exception as error:  # noqa: BLE001 - whatever it is, this caller noticed something
            self.wrong.append(repr(error))
            return
        mistakes = self._truth.mistakes(rows, response)
        self.wrong += mistakes
        self.right += not mistakes

    def again(self, times: int = 3) -> None:
        """Wait for so many more right answers, begun from now on but for one."""
        goal, until = self.right + times, time.monotonic() + PATIENCE_S
        while self.right < goal:
            assert not self.wrong, self.wrong[:3]
            assert time.monotonic() < until, "no answers any more"
            time.sleep(0.005)

    def stop(self) -> None:
        """No more asking."""
        self._over.set()
        self.join(PATIENCE_S)
        assert not self.is_alive()


@contextmanager
def undisturbed(url: str, truth: Truth, **options: Any) -> Iterator[Bystander]:
    """Another caller's answers are right before, during and after what happens inside."""
    bystander = Bystander(url, truth, **options)
    bystander.start()
    try:
        bystander.again()
        yield bystander
        bystander.again()
    finally:
        bystander.stop()
    assert not bystander.wrong, bystander.wrong[:3]
