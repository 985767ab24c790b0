"""Collecting an iteration: order, overlap, and failures that never become rewards."""

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from tests.trainer.conftest import PROMPTS, FakeScorer
from trainer.config import RolloutConfig
from trainer.rl import rollout as judging
from trainer.rl.rewards import Images, Scores, ScoringError
from trainer.rl.rollout import DropCount, Rollout, collect, group_keys
from trainer.rl.sampler import ImageSampler
from trainer.runtime.errors import RolloutError

CONFIG = RolloutConfig(prompts_per_iteration=4, images_per_prompt=3, score_attempts=2)
KEYS = group_keys(PROMPTS, 3, seed=0, fold=0, iteration=0)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "BACKOFF_S", 0.0)


def collected(
    sampler: ImageSampler, scorer: FakeScorer, micro_batch: int = 4, limit: float = 0.05
) -> Rollout:
    return collect(sampler, scorer, KEYS, CONFIG, micro_batch, DropCount(limit))


def fails_for(prompt: str, times: int, *, retryable: bool = True):
    """A fault that hits the first `times` requests in which `prompt` occurs."""
    left = [times]

    def fault(prompts: Sequence[str]) -> None:
        if prompt in prompts and left[0] > 0:
            left[0] -= 1
            raise ScoringError("injected", retryable=retryable)

    return fault


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 100])
def test_scores_belong_to_their_images(sampler: ImageSampler, micro_batch: int) -> None:
    """Whatever the micro-batch, every image carries its own score, prompt and group."""
    result = collected(sampler, FakeScorer(), micro_batch)
    expected = FakeScorer().score([key.prompt for key in result.keys], result.images)
    np.testing.assert_array_equal(result.scores.raw, expected.raw)
    assert result.keys == KEYS
    assert result.group.tolist() == [row // 3 for row in range(12)]
    assert len(result.trajectory.latents) == len(result.condition.context) == 12


def test_a_missing_score_is_asked_for_again(sampler: ImageSampler) -> None:
    """One failed request costs a repetition, not a group."""
    result = collected(sampler, FakeScorer(fails_for(PROMPTS[1], times=1)))
    assert result.dropped_groups == 0
    assert len(result.keys) == 12


def test_a_lost_score_drops_its_whole_group_and_no_other(sampler: ImageSampler) -> None:
    """The rest of the group is not compared with an image that has no score, and nothing scores 0."""
    result = collected(sampler, FakeScorer(fails_for(PROMPTS[1], times=99)), micro_batch=3)
    assert result.dropped_groups == 1
    assert {key.prompt for key in result.keys} == set(PROMPTS) - {PROMPTS[1]}
    assert result.group.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    expected = FakeScorer().score([key.prompt for key in result.keys], result.images)
    np.testing.assert_array_equal(result.scores.raw, expected.raw)
    assert len(result.trajectory.latents) == 9


def test_what_cannot_be_retried_is_asked_once(sampler: ImageSampler) -> None:
    """A refusal is not hammered with repetitions."""
    scorer = FakeScorer(fails_for(PROMPTS[1], times=99, retryable=False))
    collected(sampler, scorer, micro_batch=3)
    assert scorer.calls == 4


def test_losing_every_group_stops_the_run(sampler: ImageSampler) -> None:
    """A dead service ends the run with its cause, in one line."""
    with pytest.raises(RolloutError, match=r"4 of 4 groups.*injected") as caught:
        collected(sampler, FakeScorer(_always))
    assert "\n" not in str(caught.value)


def _always(prompts: Sequence[str]) -> None:
    raise ScoringError("injected", retryable=False)


def test_more_than_the_limit_stops_the_run_once_there_is_enough_to_judge() -> None:
    """One group of the first eight is bad luck; more than 5 % of many is a fault."""
    cause = ScoringError("injected", retryable=True)
    drops = DropCount(0.05)
    drops.add(8, 1, cause)
    for _ in range(4):
        drops.add(8, 0, None)
    with pytest.raises(RolloutError, match=r"3 of 48 groups"):
        drops.add(8, 2, cause)


def test_losing_many_of_the_first_groups_stops_the_run_at_once() -> None:
    """The grace is for the odd group: a run does not learn for iterations from half of its images."""
    with pytest.raises(RolloutError, match=r"4 of 8 groups.*injected"):
        DropCount(0.05).add(8, 4, ScoringError("injected", retryable=True))


def test_a_score_that_is_no_number_is_a_missing_score(sampler: ImageSampler) -> None:
    """A NaN would make its group look as if nothing varied: it is asked for again, then the group dropped."""

    class Spoilt(FakeScorer):
        def score(self, prompts: Sequence[str], images: Images) -> Scores:
            scores = super().score(prompts, images)
            return Scores(scores.raw, np.where(PROMPTS[1] in prompts, np.nan, scores.z))

    scorer = Spoilt()
    result = collected(sampler, scorer, micro_batch=3)
    assert (result.dropped_groups, scorer.calls) == (1, 5)
    assert np.isfinite(result.scores.z).all()


def test_a_programming_error_in_the_scorer_is_not_swallowed(sampler: ImageSampler) -> None:
    """Only failures of scoring are handled; anything else surfaces."""

    def broken(prompts: Sequence[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collected(sampler, FakeScorer(broken))


class SlowScorer(FakeScorer):
    """Counts how many requests are under way at once."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.now = self.most = 0

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.2)
        with self._lock:
            self.now -= 1
        return super().score(prompts, images)


def test_scoring_overlaps_and_is_bounded(sampler: ImageSampler) -> None:
    """While micro-batches wait for scores the next is drawn, but never more than `in_flight` wait."""
    scorer = SlowScorer()
    start = time.perf_counter()
    result = collect(sampler, scorer, KEYS, CONFIG, 1, DropCount(0.05))
    elapsed = time.perf_counter() - start
    assert scorer.most == CONFIG.in_flight == 2
    assert elapsed < 12 * 0.2 + result.times.draw_s
    assert result.times.exposed_wait_s < 12 * 0.2
