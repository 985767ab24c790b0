"""One run from start to end: measure the base, train, measure again, leave everything in the run folder.

Evaluations while a fold is trained: the averaged policy against the base, on validation prompts.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console

from trainer.config import TrainerConfig
from trainer.data.splits import Split
from trainer.evaluation.comparison import Measurement, sentences, table
from trainer.evaluation.evaluate import measure
from trainer.evaluation.intervals import Groups
from trainer.evaluation.stopping import (
    Ending,
    Examination,
    Stopper,
    Stoppers,
    configured_stoppers,
    examination,
    gamed,
)
from trainer.rl.replay import Record
from trainer.rl.rewards import Scorer
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import TrainingState, new_training_state, train_fold
from trainer.runs.checkpoints import (
    TUNED_FILE,
    Checkpoints,
    go_back_to_best,
    go_on,
    kept,
    measure_base,
    provenance,
    record,
)
from trainer.runs.folder import RunFolder, mark_finished, model_card, pin_prompts, pin_scorer
from trainer.runs.grids import comparison_grid, save_grids
from trainer.runs.setup import check_alike, check_evaluators, check_share, load_sampler
from trainer.runs.studies import record_sharing
from trainer.runs.trackers import Journal
from trainer.runtime.distributed import ALONE, Processes
from trainer.runtime.rng import stream_seed


class Examiner:
    """Evaluates every `evaluation.every` iterations, asks the stoppers, and remembers the newest result."""

    def __init__(
        self,
        sampler: ImageSampler,
        scorer: Scorer,
        base: Measurement,
        groups: Groups,
        config: TrainerConfig,
        journal: Journal,
        stoppers: Stoppers,
        processes: Processes = ALONE,
    ) -> None:
        """`base` is the base policy's measurement; the `journal` gets the grids."""
        self._sampler = sampler
        self._scorer = scorer
        limit = config.evaluation.every_limit
        self._base = base.first(limit)
        self._groups = None if groups is None else groups[:limit]
        self._config = config
        self._journal = journal
        self._stoppers = stoppers
        self._processes = processes
        self._newest: Examination | None = None

    def examine(self, training: TrainingState) -> Record:
        """What there is to add to the record of the trainer's last iteration: nothing out of turn.

        Raises EvaluationError.
        """
        every, done = self._config.evaluation.every, training.done
        if every == 0 or done % every:
            return {}
        start = time.perf_counter()
        with training.average.applied():
            now = measure(
                self._sampler,
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


class Result(NamedTuple):
    """What a run came to: its policy after `done` iterations against the base, on all validation prompts."""

    examined: Examination
    ending: Ending | None  # why it ended before its last iteration, if it did
    reached: int  # iterations that were trained

    @property
    def done(self) -> int:
        """Iterations behind the policy that is evaluated and shipped."""
        return self.examined.done

    @property
    def gamed(self) -> str | None:
        """Why the gain is not to be believed, if so."""
        return gamed(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ending = self.ending and self.ending._asdict()
        return self.examined.comparison.to_dict() | self.examined.watched() | {"ending": ending}


def train_run(
    config: TrainerConfig,
    split: Split,
    scorer: Scorer,
    run: RunFolder,
    console: Console,
    processes: Processes = ALONE,
    *,
    fold: int = 0,
    last: int | None = None,
    others: Sequence[Stopper] = (),
) -> Result:
    """Train on the split's training prompts, evaluate on the others; save LoRA, grids, metrics, comparison.

    A run that was ended before, at whatever moment, goes on from its newest whole checkpoint. It ends after
    `last` iterations, by default all, or when a stopper says so: those of the configuration, and `others`.
    With early stopping, what is evaluated in the end and saved is the best checkpoint. Of several processes
    the main one writes and speaks.
    """
    check_evaluators(config, scorer)
    check_share(config, split.train, processes)
    with processes.one_fate():
        if processes.main:
            pin_scorer(run, scorer.identity)
            pin_prompts(run, split)
        sampler = load_sampler(config, processes.device(config.device))
        sampler.policy.add_lora(config.lora, seed=stream_seed(config.seed, "lora"))
    check_alike(config, scorer, sampler.policy, processes)
    training = new_training_state(sampler.policy, config, len(scorer.evaluators), processes)
    stoppers = configured_stoppers(config, scorer.evaluators, *others)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoints, provenance(config, scorer))
    go_on(training, stoppers, checkpoints, config, run, console)
    if config.rollout.measure_sharing:
        record_sharing(sampler, scorer, split.train, config, run, processes)
    with processes.one_fate():
        journal = Journal.open(config, run, training.done) if processes.main else Journal()
    with journal:
        before = measure_base(sampler, scorer, split.validation, config, run, processes)
        examiner = Examiner(sampler, scorer, before, split.groups, config, journal, stoppers, processes)
        if stoppers.ending is None:
            with kept(checkpoints):
                train_fold(
                    sampler,
                    scorer,
                    split.train,
                    config,
                    fold=fold,
                    log=journal.record,
                    processes=processes,
                    training=training,
                    last=last,
                    examine=examiner.examine,
                    after=partial(record, checkpoints, run, examiner.composite, stoppers),
                )
        reached = training.done
        if config.early_stopping.patience:
            go_back_to_best(training, checkpoints)
        with training.average.applied():
            known = examiner.whole(training.done, len(split.validation))
            after = known or measure(sampler, scorer, split.validation, config.evaluation, "tuned", processes)
            examined = examination(config, scorer, training.done, before, after, split.groups)
            result = Result(examined, stoppers.ending, reached)
            if processes.main:
                card = model_card(config, training.done, scorer.identity, sentences(examined.comparison))
                run.save_lora(sampler.policy.save_lora, card)
        if processes.main:
            if known is None:
                journal.scalars({"evaluation": examined.comparison.rows()}, training.done)
                journal.grid(comparison_grid(before, after, config), training.done)
            _leave(result, run, config)
            _show(result, run, console)
    return result


def _leave(result: Result, run: RunFolder, config: TrainerConfig) -> None:
    """Write what the run came to; that it is finished last."""
    before, after = result.examined.base, result.examined.tuned
    after.save(run.path / TUNED_FILE)
    run.write_json("evaluation.json", result.to_dict())
    save_grids(run, before, after, config)
    mark_finished(run, config.iterations, result.reached, result.done)


def _show(result: Result, run: RunFolder, console: Console) -> None:
    console.print(table(result.examined.comparison))
    if result.ending is not None:
        console.print(f"Ended early ({result.ending.by}): {result.ending.reason}.")
    for line in result.examined.sentences():
        console.print(line)
    console.print(f"Images: {run.path / 'before_after.png'}", soft_wrap=True)
    console.print(f"LoRA:     {run.lora}", soft_wrap=True)
