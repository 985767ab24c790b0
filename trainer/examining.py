"""Evaluations while a fold is trained: the averaged policy against the base, on validation prompts."""

import time

from PIL import Image

from trainer.config import TrainerConfig
from trainer.deciding import Examination, Stoppers, examination
from trainer.diagnostics import Record
from trainer.drawing import Studio
from trainer.evaluation import measure
from trainer.intervals import Groups
from trainer.journal import Journal
from trainer.measurements import Measurement
from trainer.pictures import before_and_after
from trainer.processes import ALONE, Processes
from trainer.scoring import Scorer
from trainer.updating import Learner


class Examiner:
    """Evaluates every `evaluation.every` iterations, asks the stoppers, and remembers the newest result."""

    def __init__(
        self,
        studio: Studio,
        scorer: Scorer,
        base: Measurement,
        groups: Groups,
        config: TrainerConfig,
        journal: Journal,
        stoppers: Stoppers,
        processes: Processes = ALONE,
    ) -> None:
        """`base` is the base policy's measurement; the `journal` gets the grids."""
        self._studio = studio
        self._scorer = scorer
        limit = config.evaluation.every_limit
        self._base = base.first(limit)
        self._groups = None if groups is None else groups[:limit]
        self._config = config
        self._journal = journal
        self._stoppers = stoppers
        self._processes = processes
        self._newest: Examination | None = None

    def examine(self, learner: Learner) -> Record:
        """What there is to add to the record of the learner's last iteration: nothing out of turn.

        Raises EvaluationError.
        """
        every, done = self._config.evaluation.every, learner.done
        if every == 0 or done % every:
            return {}
        start = time.perf_counter()
        with learner.average.applied():
            now = measure(
                self._studio,
                self._scorer,
                self._base.prompts,
                self._config.evaluation,
                f"after {done}",
                self._processes,
            )
        self._newest = examination(self._config, self._scorer, done, self._base, now, self._groups)
        self._stoppers.heed(self._newest)
        self._journal.grid(comparison_grid(self._base, now, self._config), done)
        comparison = self._newest.comparison
        record = {"evaluation": comparison.rows() | {"seconds": time.perf_counter() - start}}
        return record | self._newest.watched()

    def composite(self, done: int) -> float | None:
        """Composite of the policy after `done` iterations, where it was evaluated then."""
        if self._newest is None or self._newest.done != done:
            return None
        return self._newest.comparison.composite.after

    def whole(self, done: int, prompts: int) -> Measurement | None:
        """The measurement after `done` iterations, where it took in all of so many prompts."""
        if self._newest is None or self._newest.done != done or len(self._newest.tuned.prompts) != prompts:
            return None
        return self._newest.tuned


def comparison_grid(before: Measurement, after: Measurement, config: TrainerConfig) -> Image.Image:
    """The first prompts of both, side by side."""
    rows, columns = config.evaluation.grid_prompts, config.evaluation.grid_images
    return before_and_after(before.prompts[:rows], before.pictures[:rows], after.pictures[:rows], columns)
