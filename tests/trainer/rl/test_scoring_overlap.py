"""Drawing and scoring at once: times that add up, an end that waits for nobody, an outage noticed once."""

import threading
import time
from collections.abc import Sequence

import pytest

from tests.trainer.conftest import PROMPTS, FakeScorer
from trainer.config import RolloutConfig
from trainer.rl import rollout as judging
from trainer.rl.rewards import ScoringError
from trainer.rl.rollout import (
    DropCount,
    Judged,
    Judging,
    collect,
    group_keys,
    micro_batches,
    sample_and_score,
)
from trainer.rl.sampler import NOTHING_SHARED, ImageSampler, SampledImages
from trainer.runtime.errors import RolloutError

KEYS = group_keys(PROMPTS, 2, seed=0, fold=0, iteration=0)
PATIENT = RolloutConfig(score_attempts=2, in_flight=2)


def judged(sampler: ImageSampler, scorer: FakeScorer, on_drawn=int) -> Judged[SampledImages]:
    return sample_and_score(
        sampler,
        scorer,
        [KEYS[start:stop] for start, stop in micro_batches(len(KEYS), 2)],
        NOTHING_SHARED,
        "super_resolution",
        PATIENT,
        enough=lambda judging: judging.outage,
        keep=lambda drawing: drawing,
        on_drawn=on_drawn,
    )


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "score"]


def test_waiting_is_hidden_while_something_is_drawn_and_exposed_when_nothing_is_left(
    sampler: ImageSampler,
) -> None:
    """The two parts are the time in which scores were under way, and a last slow score is exposed."""
    asked = []

    def slow_at_last(prompts: Sequence[str]) -> None:
        asked.append(prompts)
        time.sleep(0.3 if len(asked) == 4 else 0.0)

    times = judged(sampler, FakeScorer(slow_at_last)).times
    assert len(asked) == 4
    assert 0.25 < times.exposed_wait_s <= times.score_s
    assert times.hidden_wait_s == pytest.approx(times.score_s - times.exposed_wait_s)
    assert times.score_s < times.draw_s + times.exposed_wait_s + 0.1


def test_whoever_is_told_to_stop_waits_for_no_score(sampler: ImageSampler) -> None:
    """Ctrl-C while a request hangs leaves at once; no thread keeps the program from ending."""
    hang = threading.Event()

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    def interrupted_after_asking(drawn: int) -> None:
        if threads():
            stop(drawn)

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        judged(sampler, FakeScorer(lambda _: hang.wait(60)), interrupted_after_asking)
    assert time.perf_counter() - start < 20
    assert threads()
    assert all(thread.daemon for thread in threads())
    hang.set()
    for thread in threads():
        thread.join(10)


def test_a_pause_before_asking_again_ends_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving wakes a thread that would have asked again, and it does not ask."""
    monkeypatch.setattr(judging, "BACKOFF_S", 60.0)
    asked = threading.Event()

    def fails(_: Sequence[str]) -> None:
        asked.set()
        raise ScoringError("injected", retryable=True)

    scorer = FakeScorer(fails)
    with Judging(scorer, PATIENT) as requests:
        requests.ask(["a"], None)  # type: ignore[arg-type]
        assert asked.wait(10)
    for thread in threads():
        thread.join(10)
    assert not threads()
    assert scorer.calls == 1


def test_an_outage_ends_the_iteration_instead_of_waiting_for_every_micro_batch(sampler: ImageSampler) -> None:
    """Nobody answers: the rest is not drawn, each further request would wait as long."""

    def nobody(_: Sequence[str]) -> None:
        raise ScoringError("no answer", retryable=False, outage=True)

    keys = group_keys(
        [f"{prompt} {i}" for prompt in PROMPTS for i in range(4)], 2, seed=0, fold=0, iteration=0
    )
    drawn: list[int] = []
    config = RolloutConfig(images_per_prompt=2, in_flight=1)
    with pytest.raises(RolloutError, match="no answer"):
        collect(sampler, FakeScorer(nobody), keys, config, 1, DropCount(0.05), drawn.append)
    assert sum(drawn) <= 2


def test_after_an_outage_what_was_scored_before_is_kept(sampler: ImageSampler) -> None:
    """Groups with all their scores are learned from; the others are counted as lost."""
    requests = []

    def then_nobody(prompts: Sequence[str]) -> None:
        requests.append(prompts)
        if len(requests) > 2:
            raise ScoringError("no answer", retryable=False, outage=True)

    config = RolloutConfig(images_per_prompt=2, in_flight=1)
    rollout = collect(sampler, FakeScorer(then_nobody), KEYS, config, 2, DropCount(0.05))
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
def test_the_last_micro_batch_is_cut_in_halves(
    count: int, size: int, smallest: int | None, sizes: list[int]
) -> None:
    """Every image is drawn once, and little is left to score at the end."""
    bounds = micro_batches(count, size, smallest)
    assert [stop - start for start, stop in bounds] == sizes
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(count))
