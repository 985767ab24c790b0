"""SIGKILL in the middle of a search: the same command ends with the same numbers."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from tests.trainer.kill_driver import die_in_call, in_child, wait
from tests.trainer.searching import found_in, search_config, searched
from trainer.studies import Taken

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


def test_a_search_that_is_killed_at_bad_moments_ends_with_the_same_numbers(
    tmp_path: Path, karlo_folder: Path
) -> None:
    """Between report and checkpoint, between result and study, between study and search.json, in a write."""
    torch.set_num_threads(1)  # threads do not survive a fork
    config = search_config(tmp_path, karlo_folder, search={"iterations": 3})
    expected = searched(config, path=tmp_path / "whole")
    assert {row["state"] for row in expected["trials"]} == {"complete", "pruned"}

    killed = tmp_path / "killed"
    moments: list[Prepare] = [
        dying("note_settings", 1, after=False),
        dying("tell", 1, after=False),
        dying("report", 1, after=True),
        dying("report", 2, after=False),
        dying("tell", 1, after=True),
        dying("report", 2, after=True),
        lambda: die_in_call(30, half=False),
    ]
    for prepare in moments:
        child = in_child(lambda: searched(config, path=killed), prepare, tmp_path / "log")
        assert wait(child), "it was not killed"
    assert not wait(in_child(lambda: searched(config, path=killed), lambda: None, tmp_path / "log"))
    found = found_in(killed)
    assert found["trials"] == expected["trials"]
    assert found["winner"] == expected["winner"]
    assert found["sentences"] == expected["sentences"]
