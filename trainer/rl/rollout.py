"""Collect a rollout: sample the images of one iteration and score them.

Sampling and scoring overlap: while some micro-batches are being scored, the next ones are sampled. A failed
request never becomes a reward: a group with an unscored image is dropped as a whole.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config import ImageStage, RolloutConfig, Sharing
from trainer.rl.diffusion import entropy
from trainer.rl.karlo import Condition, join_conditions
from trainer.rl.policy import Trajectory, join_trajectories
from trainer.rl.rewards import Images, Scorer, Scores, ScoringError, require_finite
from trainer.rl.sampler import ImageSampler, SampledImages
from trainer.runtime.distributed import ALONE, Processes
from trainer.runtime.errors import RolloutError
from trainer.runtime.rng import ImageKey

T = TypeVar("T")
Outcome = Scores | ScoringError  # of one micro-batch

BACKOFF_S = 0.5  # before the second attempt; doubles with each further one
GRACE_GROUPS = 40  # the drop limit applies to at least so many groups: one lost group of a few is bad luck


# ------------------------------------------------------------------------------- overlapped scoring


class Times(NamedTuple):
    """Time spent on sampling and scoring, in seconds."""

    sample_s: float  # sampling images
    score_s: float  # at least one scoring request in flight
    exposed_wait_s: float  # blocked on scores, nothing else to do

    @property
    def hidden_wait_s(self) -> float:
        """Seconds in which scoring overlapped with other work."""
        return self.score_s - self.exposed_wait_s


class ScoringLimits(Protocol):
    """Settings of a `ScoringPipeline`; `RolloutConfig` and `EvaluationConfig` have both."""

    @property
    def in_flight(self) -> int:
        """Maximum number of micro-batches that wait for scores while the next is sampled."""

    @property
    def score_attempts(self) -> int:
        """Maximum number of attempts to score a micro-batch."""


class ScoringPipeline:
    """Background scoring requests, at most `in_flight` at a time; outcomes are returned in order.

    Each request runs on a daemon thread of its own, so that leaving the context early, or ending the program,
    never waits for a service that may be gone. A context manager.
    """

    def __init__(self, scorer: Scorer, limits: ScoringLimits) -> None:
        self.outage = False  # the service is unavailable: further requests would fail too
        self.failed = False  # some images have no scores
        self.score_s = 0.0
        self.exposed_wait_s = 0.0
        self._scorer = scorer
        self._limits = limits
        self._closed = threading.Event()
        self._pending: deque[Future[Outcome]] = deque()
        self._outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._active = 0
        self._active_since = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def submit(self, prompts: Sequence[str], images: Images) -> None:
        """Start scoring N images (N, H, W, 3); blocks while `in_flight` requests are pending."""
        while len(self._pending) >= self._limits.in_flight:
            self._await_oldest()
        future: Future[Outcome] = Future()
        self._pending.append(future)
        self._mark_started()
        _run_in_background(future, lambda: self._score_with_retries(prompts, images), self._mark_ended)

    def finish(self) -> list[Outcome]:
        """Wait for all pending requests.

        Returns:
            the outcome of every submitted micro-batch, in order of submission

        Raises:
            BaseException: any exception of the scorer that is not a ScoringError
        """
        while self._pending:
            self._await_oldest()
        return self._outcomes

    def _await_oldest(self) -> None:
        start = time.perf_counter()
        self._outcomes.append(self._pending.popleft().result())
        self.exposed_wait_s += time.perf_counter() - start

    def _score_with_retries(self, prompts: Sequence[str], images: Images) -> Outcome:
        """Return scores after up to `score_attempts` attempts, or the last error."""
        attempts = self._limits.score_attempts
        for attempt in range(1, attempts + 1):
            try:
                return require_finite(self._scorer.score(prompts, images))
            except ScoringError as error:
                pause_s = BACKOFF_S * 2 ** (attempt - 1)
                if attempt == attempts or not error.retryable or self._closed.wait(pause_s):
                    self.failed = True
                    if error.outage:  # not `|=`: another thread may set it at the same time
                        self.outage = True
                    return error
        raise AssertionError("unreachable: score_attempts is at least 1")

    def _mark_started(self) -> None:
        with self._lock:
            if self._active == 0:
                self._active_since = time.perf_counter()
            self._active += 1

    def _mark_ended(self) -> None:
        with self._lock:
            self._active -= 1
            if self._active == 0:
                self.score_s += time.perf_counter() - self._active_since


def _run_in_background(future: "Future[T]", work: Callable[[], T], on_end: Callable[[], None]) -> None:
    """Run `work` on a daemon thread, call `on_end`, then resolve the future."""

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised again by Future.result
            on_end()
            future.set_exception(error)
        else:
            on_end()
            future.set_result(result)

    threading.Thread(target=run, name="score", daemon=True).start()


class ScoredBatches(NamedTuple, Generic[T]):
    """Sampled micro-batches and their scores; fewer than requested if sampling stopped early."""

    batches: list[T]
    outcomes: list[Outcome]
    times: Times


def _ignore(_: int) -> None:
    """Ignore a count of images."""


def sample_and_score(
    sampler: ImageSampler,
    scorer: Scorer,
    batches: Iterable[Sequence[ImageKey]],
    sharing: Sharing,
    stage: ImageStage,
    limits: ScoringLimits,
    *,
    stop_when: Callable[[ScoringPipeline], bool],
    keep: Callable[[SampledImages], T],
    on_sampled: Callable[[int], object] = _ignore,
) -> ScoredBatches[T]:
    """Sample micro-batches one after the other; score each while later ones are sampled.

    Args:
        sampler: source of the images
        scorer: scores the images
        batches: keys of the images of each micro-batch
        sharing: random numbers that images have in common
        stage: stage whose images are scored
        limits: requests in flight and attempts
        stop_when: called before each micro-batch; True ends sampling early
        keep: selects what is kept of each sampled micro-batch
        on_sampled: called with the number of images after each micro-batch

    Returns:
        the kept part and the outcome of each sampled micro-batch, in order

    An exception or a signal leaves at once, without waiting for pending requests.
    """
    kept: list[T] = []
    sample_s = 0.0
    with ScoringPipeline(scorer, limits) as scoring:
        for batch in batches:
            if stop_when(scoring):
                break
            start = time.perf_counter()
            sampled = sampler.sample(batch, sharing, stage)
            sample_s += time.perf_counter() - start
            kept.append(keep(sampled))
            on_sampled(len(batch))
            scoring.submit([key.prompt for key in batch], sampled.images)
        outcomes = scoring.finish()
    return ScoredBatches(kept, outcomes, Times(sample_s, scoring.score_s, scoring.exposed_wait_s))


# ------------------------------------------------------------------------------------------ rollout


class Rollout(NamedTuple):
    """Scored images of one iteration, N of them, whole groups only."""

    keys: tuple[ImageKey, ...]
    group: NDArray[np.int64]  # (N,) index of the prompt within the iteration
    images: Images  # (N, H, W, 3)
    scores: Scores  # (N, K) each
    trajectory: Trajectory
    condition: Condition
    dropped_groups: int
    times: Times


class DropCount:
    """Count of requested and dropped groups of all processes; stops a run that drops too many."""

    def __init__(self, limit: float, processes: Processes = ALONE) -> None:
        self.limit = limit
        self._processes = processes
        self.requested = 0
        self.dropped = 0

    def add(self, requested: int, dropped: int, cause: ScoringError | None) -> None:
        """Add one iteration; all processes must call this, and their counts are summed.

        Raises:
            RolloutError: the dropped share is above the limit, or every group of the iteration was dropped;
                raised in all processes or in none
        """
        counts = self._processes.gather_values([requested, dropped])
        causes = self._processes.gather_values(None if cause is None else str(cause))
        requested, dropped = (sum(column) for column in zip(*counts, strict=True))
        first_cause = next((message for message in causes if message is not None), None)
        self.requested += requested
        self.dropped += dropped
        if not dropped:
            return
        if dropped == requested or self.dropped > self.limit * max(self.requested, GRACE_GROUPS):
            raise RolloutError(
                f"{self.dropped} of {self.requested} groups have no scores (limit {self.limit:.0%}): "
                f"{first_cause}; fix the reward service and start again"
            )


def group_keys(
    prompts: Sequence[str], images_per_prompt: int, *, seed: int, fold: int, iteration: int
) -> tuple[ImageKey, ...]:
    """Return the keys of one iteration's images, those of a prompt next to each other."""
    return tuple(
        ImageKey(seed, fold, iteration, prompt, image)
        for prompt in prompts
        for image in range(images_per_prompt)
    )


def collect_rollout(
    sampler: ImageSampler,
    scorer: Scorer,
    keys: Sequence[ImageKey],
    config: RolloutConfig,
    micro_batch: int,
    drops: DropCount,
    on_sampled: Callable[[int], object] = _ignore,
) -> Rollout:
    """Sample and score the images of `keys`, `images_per_prompt` per group.

    When the service is unavailable for longer than the client retries, the rest of the iteration is dropped.

    Args:
        sampler: source of the images
        scorer: scores the images
        keys: images to sample, group by group
        config: settings `trainer.rollout`
        micro_batch: maximum number of images per micro-batch
        drops: count of dropped groups, updated
        on_sampled: called with the number of images after each micro-batch

    Raises:
        RolloutError: too many groups have no scores
    """
    bounds = micro_batches(len(keys), micro_batch, config.smallest_batch)
    scored = sample_and_score(
        sampler,
        scorer,
        [keys[start:stop] for start, stop in bounds],
        config.share,
        config.reward_stage,
        config,
        stop_when=lambda scoring: scoring.outage,
        keep=lambda sampled: sampled,
        on_sampled=on_sampled,
    )
    outcomes = dict(zip(bounds, scored.outcomes, strict=False))
    rows, cause = _rows_of_whole_groups(outcomes, len(keys), config.images_per_prompt)
    groups = len(keys) // config.images_per_prompt
    dropped = groups - len(rows) // config.images_per_prompt
    drops.add(groups, dropped, cause)
    return _select_rows(keys, scored, rows, config.images_per_prompt, dropped, len(scorer.evaluators))


def micro_batches(count: int, size: int, smallest: int | None = None) -> list[tuple[int, int]]:
    """Return the bounds (first, one past the last) of the micro-batches of `count` images, `size` each.

    With `smallest`, the last one is halved repeatedly down to that size, so that little is left to score when
    sampling has ended.
    """
    cuts = [*range(0, count, size), count] if count else [0]
    while smallest is not None and count and cuts[-1] - cuts[-2] >= 2 * smallest:
        cuts.insert(-1, (cuts[-2] + cuts[-1] + 1) // 2)
    return list(pairwise(cuts))


def _rows_of_whole_groups(
    outcomes: Mapping[tuple[int, int], Outcome], images: int, group_size: int
) -> tuple[list[int], ScoringError | None]:
    """Return the rows of the groups in which every image was scored, and the first error of the others."""
    scored = [range(*bounds) for bounds, outcome in outcomes.items() if isinstance(outcome, Scores)]
    cause = next((outcome for outcome in outcomes.values() if isinstance(outcome, ScoringError)), None)
    dropped = {row // group_size for row in set(range(images)).difference(*scored)}
    return [row for row in range(images) if row // group_size not in dropped], cause


def _select_rows(
    keys: Sequence[ImageKey],
    scored: ScoredBatches[SampledImages],
    rows: Sequence[int],
    group_size: int,
    dropped: int,
    evaluators: int,
) -> Rollout:
    """Concatenate the micro-batches and select `rows`; none if only other processes have scored images."""
    scores = _with_placeholders(scored, evaluators)
    index = torch.tensor(rows, dtype=torch.int64)
    return Rollout(
        keys=tuple(keys[row] for row in rows),
        group=np.array([row // group_size for row in rows], dtype=np.int64),
        images=np.concatenate([sampled.images for sampled in scored.batches])[rows],
        scores=Scores(*(np.concatenate(field)[rows] for field in zip(*scores, strict=True))),
        trajectory=join_trajectories([sampled.trajectory for sampled in scored.batches]).select(index),
        condition=join_conditions([sampled.condition for sampled in scored.batches]).select(index),
        dropped_groups=dropped,
        times=scored.times,
    )


def _with_placeholders(scored: ScoredBatches[SampledImages], evaluators: int) -> list[Scores]:
    """Return scores with NaN rows for unscored images, which cannot pass unnoticed if one is not dropped."""
    blanks = [np.full((len(sampled.images), evaluators), np.nan) for sampled in scored.batches]
    return [
        outcome if isinstance(outcome, Scores) else Scores(blank, blank)
        for outcome, blank in zip(scored.outcomes, blanks, strict=True)
    ]


# ----------------------------------------------------------------------------- pooling over processes


class PooledRollout(NamedTuple):
    """Rollouts of all processes without images and latents; N images in the order of a single process's."""

    scores: Scores  # (N, K) each
    group: NDArray[np.int64]  # (N,)
    clamp_fraction: NDArray[np.float64]  # (N, S) saturated share of the predicted x0
    entropy: NDArray[np.float64]  # (N, S - 1) of the steps that have noise, nats per dimension
    offset: int  # row of this process's first image
    dropped_groups: int
    times: Times  # maximum over the processes, each


def pool_rollouts(rollout: Rollout, processes: Processes) -> PooledRollout:
    """Gather the scores and diagnostics of all processes' rollouts; all processes must call this."""
    raw, z = (processes.gather_rows(field) for field in rollout.scores)
    groups = processes.gather_rows(rollout.group)
    # Every process numbers its own groups from 0.
    starts = np.cumsum([0] + [group.max(initial=-1) + 1 for group in groups])
    clamp_fraction = rollout.trajectory.clamp_fraction.double().cpu().numpy()
    noisy = rollout.trajectory.sigmas[:, :-1]
    entropies = entropy(noisy.flatten(0, 1)).reshape(noisy.shape[:2]).double().cpu().numpy()
    dropped, *times = zip(*processes.gather_values([rollout.dropped_groups, *rollout.times]), strict=True)
    return PooledRollout(
        scores=Scores(np.concatenate(raw), np.concatenate(z)),
        group=np.concatenate([group + start for group, start in zip(groups, starts, strict=False)]),
        clamp_fraction=np.concatenate(processes.gather_rows(clamp_fraction)),
        entropy=np.concatenate(processes.gather_rows(entropies)),
        offset=sum(map(len, groups[: processes.rank])),
        dropped_groups=int(sum(dropped)),
        times=Times(*(max(each) for each in times)),
    )
