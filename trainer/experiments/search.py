"""Hyperparameter search: trials trained from the base with other settings; the winner is measured again.

    trial 0 trains nothing: its gain is what the procedure measures when nothing has changed
    for each trial n = 1, 2, ...:
        sample settings from (seed, n), train on fold 0's training prompts, end early if the pruner says so
        gain = composite on fold 0's validation prompts, against the base
    winner: the best complete trial, if its gain is above 0 and above the null trial's
    measure the winner again on the same prompts with fresh random streams

The winner was chosen for its gain, so that gain is optimistic; the gain on fresh streams shows by how much.
The search never uses the test prompts.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from trainer.config import TrainerConfig, flatten, with_values
from trainer.data.splits import Split
from trainer.evaluation.evaluate import measure
from trainer.evaluation.stopping import evaluate_against_base
from trainer.experiments.experiment import Experiment
from trainer.experiments.run_trial import SEARCH, TRIALS, run_trial
from trainer.experiments.space import check_space, trial_config
from trainer.experiments.study import (
    SERVICE_KEY,
    SearchStudy,
    gain_of,
    location,
    open_study,
    read_trials,
)
from trainer.experiments.trial import (
    GainRow,
    Trial,
    TrialSettings,
    Winner,
    choose_winner,
    search_sentences,
    trial_table,
)
from trainer.experiments.workers import WorkerCommand, run_side_by_side
from trainer.rl.rewards import Scorer
from trainer.runs.folder import MUTABLE_SETTINGS, RunFolder
from trainer.runs.setup import load_sampler
from trainer.runtime.errors import JobError
from trainer.runtime.files import Lock

SEARCH_FILE, FRESH_FILE = "search.json", "fresh.json"
WORKER_CONFIG = f"{SEARCH}/config.yaml"  # read by the command `trials`, which starts a worker
POLL_S = 0.5

# Settings that all trials of a study share. Paths are not among them: workers may be on several machines.
SHARED = (
    *("seed", "sampling", "lora", "rollout", "objective", "update", "evaluation", "early_stopping", "guard"),
    *("precision", "decoder_precision", "ablation"),
)


def search_winner(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console
) -> TrialSettings:
    """Return the winner's settings and the composite that chose it; empty without a winner."""
    winner = search(experiment, config, scorer, console)
    if winner is None:
        return {}
    return {**winner.params, "evaluation.weights": dict(config.composite_weights)}


def search(experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console) -> Winner | None:
    """Run all unfinished trials, in several processes if configured, and return the winner, if there is one.

    Resumes a search that was interrupted.

    Raises:
        ConfigError: The space cannot be searched.
        JobError: Workers elsewhere have not finished their trials.
    """
    check_space(config, scorer)
    experiment.pin(scorer)
    if config.search.workers > 1:
        _run_workers(experiment, config, console)
    with _opened_study(experiment, config, scorer) as study:
        _run_trials(study, experiment, config, scorer, console)
        return _conclude(study, experiment, config, scorer, console)


def work(experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console) -> None:
    """Run trials beside other workers until none is left to claim."""
    check_space(config, scorer)
    experiment.pin(scorer)
    with _opened_study(experiment, config, scorer) as study:
        _run_trials(study, experiment, config, scorer, console)


def _run_workers(experiment: Experiment, config: TrainerConfig, console: Console) -> None:
    """Run the trials in worker processes. This process runs what a killed worker leaves."""
    experiment.folder.write_config(config, WORKER_CONFIG)
    storage = config.search.storage
    if storage is not None and storage.password is not None:
        os.environ["PGPASSWORD"] = storage.password.get_secret_value()  # inherited, and on no command line
    command = [sys.executable, "-m", "trainer", "trials", "--run", str(experiment.path)]
    # A search at the same time writes the same file, but has its own reward service, which ends with it.
    command += ["--set", f"service.url={config.service.url}"]
    if config.threads is not None:
        command += ["--set", f"threads={max(1, config.threads // config.search.workers)}"]
    workers = min(config.search.workers, config.search.trials + config.search.null_trial)
    jobs = [
        WorkerCommand(f"worker {n}", command, experiment.path / SEARCH / f"worker-{n}.log")
        for n in range(1, workers + 1)
    ]
    run_side_by_side(jobs, workers, console)


# ------------------------------------------------------------------------------------------- study


@contextmanager
def _opened_study(experiment: Experiment, config: TrainerConfig, scorer: Scorer) -> Iterator[SearchStudy]:
    folder = experiment.path / SEARCH / TRIALS
    total = config.search.trials + config.search.null_trial
    identity = _identity(config, experiment.splits.fold(0), scorer)
    name = study_name(experiment, config)
    with open_study(config.search, folder, name, config.seed, total, identity) as study:
        yield study


def study_name(experiment: Experiment, config: TrainerConfig) -> str:
    """Return the study's name in its database."""
    return config.search.study or experiment.path.name


def _identity(config: TrainerConfig, split: Split, scorer: Scorer) -> dict[str, str]:
    """Return what all trials of a study have in common, on every machine."""
    search = config.search
    null_config = trial_config(config, {})
    free = tuple(f"{key}." for key in MUTABLE_SETTINGS)
    shared = {
        key: json.dumps(value)
        for key, value in flatten(null_config.model_dump(mode="json", include=set(SHARED))).items()
        if not f"{key}.".startswith(free)
    }
    rules = ("space", "sampler", "pruner", "warmup_trials", "warmup_iterations", "reduction", "null_trial")
    return {
        **shared,
        **{f"search.{key}": _digest(search.model_dump(mode="json")[key]) for key in rules},
        "iterations": str(null_config.iterations),
        "evaluation.every": str(null_config.evaluation.every),
        "the prompts": _digest(split),
        SERVICE_KEY: _digest(dict(scorer.identity)),
    }


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def _run_trials(
    study: SearchStudy, experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console
) -> None:
    """Claim and run trials until all of this folder are finished; wait for those of other workers here."""
    while True:
        claimed = study.claim()
        if claimed is not None:
            with claimed:
                run_trial(claimed, experiment, config, scorer, console)
            _write_results(study, experiment, config)
        elif len(study.unfinished()) > len(study.running_elsewhere()):
            time.sleep(POLL_S)
        else:
            return


# ------------------------------------------------------------------------------------------- winner


def _conclude(
    study: SearchStudy, experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console
) -> Winner | None:
    """Choose the winner, measure it again, write search.json and print the result."""
    _check_none_elsewhere(study, experiment, config)
    best = choose_winner(read_trials(study.trials(), null_trial=config.search.null_trial))
    fresh = None
    if best is not None:
        _check_is_here(study, experiment, config, best)
        with Lock(experiment.path / SEARCH / ".concluding", wait_s=None):
            fresh = _measure_again(experiment, config, best, scorer, console)
    winner = _write_results(study, experiment, config, best, fresh)
    console.print(trial_table(read_trials(study.trials(), null_trial=config.search.null_trial), winner))
    for line in experiment.folder.read_json(SEARCH_FILE)["sentences"]:
        console.print(line)
    return winner


def _check_none_elsewhere(study: SearchStudy, experiment: Experiment, config: TrainerConfig) -> None:
    others = study.running_elsewhere()
    if others:
        _write_results(study, experiment, config)
        places = "; ".join(f"trial {trial.number} at {location(trial)}" for trial in others)
        raise JobError(
            f"{experiment.path}: other workers are still running trials of this study: {places}; run this "
            "command again when they have ended, or there, if they were killed"
        )


def _check_is_here(study: SearchStudy, experiment: Experiment, config: TrainerConfig, best: Trial) -> None:
    source = next(trial for trial in study.trials() if trial.number == best.number)
    if not study.is_local(source):
        _write_results(study, experiment, config)
        raise JobError(
            f"{experiment.path}: the winner, trial {best.number}, is at {location(source)}; run this command "
            "there to measure it again and to continue with it"
        )


def _measure_again(
    experiment: Experiment, config: TrainerConfig, best: Trial, scorer: Scorer, console: Console
) -> GainRow:
    """Return the winner's gain on the same prompts, with fresh random streams for both policies.

    Raises:
        EvaluationError: An image cannot be scored.
    """
    run = RunFolder(experiment.path / SEARCH / TRIALS / f"{best.number:04d}")
    stored: GainRow | None = run.read_json(FRESH_FILE)
    if stored is not None:
        return stored
    console.print(f"Trial {best.number} is the best: measuring it again on fresh random streams")
    selected = trial_config(config, best.params)
    fresh = with_values(selected, {"evaluation.seed": selected.evaluation.seed + 1})
    split = experiment.splits.fold(0)
    sampler = load_sampler(fresh)

    base = measure(sampler, scorer, split.validation, fresh.evaluation, "base again")
    sampler.policy.load_lora(run.lora)
    tuned = measure(sampler, scorer, split.validation, fresh.evaluation, "winner again")
    result = evaluate_against_base(fresh, scorer, best.iterations, base, tuned, split.groups)
    gain: GainRow = result.comparison.rows()[result.comparison.composite.name]  # type: ignore[assignment]
    run.write_json(FRESH_FILE, gain)
    return gain


def _write_results(
    study: SearchStudy,
    experiment: Experiment,
    config: TrainerConfig,
    best: Trial | None = None,
    fresh: GainRow | None = None,
) -> Winner | None:
    """Write search.json from the study as it is now; return the winner."""
    with Lock(experiment.path / SEARCH / ".writing", wait_s=None):
        stored = study.trials()
        gains = {trial.number: gain_of(trial) for trial in stored}
        trials = read_trials(stored, null_trial=config.search.null_trial)
        winner = None
        if best is not None:
            selected = gains[best.number]
            assert selected is not None  # it is complete
            winner = Winner(best.number, best.params, selected, fresh)
        null_gain = gains.get(0) if config.search.null_trial else None
        experiment.folder.write_json(
            SEARCH_FILE,
            {
                "trials": [trial.to_dict() for trial in trials],
                "winner": winner and winner.to_dict(),
                "sampler": config.search.sampler,
                "pruner": config.search.pruner,
                "study": study_name(experiment, config),
                "sentences": search_sentences(trials, winner, null_gain),
            },
        )
    return winner
