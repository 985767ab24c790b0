"""Search killed by SIGKILL at critical moments: the same command ends with the same numbers.

`python -m tests.trainer.experiments.test_search_kills FOLDER KARLO` forks from a process that has never
trained: torch refuses a backward pass in the fork of a process whose autograd has started threads.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.trainer.kill_driver import die_in_call, fork, wait
from tests.support.trainer.search_runs import read_results, run_search, search_config
from trainer.experiments.study import ClaimedTrial

REPOSITORY = Path(__file__).parents[3]
TIMEOUT_S = 1500.0  # generous: a loaded machine may be many times slower
Prepare = Callable[[], None]


def die_in_method(method: str, number: int, *, after: bool) -> Prepare:
    """Return a function that makes this process kill itself before or after the n-th call of a method."""
    original = getattr(ClaimedTrial, method)

    def prepare() -> None:
        remaining = number

        def counted(*arguments: object) -> object:
            nonlocal remaining
            remaining -= 1
            if remaining == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments)
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(ClaimedTrial, method, counted)

    return prepare


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_search_killed_at_critical_moments_ends_with_the_same_numbers(
    tmp_path: Path, karlo_folder: Path
) -> None:
    """Between report and checkpoint, result and study, study and search.json, and during a write."""
    command = [
        sys.executable,
        "-m",
        "tests.trainer.experiments.test_search_kills",
        str(tmp_path),
        str(karlo_folder),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S)
    log = tmp_path / "log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    expected, found = read_results(tmp_path / "whole"), read_results(tmp_path / "killed")
    assert {row["state"] for row in expected["trials"]} == {"complete", "pruned"}
    assert found["trials"] == expected["trials"]
    assert found["winner"] == expected["winner"]
    assert found["sentences"] == expected["sentences"]


def main(folder: Path, karlo: Path) -> None:
    """Run one search without interruption, and another that is killed at each of the moments."""
    torch.set_num_threads(1)  # threads do not survive a fork
    config = search_config(folder, karlo, search={"iterations": 3})
    moments: list[Prepare] = [
        die_in_method("store_settings", 1, after=False),
        die_in_method("finish", 1, after=False),
        die_in_method("report", 1, after=True),
        die_in_method("report", 2, after=False),
        die_in_method("finish", 1, after=True),
        die_in_method("report", 2, after=True),
        lambda: die_in_call(30, half=False),
    ]

    def is_killed(name: str, prepare: Prepare) -> bool:
        def work() -> None:
            run_search(config, path=folder / name)

        return wait(fork(work, prepare, folder / "log"))

    undisturbed: Prepare = lambda: None  # noqa: E731
    assert not is_killed("whole", undisturbed)
    for number, prepare in enumerate(moments):
        assert is_killed("killed", prepare), f"moment {number}: it was not killed"
    assert not is_killed("killed", undisturbed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
