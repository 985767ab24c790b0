"""Checkpoints: everything that changes while a fold is trained, each whole or not there.

    <run>/checkpoints/
        iteration-000012/           the learner after 12 iterations
            tensors.safetensors     adapter, its moving average, optimizer, deviations
            state.json              the numbers beside them; the configuration, the scorer, the versions
            manifest.json           size and sha256 of the other two, written last
        best.json                   which checkpoint the evaluation liked best

A checkpoint is written into a folder of another name, which is renamed when all of it is on the disk. It is
whole if, and only if, its manifest agrees with its files. Random numbers are functions of the iteration
(trainer.streams) and prompts as well (trainer.training): neither needs a state.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.config import CheckpointsConfig
from trainer.errors import StorageError
from trainer.objective import Deviations
from trainer.storage import (
    clear_stale,
    naming,
    remove_folder,
    replace_folder,
    staging,
    write_atomically,
    write_synced,
)
from trainer.updating import Learner

FORMAT = 1
TENSORS, STATE, MANIFEST, BEST = "tensors.safetensors", "state.json", "manifest.json", "best.json"
NAME = re.compile(r"iteration-(\d{6,})")
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


class Snapshot(NamedTuple):
    """A learner after `done` iterations: copies, which do not change when it goes on."""

    done: int
    tensors: dict[str, Tensor]
    learner: dict[str, Any]  # JSON: what the tensors leave out
    stopper: Mapping[str, Any] = MappingProxyType({})  # JSON: the state of whatever decides when to stop
    composite: float | None = None  # of the evaluation of this learner, where there was one
    metrics_bytes: int = 0  # size of metrics.jsonl


class Stored(NamedTuple):
    """The two files of a checkpoint, as they were when its manifest was written."""

    state: bytes
    tensors: bytes


# ------------------------------------------------------------------------------------------- learner


def capture(learner: Learner, **more: Any) -> Snapshot:
    """The learner as it is now, on the CPU; `more` are further fields of the snapshot."""
    names = list(learner.policy.lora)
    tensors: dict[str, Tensor] = {
        f"lora/{name}": weight.detach() for name, weight in learner.policy.lora.items()
    }
    tensors |= {f"average/{name}": weight for name, weight in learner.average.average.items()}
    tensors["deviations/variance"] = learner.deviations.variance
    optimizer = learner.optimizer.state_dict()
    for index, state in optimizer["state"].items():
        tensors |= {f"optimizer/{names[index]}/{key}": value for key, value in state.items()}
    values = {
        "updates": learner.average.updates,
        "deviations_weight": learner.deviations.weight,
        "drops": {"asked": learner.drops.asked, "dropped": learner.drops.dropped},
        "optimizer": optimizer["param_groups"],
    }
    copies = {
        key: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    return Snapshot(learner.done, copies, values, **more)


@torch.no_grad()
def restore(learner: Learner, snapshot: Snapshot) -> None:
    """Make the learner what it was. Raises StorageError where the snapshot is of another kind of learner."""
    try:
        _copy(learner.policy.lora, _under("lora", snapshot.tensors))
        _copy(learner.average.average, _under("average", snapshot.tensors))
        learner.average.updates = snapshot.learner["updates"]
        learner.deviations = Deviations(
            snapshot.tensors["deviations/variance"].clone(), snapshot.learner["deviations_weight"]
        )
        learner.drops.asked = snapshot.learner["drops"]["asked"]
        learner.drops.dropped = snapshot.learner["drops"]["dropped"]
        _restore_optimizer(learner, snapshot)
        learner.done = snapshot.done
    except (KeyError, ValueError, RuntimeError) as error:
        raise StorageError(f"a checkpoint does not fit this configuration's learner: {error}") from error


def _restore_optimizer(learner: Learner, snapshot: Snapshot) -> None:
    stored = _under("optimizer", snapshot.tensors)
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(learner.policy.lora):
        # load_state_dict may keep the tensors it is given, and steps change them in place.
        state[index] = {key: value.clone() for key, value in _under(name, stored).items()}
    groups = [_with_tuples(group) for group in snapshot.learner["optimizer"]]
    state = {index: values for index, values in state.items() if values}
    learner.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _copy(targets: Mapping[str, Tensor | nn.Parameter], values: Mapping[str, Tensor]) -> None:
    if targets.keys() != values.keys():
        raise ValueError(f"it has other weights, the first {min(targets.keys() ^ values.keys())}")
    for name, target in targets.items():
        target.copy_(values[name])


def _with_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples; the optimizer's betas are one."""
    return {
        key: tuple(value) if isinstance(value, list) and key != "params" else value
        for key, value in group.items()
    }


# --------------------------------------------------------------------------------------------- files


@dataclass
class Checkpoints:
    """The checkpoints of one run. Only one process may write them."""

    folder: Path
    config: CheckpointsConfig
    provenance: Mapping[str, Any] = field(default_factory=dict)  # kept in each: configuration and scorer
    pending: Snapshot | None = None  # the newest learner that is not on the disk

    def record(self, snapshot: Snapshot) -> None:
        """Take note of a learner; save it where its turn has come, or where it was evaluated."""
        self.pending = snapshot
        if snapshot.done % self.config.every == 0 or snapshot.composite is not None:
            self.flush()

    def flush(self) -> None:
        """Save the newest learner, unless it is saved."""
        if self.pending is not None:
            self.save(self.pending)
            self.pending = None

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, then remove those that are one too many. A full disk raises an OSError."""
        path = self._path(snapshot.done)
        with naming(path):
            self.folder.mkdir(exist_ok=True)
            with staging(self.folder, path.name) as target:
                write_stored(target, encode(snapshot, self.provenance))
                replace_folder(target, path)
            self.compare_with_best(snapshot)
            self._prune()

    def compare_with_best(self, snapshot: Snapshot) -> None:
        """Mark a saved snapshot as the best where its evaluation says so."""
        best = self.best()
        if snapshot.composite is not None and (best is None or snapshot.composite > best[1]):
            self.mark_best(snapshot.done, snapshot.composite)

    def mark_best(self, done: int, composite: float) -> None:
        """Have the checkpoint after `done` iterations kept, as that of the best evaluation so far."""
        content = json.dumps({"iteration": done, "composite": composite}, allow_nan=False).encode()
        write_atomically(self.folder / BEST, lambda path: write_synced(path, content))

    def best(self) -> tuple[int, float] | None:
        """Which checkpoint the evaluation liked best, and its composite; None where no file says so."""
        try:
            marked = json.loads((self.folder / BEST).read_bytes())
            return int(marked["iteration"]), float(marked["composite"])
        except (FileNotFoundError, ValueError, LookupError, TypeError):  # damaged: the next one marks it anew
            return None

    def best_stored(self) -> Stored | None:
        """The checkpoint that the evaluation liked best. Raises StorageError where it is damaged."""
        best = self.best()
        return None if best is None else read_stored(self._path(best[0]))

    def latest(self, report: Callable[[str], object] = str) -> Stored | None:
        """The newest whole checkpoint; `report` hears of the others. Clears away what is half written."""
        if self.folder.is_dir():
            clear_stale(self.folder)
        for path in reversed(self.paths()):
            try:
                return read_stored(path)
            except StorageError as error:
                report(f"passed over: {error}")
        return None

    def _path(self, done: int) -> Path:
        return self.folder / f"iteration-{done:06d}"

    def paths(self) -> list[Path]:
        """The folders named as checkpoints, oldest first; each may be whole or not."""
        found = [path for path in self.folder.glob("iteration-*") if NAME.fullmatch(path.name)]
        return sorted(found, key=_done)

    def _prune(self) -> None:
        best = self.best()
        for path in self.paths()[: -self.config.keep]:
            if best is None or _done(path) != best[0]:
                remove_folder(path)


def _done(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def write_stored(folder: Path, stored: Stored) -> None:
    """Write a checkpoint's files, the manifest last."""
    files = {STATE: stored.state, TENSORS: stored.tensors}
    for name, content in files.items():
        write_synced(folder / name, content)
    manifest = {"format": FORMAT, "files": {name: _seal(content) for name, content in files.items()}}
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=2).encode())


def read_stored(folder: Path) -> Stored:
    """The files of a whole checkpoint. Raises StorageError, saying why it is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        contents = {name: (folder / name).read_bytes() for name in (STATE, TENSORS)}
        if manifest["format"] != FORMAT:
            raise StorageError(f"{folder}: format {manifest['format']}, but this version reads {FORMAT}")
        broken = [name for name, content in contents.items() if manifest["files"][name] != _seal(content)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StorageError(f"{folder}: not a whole checkpoint ({error})") from error
    if broken:
        raise StorageError(f"{folder}: not a whole checkpoint ({broken[0]} is not what the manifest says)")
    return Stored(contents[STATE], contents[TENSORS])


def _seal(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def encode(snapshot: Snapshot, provenance: Mapping[str, Any]) -> Stored:
    """A snapshot as the bytes of a checkpoint's files."""
    state = snapshot._asdict() | {"stopper": dict(snapshot.stopper), **provenance, "versions": versions()}
    del state["tensors"]
    return Stored(
        json.dumps(state, indent=2, allow_nan=False).encode(), safetensors.torch.save(snapshot.tensors)
    )


def decode(stored: Stored) -> tuple[Snapshot, dict[str, Any]]:
    """What `encode` was given, and the versions under "versions" of the provenance."""
    state = json.loads(stored.state)
    own = {name: state.pop(name) for name in Snapshot._fields if name != "tensors"}
    return Snapshot(tensors=safetensors.torch.load(stored.tensors), **own), state


def versions() -> dict[str, str]:
    """What a result on the CPU depends on, to the bit, beside the configuration."""
    return {"python": python_version(), **{name: version(name) for name in LIBRARIES}}
