"""Client that sends requests during a fault test and compares every score with the engine's own."""

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

#: Largest change of a raw score by other pairs in its batch, in float32 (docs/numerics.md).
TOLERANCE = {"aesthetic": 1e-5, "clip": 1e-6, "hpsv2": 1e-6, "pickscore": 1e-4}
TIMEOUT_S = 240.0
_SIDES = ((64, 64), (40, 72), (90, 31), (33, 33), (128, 96))
_WORDS = ("a red circle", "two blue squares", "a green dog", "nothing at all", "ünïcode ﬁsh")


def known_pairs(count: int = 15) -> list[Pair]:
    """Return pairs with images of several sizes, always the same."""
    rng = np.random.default_rng(6)
    return [
        Pair(f"{_WORDS[index % 5]} {index}", rng.integers(0, 256, (*_SIDES[index % 5], 3), np.uint8))
        for index in range(count)
    ]


@dataclass(frozen=True)
class ExpectedScores:
    """Pairs with the raw scores of the engine itself, by evaluator."""

    pairs: Sequence[Pair]
    raw: Sequence[dict[str, float]]

    @classmethod
    def of(cls, engine: RewardEngine, pairs: Sequence[Pair]) -> ExpectedScores:
        return cls(pairs, [scored.raw for scored in engine.score(pairs)])

    def mistakes(self, rows: Sequence[int], response: ScoreResponse) -> list[str]:
        """Return one line for each score of the pairs at `rows` that is missing or wrong."""
        wrong = [] if len(response.results) == len(rows) else ["another number of results than of pairs"]
        for row, result in zip(rows, response.results, strict=False):
            for name, own in self.raw[row].items():
                score = result.scores.get(name)
                if score is None or not abs(score.raw - own) <= TOLERANCE[name]:
                    wrong.append(f"pair {row}, {name}: {score and score.raw} instead of {own}")
        return wrong


class Bystander(threading.Thread):
    """Thread that requests the scores of three pairs at a time until it is stopped."""

    def __init__(self, url: str, expected: ExpectedScores, **options: Any) -> None:
        super().__init__(name="bystander", daemon=True)
        self._client = RewardClient(url, **{"client_id": "bystander", "retry_budget_s": 0.0, **options})
        self._expected, self._over = expected, threading.Event()
        self.correct, self.mistakes = 0, list[str]()

    def run(self) -> None:
        rows = itertools.cycle(range(len(self._expected.pairs)))
        with self._client:
            while not self._over.is_set():
                self._score(list(itertools.islice(rows, 3)))
                time.sleep(0.01)

    def _score(self, rows: Sequence[int]) -> None:
        pairs = [self._expected.pairs[row] for row in rows]
        try:
            response = self._client.score([it.prompt for it in pairs], [it.image for it in pairs])
        except Exception as error:  # noqa: BLE001 - any error is a mistake of the service
            self.mistakes.append(repr(error))
            return
        mistakes = self._expected.mistakes(rows, response)
        self.mistakes += mistakes
        self.correct += not mistakes

    def wait_for_scores(self, times: int = 3) -> None:
        """Wait for so many more correct responses, all but one of which are requested from now on."""
        goal, until = self.correct + times, time.monotonic() + TIMEOUT_S
        while self.correct < goal:
            assert not self.mistakes, self.mistakes[:3]
            assert time.monotonic() < until, "no more responses"
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop sending requests."""
        self._over.set()
        self.join(TIMEOUT_S)
        assert not self.is_alive()


@contextmanager
def undisturbed(url: str, expected: ExpectedScores, **options: Any) -> Iterator[Bystander]:
    """Check that another client gets correct scores before, during and after the block."""
    bystander = Bystander(url, expected, **options)
    bystander.start()
    try:
        bystander.wait_for_scores()
        yield bystander
        bystander.wait_for_scores()
    finally:
        bystander.stop()
    assert not bystander.mistakes, bystander.mistakes[:3]
