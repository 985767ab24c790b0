"""Folder of an experiment, shared by `crossval` and `search`.

    <runs_dir>/<name>-experiment/
        config.yaml scorer.json splits.json     common to everything below
        search/trials/0003/                     run folder of a trial (search.py)
        folds/0/ final/                         run folders of the folds and of the final fit (crossval.py)
        search.json crossval.json test.json report.html

The same command starts an experiment and resumes it: finished parts are not repeated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.config import ConfigError, TrainerConfig, load_trainer_config, with_values
from trainer.data.splits import REMEDY, ExperimentSplits, experiment_splits
from trainer.rl.rewards import Scorer
from trainer.runs.folder import (
    CONFIG_FILE,
    LOCK_FILE,
    MUTABLE_SETTINGS,
    SCORER_FILE,
    RunFolder,
    check_same_settings,
    pin_scorer,
)
from trainer.runtime.errors import StorageError
from trainer.runtime.files import Lock, LockHeldError

SPLITS_FILE = "splits.json"
LOCK_WAIT_S = 60.0  # for a trainer that was terminated to save its checkpoint and end

# Settings that are free in a run, but not in an experiment: they decide which iteration each fold ships, and
# so the length of the final fit.
DECIDING = ("iterations", "evaluation.every")
# Settings that may change when an experiment is resumed.
EXPERIMENT_FREE = (
    *(setting for setting in MUTABLE_SETTINGS if setting not in DECIDING),
    *("crossval.workers", "crossval.settings"),
    *("search.trials", "search.workers", "search.storage"),
)


class Experiment:
    """An experiment that has been started: its folder, configuration and splits."""

    def __init__(self, path: Path, config: TrainerConfig, splits: ExperimentSplits) -> None:
        self.path = path
        self.config = config
        self.splits = splits
        self.folder = RunFolder(path)

    @classmethod
    def open(cls, config: TrainerConfig, path: Path | None = None) -> "Experiment":
        """Start an experiment, or resume the one in the folder; several processes may do so at once.

        Args:
            config: Its configuration.
            path: Its folder; None: `<name>-experiment` in `runs_dir`.

        Raises:
            ConfigError: The folder holds other files, or an experiment with other settings.
            LeakError: Near-duplicates, or prompts of one user, are on two sides of the splits.
        """
        path = (path or config.runs_dir / f"{config.name}-experiment").resolve()
        path.mkdir(parents=True, exist_ok=True)
        with Lock(path / LOCK_FILE, wait_s=None):
            if (path / CONFIG_FILE).exists():
                existing = cls.load(path)
                try:
                    check_same_settings(existing.config, config, str(path), EXPERIMENT_FREE)
                except ConfigError as error:
                    raise ConfigError(f"{error} with another --run, or delete this folder") from error
                return cls(path, config, existing.splits)
            if any(not file.name.startswith(".") for file in path.iterdir() if file.name != SPLITS_FILE):
                raise ConfigError(f"{path}: not the folder of an experiment; name another with --run")
            splits = experiment_splits(config.prompts, config.crossval.folds, config.seed)
            splits.save(path / SPLITS_FILE)
            RunFolder(path).write_config(config)
            return cls(path, config, splits)

    @classmethod
    def load(cls, path: Path) -> "Experiment":
        """Load an experiment that has been started.

        Raises:
            ConfigError: There is none, or its splits have another number of folds.
        """
        if not (path / CONFIG_FILE).exists():
            raise ConfigError(f"{path}: not an experiment (no {CONFIG_FILE}); name its folder with --run")
        config = load_trainer_config(path / CONFIG_FILE)
        splits = ExperimentSplits.load(path / SPLITS_FILE, config.prompts)
        folds, expected = len(splits.folds), config.crossval.folds
        if folds != expected:
            raise ConfigError(
                f"{path / SPLITS_FILE}: has {folds} folds for crossval.folds={expected}; {REMEDY}"
            )
        return cls(path, config, splits)

    @contextmanager
    def exclusive(self, task: str) -> Iterator[None]:
        """Allow one process at a time to run this block for the experiment.

        Raises:
            StorageError: Another process is running `task`.
        """
        try:
            lock = Lock(self.path / f".{task}")
        except LockHeldError as error:
            raise StorageError(
                f"{self.path}: process {error.process} is already running its {task}; wait until it ends, or "
                "stop it"
            ) from error
        with lock:
            yield

    def pin(self, scorer: Scorer) -> None:
        """Store the identity of the reward service, or compare it with the stored one.

        Raises:
            StorageError: It is the identity of a different service.
        """
        with Lock(self.path / LOCK_FILE, wait_s=None):
            pin_scorer(self.folder, scorer.identity)

    @property
    def evaluators(self) -> tuple[str, ...]:
        """The service's evaluators, in the order of the columns of scores."""
        return tuple(sorted(self.folder.read_json(SCORER_FILE)))

    def open_run(self, config: TrainerConfig, *names: str) -> tuple[TrainerConfig, RunFolder]:
        """Create or resume one of the experiment's runs, and lock its folder.

        Args:
            config: The experiment's configuration with the run's settings.
            names: Path of the run folder below the experiment's folder.

        Returns:
            The run's configuration, with its own folder, and the run folder.
        """
        path = self.path.joinpath(*names)
        run_config = self.run_config(config, *names)
        if not (path / CONFIG_FILE).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return run_config, RunFolder.create(run_config, path)
        return run_config, RunFolder.resume(path, wait_s=LOCK_WAIT_S)

    def run_config(self, config: TrainerConfig, *names: str) -> TrainerConfig:
        """Return the configuration of one of the experiment's runs, with its own folder.

        Raises:
            ConfigError: The run was started with other settings.
        """
        path = self.path.joinpath(*names)
        run_config = with_values(config, {"name": path.name, "runs_dir": str(path.parent)})
        if (path / CONFIG_FILE).exists():
            check_same_settings(load_trainer_config(path / CONFIG_FILE), run_config, str(path))
        return run_config
