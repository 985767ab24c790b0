"""Overlapped sampling and scoring: times, leaving early, and outages."""

import threading
from collections.abc import Callable, Sequence

import pytest

from tests.trainer.conftest import PROMPTS, FakeScorer
from trainer.config import RolloutConfig
from trainer.rl import rollout as rollout_module
from trainer.rl.rewards import ScoringError
from trainer.rl.rollout import (
    DropCount,
    Outcome,
    ScoredBatches,
    ScoringPipeline,
    Times,
    collect_rollout,
    group_keys,
    micro_batches,
    sample_and_score,
)
from trainer.rl.sampler import NOTHING_SHARED, ImageSampler, SampledImages
from trainer.runtime.errors import RolloutError

KEYS = group_keys(PROMPTS, 2, seed=0, fold=0, iteration=0)
LIMITS = RolloutConfig(score_attempts=2, in_flight=2)
WAIT_S = 120.0  # for events that come within milliseconds on an idle machine


def sample_and_score_all(
    sampler: ImageSampler,
    scorer: FakeScorer,
    limits: RolloutConfig = LIMITS,
    on_sampled: Callable[[int], object] = int,
) -> ScoredBatches[SampledImages]:
    """Sample and score the images of `KEYS` in four micro-batches."""
    return sample_and_score(
        sampler,
        scorer,
        [KEYS[start:stop] for start, stop in micro_batches(len(KEYS), 2)],
        NOTHING_SHARED,
        "super_resolution",
        limits,
        stop_when=lambda scoring: scoring.outage,
        keep=lambda sampled: sampled,
        on_sampled=on_sampled,
    )


def scoring_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "score"]


class ManualClock:
    """Stand-in for module `time`, whose clock advances only by assignment to `now`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_read: Callable[[], object] = float

    def perf_counter(self) -> float:
        now = self.now
        self.on_read()
        return now


def test_times_separate_hidden_and_exposed_wait(
    sampler: ImageSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring is hidden while the next micro-batch is sampled; the wait for the last score is exposed."""
    clock = ManualClock()
    sampled = [threading.Event() for _ in range(4)]
    blocked = threading.Event()
    sample = sampler.sample

    def sample_for_one_second(*arguments: object) -> SampledImages:
        result = sample(*arguments)  # type: ignore[arg-type]
        clock.now += 1.0
        next(event for event in sampled if not event.is_set()).set()
        return result

    class ObservedPipeline(ScoringPipeline):
        def finish(self) -> list[Outcome]:
            clock.on_read = blocked.set  # the wait for the last score starts with a reading of the clock
            return super().finish()

    def score_during_next_sampling(_: Sequence[str]) -> None:
        if scorer.calls < 4:
            assert sampled[scorer.calls].wait(WAIT_S)
        else:
            assert blocked.wait(WAIT_S)
            clock.now += 5.0

    scorer = FakeScorer(score_during_next_sampling)
    monkeypatch.setattr(rollout_module, "time", clock)
    monkeypatch.setattr(rollout_module, "ScoringPipeline", ObservedPipeline)
    monkeypatch.setattr(sampler, "sample", sample_for_one_second)
    times = sample_and_score_all(sampler, scorer, RolloutConfig(in_flight=1)).times
    assert scorer.calls == 4
    assert times == Times(sample_s=4.0, score_s=8.0, exposed_wait_s=5.0)
    assert times.hidden_wait_s == 3.0


def test_interrupt_does_not_wait_for_scores(sampler: ImageSampler) -> None:
    """Ctrl-C while a request hangs leaves at once; no thread keeps the program from ending."""
    release = threading.Event()

    def interrupt_during_request(_: int) -> None:
        if scoring_threads():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_and_score_all(
            sampler, FakeScorer(lambda _: release.wait(WAIT_S)), on_sampled=interrupt_during_request
        )
    assert scoring_threads(), "the request is still hanging"
    assert all(thread.daemon for thread in scoring_threads())
    release.set()
    for thread in scoring_threads():
        thread.join(WAIT_S)


def test_leaving_ends_pause_before_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the pipeline wakes a thread that would retry, and it does not retry."""
    monkeypatch.setattr(rollout_module, "BACKOFF_S", 10 * WAIT_S)
    requested = threading.Event()

    def fail(_: Sequence[str]) -> None:
        requested.set()
        raise ScoringError("injected", retryable=True)

    scorer = FakeScorer(fail)
    with ScoringPipeline(scorer, LIMITS) as scoring:
        scoring.submit(["a"], None)  # type: ignore[arg-type]
        assert requested.wait(WAIT_S)
    for thread in scoring_threads():
        thread.join(WAIT_S)
    assert not scoring_threads()
    assert scorer.calls == 1


def test_outage_ends_iteration_early(sampler: ImageSampler) -> None:
    """When the service is unreachable the rest is not sampled: each request would wait as long."""

    def fail(_: Sequence[str]) -> None:
        raise ScoringError("no response", retryable=False, outage=True)

    keys = group_keys(
        [f"{prompt} {i}" for prompt in PROMPTS for i in range(4)], 2, seed=0, fold=0, iteration=0
    )
    sampled: list[int] = []
    config = RolloutConfig(images_per_prompt=2, in_flight=1)
    with pytest.raises(RolloutError, match="no response"):
        collect_rollout(sampler, FakeScorer(fail), keys, config, 1, DropCount(0.05), sampled.append)
    assert sum(sampled) <= 2


def test_groups_scored_before_outage_are_kept(sampler: ImageSampler) -> None:
    """Groups with all their scores are kept; the others are counted as dropped."""
    requests = []

    def fail_after_two(prompts: Sequence[str]) -> None:
        requests.append(prompts)
        if len(requests) > 2:
            raise ScoringError("no response", retryable=False, outage=True)

    config = RolloutConfig(images_per_prompt=2, in_flight=1)
    rollout = collect_rollout(sampler, FakeScorer(fail_after_two), KEYS, config, 2, DropCount(0.05))
    assert rollout.keys == KEYS[:4]
    assert rollout.dropped_groups == 2


@pytest.mark.parametrize(
    ("count", "size", "smallest", "sizes"),
    [
        (8, 4, None, [4, 4]),
        (7, 4, None, [4, 3]),
        (0, 4, 2, []),
        (64, 32, 8, [32, 16, 8, 8]),
        (64, 32, 32, [32, 32]),
        (40, 32, 2, [32, 4, 2, 2]),
        (5, 8, 1, [3, 1, 1]),
    ],
)
def test_last_micro_batch_is_halved_repeatedly(
    count: int, size: int, smallest: int | None, sizes: list[int]
) -> None:
    """Every image is in one micro-batch, and little is left to score at the end."""
    bounds = micro_batches(count, size, smallest)
    assert [stop - start for start, stop in bounds] == sizes
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(count))
