"""Training run from start to end: measure the base, train, evaluate, and leave everything in the run folder.

While a fold is trained, the averaged policy is evaluated against the base on validation prompts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich.console import Console

from trainer.config import TrainerConfig
from trainer.data.splits import Split
from trainer.evaluation.comparison import Measurement, comparison_sentences, comparison_table
from trainer.evaluation.evaluate import measure
from trainer.evaluation.stopping import (
    Ending,
    EvaluationResult,
    Stopper,
    Stoppers,
    configured_stoppers,
    evaluate_against_base,
    reward_hacking_reason,
)
from trainer.rl.replay import Record
from trainer.rl.rewards import Scorer
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import Callback, TrainingState, new_training_state, train_fold
from trainer.runs.checkpoints import Checkpoints, capture, provenance, restore_best, resume_training
from trainer.runs.folder import (
    BASE_FILE,
    TUNED_FILE,
    RunFolder,
    mark_finished,
    model_card,
    pin_prompts,
    pin_scorer,
)
from trainer.runs.grids import comparison_grid, save_grids
from trainer.runs.setup import (
    check_evaluators,
    check_processes_agree,
    check_prompts_per_process,
    load_sampler,
)
from trainer.runs.studies import record_sharing
from trainer.runs.trackers import RunLogger
from trainer.runtime.distributed import ALONE, Processes
from trainer.runtime.rng import stream_seed


class RunResult(NamedTuple):
    """Result of a run: its policy against the base, on all validation prompts."""

    evaluation: EvaluationResult
    ending: Ending | None  # why it ended before its last iteration, if it did
    reached: int  # iterations that were trained

    @property
    def done(self) -> int:
        """Iterations behind the policy that is evaluated and saved."""
        return self.evaluation.done

    @property
    def reward_hacking_reason(self) -> str | None:
        """Reason to take the gain for reward hacking, or None."""
        return reward_hacking_reason(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of evaluation.json."""
        ending = self.ending and self.ending._asdict()
        return self.evaluation.comparison.to_dict() | self.evaluation.monitors() | {"ending": ending}


def train_run(
    config: TrainerConfig,
    split: Split,
    scorer: Scorer,
    folder: RunFolder,
    console: Console,
    processes: Processes = ALONE,
    *,
    fold: int = 0,
    last: int | None = None,
    stoppers: Sequence[Stopper] = (),
) -> RunResult:
    """Train on the split's training prompts, evaluate on its validation prompts, and save the result.

    An interrupted run resumes from its newest complete checkpoint. With early stopping, the policy that is
    evaluated and saved is that of the best checkpoint. Of several processes, the main one writes and prints.

    Args:
        fold: Number of the fold, part of every random seed.
        last: Iterations after which to end; by default all that are configured.
        stoppers: Further stoppers beside the configured ones; any of them may end the run.
    """
    run = TrainRun.prepare(config, split, scorer, folder, console, processes, stoppers)
    with run.logger:
        callback = run.loop(fold=fold, last=last)
        return run.finish(callback)


@dataclass(frozen=True)
class TrainRun:
    """A run whose models are loaded and whose state is that of its newest checkpoint."""

    config: TrainerConfig
    split: Split
    scorer: Scorer
    folder: RunFolder
    console: Console
    processes: Processes
    sampler: ImageSampler
    training: TrainingState
    stoppers: Stoppers
    checkpoints: Checkpoints
    logger: RunLogger

    @classmethod
    def prepare(
        cls,
        config: TrainerConfig,
        split: Split,
        scorer: Scorer,
        folder: RunFolder,
        console: Console,
        processes: Processes,
        stoppers: Sequence[Stopper],
    ) -> Self:
        """Check the settings, load the models, resume from the newest checkpoint, and open the logger."""
        sampler = _checked_sampler(config, split, scorer, folder, processes)
        training = new_training_state(sampler.policy, config, len(scorer.evaluators), processes)
        all_stoppers = configured_stoppers(config, scorer.evaluators, *stoppers)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoints, provenance(config, scorer))
        resume_training(training, all_stoppers, checkpoints, config, folder, console)
        if config.rollout.measure_sharing:
            record_sharing(sampler, scorer, split.train, config, folder, processes)
        with processes.fail_together():
            logger = RunLogger.open(config, folder, training.done) if processes.main else RunLogger()
        return cls(
            config,
            split,
            scorer,
            folder,
            console,
            processes,
            sampler,
            training,
            all_stoppers,
            checkpoints,
            logger,
        )

    def loop(self, *, fold: int = 0, last: int | None = None) -> "RunCallback":
        """Measure the base policy, then train until the last iteration or a stopper ends the fold."""
        callback = RunCallback(self, self._base_measurement())
        if self.stoppers.ending is None:
            with self.checkpoints.flushed_on_exit():
                train_fold(
                    self.sampler,
                    self.scorer,
                    self.split.train,
                    self.config,
                    fold=fold,
                    processes=self.processes,
                    training=self.training,
                    last=last,
                    callback=callback,
                )
        return callback

    def finish(self, callback: "RunCallback") -> RunResult:
        """Evaluate the policy on all validation prompts, save and print the result."""
        config, training = self.config, self.training
        reached = training.done
        if config.early_stopping.patience:
            restore_best(training, self.checkpoints)
        with training.average.applied():
            evaluated = callback.full_measurement(training.done)
            tuned = evaluated or self.measure("tuned")
            evaluation = evaluate_against_base(
                config, self.scorer, training.done, callback.base, tuned, self.split.groups
            )
            result = RunResult(evaluation, self.stoppers.ending, reached)
            if self.processes.main:
                self._save_lora(result)
        if self.processes.main:
            if evaluated is None:
                self.logger.log_scalars({"evaluation": evaluation.comparison.rows()}, training.done)
                self.logger.log_grid(comparison_grid(callback.base, tuned, config), training.done)
            self._save(result)
            self._print(result)
        return result

    def measure(self, description: str, prompts: Sequence[str] | None = None) -> Measurement:
        """Measure the current policy on prompts, by default on all validation prompts."""
        prompts = self.split.validation if prompts is None else prompts
        return measure(
            self.sampler, self.scorer, prompts, self.config.evaluation, description, self.processes
        )

    def _base_measurement(self) -> Measurement:
        """Return the measurement of the base policy: the one in the run folder, or a new one, saved there."""
        path, prompts = self.folder.path / BASE_FILE, self.split.validation
        content = _read_measurement(path, prompts) if self.processes.main else b""
        content = self.processes.gather(content)[0]
        if content:
            return Measurement.decode(content, prompts)
        with self.sampler.policy.base():
            measurement = self.measure("base")
        if self.processes.main:
            measurement.save(path)
        return measurement

    def _save_lora(self, result: RunResult) -> None:
        sentences = comparison_sentences(result.evaluation.comparison)
        card = model_card(self.config, result.done, self.scorer.identity, sentences)
        self.folder.save_lora(self.sampler.policy.save_lora, card)

    def _save(self, result: RunResult) -> None:
        """Write the result; the mark that the run is finished comes last."""
        base, tuned = result.evaluation.base, result.evaluation.tuned
        tuned.save(self.folder.path / TUNED_FILE)
        self.folder.write_json("evaluation.json", result.to_dict())
        save_grids(self.folder, base, tuned, self.config)
        mark_finished(self.folder, self.config.iterations, result.reached, result.done)

    def _print(self, result: RunResult) -> None:
        print_line = self.console.print
        print_line(comparison_table(result.evaluation.comparison))
        if result.ending is not None:
            print_line(f"Ended early ({result.ending.by}): {result.ending.reason}.")
        for line in result.evaluation.sentences():
            print_line(line)
        print_line(f"Images: {self.folder.path / 'before_after.png'}", soft_wrap=True)
        print_line(f"LoRA:   {self.folder.lora}", soft_wrap=True)


class RunCallback(Callback):
    """Evaluation, logging and checkpoints of a run, after each iteration."""

    def __init__(self, run: TrainRun, base: Measurement) -> None:
        """`base` is the base policy's measurement on all validation prompts."""
        self._run = run
        self.base = base
        limit = run.config.evaluation.every_limit
        self._base = base.first(limit)
        self._groups = run.split.groups[:limit]
        self._latest: EvaluationResult | None = None

    def on_evaluation(self, training: TrainingState) -> Record:
        """Evaluate every `evaluation.every` iterations, inform the stoppers, and log the images.

        Raises:
            EvaluationError: The images could not be scored.
        """
        run, done = self._run, training.done
        every = run.config.evaluation.every
        if every == 0 or done % every:
            return {}
        start = time.perf_counter()
        with training.average.applied():
            tuned = run.measure(f"after {done}", self._base.prompts)
        result = evaluate_against_base(run.config, run.scorer, done, self._base, tuned, self._groups)
        self._latest = result
        run.stoppers.on_evaluation(result)
        run.logger.log_grid(comparison_grid(self._base, tuned, run.config), done)
        evaluation = result.comparison.rows() | {"seconds": time.perf_counter() - start}
        return {"evaluation": evaluation, **result.monitors()}

    def on_iteration(self, training: TrainingState, record: Record) -> bool:
        """Log the iteration and save a checkpoint if one is due; return whether a stopper ends the fold."""
        run = self._run
        if run.processes.main:
            run.logger.log_iteration(record)
            snapshot = capture(
                training,
                stopper=run.stoppers.state(),
                composite=self._composite(training.done),
                metrics_bytes=run.folder.metrics_bytes(),
            )
            run.checkpoints.add(snapshot)
        return run.stoppers.ending is not None

    def full_measurement(self, done: int) -> Measurement | None:
        """Return the measurement after `done` iterations, if one was made then on all validation prompts."""
        if self._latest is None or self._latest.done != done:
            return None
        tuned = self._latest.tuned
        return tuned if len(tuned.prompts) == len(self.base.prompts) else None

    def _composite(self, done: int) -> float | None:
        """Return the composite of the policy after `done` iterations, if it was evaluated then."""
        if self._latest is None or self._latest.done != done:
            return None
        return self._latest.comparison.composite.after


def _checked_sampler(
    config: TrainerConfig, split: Split, scorer: Scorer, folder: RunFolder, processes: Processes
) -> ImageSampler:
    """Load the models with a new adapter, after the checks that all processes and earlier runs agree."""
    check_evaluators(config, scorer)
    check_prompts_per_process(config, split.train, processes)
    with processes.fail_together():
        if processes.main:
            pin_scorer(folder, scorer.identity)
            pin_prompts(folder, split)
        sampler = load_sampler(config, processes.device(config.device))
        sampler.policy.add_lora(config.lora, seed=stream_seed(config.seed, "lora"))
    check_processes_agree(config, scorer, sampler.policy, processes)
    return sampler


def _read_measurement(path: Path, prompts: Sequence[str]) -> bytes:
    """Return the file's content; empty if it is missing or damaged: it can be measured again."""
    try:
        content = path.read_bytes()
        Measurement.decode(content, prompts)
    except (FileNotFoundError, ValueError):
        return b""
    return content
