"""Checkpoints: everything that changes while a fold is trained, each whole or not there.

    <run>/checkpoints/
        iteration-000012/           the trainer after 12 iterations
            tensors.safetensors     adapter, its moving average, optimizer, deviations
            state.json              the numbers beside them; the configuration, the scorer, the versions
            manifest.json           size and sha256 of the other two, written last
        best.json                   which checkpoint the evaluation liked best

A checkpoint is written into a folder of another name, which is renamed when all of it is on the disk. It is
whole if, and only if, its manifest agrees with its files. Random numbers are functions of the iteration
(trainer.runtime.rng) and prompts as well (trainer.rl.train): neither needs a state.

Bring a run that was ended back to where it was; keep what that needs while it runs.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from trainer.evaluation.comparison import Measurement
from trainer.evaluation.evaluate import measure
from trainer.evaluation.stopping import Stoppers
from trainer.rl.objective import Deviations
from trainer.rl.rewards import Scorer
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import TrainingState
from trainer.runs.folder import RunFolder, check_same
from trainer.runtime.distributed import Processes
from trainer.runtime.errors import StorageError
from trainer.runtime.files import clear_stale, remove_folder, replacing, write_atomically

FORMAT = 1
TRAINING_KEY = "learner"  # of state.json: the name that format 1 has for `Snapshot.training`
TENSORS, STATE, MANIFEST, BEST = "tensors.safetensors", "state.json", "manifest.json", "best.json"
NAME = re.compile(r"iteration-(\d{6,})")
LIBRARIES = ("torch", "diffusers", "transformers", "peft")


class Snapshot(NamedTuple):
    """A trainer after `done` iterations: copies, which do not change when it goes on."""

    done: int
    tensors: dict[str, Tensor]
    training: dict[str, Any]  # JSON: what the tensors leave out
    stopper: Mapping[str, Any] = MappingProxyType({})  # JSON: the state of whatever decides when to stop
    composite: float | None = None  # of the evaluation of this trainer, where there was one
    metrics_bytes: int = 0  # size of metrics.jsonl


class Stored(NamedTuple):
    """The two files of a checkpoint, as they were when its manifest was written."""

    state: bytes
    tensors: bytes


# ------------------------------------------------------------------------------------------- trainer


def capture(training: TrainingState, **more: Any) -> Snapshot:
    """The trainer as it is now, on the CPU; `more` are further fields of the snapshot."""
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
    """Make the trainer what it was. Raises StorageError where the snapshot is of another kind of trainer."""
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
        raise StorageError(f"a checkpoint does not fit this configuration's trainer: {error}") from error


def _restore_optimizer(training: TrainingState, snapshot: Snapshot) -> None:
    stored = _under("optimizer", snapshot.tensors)
    state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(training.policy.lora):
        # load_state_dict may keep the tensors it is given, and steps change them in place.
        state[index] = {key: value.clone() for key, value in _under(name, stored).items()}
    groups = [_with_tuples(group) for group in snapshot.training["optimizer"]]
    state = {index: values for index, values in state.items() if values}
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})


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
    pending: Snapshot | None = None  # the newest trainer that is not on the disk

    def record(self, snapshot: Snapshot) -> None:
        """Take note of a trainer; save it where its turn has come, or where it was evaluated."""
        self.pending = snapshot
        if snapshot.done % self.config.every == 0 or snapshot.composite is not None:
            self.flush()

    def flush(self) -> None:
        """Save the newest trainer, unless it is saved."""
        if self.pending is not None:
            self.save(self.pending)
            self.pending = None

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, then remove those that are one too many. A full disk raises an OSError."""
        with replacing(self._path(snapshot.done)) as staging:
            write_stored(staging, encode(snapshot, self.provenance))
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
        write_atomically(self.folder / BEST, content)

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
        (folder / name).write_bytes(content)
    manifest = {"format": FORMAT, "files": {name: _seal(content) for name, content in files.items()}}
    (folder / MANIFEST).write_bytes(json.dumps(manifest, indent=2).encode())


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
    state[TRAINING_KEY] = state.pop("training")
    return Stored(
        json.dumps(state, indent=2, allow_nan=False).encode(), safetensors.torch.save(snapshot.tensors)
    )


def decode(stored: Stored) -> tuple[Snapshot, dict[str, Any]]:
    """What `encode` was given, and the versions under "versions" of the provenance."""
    state = json.loads(stored.state)
    state["training"] = state.pop(TRAINING_KEY)
    own = {name: state.pop(name) for name in Snapshot._fields if name != "tensors"}
    return Snapshot(tensors=safetensors.torch.load(stored.tensors), **own), state


def versions() -> dict[str, str]:
    """What a result on the CPU depends on, to the bit, beside the configuration."""
    return {"python": python_version(), **{name: version(name) for name in LIBRARIES}}


BASE_FILE, TUNED_FILE = "base.npz", "tuned.npz"  # measurements of the base policy, and of the run's result


def provenance(config: TrainerConfig, scorer: Scorer) -> dict[str, object]:
    """What every checkpoint of a run says of where it comes from."""
    return {"config": config.model_dump(mode="json"), "scorer": dict(scorer.identity)}


def go_on(
    training: TrainingState,
    stoppers: Stoppers,
    checkpoints: Checkpoints,
    config: TrainerConfig,
    run: RunFolder,
    console: Console,
) -> None:
    """Restore trainer and stoppers from the newest whole checkpoint, where there is one.

    What was logged after that checkpoint is cut off, for it is going to be logged again. The main process
    reads; the others get what it read. Raises ConfigError where the configuration is not the checkpoint's.
    """
    processes = training.processes
    with processes.fail_together():
        stored = checkpoints.latest(console.print) if processes.main else None
        if processes.main and stored is None and checkpoints.paths():
            raise StorageError(
                f"{run.checkpoints}: none of its {len(checkpoints.paths())} checkpoints is whole; begin a "
                "new run, or remove that folder to have this one begin again"
            )
    stored = _from_main(stored, processes)
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
        checkpoints.compare_with_best(snapshot)
        console.print(f"Going on after {snapshot.done} of {config.iterations} iterations: {run.path}")
        if origin["versions"] != versions():
            console.print(f"It began with {origin['versions']}, now {versions()}: last digits may differ.")


def go_back_to_best(training: TrainingState, checkpoints: Checkpoints) -> None:
    """Restore the trainer from the checkpoint that the evaluations liked best. Raises StorageError."""
    processes = training.processes
    with processes.fail_together():
        stored = checkpoints.best_stored() if processes.main else None
    stored = _from_main(stored, processes)
    if stored.state:
        restore(training, decode(stored)[0])


def _from_main(stored: Stored | None, processes: Processes) -> Stored:
    return Stored(*(processes.gather(part)[0] for part in stored or Stored(b"", b"")))


def _check_origin(origin: Mapping[str, Any], done: int, config: TrainerConfig, run: RunFolder) -> None:
    try:
        own = TrainerConfig.model_validate(origin["config"])
    except ValidationError as error:
        raise StorageError(
            f"{run.checkpoints}: written by another version of this program, whose settings differ; "
            "begin a new run"
        ) from error
    check_same(own, config, str(run.path))
    if config.iterations < done:
        raise ConfigError(
            f"trainer.iterations: {config.iterations}, but {run.path} has {done} behind it; "
            "set as many or more, or begin a new run"
        )


@contextmanager
def kept(checkpoints: Checkpoints) -> Iterator[None]:
    """Whatever ends the training within this block, what it has completed is saved; a full disk excepted."""
    try:
        yield
    except OSError:
        raise
    except BaseException:
        checkpoints.flush()
        raise
    checkpoints.flush()


def record(
    checkpoints: Checkpoints,
    run: RunFolder,
    composite: Callable[[int], float | None],
    stoppers: Stoppers,
    training: TrainingState,
) -> bool:
    """Have the trainer saved where its turn has come, by the process that writes; tells whether it is to end.

    `composite` tells that of the trainer's evaluation, where it was evaluated after so many iterations.
    """
    if training.processes.main:
        size, rated = run.metrics_bytes(), composite(training.done)
        checkpoints.record(capture(training, metrics_bytes=size, composite=rated, stopper=stoppers.state()))
    return stoppers.ending is not None


def _kept_base(path: Path, prompts: Sequence[str]) -> bytes:
    """The file; nothing where there is none, or it is damaged: it can be measured again."""
    try:
        content = path.read_bytes()
        Measurement.decode(content, prompts)
    except (FileNotFoundError, ValueError):
        return b""
    return content


def measure_base(
    sampler: ImageSampler,
    scorer: Scorer,
    prompts: Sequence[str],
    config: TrainerConfig,
    run: RunFolder,
    processes: Processes,
) -> Measurement:
    """The base policy's measurement: of this run when it began, else made and kept now."""
    path = run.path / BASE_FILE
    before = processes.gather(_kept_base(path, prompts) if processes.main else b"")[0]
    if before:
        return Measurement.decode(before, prompts)
    with sampler.policy.base():
        measured = measure(sampler, scorer, prompts, config.evaluation, "base", processes)
    if processes.main:
        measured.save(path)
    return measured
