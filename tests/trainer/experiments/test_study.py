"""The study apart from training: sampling, pruning, claims, addresses, workers; SQLite and PostgreSQL."""

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

from trainer.config import ConfigError, SearchConfig, TrainerConfig, password_of, without_password
from trainer.experiments.space import Halving
from trainer.experiments.study import open_study, owner_of
from trainer.runs.folder import RunFolder
from trainer.runtime.errors import StorageError

SPACE = {
    "update.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "lora.rank": {"choices": [4, 8, 16]},
    "lora.targets": {"choices": [["to_q"], ["to_q", "to_k"]]},
    "update.steps_per_image": {"low": 1, "high": 6, "integer": True},
}


def rules(**changes: Any) -> SearchConfig:
    """Of a search over SPACE."""
    return SearchConfig.model_validate({"space": SPACE, "pruner": "none", **changes})


def drawn(config: SearchConfig, folder: Path, total: int, seed: int = 0) -> list[dict[str, Any]]:
    """What the trials try that are not finished, one after the other; each gets its rate for a gain."""
    found = []
    with open_study(config, folder, "study", seed, total, {}) as study:
        while (taken := study.take()) is not None:
            with taken:
                found.append(taken.draw(config.space))
                taken.tell(TrialState.COMPLETE, found[-1]["update.learning_rate"], {"gain": None})
    return found


# TPE draws at random before it has ten complete trials.
@pytest.mark.parametrize(("sampler", "total"), [("random", 6), ("tpe", 12), ("qmc", 6)])
def test_trial_n_tries_the_same_whatever_happened_before(tmp_path: Path, sampler: str, total: int) -> None:
    """Stopped after any trial, killed between two draws, asked for more later: the same sequence."""
    config = rules(sampler=sampler)
    whole = drawn(config, tmp_path / "whole/trials", total)
    assert len({repr(it) for it in whole}) == total
    pieces = drawn(config, tmp_path / "pieces/trials", 3)
    with open_study(config, tmp_path / "pieces/trials", "study", 0, total, {}) as study:
        taken = study.take()
        assert taken is not None
        with taken:  # killed when a part was drawn
            first = sorted(SPACE)[0]
            taken.draw({first: config.space[first]})
    pieces += drawn(config, tmp_path / "pieces/trials", total)
    assert pieces == whole
    for tried in whole:
        assert 1e-4 <= tried["update.learning_rate"] <= 1e-2
        assert tried["lora.rank"] in (4, 8, 16)
        assert tried["lora.targets"] in (["to_q"], ["to_q", "to_k"])
        assert isinstance(tried["update.steps_per_image"], int)
    assert drawn(config, tmp_path / "other/trials", 3, seed=1) != whole[:3]


def test_halving_decides_as_optunas_does() -> None:
    """On random reports of trials that come one after the other; and again when it is asked again."""
    chance = random.Random(0)
    theirs, ours = SuccessiveHalvingPruner(min_resource=1, reduction_factor=3), Halving(3)
    study = optuna.create_study(direction="maximize", pruner=theirs)
    ended = 0
    for _ in range(60):
        trial, good = study.ask(), chance.random()
        for step in range(1, 12):
            trial.report(good + 0.3 * chance.random(), step)
            decision = ours.prune(study, study.get_trials()[-1])
            assert decision == ours.prune(study, study.get_trials()[-1])
            assert decision == trial.should_prune()
            if decision:
                ended += 1
                break
        study.tell(
            trial,
            state=TrialState.PRUNED if decision else TrialState.COMPLETE,
            values=None if decision else [good],
        )
    assert 20 < ended < 60


def test_a_killed_workers_trial_is_gone_on_with_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """What was reported stays as it is; the lowest number comes first."""
    with open_study(rules(), tmp_path / "trials", "study", 0, 2, {}) as study:
        living = study.take()
        assert living is not None
        assert living.number == 0
        living.report(5, 0.25)
        other = study.take()
        assert other is not None
        assert other.number == 1
        assert study.take() is None
        with living:
            pass  # its process is gone
        adopted = study.take()
        assert adopted is not None
        with adopted, other:
            assert adopted.number == 0
            adopted.report(5, 99.0)
            assert study.trials()[0].intermediate_values == {5: 0.25}
            adopted.tell(TrialState.COMPLETE, 0.5, {"gain": None})
            other.tell(TrialState.FAIL, None, {"gain": None, "reason": "broken"})
        assert study.take() is None
        assert not study.unfinished()


def test_trials_of_another_folder_are_left_alone(tmp_path: Path) -> None:
    """As on two machines with one database: recognised, not stolen, even when their worker is gone."""
    config = rules(storage=f"sqlite:///{tmp_path / 'shared.db'}")
    with open_study(config, tmp_path / "there", "study", 0, 2, {}) as study:
        taken = study.take()
        assert taken is not None
        with taken:
            pass
    with open_study(config, tmp_path / "here", "study", 0, 2, {}) as study:
        own = study.take()
        assert own is not None
        with own:
            assert own.number == 1
            assert study.take() is None
            assert [trial.number for trial in study.elsewhere()] == [0]
            assert owner_of(study.elsewhere()[0]).endswith(str(tmp_path / "there"))


def test_another_searchs_study_is_refused(tmp_path: Path) -> None:
    """The message names what differs; trials of two searches cannot be compared."""
    config = rules(storage=f"sqlite:///{tmp_path / 'shared.db'}", study="mine")
    with open_study(config, tmp_path / "a", "mine", 0, 1, {"seed": "0", "lora.rank": "8"}):
        pass
    with (
        pytest.raises(ConfigError, match=r"search\.study: mine .* differs in lora\.rank"),
        open_study(config, tmp_path / "b", "mine", 0, 1, {"seed": "0", "lora.rank": "16"}),
    ):
        pass


# --------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("written", "kept", "password"),
    [
        ("postgresql+psycopg://me:se:cr@et@host/db", "postgresql+psycopg://me@host/db", "se:cr@et"),
        ("postgresql://me:p%40ss/word@host:5432/db", "postgresql+psycopg://me@host:5432/db", "p%40ss/word"),
        ("postgres://host/db?user=me&password=hidden", "postgresql+psycopg://host/db?user=me", "hidden"),
        ("postgresql+psycopg://me@other/db", "postgresql+psycopg://me@other/db", None),
        ("sqlite:////home/a:b@c/study.db", "sqlite:////home/a:b@c/study.db", None),
    ],
)
def test_a_password_is_parted_from_its_address(written: str, kept: str, password: str | None) -> None:
    """What is kept in the configuration has none; this process still knows it."""
    assert without_password(written) == kept
    assert password_of(kept) == password


def test_a_password_is_in_no_file_and_in_no_message(trainer_config: TrainerConfig, tmp_path: Path) -> None:
    """Neither where the configuration is saved, nor where nobody answers, nor where the address is none."""
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
            open_study(rules(storage=storage), tmp_path / "trials", "study", 0, 1, {}),
        ):
            pass
        assert "hunter2" not in str(refused.value)
        assert "\n" not in str(refused.value)


# ----------------------------------------------------------------------------------------- workers

# Two of these at a time: each writes down which trials it has run.
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
    while (taken := study.take()) is not None:
        with taken:
            value = taken.draw(config.space)["lora.rank"]
            taken.report(1, value)
            taken.is_to_be_pruned()
            time.sleep(0.01)
            taken.tell(TrialState.COMPLETE, value, {"gain": None})
        print(taken.number, flush=True)
"""

Storage = Callable[[], str]
TRIALS = 24


def both_run(storage: str, folders: tuple[Path, Path]) -> None:
    """Two processes at one study: every trial is run, and by one of them."""
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
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    run = [[int(number) for number in output.split()] for output, _ in said]
    assert Counter(run[0] + run[1]) == Counter(range(TRIALS))
    assert all(len(numbers) > 0 for numbers in run)


def test_two_workers_on_one_sqlite_study_never_run_the_same_trial(tmp_path: Path) -> None:
    """As `search` started twice, or with --workers 2."""
    both_run("", (tmp_path / "trials", tmp_path / "trials"))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a PostgreSQL cluster of its own, on a free port, gone afterwards."""
    where = shutil.which("initdb")
    found = [Path(where)] if where else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL's server is not installed (no initdb in PATH or /usr/lib/postgresql/*/bin)")
    binaries = found[-1].resolve().parent
    # It refuses to run as root; the temporary folders of others are closed to the user that it gets.
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
        # Its output goes to a file: the server would keep a pipe open.
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


def test_two_workers_on_one_postgresql_study_never_run_the_same_trial(postgres: str, tmp_path: Path) -> None:
    """Each with a folder of its own, as on two machines: only the database stands between them."""
    both_run(postgres, (tmp_path / "one", tmp_path / "two"))


def test_a_worker_killed_before_it_had_said_its_name_is_found_out(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the claim and the name any machine may be meant: the trial is free after a while."""
    config = rules(storage=postgres)
    with open_study(config, tmp_path / "trials", "nameless", 0, 1, {}) as study:
        only = study.trials()[0]
        storage = study.study._storage
        assert storage.set_trial_state_values(only._trial_id, TrialState.RUNNING)
        assert study.take() is None
        assert study.unfinished()
        assert not study.elsewhere()
        monkeypatch.setattr("trainer.experiments.study.UNNAMED_S", 0.0)
        taken = study.take()
        assert taken is not None
        with taken:
            assert taken.number == 0
