"""What a run that goes on must have in common with the run that began; checked before any model is loaded."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import ConfigError, TrainerConfig, load_trainer_config
from trainer.errors import StorageError
from trainer.processes import flat
from trainer.splits import Split, read_splits
from trainer.storage import CONFIG_FILE, RunFolder

PROMPTS_FILE = "prompts.json"
SCORER_FILE = "scorer.json"
FINISHED_FILE = "finished.json"
RESULT_FILES = ("evaluation.json", "tuned.npz")

# Settings that may differ when a run goes on, and all below them: none decides what is learned. `name` and
# `runs_dir` only say where the run is, and that is known; `iterations` may grow.
FREE = (
    "name",
    "runs_dir",
    "iterations",
    "device",
    "threads",
    "compile",
    "memory",
    "service",
    "checkpoints",
    "processes",
    "logging",
    "sampling.micro_batch",
    "evaluation.every",
    "evaluation.micro_batch",
    "evaluation.in_flight",
    "evaluation.score_attempts",
    "evaluation.grid_prompts",
    "evaluation.grid_images",
    "rollout.in_flight",
    "rollout.smallest_batch",
    "rollout.score_attempts",
    "rollout.max_dropped",
    "update.gradient_checkpointing",
)


def resumed_config(run: Path, config: Path | None, overrides: Sequence[str]) -> TrainerConfig:
    """The configuration with which a run goes on: its own, with what may differ from `config` and overrides.

    Raises ConfigError naming the first setting that may not differ, with both values.
    """
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"{run}: no run to go on with (no {CONFIG_FILE}); name its folder with --run")
    own = load_trainer_config(run / CONFIG_FILE)
    wanted = load_trainer_config(config or run / CONFIG_FILE, overrides)
    check_same(own, wanted, str(run))
    return wanted.model_copy(update={"name": own.name, "runs_dir": own.runs_dir})


def check_same(own: TrainerConfig, wanted: TrainerConfig, run: str, free: Sequence[str] = FREE) -> None:
    """Raises ConfigError where `wanted` differs from the run's `own` in what decides the result."""
    before, now = (flat(config.model_dump(mode="json")) for config in (own, wanted))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not _is_free(key, free):
            raise ConfigError(
                f"trainer.{key}: {_shown(now.get(key))}, but {run} began with {_shown(before.get(key))}; "
                "leave it as it was, or begin a new run"
            )
    if wanted.iterations != own.iterations and own.update.schedule != "constant":
        raise ConfigError(
            f"trainer.iterations: {wanted.iterations}, but {run} began with {own.iterations}, which its "
            f"{own.update.schedule} update.schedule depends on; leave it as it was, or begin a new run"
        )


def _is_free(key: str, free: Sequence[str]) -> bool:
    return any(key == it or key.startswith(it + ".") for it in free)


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]


# ---------------------------------------------------------------------------------------------- pins


def pin_prompts(run: RunFolder, prompts: Split) -> None:
    """Keep the run's prompts with it, or check them. Raises ConfigError where they are others."""
    now = {name: list(values) for name, values in prompts._asdict().items()}
    kept = run.read_json(PROMPTS_FILE)
    if kept is None:
        run.write_json(PROMPTS_FILE, now)
    elif any(kept[name] != now[name] for name in ("train", "validation")):
        raise ConfigError(
            f"{run.path}: began with other prompts than the experiment's splits.json has now; restore that "
            "file, or begin a new experiment"
        )


def pinned_prompts(run: RunFolder, config: TrainerConfig) -> Split:
    """The prompts that the run began with, whatever has become of the files; else those of the files."""
    kept = run.read_json(PROMPTS_FILE)
    if kept is None:
        return read_splits(config.prompts, config.seed)
    groups = kept.get("groups", range(len(kept["validation"])))  # runs of before there were any: each its own
    return Split(tuple(kept["train"]), tuple(kept["validation"]), tuple(groups))


def pin_scorer(run: RunFolder, identity: Mapping[str, str]) -> None:
    """Keep the scorer's identity with the run, or check it. Raises StorageError naming what differs."""
    kept = run.read_json(SCORER_FILE)
    if kept is None:
        run.write_json(SCORER_FILE, dict(identity))
    elif kept != dict(identity):
        differences = "; ".join(_scorer_differences(kept, identity))
        raise StorageError(
            f"the scoring service is not the one that {run.path} began with: {differences}; "
            "start it with the same models and calibration, or begin a new run"
        )


def _scorer_differences(kept: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    said = []
    for name in sorted({*kept, *now}):
        if name not in now:
            said.append(f"evaluator {name} is missing")
        elif name not in kept:
            said.append(f"evaluator {name} is new")
        else:
            parts = zip(
                ("fingerprint", "calibration"), kept[name].split("/"), now[name].split("/"), strict=False
            )
            said += [f"{name}'s {part} is {b}, was {a}" for part, a, b in parts if a != b]
    return said


# ------------------------------------------------------------------------------------------- the end


def mark_finished(run: RunFolder, iterations: int, reached: int, done: int) -> None:
    """Everything is there that a run of so many iterations leaves behind.

    It has ended after those that it `reached`; what it shipped has `done` behind it.
    """
    run.write_json(FINISHED_FILE, {"iterations": iterations, "reached": reached, "done": done})


def is_finished(run: RunFolder, iterations: int) -> bool:
    """Whether the run has nothing left to do for so many iterations; what is missing is redone."""
    finished: Any = run.read_json(FINISHED_FILE)
    whole = all((run.path / name).exists() for name in RESULT_FILES)
    return whole and finished is not None and finished["iterations"] == iterations


def how_to_go_on(run: Path) -> str:
    """What to say to whoever may want the rest of a run."""
    return f"go on with: reward-trainer train --resume --run {shlex.quote(str(run))}"
