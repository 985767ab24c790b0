"""Folder of a training run: its files, each written atomically, and the checks before a run resumes."""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from reward_service.runtime.yaml12 import dump_yaml
from trainer.config import LORA_FILE, ConfigError, TrainerConfig, flatten, load_trainer_config
from trainer.data.splits import Split, read_splits
from trainer.runtime.errors import StorageError, reason
from trainer.runtime.files import (
    Lock,
    LockHeldError,
    add_path_to_errors,
    clear_stale,
    replacing,
    write_atomically,
)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
PROMPTS_FILE = "prompts.json"
SCORER_FILE = "scorer.json"
FINISHED_FILE = "finished.json"
BASE_FILE, TUNED_FILE = "base.npz", "tuned.npz"  # measurements of the base policy and of the run's result
RESULT_FILES = ("evaluation.json", TUNED_FILE)


class RunFolder:
    """One run's folder: config.yaml, metrics.jsonl, checkpoints/, lora/, images and evaluation.json.

    `create` and `resume` lock it until it is closed or the process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None

    def close(self) -> None:
        """Unlock the folder: other processes may write here."""
        if self._lock is not None:
            self._lock.release()

    @classmethod
    def create(cls, config: TrainerConfig, path: Path | None = None) -> "RunFolder":
        """Create and lock a folder: `path`, which must be empty, or the next free `<runs_dir>/<name>[-n]`."""
        target = path or config.runs_dir / config.name
        try:
            run = cls(_make_empty(path) if path else _make_next_free(target))
            run._acquire_lock()
            clear_stale(run.path)
            run.write_config(config)
        except OSError as error:
            cause = f"cannot be created or written: {error.strerror}"
            raise ConfigError(f"{target}: the run folder {cause}; name another with --run") from error
        return run

    @classmethod
    def resume(cls, path: Path, *, wait_s: float = 0.0) -> "RunFolder":
        """Lock the folder of an earlier run, and remove what was half written when that ended.

        Args:
            path: The folder.
            wait_s: Seconds to wait for another trainer that has it locked.

        Raises:
            StorageError: Another trainer is writing it.
        """
        run = cls(path)
        run._acquire_lock(wait_s)
        clear_stale(path)
        return run

    def _acquire_lock(self, wait_s: float = 0.0) -> None:
        try:
            self._lock = Lock(self.path / LOCK_FILE, wait_s=wait_s)
        except LockHeldError as error:
            raise StorageError(
                f"{self.path}: another trainer (process {error.process}) is writing this run; "
                "wait until it ends, or stop it"
            ) from error

    @property
    def lora(self) -> Path:
        """Folder of the adapter."""
        return self.path / "lora"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def write_config(self, config: TrainerConfig, name: str = CONFIG_FILE) -> None:
        """Write the resolved configuration; a folder that has it is a run."""
        resolved = {"trainer": config.model_dump(mode="json")}
        self.write_text(name, dump_yaml(resolved))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_atomically(self.path / name, text.encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically. Raises ValueError for a number that is not finite."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON file; None if it is missing. Raises StorageError if it is damaged."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StorageError(
                f"{self.path / name}: damaged, not valid JSON ({error}); delete it and run the same command "
                "again"
            ) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; it is on the disk when this returns."""
        line = json.dumps(record, allow_nan=False)
        path = self.path / METRICS_FILE
        with add_path_to_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics_bytes(self) -> int:
        """Return the size of metrics.jsonl."""
        path = self.path / METRICS_FILE
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Truncate metrics.jsonl to an earlier size: what was logged since will be logged again.

        If the file is shorter than that, an incomplete line at its end is removed.
        """
        path, found = self.path / METRICS_FILE, self.metrics_bytes()
        if 0 < found < size:
            size = path.read_bytes().rfind(b"\n") + 1
        if found > size:
            os.truncate(path, size)

    def save_image(self, name: str, image: Image.Image) -> Path:
        """Write a PNG file atomically and return its path."""
        path = self.path / name
        write_atomically(path, lambda target: image.save(target, format="PNG"))
        return path

    def save_lora(self, save: Callable[[Path], object], card: str) -> None:
        """Write the folder lora/ atomically: the files that `save` writes, and `card` as README.md."""
        with replacing(self.lora) as folder:
            try:
                save(folder)
            except SafetensorError as error:  # an OSError of the write, wrapped by safetensors
                raise StorageError(f"{self.lora}: cannot be written ({reason(error)})") from error
            (folder / "README.md").write_text(card, encoding="utf-8")


def _make_empty(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    # Hidden files, a lock and incomplete files, are of a run that was killed before it began.
    if any(not file.name.startswith(".") for file in path.iterdir()):
        raise ConfigError(f"{path}: this folder is not empty; name another with --run, or add --resume")
    return path


def _make_next_free(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for n in range(1, 10_000):
        candidate = path if n == 1 else path.with_name(f"{path.name}-{n}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise ConfigError(f"{path}: 10,000 runs have this name; choose another (trainer.name)")


# ----------------------------------------------------------------------------------------- resuming

# Settings, and sections of them, that may differ when a run resumes: none decides what is learned. `name` and
# `runs_dir` only give the run's place, which is known; `iterations` may grow.
MUTABLE_SETTINGS = (
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


def newest_run(config: TrainerConfig) -> Path:
    """Return the folder of the newest run of the configured name. Raises ConfigError if there is none."""
    name = re.compile(rf"{re.escape(config.name)}(-\d+)?")
    runs = [
        path.parent for path in config.runs_dir.glob(f"*/{CONFIG_FILE}") if name.fullmatch(path.parent.name)
    ]
    if not runs:
        raise ConfigError(
            f"{config.runs_dir}: no run named {config.name} to resume; name its folder with --run"
        )
    return max(runs, key=lambda path: (path / CONFIG_FILE).stat().st_mtime_ns)


def resumed_config(run: Path, config: Path | None, overrides: Sequence[str]) -> TrainerConfig:
    """Return the configuration of a resumed run: its own, with what may differ taken from the arguments.

    Args:
        run: The run's folder.
        config: A configuration file; by default the run's own.
        overrides: Settings as KEY=VALUE.

    Raises:
        ConfigError: There is no run, or a setting differs that must not; both values are named.
    """
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"{run}: no run to resume (no {CONFIG_FILE}); name its folder with --run")
    own = load_trainer_config(run / CONFIG_FILE)
    given = load_trainer_config(config or run / CONFIG_FILE, overrides)
    check_same_settings(own, given, str(run))
    return given.model_copy(update={"name": own.name, "runs_dir": own.runs_dir})


def check_same_settings(
    own: TrainerConfig, given: TrainerConfig, run: str, mutable: Sequence[str] = MUTABLE_SETTINGS
) -> None:
    """Raise ConfigError if `given` differs from the run's `own` settings in one that is not mutable."""
    before, now = (flatten(config.model_dump(mode="json")) for config in (own, given))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not _is_mutable(key, mutable):
            raise ConfigError(
                f"trainer.{key}: {_shown(now.get(key))}, but {run} began with {_shown(before.get(key))}; "
                "leave it as it was, or begin a new run"
            )
    if given.iterations != own.iterations and own.update.schedule != "constant":
        raise ConfigError(
            f"trainer.iterations: {given.iterations}, but {run} began with {own.iterations}, which its "
            f"{own.update.schedule} update.schedule depends on; leave it as it was, or begin a new run"
        )


def _is_mutable(key: str, mutable: Sequence[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in mutable)


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:80]


def resume_hint(run: Path) -> str:
    """Return the command that resumes a run, in words for an error message."""
    return f"resume with: reward-trainer train --resume --run {shlex.quote(str(run))}"


# ------------------------------------------------------------------------------------ pinned inputs


def pin_prompts(run: RunFolder, prompts: Split) -> None:
    """Store the run's prompts in it, or check that they are the same. Raises ConfigError if not."""
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
    """Return the prompts that the run began with, if it has any; else read the configured files."""
    kept = run.read_json(PROMPTS_FILE)
    if kept is None:
        return read_splits(config.prompts, config.seed)
    groups = kept.get("groups", range(len(kept["validation"])))  # an old run without groups: each its own
    return Split(tuple(kept["train"]), tuple(kept["validation"]), tuple(groups))


def pin_scorer(run: RunFolder, identity: Mapping[str, str]) -> None:
    """Store the scorer's identity in the run, or check it. Raises StorageError naming the differences."""
    kept = run.read_json(SCORER_FILE)
    if kept is None:
        run.write_json(SCORER_FILE, dict(identity))
    elif kept != dict(identity):
        differences = "; ".join(_scorer_differences(kept, identity))
        raise StorageError(
            f"the reward service is not the one that {run.path} began with: {differences}; "
            "start it with the same models and calibration, or begin a new run"
        )


def _scorer_differences(kept: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    differences = []
    for name in sorted({*kept, *now}):
        if name not in now:
            differences.append(f"evaluator {name} is missing")
        elif name not in kept:
            differences.append(f"evaluator {name} is new")
        else:
            parts = zip(
                ("fingerprint", "calibration"), kept[name].split("/"), now[name].split("/"), strict=False
            )
            differences += [f"{name}'s {part} is {b}, was {a}" for part, a, b in parts if a != b]
    return differences


# ------------------------------------------------------------------------------------------- result


def mark_finished(run: RunFolder, iterations: int, reached: int, done: int) -> None:
    """Mark that all files of a run are written.

    Args:
        run: The run's folder.
        iterations: Configured iterations.
        reached: Iterations that were trained.
        done: Iterations behind the policy that was saved.
    """
    run.write_json(FINISHED_FILE, {"iterations": iterations, "reached": reached, "done": done})


def is_finished(run: RunFolder, iterations: int) -> bool:
    """Return whether a run of `iterations` iterations is complete; if not, what is missing is redone."""
    finished: Any = run.read_json(FINISHED_FILE)
    complete = all((run.path / name).exists() for name in RESULT_FILES)
    return complete and finished is not None and finished["iterations"] == iterations


def model_card(config: TrainerConfig, done: int, identity: Mapping[str, str], summary: Sequence[str]) -> str:
    """Return the README.md of a LoRA: its base model, training, evaluators, gain, and how to load it.

    Args:
        config: Configuration of the run.
        done: Iterations of training.
        identity: Fingerprint and calibration of each evaluator.
        summary: Sentences about the gain.
    """
    source = config.karlo.repo or (config.karlo.path.name if config.karlo.path else "")
    evaluators = "\n".join(f"- {name}: `{fingerprint}`" for name, fingerprint in sorted(identity.items()))
    return f"""---
library_name: peft
tags: [lora, unclip, reinforcement-learning]
---
# {config.name}

A LoRA for the decoder of {source}, rank {config.lora.rank}, trained for {done} iterations by
policy gradient on the rewards of these evaluators (fingerprint/calibration):

{evaluators}

On held-out prompts, against the same decoder without it:

{chr(10).join(f"- {line}" for line in summary)}

## Load

`decoder` is Karlo's decoder, a diffusers `UNet2DConditionModel`:

```python
decoder.load_lora_adapter("lora", prefix=None, weight_name="{LORA_FILE}")
pipeline = UnCLIPPipeline(decoder=decoder, **other_parts)
```

It inherits the licence of the model it was trained on.
"""
