"""Study of a search: its trials in a database (Optuna), shared by several workers.

A worker claims a trial in two steps. It locks the trial's file in the experiment's folder, which no other
living worker of this folder holds; then it changes the trial's state in the database from WAITING to RUNNING,
which succeeds for one worker anywhere. A RUNNING trial of this folder whose file is not locked belonged to a
worker that was killed, and the next worker resumes it. Trials of another folder, perhaps on another machine,
are left to the workers there.
"""

import random
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import optuna
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial
from optuna.trial import Trial as OptunaTrial
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from trainer.config import ConfigError, DatabaseUrl, SearchConfig
from trainer.experiments.space import PerTrialSampler, Space, make_pruner, sample_values
from trainer.experiments.trial import State, Trial, TrialSettings
from trainer.runtime.errors import StorageError, reason
from trainer.runtime.files import Lock, LockHeldError, write_atomically

SQLITE_WAIT_S = 60.0  # for another process to unlock the file
# Age of a RUNNING trial without an owner from which its worker counts as killed before it stored the owner.
OWNER_GRACE_S = 30.0
OWNER, SETTINGS, OUTCOME, IDENTITY = "owner", "settings", "outcome", "identity"  # keys in the database
SERVICE_KEY = "the judge"  # key in the stored identity: the evaluators' fingerprints

STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


# ------------------------------------------------------------------------------------------- opening


@contextmanager
def open_study(
    config: SearchConfig, folder: Path, name: str, seed: int, total: int, identity: Mapping[str, str]
) -> "Iterator[SearchStudy]":
    """Open a study; the first worker creates it.

    Args:
        config: The search: storage, space, sampler and pruner.
        folder: Parent of the trials' run folders.
        name: Name of the study in its database.
        seed: Seed of the sampler.
        total: Number of trials, the null trial included.
        identity: What all trials of the study have in common.

    Raises:
        StorageError: The database cannot be used.
        ConfigError: The address is invalid, or a study of this name has another identity.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    url = config.storage or DatabaseUrl(f"sqlite:///{folder.parent / 'study.db'}")
    with _database_errors(url):
        address, lock = _connection(url, folder)
        with Lock(lock, wait_s=None):
            storage = _open_storage(address)
        try:
            with Lock(lock, wait_s=None):
                study = optuna.create_study(
                    storage=storage,
                    study_name=name,
                    direction="maximize",
                    load_if_exists=True,
                    sampler=PerTrialSampler(config.sampler, seed, config.space),
                    pruner=make_pruner(config),
                )
                _check_identity(study, identity, name, url)
            opened = SearchStudy(study, storage, folder, total, lock)
            opened.enqueue_missing()
            yield opened
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _connection(url: DatabaseUrl, folder: Path) -> tuple[str, Path]:
    """Return Optuna's URL with the password, and the file to lock while this machine changes the database."""
    try:
        parsed = make_url(url.address)
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ImportError, ValueError):
        raise ConfigError(
            f"trainer.search.storage: {url}: not the address of a supported database; write it as "
            "postgresql+psycopg://user@host/database, or leave it out for SQLite"
        ) from None
    if url.password is not None:
        parsed = parsed.set(password=unquote(url.password.get_secret_value()))
    lock = folder / ".lock"
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        lock = Path(f"{parsed.database}.lock").resolve()
    # Optuna replaces {SCHEMA_VERSION}.
    return parsed.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"), lock


def _open_storage(address: str) -> RDBStorage:
    """Open the database. If a worker elsewhere creates the same tables, the next attempt finds them."""
    options = {"connect_args": {"timeout": SQLITE_WAIT_S}} if address.startswith("sqlite") else {}
    for attempt in range(4):
        try:
            return RDBStorage(address, engine_kwargs={"pool_pre_ping": True, **options})
        except (SQLAlchemyError, AssertionError):
            if attempt == 3:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")


@contextmanager
def _database_errors(url: DatabaseUrl) -> Iterator[None]:
    """Raise errors of the database within this block as a StorageError of one line."""
    try:
        yield
    except (SQLAlchemyError, OptunaError) as error:
        # Optuna wraps SQLAlchemy's error, which wraps the database driver's.
        cause = getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error
        raise StorageError(
            f"trainer.search.storage: {url}: cannot connect to the study or use it ({reason(cause)}); check "
            "that the database runs and is writable, then run the same command again"
        ) from None


def _check_identity(study: Study, identity: Mapping[str, str], name: str, url: DatabaseUrl) -> None:
    """Store what the trials have in common in a new study; compare it with an existing one's."""
    stored = study.user_attrs.get(IDENTITY)
    if stored is None:
        study.set_user_attr(IDENTITY, dict(identity))
        return
    different = next((key for key in identity if stored.get(key) != identity[key]), None)
    if different is not None:
        what = "the reward service" if different == SERVICE_KEY else different
        raise ConfigError(
            f"trainer.search.study: {name} in {url} is the study of another search, which differs in "
            f"{what}; name another study, or make the settings equal"
        )


# ------------------------------------------------------------------------------------------- trials


class SearchStudy:
    """The trials of a search, by their numbers."""

    def __init__(self, study: Study, storage: RDBStorage, folder: Path, total: int, lock: Path) -> None:
        """Wrap an open study.

        Args:
            study: The study, with its sampler and pruner.
            storage: Its database.
            folder: Parent of the trials' run folders.
            total: Number of trials; trials from this number on are ignored.
            lock: File to lock while trials are claimed or added.
        """
        self.study = study
        self._storage = storage
        self._folder = folder
        self._total = total
        self._lock = lock
        self._home = _home(folder)
        self._id = storage.get_study_id_from_name(study.study_name)

    def trials(self) -> list[FrozenTrial]:
        """Return the trials as the database holds them now."""
        stored = self._storage.get_all_trials(self._id, deepcopy=False)
        return sorted((trial for trial in stored if trial.number < self._total), key=lambda it: it.number)

    def unfinished(self) -> list[FrozenTrial]:
        """Return the trials that are waiting or running."""
        return [trial for trial in self.trials() if not trial.state.is_finished()]

    def running_elsewhere(self) -> list[FrozenTrial]:
        """Return the trials that workers of another folder are running."""
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        return [trial for trial in running if OWNER in trial.user_attrs and not self.is_local(trial)]

    def is_local(self, trial: FrozenTrial) -> bool:
        """Return whether a trial's run folder is in this experiment's folder."""
        return bool(trial.user_attrs.get(OWNER, {}).get("home") == self._home)

    def enqueue_missing(self) -> None:
        """Add waiting trials up to the total."""
        with Lock(self._lock, wait_s=None):
            # Workers elsewhere may do the same now: trials beyond the total are ignored.
            for _ in range(self._total - len(self._storage.get_all_trials(self._id, deepcopy=False))):
                self._storage.create_new_trial(self._id, create_trial(state=TrialState.WAITING))

    def claim(self) -> "ClaimedTrial | None":
        """Claim the first unfinished trial that no worker holds; None if there is none."""
        with Lock(self._lock, wait_s=None):
            for trial in self.trials():
                if trial.state.is_finished():
                    continue
                try:
                    held = Lock(self._folder / f".{trial.number:04d}.lock")
                except LockHeldError:
                    continue
                if self._own(trial):
                    self.study.get_trials(deepcopy=False)  # updates Optuna's cache
                    return ClaimedTrial(OptunaTrial(self.study, trial._trial_id), self._storage, held)
                held.release()
        return None

    def _own(self, trial: FrozenTrial) -> bool:
        """Make this worker the owner of a trial whose file it has locked; return whether it succeeded."""
        owner = trial.user_attrs.get(OWNER)
        try:
            if trial.state == TrialState.WAITING:
                if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    return False
            elif owner is None:
                if not self._one_machine and _age_s(trial) < OWNER_GRACE_S:
                    return False
            elif owner["home"] != self._home:
                return False
            named = {"home": self._home, "host": socket.gethostname(), "folder": str(self._folder)}
            self._storage.set_trial_user_attr(trial._trial_id, OWNER, named)
        except UpdateFinishedTrialError:  # a worker elsewhere has claimed and finished it
            return False
        return True

    @property
    def _one_machine(self) -> bool:
        """True if all workers are on this machine, and so share the lock under which trials are claimed."""
        return bool(self._storage.engine.name == "sqlite")


def _home(folder: Path) -> str:
    """Return an identifier of the folder itself, the same from every machine or container."""
    file = folder / ".home"
    with Lock(folder / ".lock", wait_s=None):
        if not file.exists() or not file.read_text(encoding="ascii"):
            write_atomically(file, uuid.uuid4().hex.encode())
    return file.read_text(encoding="ascii")


def _age_s(trial: FrozenTrial) -> float:
    """Return the seconds since a trial was claimed, by the clocks of its worker and of this machine."""
    return time.time() - trial.datetime_start.timestamp() if trial.datetime_start else 0.0


class ClaimedTrial:
    """A trial that belongs to this worker until the `with` block ends."""

    def __init__(self, trial: OptunaTrial, storage: RDBStorage, lock: Lock) -> None:
        self.trial = trial
        self.number = trial.number
        self._storage = storage
        self._lock = lock

    def __enter__(self) -> "ClaimedTrial":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def sample(self, space: Space) -> dict[str, Any]:
        """Return the trial's values by key of the space; repeated calls return the same."""
        return sample_values(self.trial, space)

    def store_settings(self, settings: TrialSettings) -> None:
        """Store the settings that the trial changes."""
        self.trial.set_user_attr(SETTINGS, dict(settings))

    def report(self, iterations: int, value: float) -> None:
        """Store the gain after so many iterations; a value reported before a kill stays."""
        if iterations not in self._stored().intermediate_values:
            self._storage.set_trial_intermediate_value(self.trial._trial_id, iterations, value)

    def should_prune(self) -> bool:
        """Return the pruner's decision on the reports so far."""
        return self.trial.study.pruner.prune(self.trial.study, self._stored())

    def finish(self, state: TrialState, value: float | None, outcome: Mapping[str, Any]) -> None:
        """Store the final state, the gain and the outcome."""
        self.trial.set_user_attr(OUTCOME, dict(outcome))
        values = None if value is None else [value]
        self._storage.set_trial_state_values(self.trial._trial_id, state, values)

    def _stored(self) -> FrozenTrial:
        return self._storage.get_trial(self.trial._trial_id)


# ------------------------------------------------------------------------------------------ reading


def location(trial: FrozenTrial) -> str:
    """Return host and folder of a trial's run folder, for messages."""
    owner: Mapping[str, str] = trial.user_attrs[OWNER]
    return f"{owner['host']}:{owner['folder']}"


def gain_of(trial: FrozenTrial) -> dict[str, Any] | None:
    """Return the composite's row of a finished trial's comparison; None if it has none."""
    gain: dict[str, Any] | None = trial.user_attrs.get(OUTCOME, {}).get("gain")
    return gain


def read_trials(stored: Sequence[FrozenTrial], *, null_trial: bool) -> list[Trial]:
    """Return the study's trials as records; with `null_trial`, number 0 is the null trial."""
    return [_read_trial(trial, null_trial and trial.number == 0) for trial in stored]


def _read_trial(trial: FrozenTrial, null: bool) -> Trial:
    outcome, gain = trial.user_attrs.get(OUTCOME, {}), gain_of(trial) or {}
    curve = tuple(sorted(trial.intermediate_values.items()))
    return Trial(
        number=trial.number,
        state=STATES[trial.state],
        params=trial.user_attrs.get(SETTINGS, {}),
        value=gain.get("difference"),
        low=gain.get("low"),
        high=gain.get("high"),
        iterations=outcome.get("iterations", curve[-1][0] if curve else 0),
        reason=outcome.get("reason"),
        null=null,
        curve=curve,
    )
