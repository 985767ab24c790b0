"""`reward-trainer search`: trials, each from the base with other settings; the best one, measured again.

    trial 0 trains nothing: what the procedure measures where there is nothing to measure
    for each trial n = 1, 2, ...:
        draw settings from (seed, n), train on fold 0's training prompts, end early if the pruner says so
        gain = composite on fold 0's validation prompts, against the base
    winner: the best complete trial, if it gains more than nothing
    measure the winner again on the same prompts with fresh random streams

The winner was chosen for its gain, so that flatters; its gain on fresh streams shows by how much. Nothing
here looks at the test prompts.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from trainer.config import TrainerConfig, flat, password_of, with_values
from trainer.data.splits import Split
from trainer.evaluation.evaluate import measure
from trainer.evaluation.stopping import examination
from trainer.experiments.experiment import Experiment
from trainer.experiments.ranking import Row, choose, sentences, table
from trainer.experiments.space import Settings, check_space, trial_config
from trainer.experiments.study import OUTCOME, TrialsStudy, open_study, owner_of, rows
from trainer.experiments.trial import SEARCH, TRIALS, run_trial
from trainer.experiments.workers import Job, run_side_by_side
from trainer.rl.rewards import Scorer
from trainer.runs.folder import FREE, RunFolder
from trainer.runs.setup import load_sampler
from trainer.runtime.errors import JobError

SEARCH_FILE, FRESH_FILE = "search.json", "fresh.json"
WORKER_CONFIG = f"{SEARCH}/config.yaml"  # read by `trials`, which is how a worker is begun
POLL_S = 0.5

# Settings that all trials of a study share; paths are not among them, for workers may be on several machines.
SHARED = (
    *("seed", "sampling", "lora", "rollout", "objective", "update", "evaluation", "early_stopping", "guard"),
    *("precision", "decoder_precision", "ablation"),
)


def search_winner(
    experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console
) -> Settings:
    """The settings to go on with: the winner's, and the composite it was chosen by; none without a winner."""
    winner = search(experiment, config, scorer, console)
    if winner is None:
        return {}
    return {**winner["params"], "evaluation.weights": dict(config.reward_evaluators)}


def search(experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console) -> Row | None:
    """Run all trials that are not finished, side by side where so configured; the winner, if there is one.

    Goes on where it was ended. Raises ConfigError where the space cannot be tried, and JobError where others
    have trials still to end.
    """
    check_space(config, scorer)
    experiment.pin(scorer)
    if config.search.workers > 1:
        _side_by_side(experiment, config, console)
    with _opened(experiment, config, scorer) as study:
        run_trials(study, experiment, config, scorer, console)
        return _conclude(study, experiment, config, scorer, console)


def work(experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console) -> None:
    """Run trials until there are none left to take, beside others who do the same."""
    check_space(config, scorer)
    experiment.pin(scorer)
    with _opened(experiment, config, scorer) as study:
        run_trials(study, experiment, config, scorer, console)


def _side_by_side(experiment: Experiment, config: TrainerConfig, console: Console) -> None:
    """Have processes of their own run the trials. What they leave, if one is killed, this one does."""
    experiment.folder.write_config(config, WORKER_CONFIG)
    password = password_of(config.search.storage or "")
    if password is not None:
        os.environ["PGPASSWORD"] = password  # theirs too, and on no command line
    command = [sys.executable, "-m", "trainer", "trials", "--run", str(experiment.path)]
    # Another search beside this one writes the same file, and has a reward service of its own that ends with it.
    command += ["--set", f"service.url={config.service.url}"]
    if config.threads is not None:
        command += ["--set", f"threads={max(1, config.threads // config.search.workers)}"]
    workers = min(config.search.workers, config.search.trials + config.search.null_trial)
    jobs = [
        Job(f"worker {n}", command, experiment.path / SEARCH / f"worker-{n}.log")
        for n in range(1, workers + 1)
    ]
    run_side_by_side(jobs, workers, console)


@contextmanager
def _opened(experiment: Experiment, config: TrainerConfig, scorer: Scorer) -> Iterator[TrialsStudy]:
    folder = experiment.path / SEARCH / TRIALS
    total = config.search.trials + config.search.null_trial
    identity = _identity(config, experiment.splits.fold(0), scorer)
    with open_study(
        config.search, folder, study_name(experiment, config), config.seed, total, identity
    ) as study:
        yield study


def study_name(experiment: Experiment, config: TrainerConfig) -> str:
    """The study's name in its database."""
    return config.search.study or experiment.path.name


def _identity(config: TrainerConfig, split: Split, scorer: Scorer) -> dict[str, str]:
    """What all trials of a study have in common, wherever they are trained."""
    search = config.search
    nothing = trial_config(config, {})
    free = tuple(f"{key}." for key in FREE)
    shared = {
        key: json.dumps(value)
        for key, value in flat(nothing.model_dump(mode="json", include=set(SHARED))).items()
        if not f"{key}.".startswith(free)
    }
    rules = ("space", "sampler", "pruner", "warmup_trials", "warmup_iterations", "reduction", "null_trial")
    return {
        **shared,
        **{f"search.{key}": _digest(search.model_dump(mode="json")[key]) for key in rules},
        "iterations": str(nothing.iterations),
        "evaluation.every": str(nothing.evaluation.every),
        "the prompts": _digest(split),
        "the service": _digest(dict(scorer.identity)),
    }


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


# -------------------------------------------------------------------------------------------- trials


def run_trials(
    study: TrialsStudy, experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console
) -> None:
    """Take trials until all of this folder's are finished; those that other workers are at are waited for."""
    while True:
        taken = study.take()
        if taken is not None:
            with taken:
                run_trial(taken, experiment, config, scorer, console)
            write(study, experiment, config)
        elif len(study.unfinished()) > len(study.elsewhere()):
            time.sleep(POLL_S)
        else:
            return


# ------------------------------------------------------------------------------------------- the end


def _conclude(
    study: TrialsStudy, experiment: Experiment, config: TrainerConfig, scorer: Scorer, console: Console
) -> Row | None:
    """Choose the winner and measure it again; leave search.json and say it."""
    others = study.elsewhere()
    if others:
        write(study, experiment, config)
        where = "; ".join(f"trial {trial.number} at {owner_of(trial)}" for trial in others)
        raise JobError(
            f"{experiment.path}: other workers are still at this study: {where}; run this command again when "
            "they have ended, or there, if they were killed"
        )
    trials = rows(study.trials(), config.search.null_trial)
    best = choose(trials)
    fresh = None
    if best is not None:
        source = next(trial for trial in study.trials() if trial.number == best["number"])
        if not study.is_here(source):
            write(study, experiment, config)
            raise JobError(
                f"{experiment.path}: the winner, trial {best['number']}, is at {owner_of(source)}; run this "
                "command there to measure it again and to go on with it"
            )
        with _locked(experiment, ".concluding"):
            fresh = measure_again(experiment, config, best, scorer, console)
    winner = write(study, experiment, config, best, fresh)
    trials = rows(study.trials(), config.search.null_trial)
    console.print(table(trials, winner))
    for line in experiment.folder.read_json(SEARCH_FILE)["sentences"]:
        console.print(line)
    return winner


def measure_again(
    experiment: Experiment, config: TrainerConfig, best: Row, scorer: Scorer, console: Console
) -> Row:
    """The winner's gain on the same prompts, both policies on fresh streams. Raises EvaluationError."""
    run = RunFolder(experiment.path / SEARCH / TRIALS / f"{best['number']:04d}")
    kept: Row | None = run.read_json(FRESH_FILE)
    if kept is not None:
        return kept
    console.print(f"Trial {best['number']} is the best: measuring it again on fresh random streams")
    placed = trial_config(config, best["params"])
    fresh = with_values(placed, {"evaluation.seed": placed.evaluation.seed + 1})
    split = experiment.splits.fold(0)
    sampler = load_sampler(fresh)

    base = measure(sampler, scorer, split.validation, fresh.evaluation, "base again")
    sampler.policy.load_lora(run.lora)
    tuned = measure(sampler, scorer, split.validation, fresh.evaluation, "winner again")
    comparison = examination(fresh, scorer, best["iterations"], base, tuned, split.groups).comparison
    gain: Row = comparison.rows()[comparison.composite.name]  # type: ignore[assignment]
    run.write_json(FRESH_FILE, gain)
    return gain


def write(
    study: TrialsStudy,
    experiment: Experiment,
    config: TrainerConfig,
    best: Row | None = None,
    fresh: Row | None = None,
) -> Row | None:
    """Write search.json as the study is now; the winner as that has it."""
    with _locked(experiment, ".writing"):
        stored = study.trials()
        gains = {trial.number: trial.user_attrs.get(OUTCOME, {}).get("gain") for trial in stored}
        trials = rows(stored, config.search.null_trial)
        winner = None
        if best is not None:
            number = best["number"]
            winner = {
                "number": number,
                "params": best["params"],
                "selected": gains[number],
                "fresh": fresh,
            }
        null = gains.get(0) if config.search.null_trial else None
        experiment.folder.write_json(
            SEARCH_FILE,
            {
                "trials": trials,
                "winner": winner,
                "sampler": config.search.sampler,
                "pruner": config.search.pruner,
                "study": study_name(experiment, config),
                "sentences": sentences(trials, winner, null),
            },
        )
    return winner


@contextmanager
def _locked(experiment: Experiment, name: str) -> Iterator[None]:
    with (experiment.path / SEARCH / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
