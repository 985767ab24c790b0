"""The study: a search's trials in a database (Optuna), which several workers may share.

A worker takes a trial in two steps. It locks the trial's file in the experiment's folder, which no other
living worker there holds; then it has the database turn WAITING into RUNNING, which succeeds for one worker
anywhere. A RUNNING trial of this folder whose file is not locked is that of a worker that was killed: whoever
comes next goes on with it. Trials of another folder, perhaps on another machine, are left to workers there.
"""

import fcntl
import random
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote

import optuna
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from trainer.config import ConfigError, SearchConfig, password_of
from trainer.experiments.space import Numbered, Space, draw, make_pruner
from trainer.runtime.errors import StorageError, reason

SQLITE_WAIT_S = 60.0  # for another process to let go of the file
UNNAMED_S = 30.0  # a trial that was taken so long ago, and has no owner, has lost it before it said its name
OWNER, SETTINGS, OUTCOME, IDENTITY = "owner", "settings", "outcome", "identity"


class TrialsStudy:
    """A search's trials, in the order of their numbers."""

    def __init__(self, study: Study, storage: RDBStorage, folder: Path, total: int, lock: Path) -> None:
        """`folder` is that of the trials' run folders; trials from number `total` on are not looked at."""
        self.study = study
        self._storage = storage
        self._folder = folder
        self._total = total
        self._lock = lock
        self._home = _home(folder)
        self._id = storage.get_study_id_from_name(study.study_name)

    def trials(self) -> list[FrozenTrial]:
        """As the database knows them now."""
        found = self._storage.get_all_trials(self._id, deepcopy=False)
        return sorted((trial for trial in found if trial.number < self._total), key=lambda it: it.number)

    def fill(self) -> None:
        """Have as many trials wait for workers as are asked for, and are not there yet."""
        with _exclusively(self._lock):
            # Workers elsewhere may do the same now: what is too many is not looked at.
            for _ in range(self._total - len(self._storage.get_all_trials(self._id, deepcopy=False))):
                self._storage.create_new_trial(self._id, create_trial(state=TrialState.WAITING))

    def take(self) -> "Taken | None":
        """The first trial that nobody is at; None where there is none."""
        with _exclusively(self._lock):
            for trial in self.trials():
                if trial.state.is_finished():
                    continue
                held = _try_lock(self._folder / f".{trial.number:04d}.lock")
                if held is None:
                    continue
                if self._claim(trial):
                    self.study.get_trials(deepcopy=False)  # for Optuna's cache to hear of it
                    return Taken(Trial(self.study, trial._trial_id), self._storage, held)
                held.close()
        return None

    def _claim(self, trial: FrozenTrial) -> bool:
        """Whether a trial whose file is locked is this worker's from now on."""
        owner = trial.user_attrs.get(OWNER)
        try:
            if trial.state == TrialState.WAITING:
                if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    return False
            elif owner is None:
                if not self._alone and _age_s(trial) < UNNAMED_S:
                    return False
            elif owner["home"] != self._home:
                return False
            named = {"home": self._home, "host": socket.gethostname(), "folder": str(self._folder)}
            self._storage.set_trial_user_attr(trial._trial_id, OWNER, named)
        except UpdateFinishedTrialError:  # somebody elsewhere was faster in everything
            return False
        return True

    @property
    def _alone(self) -> bool:
        """Whether all workers share this machine, and so the lock under which trials are taken."""
        return bool(self._storage.engine.name == "sqlite")

    def elsewhere(self) -> list[FrozenTrial]:
        """Trials that workers of another folder are at."""
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        return [trial for trial in running if OWNER in trial.user_attrs and not self.is_here(trial)]

    def is_here(self, trial: FrozenTrial) -> bool:
        """Whether a trial's run folder is in this experiment's folder."""
        return bool(trial.user_attrs.get(OWNER, {}).get("home") == self._home)

    def unfinished(self) -> list[FrozenTrial]:
        """Trials that wait, or that somebody is at."""
        return [trial for trial in self.trials() if not trial.state.is_finished()]


def _age_s(trial: FrozenTrial) -> float:
    """Seconds since it was taken, by the clocks of who took it and of this machine."""
    return time.time() - trial.datetime_start.timestamp() if trial.datetime_start else 0.0


class Taken:
    """A trial that is this worker's until it is closed; a context manager."""

    def __init__(self, trial: Trial, storage: RDBStorage, held: TextIO) -> None:
        self.trial = trial
        self.number = trial.number
        self._storage = storage
        self._held = held

    def __enter__(self) -> "Taken":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def draw(self, space: Space) -> dict[str, Any]:
        """What it tries, by key of the space; the same whenever it is asked."""
        return draw(self.trial, space)

    def note_settings(self, settings: Mapping[str, Any]) -> None:
        """Keep what the trial is about with it."""
        self.trial.set_user_attr(SETTINGS, dict(settings))

    def report(self, iterations: int, value: float) -> None:
        """Keep the gain after so many iterations; what was reported before a kill stays as it is."""
        if iterations not in self._stored().intermediate_values:
            self._storage.set_trial_intermediate_value(self.trial._trial_id, iterations, value)

    def is_to_be_pruned(self) -> bool:
        """What the pruner says of what has been reported."""
        return self.trial.study.pruner.prune(self.trial.study, self._stored())

    def tell(self, state: TrialState, value: float | None, outcome: Mapping[str, Any]) -> None:
        """Finish it."""
        self.trial.set_user_attr(OUTCOME, dict(outcome))
        values = None if value is None else [value]
        self._storage.set_trial_state_values(self.trial._trial_id, state, values)

    def _stored(self) -> FrozenTrial:
        return self._storage.get_trial(self.trial._trial_id)


# ------------------------------------------------------------------------------------------ opening


@contextmanager
def open_study(
    config: SearchConfig, folder: Path, name: str, seed: int, total: int, identity: Mapping[str, str]
) -> Iterator[TrialsStudy]:
    """The study `name`, made by whoever comes first; `identity` says what its trials have in common.

    Raises StorageError where the database cannot be used, ConfigError where it is another search's study.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    address = config.storage or f"sqlite:///{folder.parent / 'study.db'}"
    with _explained(address):
        url, lock = _database(address, folder)
        with _exclusively(lock):
            storage = _open_storage(url)
        try:
            with _exclusively(lock):
                study = optuna.create_study(
                    storage=storage,
                    study_name=name,
                    direction="maximize",
                    load_if_exists=True,
                    sampler=Numbered(config.sampler, seed, config.space),
                    pruner=make_pruner(config),
                )
                _check_identity(study, identity, name, address)
            trials = TrialsStudy(study, storage, folder, total, lock)
            trials.fill()
            yield trials
        finally:
            storage.remove_session()
            storage.engine.dispose()


def _database(address: str, folder: Path) -> tuple[str, Path]:
    """Its URL with the password, and the file that is locked while it is changed on this machine."""
    try:
        url = make_url(address)
        url.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ImportError, ValueError):
        raise ConfigError(
            f"trainer.search.storage: {address}: no address of a database that can be used here; write it as "
            "postgresql+psycopg://user@host/database, or leave it out for SQLite"
        ) from None
    password = password_of(address)
    if password is not None:
        url = url.set(password=unquote(password))
    lock = folder / ".lock"
    if url.get_backend_name() == "sqlite" and url.database:
        lock = Path(f"{url.database}.lock").resolve()
    # Optuna fills in {SCHEMA_VERSION}.
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"), lock


def _open_storage(url: str) -> RDBStorage:
    """Somebody elsewhere may be making the same tables now: then the second attempt finds them."""
    options = {"connect_args": {"timeout": SQLITE_WAIT_S}} if url.startswith("sqlite") else {}
    for attempt in range(4):
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **options})
        except (SQLAlchemyError, AssertionError):
            if attempt == 3:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """What the database says within this block, as one line."""
    try:
        yield
    except (SQLAlchemyError, OptunaError) as error:
        # Optuna wraps what SQLAlchemy wraps around what the database's own library says.
        cause = getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error
        raise StorageError(
            f"trainer.search.storage: {address}: the study cannot be reached or used ({reason(cause)}); see "
            "that the database runs and may be written to, then run the same command again"
        ) from None


def _check_identity(study: Study, identity: Mapping[str, str], name: str, address: str) -> None:
    """Keep what the trials have in common with the study, or compare."""
    kept = study.user_attrs.get(IDENTITY)
    if kept is None:
        study.set_user_attr(IDENTITY, dict(identity))
        return
    differs = next((key for key in identity if kept.get(key) != identity[key]), None)
    if differs is not None:
        raise ConfigError(
            f"trainer.search.study: {name} in {address} is the study of another search, which differs in "
            f"{differs}; name another study, or make it the same"
        )


def _home(folder: Path) -> str:
    """A name for the folder itself, the same from whichever machine or container it is looked at."""
    file = folder / ".home"
    with _exclusively(folder / ".lock"):
        if not file.exists() or not file.read_text(encoding="ascii"):
            partial = folder / ".home.partial"
            partial.write_text(uuid.uuid4().hex, encoding="ascii")
            partial.replace(file)
    return file.read_text(encoding="ascii")


@contextmanager
def _exclusively(file: Path) -> Iterator[None]:
    """One process at a time."""
    with file.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _try_lock(file: Path) -> TextIO | None:
    """The file, locked until it is closed or the process ends; None where somebody holds it."""
    opened = file.open("a")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        opened.close()
        return None
    return opened


# ------------------------------------------------------------------------------------------ reading


def owner_of(trial: FrozenTrial) -> str:
    """Where a trial's run folder is, for people."""
    owner: Mapping[str, str] = trial.user_attrs[OWNER]
    return f"{owner['host']}:{owner['folder']}"


STATES: Mapping[TrialState, str] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def rows(trials: Sequence[FrozenTrial], null_trial: bool) -> list[dict[str, Any]]:
    """The trials as search.json has them."""
    return [_row(trial, null_trial and trial.number == 0) for trial in trials]


def _row(trial: FrozenTrial, null: bool) -> dict[str, Any]:
    outcome = trial.user_attrs.get(OUTCOME, {})
    gain = outcome.get("gain") or {}
    curve = sorted(trial.intermediate_values.items())
    return {
        "number": trial.number,
        "state": STATES[trial.state],
        "params": trial.user_attrs.get(SETTINGS, {}),
        "value": gain.get("difference"),
        "low": gain.get("low"),
        "high": gain.get("high"),
        "iterations": outcome.get("iterations", curve[-1][0] if curve else 0),
        "reason": outcome.get("reason"),
        "null": null,
        "curve": [[step, value] for step, value in curve],
    }
