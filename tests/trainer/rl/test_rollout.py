"""Rollout: order of images and scores, overlap, retries and dropped groups."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from tests.trainer.conftest import PROMPTS, FakeScorer
from trainer.config import RolloutConfig
from trainer.rl import rollout as rollout_module
from trainer.rl.rewards import Images, Scores, ScoringError
from trainer.rl.rollout import DropCount, Rollout, collect_rollout, group_keys
from trainer.rl.sampler import ImageSampler
from trainer.runtime.errors import RolloutError

CONFIG = RolloutConfig(prompts_per_iteration=4, images_per_prompt=3, score_attempts=2)
KEYS = group_keys(PROMPTS, 3, seed=0, fold=0, iteration=0)
WAIT_S = 120.0  # for events that come within milliseconds on an idle machine


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "BACKOFF_S", 0.0)


def collect(sampler: ImageSampler, scorer: FakeScorer, micro_batch: int = 4, limit: float = 0.05) -> Rollout:
    return collect_rollout(sampler, scorer, KEYS, CONFIG, micro_batch, DropCount(limit))


def fail_for(prompt: str, times: int, *, retryable: bool = True):
    """Return a fault of the first `times` requests that contain `prompt`."""
    remaining = [times]

    def fault(prompts: Sequence[str]) -> None:
        if prompt in prompts and remaining[0] > 0:
            remaining[0] -= 1
            raise ScoringError("injected", retryable=retryable)

    return fault


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 100])
def test_scores_belong_to_their_images(sampler: ImageSampler, micro_batch: int) -> None:
    """For any micro-batch size, every image has its own score, prompt and group."""
    result = collect(sampler, FakeScorer(), micro_batch)
    expected = FakeScorer().score([key.prompt for key in result.keys], result.images)
    np.testing.assert_array_equal(result.scores.raw, expected.raw)
    assert result.keys == KEYS
    assert result.group.tolist() == [row // 3 for row in range(12)]
    assert len(result.trajectory.latents) == len(result.condition.context) == 12


def test_failed_request_is_retried(sampler: ImageSampler) -> None:
    """One failed request is retried and drops no group."""
    result = collect(sampler, FakeScorer(fail_for(PROMPTS[1], times=1)))
    assert result.dropped_groups == 0
    assert len(result.keys) == 12


def test_missing_score_drops_its_whole_group(sampler: ImageSampler) -> None:
    """No other group is dropped, and a missing score is never replaced by a number."""
    result = collect(sampler, FakeScorer(fail_for(PROMPTS[1], times=99)), micro_batch=3)
    assert result.dropped_groups == 1
    assert {key.prompt for key in result.keys} == set(PROMPTS) - {PROMPTS[1]}
    assert result.group.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    expected = FakeScorer().score([key.prompt for key in result.keys], result.images)
    np.testing.assert_array_equal(result.scores.raw, expected.raw)
    assert len(result.trajectory.latents) == 9


def test_what_cannot_be_retried_is_asked_once(sampler: ImageSampler) -> None:
    """A refused request is not sent again."""
    scorer = FakeScorer(fail_for(PROMPTS[1], times=99, retryable=False))
    collect(sampler, scorer, micro_batch=3)
    assert scorer.calls == 4


def test_dropping_every_group_stops_the_run(sampler: ImageSampler) -> None:
    """If no group is scored the run ends with the cause, in one line."""
    with pytest.raises(RolloutError, match=r"4 of 4 groups.*injected") as caught:
        collect(sampler, FakeScorer(_fail_always))
    assert "\n" not in str(caught.value)


def _fail_always(prompts: Sequence[str]) -> None:
    raise ScoringError("injected", retryable=False)


def test_drop_limit_applies_after_grace_groups() -> None:
    """One dropped group of the first eight is tolerated; more than 5% of many stops the run."""
    cause = ScoringError("injected", retryable=True)
    drops = DropCount(0.05)
    drops.add(8, 1, cause)
    for _ in range(4):
        drops.add(8, 0, None)
    with pytest.raises(RolloutError, match=r"3 of 48 groups"):
        drops.add(8, 2, cause)


def test_many_dropped_groups_stop_the_run_at_once() -> None:
    """The grace is for single groups: a run does not train for iterations on half of its images."""
    with pytest.raises(RolloutError, match=r"4 of 8 groups.*injected"):
        DropCount(0.05).add(8, 4, ScoringError("injected", retryable=True))


def test_non_finite_score_is_a_missing_score(sampler: ImageSampler) -> None:
    """NaN is retried, then its group is dropped; otherwise the group would seem to have no variance."""

    class NanScorer(FakeScorer):
        def score(self, prompts: Sequence[str], images: Images) -> Scores:
            scores = super().score(prompts, images)
            return Scores(scores.raw, np.where(PROMPTS[1] in prompts, np.nan, scores.z))

    scorer = NanScorer()
    result = collect(sampler, scorer, micro_batch=3)
    assert (result.dropped_groups, scorer.calls) == (1, 5)
    assert np.isfinite(result.scores.z).all()


def test_unexpected_scorer_error_is_raised(sampler: ImageSampler) -> None:
    """Only scoring errors are handled; a programming error is raised."""

    def broken(prompts: Sequence[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(sampler, FakeScorer(broken))


class ConcurrencyScorer(FakeScorer):
    """Holds each request until a second one is in flight, and records the largest number in flight."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._active = 0
        self._lock = threading.Lock()
        self._pair = threading.Barrier(2)
        self._exceeded = threading.Event()

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        with self._lock:
            self._active += 1
            self.most = max(self.most, self._active)
            if self._active > 2:
                self._exceeded.set()
        self._pair.wait(WAIT_S)
        self._exceeded.wait(0.05)  # a request beyond the limit, if there is one, has time to start
        with self._lock:
            self._active -= 1
        return super().score(prompts, images)


def test_scoring_overlaps_and_is_bounded(sampler: ImageSampler) -> None:
    """The next micro-batch is sampled while others are scored, with at most `in_flight` requests."""
    scorer = ConcurrencyScorer()
    result = collect_rollout(sampler, scorer, KEYS, CONFIG, 1, DropCount(0.05))
    assert len(result.keys) == scorer.calls == 12
    assert scorer.most == CONFIG.in_flight == 2
