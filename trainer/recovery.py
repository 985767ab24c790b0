"""Bring a run that was ended back to where it was; keep what that needs while it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from trainer.checkpoints import Checkpoints, Stored, capture, decode, restore, versions
from trainer.config import ConfigError, TrainerConfig
from trainer.deciding import Stoppers
from trainer.drawing import Studio
from trainer.errors import StorageError
from trainer.evaluation import measure
from trainer.measurements import Measurement
from trainer.processes import Processes
from trainer.resuming import check_same
from trainer.scoring import Scorer
from trainer.storage import RunFolder
from trainer.updating import Learner

BASE_FILE, TUNED_FILE = "base.npz", "tuned.npz"  # measurements of the base policy, and of the run's result


def provenance(config: TrainerConfig, scorer: Scorer) -> dict[str, object]:
    """What every checkpoint of a run says of where it comes from."""
    return {"config": config.model_dump(mode="json"), "scorer": dict(scorer.identity)}


def go_on(
    learner: Learner,
    stoppers: Stoppers,
    checkpoints: Checkpoints,
    config: TrainerConfig,
    run: RunFolder,
    console: Console,
) -> None:
    """Restore learner and stoppers from the newest whole checkpoint, where there is one.

    What was logged after that checkpoint is cut off, for it is going to be logged again. The main process
    reads; the others get what it read. Raises ConfigError where the configuration is not the checkpoint's.
    """
    processes = learner.processes
    with processes.one_fate():
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
    restore(learner, snapshot)
    stoppers.restore(dict(snapshot.stopper))
    if processes.main:
        run.cut_metrics(snapshot.metrics_bytes)
        checkpoints.compare_with_best(snapshot)
        console.print(f"Going on after {snapshot.done} of {config.iterations} iterations: {run.path}")
        if origin["versions"] != versions():
            console.print(f"It began with {origin['versions']}, now {versions()}: last digits may differ.")


def go_back_to_best(learner: Learner, checkpoints: Checkpoints) -> None:
    """Restore the learner from the checkpoint that the evaluations liked best. Raises StorageError."""
    processes = learner.processes
    with processes.one_fate():
        stored = checkpoints.best_stored() if processes.main else None
    stored = _from_main(stored, processes)
    if stored.state:
        restore(learner, decode(stored)[0])


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
    learner: Learner,
) -> bool:
    """Have the learner saved where its turn has come, by the process that writes; tells whether it is to end.

    `composite` tells that of the learner's evaluation, where it was evaluated after so many iterations.
    """
    if learner.processes.main:
        size, rated = run.metrics_bytes(), composite(learner.done)
        checkpoints.record(capture(learner, metrics_bytes=size, composite=rated, stopper=stoppers.state()))
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
    studio: Studio,
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
    with studio.policy.base():
        measured = measure(studio, scorer, prompts, config.evaluation, "base", processes)
    if processes.main:
        measured.save(path)
    return measured
