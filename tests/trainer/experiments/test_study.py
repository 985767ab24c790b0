"""Study of a search without training: sampling, pruning, claims, addresses, workers; SQLite, PostgreSQL."""

import os
import random
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import TrialState

from trainer.config import ConfigError, DatabaseUrl, SearchConfig, TrainerConfig, with_values
from trainer.experiments.space import SuccessiveHalving
from trainer.experiments.study import location, open_study
from trainer.runs.folder import RunFolder
from trainer.runtime.errors import StorageError

SPACE = {
    "update.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "lora.rank": {"choices": [4, 8, 16]},
    "lora.targets": {"choices": [["to_q"], ["to_q", "to_k"]]},
    "update.steps_per_image": {"low": 1, "high": 6, "integer": True},
}


def search_config(**changes: Any) -> SearchConfig:
    """Return the configuration of a search over SPACE."""
    return SearchConfig.model_validate({"space": SPACE, "pruner": "none", **changes})


def sampled(config: SearchConfig, folder: Path, total: int, seed: int = 0) -> list[dict[str, Any]]:
    """Claim and finish all unfinished trials, with the learning rate as the gain; return their values."""
    values = []
    with open_study(config, folder, "study", seed, total, {}) as study:
        while (claimed := study.claim()) is not None:
            with claimed:
                values.append(claimed.sample(config.space))
                claimed.finish(TrialState.COMPLETE, values[-1]["update.learning_rate"], {"gain": None})
    return values


# TPE samples at random before it has ten complete trials.
@pytest.mark.parametrize(("sampler", "total"), [("random", 6), ("tpe", 12), ("qmc", 6)])
def test_trial_values_do_not_depend_on_interruptions(tmp_path: Path, sampler: str, total: int) -> None:
    """Stopped after a trial, killed between two keys, extended later: the sequence is the same."""
    config = search_config(sampler=sampler)
    whole = sampled(config, tmp_path / "whole/trials", total)
    assert len({repr(it) for it in whole}) == total
    pieces = sampled(config, tmp_path / "pieces/trials", 3)
    with open_study(config, tmp_path / "pieces/trials", "study", 0, total, {}) as study:
        claimed = study.claim()
        assert claimed is not None
        with claimed:  # killed after the first key
            first = sorted(SPACE)[0]
            claimed.sample({first: config.space[first]})
    pieces += sampled(config, tmp_path / "pieces/trials", total)
    assert pieces == whole
    for values in whole:
        assert 1e-4 <= values["update.learning_rate"] <= 1e-2
        assert values["lora.rank"] in (4, 8, 16)
        assert values["lora.targets"] in (["to_q"], ["to_q", "to_k"])
        assert isinstance(values["update.steps_per_image"], int)
    assert sampled(config, tmp_path / "other/trials", 3, seed=1) != whole[:3]


def test_successive_halving_agrees_with_optuna() -> None:
    """Decisions on random reports of successive trials are Optuna's, and the same when repeated."""
    rng = random.Random(0)
    reference, pruner = SuccessiveHalvingPruner(min_resource=1, reduction_factor=3), SuccessiveHalving(3)
    study = optuna.create_study(direction="maximize", pruner=reference)
    pruned = 0
    for _ in range(60):
        trial, quality = study.ask(), rng.random()
        for step in range(1, 12):
            trial.report(quality + 0.3 * rng.random(), step)
            decision = pruner.prune(study, study.get_trials()[-1])
            assert decision == pruner.prune(study, study.get_trials()[-1])
            assert decision == trial.should_prune()
            if decision:
                pruned += 1
                break
        study.tell(
            trial,
            state=TrialState.PRUNED if decision else TrialState.COMPLETE,
            values=None if decision else [quality],
        )
    assert 20 < pruned < 60


def test_trial_of_a_killed_worker_is_claimed_again(tmp_path: Path) -> None:
    """A living worker's trial is not. Reported values stay; the lowest number is claimed first."""
    with open_study(search_config(), tmp_path / "trials", "study", 0, 2, {}) as study:
        first = study.claim()
        assert first is not None
        assert first.number == 0
        first.report(5, 0.25)
        other = study.claim()
        assert other is not None
        assert other.number == 1
        assert study.claim() is None
        with first:
            pass  # its worker is killed
        adopted = study.claim()
        assert adopted is not None
        with adopted, other:
            assert adopted.number == 0
            adopted.report(5, 99.0)
            assert study.trials()[0].intermediate_values == {5: 0.25}
            adopted.finish(TrialState.COMPLETE, 0.5, {"gain": None})
            other.finish(TrialState.FAIL, None, {"gain": None, "reason": "broken"})
        assert study.claim() is None
        assert not study.unfinished()


def test_trials_of_another_folder_are_not_claimed(tmp_path: Path) -> None:
    """As on two machines with one database: they are listed, but not claimed even if their worker is dead."""
    config = search_config(storage=f"sqlite:///{tmp_path / 'shared.db'}")
    with open_study(config, tmp_path / "there", "study", 0, 2, {}) as study:
        claimed = study.claim()
        assert claimed is not None
        with claimed:
            pass
    with open_study(config, tmp_path / "here", "study", 0, 2, {}) as study:
        own = study.claim()
        assert own is not None
        with own:
            assert own.number == 1
            assert study.claim() is None
            assert [trial.number for trial in study.running_elsewhere()] == [0]
            assert location(study.running_elsewhere()[0]).endswith(str(tmp_path / "there"))


def test_study_of_another_search_is_refused(tmp_path: Path) -> None:
    """The message names the difference; trials of two searches cannot be compared."""
    config = search_config(storage=f"sqlite:///{tmp_path / 'shared.db'}", study="mine")
    with open_study(config, tmp_path / "a", "mine", 0, 1, {"seed": "0", "lora.rank": "8"}):
        pass
    with (
        pytest.raises(ConfigError, match=r"search\.study: mine .* differs in lora\.rank"),
        open_study(config, tmp_path / "b", "mine", 0, 1, {"seed": "0", "lora.rank": "16"}),
    ):
        pass


# --------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "address", "password"),
    [
        ("postgresql+psycopg://me:se:cr@et@host/db", "postgresql+psycopg://me@host/db", "se:cr@et"),
        ("postgresql://me:p%40ss/word@host:5432/db", "postgresql+psycopg://me@host:5432/db", "p%40ss/word"),
        ("postgres://host/db?user=me&password=hidden", "postgresql+psycopg://host/db?user=me", "hidden"),
        ("postgresql+psycopg://me@other/db", "postgresql+psycopg://me@other/db", None),
        ("sqlite:////home/a:b@c/study.db", "sqlite:////home/a:b@c/study.db", None),
    ],
)
def test_database_url_hides_its_password(text: str, address: str, password: str | None) -> None:
    """The string, the repr and the comparison omit the password; only an explicit call returns it."""
    url = DatabaseUrl.parse(text)
    assert str(url) == url.address == address
    assert (url.password and url.password.get_secret_value()) == password
    assert password is None or password not in repr(url)
    assert url == DatabaseUrl(address)


def test_changed_configuration_keeps_the_password_of_the_same_address(trainer_config: TrainerConfig) -> None:
    """Changing any other setting keeps it; another address does not get it."""
    storage = "postgresql://me:hunter2@host/db"
    config = with_values(trainer_config, {"search.storage": storage})
    changed = with_values(config, {"service.url": "http://127.0.0.1:7001"})
    kept = changed.search.storage
    assert kept is not None
    assert kept.password is not None
    assert kept.password.get_secret_value() == "hunter2"
    other = with_values(config, {"search.storage": "postgresql://me@other/db"}).search.storage
    assert other is not None
    assert other.password is None


def test_password_is_never_saved_or_printed(trainer_config: TrainerConfig, tmp_path: Path) -> None:
    """It is not in config.yaml, nor in the errors for an unreachable database or an invalid address."""
    values = trainer_config.model_dump(mode="json")
    values["search"] = {"storage": "postgresql://me:hunter2@127.0.0.1:1/db"}
    config = TrainerConfig.model_validate(values)
    RunFolder(tmp_path).write_config(config)
    assert "me@127.0.0.1:1/db" in (tmp_path / "config.yaml").read_text()
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()
    for storage, error in (
        ("postgresql://me:hunter2@127.0.0.1:1/db", StorageError),
        ("postgresql://me:hunter2@host:notaport/db", ConfigError),
        ("nosuch://me:hunter2@host/db", ConfigError),
        ("hunter", ConfigError),
    ):
        with (
            pytest.raises(error, match=r"trainer\.search\.storage") as refused,
            open_study(search_config(storage=storage), tmp_path / "trials", "study", 0, 1, {}),
        ):
            pass
        assert "hunter2" not in str(refused.value)
        assert "\n" not in str(refused.value)


# ----------------------------------------------------------------------------------------- workers

# Two of these run at a time; each prints the trials that it has run.
WORKER = """
import sys, time
from pathlib import Path
from optuna.trial import TrialState
from trainer.config import SearchConfig
from trainer.experiments.study import open_study

storage, folder, total = sys.argv[1] or None, Path(sys.argv[2]), int(sys.argv[3])
config = SearchConfig.model_validate({"space": {"lora.rank": {"low": 1, "high": 64, "integer": True}},
                                      "storage": storage})
with open_study(config, folder, "shared", 0, total, {"seed": "0"}) as study:
    while (claimed := study.claim()) is not None:
        with claimed:
            value = claimed.sample(config.space)["lora.rank"]
            claimed.report(1, value)
            claimed.should_prune()
            time.sleep(0.01)
            claimed.finish(TrialState.COMPLETE, value, {"gain": None})
        print(claimed.number, flush=True)
"""

Storage = Callable[[], str]
TRIALS = 24
WORKER_TIMEOUT_S = 280.0  # generous: both processes import torch, perhaps on a loaded machine


def run_two_workers(storage: str, folders: tuple[Path, Path]) -> None:
    """Run two processes on one study, and check that each trial is run by one of them."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, storage, str(folder), str(TRIALS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )
        for folder in folders
    ]
    outputs = [process.communicate(timeout=WORKER_TIMEOUT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    run = [[int(number) for number in output.split()] for output, _ in outputs]
    assert Counter(run[0] + run[1]) == Counter(range(TRIALS))
    assert all(len(numbers) > 0 for numbers in run)


@pytest.mark.slow
def test_two_workers_on_one_sqlite_study_never_run_the_same_trial(tmp_path: Path) -> None:
    """Like two `search` commands, or one with --workers 2."""
    run_two_workers("", (tmp_path / "trials", tmp_path / "trials"))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a PostgreSQL cluster on a free port; yield its address."""
    where = shutil.which("initdb")
    found = [Path(where)] if where else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL's server is not installed (no initdb in PATH or /usr/lib/postgresql/*/bin)")
    binaries = found[-1].resolve().parent
    # PostgreSQL refuses to run as root, and its user cannot enter pytest's temporary folders.
    user: dict[str, Any] = (
        {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
    )
    home = Path(subprocess.check_output(["mktemp", "-d", "/tmp/pg-XXXXXX"], text=True, **user).strip())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={home} -c fsync=off"

    def command(*arguments: str) -> None:
        done = subprocess.run(
            arguments, cwd=home, capture_output=True, text=True, timeout=60, check=False, **user
        )
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        (home / "password").write_text("se:cr@et")
        (home / "password").chmod(0o644)
        authentication = ("--auth=scram-sha-256", f"--pwfile={home / 'password'}")
        command(str(binaries / "initdb"), "-D", str(home / "data"), "-U", "me", *authentication, "--no-sync")
        begin = ("-D", str(home / "data"), "-l", str(home / "log"), "-o", options, "-w", "start")
        # Output goes to a file: the server would keep a pipe open.
        subprocess.run(
            [str(binaries / "pg_ctl"), *begin],
            cwd=home,
            stdout=subprocess.DEVNULL,
            timeout=60,
            check=True,
            **user,
        )
        try:
            yield f"postgresql://me:se:cr%40et@127.0.0.1:{port}/postgres"
        finally:
            command(str(binaries / "pg_ctl"), "-D", str(home / "data"), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_two_workers_on_one_postgresql_study_never_run_the_same_trial(postgres: str, tmp_path: Path) -> None:
    """Each has a folder of its own, as on two machines: only the database coordinates them."""
    run_two_workers(postgres, (tmp_path / "one", tmp_path / "two"))


def test_running_trial_without_owner_is_claimed_after_a_while(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker, on any machine, was killed before it stored the owner: after a while the trial is free."""
    config = search_config(storage=postgres)
    with open_study(config, tmp_path / "trials", "ownerless", 0, 1, {}) as study:
        only = study.trials()[0]
        storage = study.study._storage
        assert storage.set_trial_state_values(only._trial_id, TrialState.RUNNING)
        assert study.claim() is None
        assert study.unfinished()
        assert not study.running_elsewhere()
        monkeypatch.setattr("trainer.experiments.study.OWNER_GRACE_S", 0.0)
        claimed = study.claim()
        assert claimed is not None
        with claimed:
            assert claimed.number == 0
