"""Collect one iteration: micro-batches are drawn and scored, overlapped. Failures never become rewards.

Images are drawn and scored at the same time: while some are being scored, the next are drawn.
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
from trainer.rl.rewards import Images, Scorer, Scores, ScoringError, finite
from trainer.rl.sampler import ImageSampler, SampledImages
from trainer.runtime.distributed import ALONE, Processes
from trainer.runtime.errors import RolloutError
from trainer.runtime.rng import ImageKey

T = TypeVar("T")
Outcome = Scores | ScoringError

BACKOFF_S = 0.5  # before the second attempt; doubles with each further one


class Times(NamedTuple):
    """Where the time of drawing and scoring went, in seconds."""

    draw_s: float  # spent drawing
    score_s: float  # in which scores were under way
    exposed_wait_s: float  # in which there was nothing left to do but wait for them

    @property
    def hidden_wait_s(self) -> float:
        """Seconds in which scores were under way and something else was done."""
        return self.score_s - self.exposed_wait_s


class Patience(Protocol):
    """The settings of scoring; rollout and evaluation have both."""

    @property
    def in_flight(self) -> int:
        """Micro-batches that may wait for their scores while the next is drawn."""

    @property
    def score_attempts(self) -> int:
        """Times a micro-batch is sent before it counts as lost."""


class Judged(NamedTuple, Generic[T]):
    """What was drawn, micro-batch by micro-batch, and its scores; fewer than asked for after an outage."""

    drawn: list[T]
    outcomes: list[Outcome]
    times: Times


def sample_and_score(
    sampler: ImageSampler,
    scorer: Scorer,
    batches: Iterable[Sequence[ImageKey]],
    sharing: Sharing,
    stage: ImageStage,
    patience: Patience,
    *,
    enough: Callable[["Judging"], bool],
    keep: Callable[[SampledImages], T],
    on_drawn: Callable[[int], object] = int,
) -> Judged[T]:
    """Draw the micro-batches one after the other, each scored while later ones are drawn.

    `enough`, asked before each, ends it early; of each drawing what `keep` returns is kept; `on_drawn` hears
    how many images were drawn. Left early, by an exception or a signal, it waits for nothing.
    """
    drawn: list[T] = []
    draw_s = 0.0
    with Judging(scorer, patience) as judging:
        for batch in batches:
            if enough(judging):
                break
            start = time.perf_counter()
            drawing = sampler.draw(batch, sharing, stage)
            draw_s += time.perf_counter() - start
            drawn.append(keep(drawing))
            on_drawn(len(batch))
            judging.ask([key.prompt for key in batch], drawing.images)
        outcomes = judging.finish()
    return Judged(drawn, outcomes, Times(draw_s, judging.score_s, judging.exposed_wait_s))


class Judging:
    """Requests for scores in the background, at most `in_flight` at a time, answered in order.

    Each runs on a daemon thread of its own: a context manager that is left early, and a program that ends, do
    not wait for a service that may be gone.
    """

    def __init__(self, scorer: Scorer, patience: Patience) -> None:
        self.outage = False  # nobody answers: asking for other images is no use now
        self.failed = False  # some images have no scores
        self.score_s = 0.0
        self.exposed_wait_s = 0.0
        self._scorer = scorer
        self._patience = patience
        self._left = threading.Event()
        self._waiting: deque[Future[Outcome]] = deque()
        self._outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def ask(self, prompts: Sequence[str], images: Images) -> None:
        """Have N images (N, H, W, 3) scored; waits first where `in_flight` requests are under way."""
        while len(self._waiting) >= self._patience.in_flight:
            self._take()
        future: Future[Outcome] = Future()
        self._waiting.append(future)
        self._begun()
        _in_background(future, lambda: self._answer(prompts, images), self._ended)

    def finish(self) -> list[Outcome]:
        """Wait for what is under way; the outcomes of all requests, in order. Other exceptions pass."""
        while self._waiting:
            self._take()
        return self._outcomes

    def _take(self) -> None:
        start = time.perf_counter()
        self._outcomes.append(self._waiting.popleft().result())
        self.exposed_wait_s += time.perf_counter() - start

    def _answer(self, prompts: Sequence[str], images: Images) -> Outcome:
        """Scores, asked for up to `score_attempts` times; the last error where none came."""
        attempts = self._patience.score_attempts
        for attempt in range(1, attempts + 1):
            try:
                return finite(self._scorer.score(prompts, images))
            except ScoringError as error:
                pause_s = BACKOFF_S * 2 ** (attempt - 1)
                if attempt == attempts or not error.retryable or self._left.wait(pause_s):
                    self.failed = True
                    if error.outage:  # no |=: another thread may be setting it
                        self.outage = True
                    return error
        raise AssertionError("unreachable: score_attempts is at least 1")

    def _begun(self) -> None:
        with self._lock:
            if self._under_way == 0:
                self._since = time.perf_counter()
            self._under_way += 1

    def _ended(self) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self.score_s += time.perf_counter() - self._since


def _in_background(future: "Future[T]", work: Callable[[], T], done: Callable[[], None]) -> None:
    """Have a daemon thread do `work`, say `done`, then give the result or the exception to the future."""

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            done()
            future.set_exception(error)
        else:
            done()
            future.set_result(result)

    threading.Thread(target=run, name="score", daemon=True).start()


GRACE_GROUPS = 40  # a run may lose its share of so many at once: one lost group of a few is bad luck


class Rollout(NamedTuple):
    """The images of one iteration that were scored, N of them, whole groups only."""

    keys: tuple[ImageKey, ...]
    group: NDArray[np.int64]  # (N,) which prompt of the iteration
    images: Images  # (N, H, W, 3)
    scores: Scores  # (N, K) each
    trajectory: Trajectory
    condition: Condition
    dropped_groups: int
    times: Times


class Pool(NamedTuple):
    """What all processes collected in one iteration, N images in the order of a single process's."""

    scores: Scores  # (N, K) each
    group: NDArray[np.int64]  # (N,)
    clamp_fraction: NDArray[np.float64]  # (N, S) share of x0 that saturates
    entropy: NDArray[np.float64]  # (N, S - 1) of the steps that have noise, nats per dimension
    first: int  # where this process's own images begin
    dropped_groups: int
    times: Times  # of the slowest process, each


def pool_rollouts(rollout: Rollout, processes: Processes) -> Pool:
    """What is to be known of the other processes' rollouts: not their images and latents."""
    raw, z = (processes.gather_rows(field) for field in rollout.scores)
    groups = processes.gather_rows(rollout.group)
    # Every process numbers its own groups from 0.
    starts = np.cumsum([0] + [group.max(initial=-1) + 1 for group in groups])
    clamp_fraction = rollout.trajectory.clamp_fraction.double().cpu().numpy()
    noisy = rollout.trajectory.sigmas[:, :-1]
    entropies = entropy(noisy.flatten(0, 1)).reshape(noisy.shape[:2]).double().cpu().numpy()
    dropped, *times = zip(*processes.gather_values([rollout.dropped_groups, *rollout.times]), strict=True)
    return Pool(
        scores=Scores(np.concatenate(raw), np.concatenate(z)),
        group=np.concatenate([group + start for group, start in zip(groups, starts, strict=False)]),
        clamp_fraction=np.concatenate(processes.gather_rows(clamp_fraction)),
        entropy=np.concatenate(processes.gather_rows(entropies)),
        first=sum(map(len, groups[: processes.rank])),
        dropped_groups=int(sum(dropped)),
        times=Times(*(max(each) for each in times)),
    )


class DropCount:
    """Groups that all processes asked for and lost in a run; stops it where the loss becomes a habit."""

    def __init__(self, limit: float, processes: Processes = ALONE) -> None:
        self.limit = limit
        self._processes = processes
        self.asked = 0
        self.dropped = 0

    def add(self, asked: int, dropped: int, cause: ScoringError | None) -> None:
        """Count one iteration. Raises RolloutError above the limit, or where every group was lost.

        All processes count together, and it is raised in all or in none.
        """
        counts = self._processes.gather_values([asked, dropped])
        causes = self._processes.gather_values(None if cause is None else str(cause))
        asked, dropped = (sum(column) for column in zip(*counts, strict=True))
        first = next((said for said in causes if said is not None), None)
        self.asked += asked
        self.dropped += dropped
        if not dropped:
            return
        if dropped == asked or self.dropped > self.limit * max(self.asked, GRACE_GROUPS):
            raise RolloutError(
                f"{self.dropped} of {self.asked} groups got no scores (limit {self.limit:.0%}): "
                f"{first}; mend the scoring service and start again"
            )


def group_keys(
    prompts: Sequence[str], images_per_prompt: int, *, seed: int, fold: int, iteration: int
) -> tuple[ImageKey, ...]:
    """Keys of one iteration, the images of a prompt side by side."""
    return tuple(
        ImageKey(seed, fold, iteration, prompt, image)
        for prompt in prompts
        for image in range(images_per_prompt)
    )


def collect(
    sampler: ImageSampler,
    scorer: Scorer,
    keys: Sequence[ImageKey],
    config: RolloutConfig,
    micro_batch: int,
    drops: DropCount,
    on_drawn: Callable[[int], object] = int,
) -> Rollout:
    """Draw and score the images of `keys`, `images_per_prompt` a group; `on_drawn` hears how many.

    Where the service is gone for longer than the client asks again, the rest of the iteration counts as lost.
    """
    bounds = micro_batches(len(keys), micro_batch, config.smallest_batch)
    judged = sample_and_score(
        sampler,
        scorer,
        [keys[start:stop] for start, stop in bounds],
        config.share,
        config.reward_stage,
        config,
        enough=lambda judging: judging.outage,
        keep=lambda drawing: drawing,
        on_drawn=on_drawn,
    )
    outcomes = dict(zip(bounds, judged.outcomes, strict=False))
    rows, cause = _whole_groups(outcomes, len(keys), config.images_per_prompt)
    groups = len(keys) // config.images_per_prompt
    dropped = groups - len(rows) // config.images_per_prompt
    drops.add(groups, dropped, cause)
    return _gather(keys, judged, rows, config.images_per_prompt, dropped, len(scorer.evaluators))


def micro_batches(count: int, size: int, smallest: int | None = None) -> list[tuple[int, int]]:
    """Bounds (first, one past the last) of the micro-batches of `count` images, `size` each.

    With `smallest`, the last one is cut in halves again and again, until the last of them is as small.
    """
    cuts = [*range(0, count, size), count] if count else [0]
    while smallest is not None and count and cuts[-1] - cuts[-2] >= 2 * smallest:
        cuts.insert(-1, (cuts[-2] + cuts[-1] + 1) // 2)
    return list(pairwise(cuts))


def _whole_groups(
    outcomes: Mapping[tuple[int, int], Outcome], images: int, group_size: int
) -> tuple[list[int], ScoringError | None]:
    """Rows of the groups in which every image was scored, and why others were not."""
    scored = [range(*bounds) for bounds, outcome in outcomes.items() if isinstance(outcome, Scores)]
    cause = next((outcome for outcome in outcomes.values() if isinstance(outcome, ScoringError)), None)
    lost = {row // group_size for row in set(range(images)).difference(*scored)}
    return [row for row in range(images) if row // group_size not in lost], cause


def _gather(
    keys: Sequence[ImageKey],
    judged: Judged[SampledImages],
    rows: Sequence[int],
    group_size: int,
    dropped: int,
    width: int,
) -> Rollout:
    scored = _with_placeholders(judged, width)
    index = torch.tensor(rows, dtype=torch.int64)  # none, where another process has all that was scored
    return Rollout(
        keys=tuple(keys[row] for row in rows),
        group=np.array([row // group_size for row in rows], dtype=np.int64),
        images=np.concatenate([drawing.images for drawing in judged.drawn])[rows],
        scores=Scores(*(np.concatenate(field)[rows] for field in zip(*scored, strict=True))),
        trajectory=join_trajectories([drawing.trajectory for drawing in judged.drawn]).select(index),
        condition=join_conditions([drawing.condition for drawing in judged.drawn]).select(index),
        dropped_groups=dropped,
        times=judged.times,
    )


def _with_placeholders(judged: Judged[SampledImages], width: int) -> list[Scores]:
    """NaN rows keep the places of unscored images until they are dropped; one that stayed would be loud."""
    blanks = [np.full((len(drawing.images), width), np.nan) for drawing in judged.drawn]
    return [
        outcome if isinstance(outcome, Scores) else Scores(blank, blank)
        for outcome, blank in zip(judged.outcomes, blanks, strict=True)
    ]
