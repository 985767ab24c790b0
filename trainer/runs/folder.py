"""What a run leaves behind: a folder of plain files, each written whole or not at all.

What a run that goes on must have in common with the run that began; checked before any model is loaded.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from safetensors import SafetensorError

from trainer.config import LORA_FILE, ConfigError, TrainerConfig, flat, load_trainer_config
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


class RunFolder:
    """One run's folder: config.yaml, metrics.jsonl, checkpoints/, lora/, images and evaluation.json.

    `create` and `resume` lock it until it is closed, or the process ends.
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
        """An empty folder: `path`, which must hold nothing yet, or the next free `<runs_dir>/<name>[-n]`."""
        wanted = path or config.runs_dir / config.name
        try:
            run = cls(_make_empty(path) if path else _make_next_free(wanted))
            run._acquire_lock()
            clear_stale(run.path)
            run.write_config(config)
        except OSError as error:
            cause = f"cannot be made or written to: {error.strerror}"
            raise ConfigError(f"{wanted}: the run folder {cause}; name another with --run") from error
        return run

    @classmethod
    def resume(cls, path: Path) -> "RunFolder":
        """The folder of a run that began before, without what was being written when it ended.

        Raises StorageError where another trainer is writing it.
        """
        run = cls(path)
        run._acquire_lock()
        clear_stale(path)
        return run

    def _acquire_lock(self) -> None:
        try:
            self._lock = Lock(self.path / LOCK_FILE)
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
        """Write what was resolved; a run is one from here on."""
        resolved = {"trainer": config.model_dump(mode="json")}
        self.write_text(name, yaml.safe_dump(resolved, sort_keys=False))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_atomically(self.path / name, text.encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file atomically. A number that is not finite is an error."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """What `write_json` wrote; None where it did not. Raises StorageError where it is no JSON."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StorageError(
                f"{self.path / name}: not what was written there ({error}); delete it and run the same "
                "command again"
            ) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, on the disk before a checkpoint that counts on it."""
        line = json.dumps(record, allow_nan=False)
        path = self.path / METRICS_FILE
        with add_path_to_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl."""
        path = self.path / METRICS_FILE
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Take away what was logged after metrics.jsonl had this size: it is going to be logged again.

        Where it has been cut shorter since, half a line at its end goes: the next would be joined to it.
        """
        path, found = self.path / METRICS_FILE, self.metrics_bytes()
        if 0 < found < size:
            size = path.read_bytes().rfind(b"\n") + 1
        if found > size:
            os.truncate(path, size)

    def save_image(self, name: str, image: Image.Image) -> Path:
        """Write a PNG atomically and say where."""
        path = self.path / name
        write_atomically(path, lambda target: image.save(target, format="PNG"))
        return path

    def save_lora(self, save: Callable[[Path], object], card: str) -> None:
        """Write lora/: what `save` puts there and a README.md; an older one is replaced as a whole."""
        with replacing(self.lora) as folder:
            try:
                save(folder)
            except SafetensorError as error:  # what safetensors makes of an error in writing
                raise StorageError(f"{self.lora}: cannot be written ({reason(error)})") from error
            (folder / "README.md").write_text(card, encoding="utf-8")


# ------------------------------------------------------------------------------------------- folders


def _make_empty(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    # A lock and what is not whole: a run that was killed before it began.
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
    raise ConfigError(f"{path}: ten thousand runs have this name; choose another (trainer.name)")


def newest_run(config: TrainerConfig) -> Path:
    """The folder of the run of this name that was last begun. Raises ConfigError where there is none."""
    name = re.compile(rf"{re.escape(config.name)}(-\d+)?")
    runs = [
        path.parent for path in config.runs_dir.glob(f"*/{CONFIG_FILE}") if name.fullmatch(path.parent.name)
    ]
    if not runs:
        raise ConfigError(
            f"{config.runs_dir}: no run named {config.name} to go on with; name its folder with --run"
        )
    return max(runs, key=lambda path: (path / CONFIG_FILE).stat().st_mtime_ns)


def model_card(config: TrainerConfig, done: int, identity: Mapping[str, str], summary: Sequence[str]) -> str:
    """README.md of a LoRA after `done` iterations: what for, how made, what gained, how to load."""
    source = config.karlo.repo or (config.karlo.path.name if config.karlo.path else "")
    judges = "\n".join(f"- {name}: `{fingerprint}`" for name, fingerprint in sorted(identity.items()))
    return f"""---
library_name: peft
tags: [lora, unclip, reinforcement-learning]
---
# {config.name}

A LoRA for the decoder of {source}, rank {config.lora.rank}, trained for {done} iterations by
policy gradient on the rewards of these evaluators (fingerprint/calibration):

{judges}

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
