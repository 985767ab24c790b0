"""SIGKILL in the middle of a search: the same command ends with the same numbers.

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

from tests.support.trainer.kill_driver import die_in_call, in_child, wait
from tests.support.trainer.searching import found_in, search_config, searched
from trainer.experiments.study import Taken

REPOSITORY = Path(__file__).parents[3]
Prepare = Callable[[], None]


def dying(method: str, number: int, *, after: bool) -> Prepare:
    """Have a process killed at its n-th call of a method of Taken, before it or after it."""
    original = getattr(Taken, method)

    def prepare() -> None:
        left = number

        def counted(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(Taken, method, counted)

    return prepare


@pytest.mark.timeout(300)
def test_a_search_that_is_killed_at_bad_moments_ends_with_the_same_numbers(
    tmp_path: Path, karlo_folder: Path
) -> None:
    """Between report and checkpoint, between result and study, between study and search.json, in a write."""
    command = [
        sys.executable,
        "-m",
        "tests.trainer.experiments.test_search_kills",
        str(tmp_path),
        str(karlo_folder),
    ]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    log = tmp_path / "log"
    assert said.returncode == 0, said.stdout + said.stderr + (log.read_text() if log.exists() else "")
    expected, found = found_in(tmp_path / "whole"), found_in(tmp_path / "killed")
    assert {row["state"] for row in expected["trials"]} == {"complete", "pruned"}
    assert found["trials"] == expected["trials"]
    assert found["winner"] == expected["winner"]
    assert found["sentences"] == expected["sentences"]


def main(folder: Path, karlo: Path) -> None:
    """Search once in peace, and once killed at each of the moments."""
    torch.set_num_threads(1)  # threads do not survive a fork
    config = search_config(folder, karlo, search={"iterations": 3})
    moments: list[Prepare] = [
        dying("note_settings", 1, after=False),
        dying("tell", 1, after=False),
        dying("report", 1, after=True),
        dying("report", 2, after=False),
        dying("tell", 1, after=True),
        dying("report", 2, after=True),
        lambda: die_in_call(30, half=False),
    ]

    def killed(name: str, prepare: Prepare) -> bool:
        def work() -> None:
            searched(config, path=folder / name)

        return wait(in_child(work, prepare, folder / "log"))

    in_peace: Prepare = lambda: None  # noqa: E731
    assert not killed("whole", in_peace)
    for number, prepare in enumerate(moments):
        assert killed("killed", prepare), f"moment {number}: it was not killed"
    assert not killed("killed", in_peace)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
