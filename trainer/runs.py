"""One run from start to end: measure the base, train, measure again, leave everything in the run folder."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from rich.console import Console

from trainer.activations import keep_few_activations
from trainer.checkpoints import Checkpoints
from trainer.comparing import sentences, table
from trainer.config import ConfigError, TrainerConfig
from trainer.deciding import Ending, Examination, Stopper, configured_stoppers, examination, gamed
from trainer.drawing import Studio
from trainer.evaluation import measure
from trainer.examining import Examiner, comparison_grid
from trainer.journal import Journal
from trainer.karlo import load_karlo
from trainer.measurements import Measurement
from trainer.pictures import grid
from trainer.policy import DecoderPolicy
from trainer.processes import ALONE, Processes, flat
from trainer.recovery import TUNED_FILE, go_back_to_best, go_on, kept, measure_base, provenance, record
from trainer.resuming import mark_finished, pin_prompts, pin_scorer
from trainer.scoring import Scorer
from trainer.sharing import SHARING_PROMPTS, measure_sharing, sharing_table
from trainer.splits import Split
from trainer.stages import compare_stages, stage_sentences, stage_table
from trainer.storage import RunFolder, model_card
from trainer.streams import PictureKey, stream_seed
from trainer.training import train_fold
from trainer.updating import new_learner


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
        studio = open_studio(config, processes.device(config.device))
        studio.policy.add_lora(config.lora, seed=stream_seed(config.seed, "lora"))
    check_alike(config, scorer, studio.policy, processes)
    learner = new_learner(studio.policy, config, len(scorer.evaluators), processes)
    stoppers = configured_stoppers(config, scorer.evaluators, *others)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoints, provenance(config, scorer))
    go_on(learner, stoppers, checkpoints, config, run, console)
    if config.rollout.measure_sharing:
        record_sharing(studio, scorer, split.train, config, run, processes)
    with processes.one_fate():
        journal = Journal.open(config, run, learner.done) if processes.main else Journal()
    with journal:
        before = measure_base(studio, scorer, split.validation, config, run, processes)
        examiner = Examiner(studio, scorer, before, split.groups, config, journal, stoppers, processes)
        if stoppers.ending is None:
            with kept(checkpoints):
                train_fold(
                    studio,
                    scorer,
                    split.train,
                    config,
                    fold=fold,
                    log=journal.record,
                    processes=processes,
                    learner=learner,
                    last=last,
                    examine=examiner.examine,
                    after=partial(record, checkpoints, run, examiner.composite, stoppers),
                )
        reached = learner.done
        if config.early_stopping.patience:
            go_back_to_best(learner, checkpoints)
        with learner.average.applied():
            known = examiner.whole(learner.done, len(split.validation))
            after = known or measure(studio, scorer, split.validation, config.evaluation, "tuned", processes)
            examined = examination(config, scorer, learner.done, before, after, split.groups)
            result = Result(examined, stoppers.ending, reached)
            if processes.main:
                card = model_card(config, learner.done, scorer.identity, sentences(examined.comparison))
                run.save_lora(studio.policy.save_lora, card)
        if processes.main:
            if known is None:
                journal.scalars({"evaluation": examined.comparison.rows()}, learner.done)
                journal.grid(comparison_grid(before, after, config), learner.done)
            _leave(result, run, config)
            _show(result, run, console)
    return result


def _leave(result: Result, run: RunFolder, config: TrainerConfig) -> None:
    """Write what the run came to; that it is finished last."""
    before, after = result.examined.base, result.examined.tuned
    after.save(run.path / TUNED_FILE)
    run.write_json("evaluation.json", result.to_dict())
    _save_grids(run, before, after, config)
    mark_finished(run, config.iterations, result.reached, result.done)


def _show(result: Result, run: RunFolder, console: Console) -> None:
    console.print(table(result.examined.comparison))
    if result.ending is not None:
        console.print(f"Ended early ({result.ending.by}): {result.ending.reason}.")
    for line in result.examined.sentences():
        console.print(line)
    console.print(f"Pictures: {run.path / 'before_after.png'}", soft_wrap=True)
    console.print(f"LoRA:     {run.lora}", soft_wrap=True)


def record_sharing(
    studio: Studio,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    run: RunFolder,
    processes: Processes,
) -> None:
    """Write once to the run what common random numbers remove of the base policy's within-prompt variance."""
    with processes.one_fate(), studio.policy.base():
        if processes.main and not (run.path / "sharing.json").exists():
            report = measure_sharing(studio, scorer, prompts[:SHARING_PROMPTS], config)
            run.write_json("sharing.json", report.to_dict())


def variance_run(config: TrainerConfig, prompts: Sequence[str], scorer: Scorer, console: Console) -> None:
    """Print what the configured sharing removes of the within-prompt variance, and each part of it alone."""
    check_evaluators(config, scorer)
    console.print(sharing_table(measure_sharing(open_studio(config), scorer, prompts, config, each=True)))


def stages_run(
    config: TrainerConfig, prompts: Sequence[str], images_per_prompt: int, scorer: Scorer, console: Console
) -> None:
    """Print how far scores before and after super-resolution agree, and what leaving it out saves."""
    check_evaluators(config, scorer)
    report = compare_stages(open_studio(config), scorer, prompts, images_per_prompt, config)
    console.print(stage_table(report))
    groups = min(config.rollout.prompts_per_iteration, len(prompts))
    for line in stage_sentences(report, groups * config.rollout.images_per_prompt):
        console.print(line)


def check_share(config: TrainerConfig, prompts: Sequence[str], processes: Processes) -> None:
    """Raises ConfigError where an iteration has fewer prompts than there are processes to draw them."""
    groups = min(config.rollout.prompts_per_iteration, len(prompts))
    if groups < processes.world:
        raise ConfigError(
            f"trainer.rollout.prompts_per_iteration: {groups} prompts cannot be shared among "
            f"{processes.world} processes, whole groups each; raise it or start fewer processes"
        )


def check_alike(config: TrainerConfig, scorer: Scorer, policy: DecoderPolicy, processes: Processes) -> None:
    """Raises JobError where one process has another configuration, scorer or adapter than the main one."""
    start_alike = "start all processes with the same command and files"
    processes.check_alike("configuration", flat(config.model_dump(mode="json")), start_alike)
    processes.check_alike("scorer", scorer.identity, "point all processes at the same service")
    processes.check_alike("adapter", {"LoRA": checksum(policy)}, start_alike)


def check_evaluators(config: TrainerConfig, scorer: Scorer) -> None:
    """Raises ConfigError where a weight names an evaluator that the service does not have."""
    wanted = {*config.objective.weights, *config.judged_by, config.guard.evaluator} - {None}
    unknown = sorted(map(str, wanted - set(scorer.evaluators)))
    if unknown:
        raise ConfigError(
            f"trainer.objective.weights: the service has no evaluator {', '.join(unknown)} (named there, in "
            f"evaluation.weights or as guard.evaluator); it has {', '.join(scorer.evaluators)}"
        )


def checksum(policy: DecoderPolicy) -> str:
    """Hash of the adapter, the same for equal bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(policy.lora.items()):
        digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def open_studio(config: TrainerConfig, device: str | None = None) -> Studio:
    """Load Karlo on the device, or the configured one; the policy has no adapter yet. Raises ConfigError."""
    device = device or config.device
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _check_device(device)
    quiet_libraries()
    karlo = load_karlo(
        config.karlo, device, getattr(torch, config.precision), getattr(torch, config.policy_precision)
    )
    if config.update.gradient_checkpointing:
        keep_few_activations(karlo.decoder)
    if config.compile:
        karlo.decoder.compile()
    policy = DecoderPolicy(
        karlo.decoder,
        karlo.decoder_scheduler,
        steps=config.sampling.decoder_steps,
        guidance=config.sampling.decoder_guidance,
    )
    return Studio(karlo, policy, config.sampling, offload=config.memory.offload)


def _check_device(name: str) -> None:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.device: {name}, but torch finds no GPU here; set trainer.device=cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"trainer.device: {name!r} is no device here; set cpu or cuda") from error


def quiet_libraries() -> None:
    """Errors only from diffusers and transformers: their notes on loading are no news to our users."""
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def generate_run(
    config: TrainerConfig, lora: Path | None, prompts: Sequence[str], count: int, out: Path
) -> Path:
    """Draw `count` pictures of each prompt, with the LoRA if there is one, and save them as one PNG grid."""
    studio = open_studio(config)
    if lora is not None:
        studio.policy.load_lora(lora)
    keys = [PictureKey(config.seed, 0, -1, prompt, image) for prompt in prompts for image in range(count)]
    size = config.sampling.micro_batch
    batches = [studio.draw(keys[start : start + size]).pictures for start in range(0, len(keys), size)]
    drawn = np.concatenate(batches)
    sheet = grid(prompts, drawn.reshape(len(prompts), count, *drawn.shape[1:]), columns=count)
    return RunFolder(out.parent).save_picture(out.name, sheet)


def _save_grids(run: RunFolder, before: Measurement, after: Measurement, config: TrainerConfig) -> None:
    rows, columns = config.evaluation.grid_prompts, config.evaluation.grid_images
    prompts, old, new = before.prompts[:rows], before.pictures[:rows], after.pictures[:rows]
    run.save_picture("before.png", grid(prompts, old, columns))
    run.save_picture("after.png", grid(prompts, new, columns))
    run.save_picture("before_after.png", comparison_grid(before, after, config))
