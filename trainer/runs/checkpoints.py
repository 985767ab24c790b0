"""Checkpoints: the state of a fold's training on disk, and resuming from it.

    <run>/checkpoints/
        iteration-000012/           the state after 12 iterations
            tensors.safetensors     adapter, its moving average, optimizer, deviations
            state.json              the numbers beside them; the configuration, the scorer, the versions
            manifest.json           size and sha256 of the other two
        best.json                   the checkpoint with the best evaluation

A checkpoint is written into a staging folder, which is renamed when all of it is on the disk. It is complete
if, and only if, its manifest agrees with its files. Random numbers are functions of the iteration
(trainer.runtime.rng), and so are prompts (trainer.rl.train): neither needs a state.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor, nn

from trainer.config import CheckpointsConfig, ConfigError, TrainerConfig
from trainer.evaluation.stopping import Stoppers
from trainer.rl.objective import Deviations
from trainer.rl.rewards import Scorer
from trainer.rl.train import TrainingState
from trainer.runs.folder import RunFolder, check_same_settings
from trainer.runtime.distributed import Processes
from trainer.runtime.errors import StorageError
from trainer.runtime.files import clear_stale, remove_folder, replacing, write_atomically

FORMAT = 1
TRAINING_KEY = "learner"  # of state.json: the name that format 1 has for `Snapshot.training`
TENSORS, STATE, MANIFEST, BEST = "tensors.safetensors", "state.json", "manifest.json", "best.json"
NAME = re.compile(r"iteration-(\d{6,})")
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


class Snapshot(NamedTuple):
    """The state of training after `done` iterations, as copies that do not change with it."""

    done: int
    tensors: dict[str, Tensor]
    training: dict[str, Any]  # JSON: numbers beside the tensors
    stopper: Mapping[str, Any] = MappingProxyType({})  # JSON: state of the stoppers
    composite: float | None = None  # of the evaluation after these iterations, if there was one
    metrics_bytes: int = 0  # size of metrics.jsonl


class StoredCheckpoint(NamedTuple):
    """Content of the two files of a checkpoint, verified against its manifest."""

    state: bytes
    tensors: bytes


# --------------------------------------------------------------------------------------------- state


def capture(training: TrainingState, **more: Any) -> Snapshot:
    """Copy the state of training to the CPU; `more` are further fields of the snapshot."""
    names = list(training.policy.lora)
    tensors: dict[str, Tensor] = {
        f"lora/{name}": weight.detach() for name, weight in training.policy.lora.items()
    }
    tensors |= {f"average/{name}": weight for name, weight in training.average.average.items()}
    tensors["deviations/variance"] = training.deviations.variance
    optimizer = training.optimizer.state_dict()
    for index, state in optimizer["state"].items():
        tensors |= {f"optimizer/{names[index]}/{key}": value for key, value in state.items()}
    values = {
        "updates": training.average.updates,
        "deviations_weight": training.deviations.weight,
        "drops": {"asked": training.drops.requested, "dropped": training.drops.dropped},
        "optimizer": optimizer["param_groups"],
    }
    copies = {
        key: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    return Snapshot(training.done, copies, values, **more)


@torch.no_grad()
def restore(training: TrainingState, snapshot: Snapshot) -> None:
    """Restore the state of training. Raises StorageError if the snapshot does not fit the configuration."""
    try:
        _copy(training.policy.lora, _under("lora", snapshot.tensors))
        _copy(training.average.average, _under("average", snapshot.tensors))
        training.average.updates = snapshot.training["updates"]
        training.deviations = Deviations(
            snapshot.tensors["deviations/variance"].clone(), snapshot.training["deviations_weight"]
        )
        training.drops.requested = snapshot.training["drops"]["asked"]
        training.drops.dropped = snapshot.training["drops"]["dropped"]
        _restore_optimizer(training, snapshot)
        training.done = snapshot.done
    except (KeyError, ValueError, RuntimeError) as error:
        raise StorageError(
            f"a checkpoint does not fit this configuration: {error}; begin a new run"
        ) from error


def _restore_optimizer(training: TrainingState, snapshot: Snapshot) -> None:
    stored = _under("optimizer", snapshot.tensors)
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(training.policy.lora):
        # load_state_dict may keep the tensors that it gets, and optimizer steps change them in place.
        state[index] = {key: value.clone() for key, value in _under(name, stored).items()}
    groups = [_restore_tuples(group) for group in snapshot.training["optimizer"]]
    state = {index: values for index, values in state.items() if values}
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _copy(targets: Mapping[str, Tensor | nn.Parameter], values: Mapping[str, Tensor]) -> None:
    if targets.keys() != values.keys():
        raise ValueError(f"its weights differ, first {min(targets.keys() ^ values.keys())}")
    for name, target in targets.items():
        target.copy_(values[name])


def _restore_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer group with its tuples (betas), which JSON holds as lists."""
    return {
        key: tuple(value) if isinstance(value, list) and key != "params" else value
        for key, value in group.items()
    }


# --------------------------------------------------------------------------------------------- files


@dataclass
class Checkpoints:
    """The checkpoints of one run; only one process may write them."""

    folder: Path
    config: CheckpointsConfig
    provenance: Mapping[str, Any] = field(default_factory=dict)  # stored in each: configuration and scorer
    pending: Snapshot | None = None  # the newest state, if it is not on the disk

    def add(self, snapshot: Snapshot) -> None:
        """Keep a snapshot; save it if a checkpoint is due, or if it was evaluated."""
        self.pending = snapshot
        if snapshot.done % self.config.every == 0 or snapshot.composite is not None:
            self.flush()

    def flush(self) -> None:
        """Save the newest snapshot, unless it is saved."""
        if self.pending is not None:
            self.save(self.pending)
            self.pending = None

    @contextmanager
    def flushed_on_exit(self) -> Iterator[None]:
        """Save the newest snapshot when the block ends, also on an error other than OSError (a full disk)."""
        try:
            yield
        except OSError:
            raise
        except BaseException:
            self.flush()
            raise
        self.flush()

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, then remove old ones beyond `keep`. Raises OSError if the disk is full."""
        with replacing(self._path(snapshot.done)) as staging:
            write_stored(staging, encode(snapshot, self.provenance))
        self.update_best(snapshot)
        self._prune()

    def update_best(self, snapshot: Snapshot) -> None:
        """Mark a saved snapshot as the best if its composite is the highest so far."""
        best = self.best()
        if snapshot.composite is not None and (best is None or snapshot.composite > best[1]):
            self.mark_best(snapshot.done, snapshot.composite)

    def mark_best(self, done: int, composite: float) -> None:
        """Mark the checkpoint after `done` iterations as the best, which is never removed."""
        content = json.dumps({"iteration": done, "composite": composite}, allow_nan=False).encode()
        write_atomically(self.folder / BEST, content)

    def best(self) -> tuple[int, float] | None:
        """Return the iterations and the composite of the best checkpoint; None if none is marked."""
        try:
            marked = json.loads((self.folder / BEST).read_bytes())
            return int(marked["iteration"]), float(marked["composite"])
        except (
            FileNotFoundError,
            ValueError,
            LookupError,
            TypeError,
        ):  # damaged: the next evaluation writes it again
            return None

    def best_stored(self) -> StoredCheckpoint | None:
        """Read the best checkpoint, if there is one. Raises StorageError if it is damaged."""
        best = self.best()
        return None if best is None else read_stored(self._path(best[0]))

    def latest(self, report: Callable[[str], object] = str) -> StoredCheckpoint | None:
        """Read the newest complete checkpoint; pass a message to `report` for each damaged one.

        Also removes what a killed process left half written.
        """
        if self.folder.is_dir():
            clear_stale(self.folder)
        for path in reversed(self.paths()):
            try:
                return read_stored(path)
            except StorageError as error:
                report(f"skipped: {error}")
        return None

    def _path(self, done: int) -> Path:
        return self.folder / f"iteration-{done:06d}"

    def paths(self) -> list[Path]:
        """Return the folders with names of checkpoints, oldest first, complete or not."""
        found = [path for path in self.folder.glob("iteration-*") if NAME.fullmatch(path.name)]
        return sorted(found, key=_done)

    def _prune(self) -> None:
        best = self.best()
        for path in self.paths()[: -self.config.keep]:
            if best is None or _done(path) != best[0]:
                remove_folder(path)


def _done(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def write_stored(folder: Path, stored: StoredCheckpoint) -> None:
    """Write a checkpoint's files and their manifest."""
    files = {STATE: stored.state, TENSORS: stored.tensors}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = {"format": FORMAT, "files": {name: _digest(content) for name, content in files.items()}}
    (folder / MANIFEST).write_bytes(json.dumps(manifest, indent=2).encode())


def read_stored(folder: Path) -> StoredCheckpoint:
    """Read and verify a checkpoint. Raises StorageError if it is not complete."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        contents = {name: (folder / name).read_bytes() for name in (STATE, TENSORS)}
        if manifest["format"] != FORMAT:
            raise StorageError(f"{folder}: format {manifest['format']}, expected {FORMAT}; begin a new run")
        broken = [name for name, content in contents.items() if manifest["files"][name] != _digest(content)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StorageError(f"{folder}: not a complete checkpoint ({error})") from error
    if broken:
        raise StorageError(f"{folder}: not a complete checkpoint ({broken[0]} does not match the manifest)")
    return StoredCheckpoint(contents[STATE], contents[TENSORS])


def _digest(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def encode(snapshot: Snapshot, provenance: Mapping[str, Any]) -> StoredCheckpoint:
    """Serialize a snapshot to the content of a checkpoint's files."""
    state = snapshot._asdict() | {"stopper": dict(snapshot.stopper), **provenance, "versions": versions()}
    del state["tensors"]
    state[TRAINING_KEY] = state.pop("training")
    return StoredCheckpoint(
        json.dumps(state, indent=2, allow_nan=False).encode(), safetensors.torch.save(snapshot.tensors)
    )


def decode(stored: StoredCheckpoint) -> tuple[Snapshot, dict[str, Any]]:
    """Return the snapshot and the provenance, which has the library versions under "versions"."""
    state = json.loads(stored.state)
    state["training"] = state.pop(TRAINING_KEY)
    own = {name: state.pop(name) for name in Snapshot._fields if name != "tensors"}
    return Snapshot(tensors=safetensors.torch.load(stored.tensors), **own), state


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, to the bit on a CPU, beside the configuration."""
    return {"python": python_version(), **{name: version(name) for name in LIBRARIES}}


def provenance(config: TrainerConfig, scorer: Scorer) -> dict[str, object]:
    """Return what every checkpoint stores about its origin: the configuration and the scorer."""
    return {"config": config.model_dump(mode="json"), "scorer": dict(scorer.identity)}


# ------------------------------------------------------------------------------------------- resuming


def resume_training(
    training: TrainingState,
    stoppers: Stoppers,
    checkpoints: Checkpoints,
    config: TrainerConfig,
    run: RunFolder,
    console: Console,
) -> None:
    """Restore training and stoppers from the newest complete checkpoint, if there is one.

    What was logged after that checkpoint is cut off, because it will be logged again. The main process reads
    the checkpoint and sends it to the others.

    Raises:
        ConfigError: The configuration differs from the checkpoint's in what decides the result.
        StorageError: There are checkpoints, and none is complete.
    """
    processes = training.processes
    with processes.fail_together():
        stored = checkpoints.latest(console.print) if processes.main else None
        if processes.main and stored is None and checkpoints.paths():
            raise StorageError(
                f"{run.checkpoints}: none of its {len(checkpoints.paths())} checkpoints is complete; begin a "
                "new run, or remove that folder to begin this one again"
            )
    stored = _broadcast(stored, processes)
    if not stored.state:
        if processes.main:
            run.cut_metrics(0)
        return
    snapshot, origin = decode(stored)
    _check_origin(origin, snapshot.done, config, run)
    restore(training, snapshot)
    stoppers.restore(dict(snapshot.stopper))
    if processes.main:
        run.cut_metrics(snapshot.metrics_bytes)
        checkpoints.update_best(snapshot)
        console.print(f"Resuming after {snapshot.done} of {config.iterations} iterations: {run.path}")
        if origin["versions"] != versions():
            console.print(f"Begun with {origin['versions']}, now {versions()}: last digits may differ.")


def restore_best(training: TrainingState, checkpoints: Checkpoints) -> None:
    """Restore training from the checkpoint with the best evaluation. Raises StorageError."""
    processes = training.processes
    with processes.fail_together():
        stored = checkpoints.best_stored() if processes.main else None
    stored = _broadcast(stored, processes)
    if stored.state:
        restore(training, decode(stored)[0])


def _broadcast(stored: StoredCheckpoint | None, processes: Processes) -> StoredCheckpoint:
    return StoredCheckpoint(*(processes.gather(part)[0] for part in stored or StoredCheckpoint(b"", b"")))


def _check_origin(origin: Mapping[str, Any], done: int, config: TrainerConfig, run: RunFolder) -> None:
    try:
        own = TrainerConfig.model_validate(origin["config"])
    except ValidationError as error:
        raise StorageError(
            f"{run.checkpoints}: written by another version of this program, whose settings differ; "
            "begin a new run"
        ) from error
    check_same_settings(own, config, str(run.path))
    if config.iterations < done:
        raise ConfigError(
            f"trainer.iterations: {config.iterations}, but {run.path} has already done {done}; "
            "set as many or more, or begin a new run"
        )
