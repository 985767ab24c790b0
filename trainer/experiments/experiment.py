"""The folder of an experiment, which `crossval` and `search` share.

    <runs_dir>/<name>-experiment/
        config.yaml scorer.json splits.json     what everything below has in common
        search/trials/0003/                     one run folder a trial (.search)
        folds/0/ final/                         one run folder a fold, and the final fit (.crossval)
        search.json crossval.json test.json report.html

The same command begins an experiment and goes on with it: what is finished is not done again.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.config import ConfigError, TrainerConfig, load_trainer_config, with_values
from trainer.data.splits import REMEDY, ExperimentSplits, experiment_splits
from trainer.rl.rewards import Scorer
from trainer.runs.folder import CONFIG_FILE, FREE, LOCK_FILE, SCORER_FILE, RunFolder, check_same, pin_scorer
from trainer.runtime.errors import StorageError

SPLITS_FILE = "splits.json"
LOCK_WAIT_S = 60.0  # for a trainer that was told to stop to save what it has

# How long folds are and when they are looked at decides which iteration each ships, and so the final fit.
DECIDING = ("iterations", "evaluation.every")
# What may differ when an experiment goes on, beside what may when a run does.
EXPERIMENT_FREE = (
    *(setting for setting in FREE if setting not in DECIDING),
    *("crossval.workers", "crossval.settings"),
    *("search.trials", "search.workers", "search.storage"),
)


class Experiment:
    """An experiment that has begun: its folder, its configuration and its splits."""

    def __init__(self, path: Path, config: TrainerConfig, splits: ExperimentSplits) -> None:
        self.path = path
        self.config = config
        self.splits = splits
        self.folder = RunFolder(path)

    @classmethod
    def open(cls, config: TrainerConfig, path: Path | None = None) -> "Experiment":
        """Begin an experiment, or go on with the one that is there; several processes may do so at once.

        Raises ConfigError where the folder holds something else, or an experiment of other settings, and
        LeakError where its splits are not clean.
        """
        path = (path or config.runs_dir / f"{config.name}-experiment").resolve()
        path.mkdir(parents=True, exist_ok=True)
        with _opening(path):
            if (path / CONFIG_FILE).exists():
                begun = cls.load(path)
                try:
                    check_same(begun.config, config, str(path), EXPERIMENT_FREE)
                except ConfigError as error:
                    raise ConfigError(f"{error} with another --run, or delete this folder") from error
                return cls(path, config, begun.splits)
            if any(not file.name.startswith(".") for file in path.iterdir() if file.name != SPLITS_FILE):
                raise ConfigError(f"{path}: this folder holds no experiment; name another with --run")
            splits = experiment_splits(config.prompts, config.crossval.folds, config.seed)
            splits.save(path / SPLITS_FILE)
            RunFolder(path).write_config(config)
            return cls(path, config, splits)

    @classmethod
    def load(cls, path: Path) -> "Experiment":
        """One that has begun. Raises ConfigError where there is none."""
        if not (path / CONFIG_FILE).exists():
            raise ConfigError(f"{path}: no experiment (no {CONFIG_FILE}); name its folder with --run")
        config = load_trainer_config(path / CONFIG_FILE)
        splits = ExperimentSplits.load(path / SPLITS_FILE, config.prompts)
        found, wanted = len(splits.folds), config.crossval.folds
        if found != wanted:
            raise ConfigError(
                f"{path / SPLITS_FILE}: has {found} folds for crossval.folds={wanted}; {REMEDY}"
            )
        return cls(path, config, splits)

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Within this block no other process does the same with this experiment. Raises StorageError."""
        with (self.path / f".{what}").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"{self.path}: another process is at its {what}; wait until it ends, or stop it"
                ) from error
            yield

    def pin(self, scorer: Scorer) -> None:
        """Keep the service's identity, or check it. Raises StorageError where it is another one's."""
        with _opening(self.path):
            pin_scorer(self.folder, scorer.identity)

    @property
    def evaluators(self) -> tuple[str, ...]:
        """The service's evaluators, in the order of the columns of scores."""
        return tuple(sorted(self.folder.read_json(SCORER_FILE)))

    def run(self, config: TrainerConfig, *names: str) -> tuple[TrainerConfig, RunFolder]:
        """One of its runs, locked: begun, or gone on with; and its configuration, placed there."""
        path = self.path.joinpath(*names)
        placed = self.placed(config, *names)
        if not (path / CONFIG_FILE).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return placed, RunFolder.create(placed, path)
        return placed, resume_when_free(path)

    def placed(self, config: TrainerConfig, *names: str) -> TrainerConfig:
        """The configuration of one of its runs. Raises ConfigError where that began with other settings."""
        path = self.path.joinpath(*names)
        placed = with_values(config, {"name": path.name, "runs_dir": str(path.parent)})
        if (path / CONFIG_FILE).exists():
            check_same(load_trainer_config(path / CONFIG_FILE), placed, str(path))
        return placed


def resume_when_free(path: Path) -> RunFolder:
    """A run's folder, once whoever was killed with it has let go. Raises StorageError after a minute."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return RunFolder.resume(path)
        except StorageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """One process at a time."""
    with (path / LOCK_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
