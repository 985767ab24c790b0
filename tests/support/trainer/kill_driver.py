"""Kill the trainer with SIGKILL at random moments, resume each time, and compare with the uninterrupted run.

    python -m tests.support.trainer.kill_driver FOLDER [--kills 25] [--seed 0]

Importing torch takes longer than a run of the tiny Karlo: this process imports everything once and forks a
trainer for each attempt. Two kinds of moments, in turn: a random delay, wherever that falls; and a random one
among the calls by which files come to the disk (open for writing, fsync, rename, rmdir, ...), half of them
with the file's content half written. After each kill, no checkpoint may be whole that cannot be gone on from.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.trainer.resumable import HELD_OUT, essence, short_config, train
from tests.trainer.conftest import build_karlo
from trainer.config import TrainerConfig
from trainer.runs import folder as storage
from trainer.runs.checkpoints import Checkpoints, decode, read_stored
from trainer.runs.folder import RunFolder, is_finished, resumed_config

LONGEST_RUN_S = 120.0
DISK_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "truncate")


def attempt(config: TrainerConfig, path: Path) -> None:
    """Begin the run, or go on with it, as the command does."""
    if (path / storage.CONFIG_FILE).exists():
        config = resumed_config(path, None, [])
        run = RunFolder.resume(path)
        run.write_config(config)
    else:
        run = RunFolder.create(config, path)
    if not is_finished(run, config.iterations):
        train(config, run)


def in_child(work: Callable[[], None], prepare: Callable[[], None], log: Path) -> int:
    """Do the work in a child process; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        prepare()
        work()
        code = 0
    except BaseException:  # noqa: BLE001  # the parent's code must not run in the child
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(code)
    return 0


def die_in_call(number: int, half: bool) -> None:
    """Have this process killed in the n-th call that changes the disk; `half`: in the middle of a file."""
    left = number

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def dying(*arguments: object, **keywords: object) -> object:
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return dying

    def write_half(path: Path, content: bytes) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write_whole(path, content)

    write_whole = storage.write_synced
    if half:
        for module in [module for module in sys.modules.values() if hasattr(module, "write_synced")]:
            module.write_synced = write_half  # type: ignore[attr-defined]
    else:
        for name in DISK_CALLS:
            setattr(os, name, counted(getattr(os, name)))


def wait(child: int, kill_after_s: float | None = None) -> bool:
    """Whether the child was killed, by itself or after that time; else it has done its work."""
    deadline = time.monotonic() + (LONGEST_RUN_S if kill_after_s is None else kill_after_s)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if os.WIFSIGNALED(status):
                return True
            if os.waitstatus_to_exitcode(status) != 0:
                raise RuntimeError("the trainer failed")
            return False
        if time.monotonic() > deadline:
            if kill_after_s is None:
                raise RuntimeError("the trainer hangs")
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.002)


def check_checkpoints(config: TrainerConfig, path: Path, reference: Path) -> int:
    """What is whole is what the uninterrupted run had at that iteration. Returns how many are not whole."""
    broken: list[str] = []
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoints)
    stored = checkpoints.latest(broken.append)
    if stored is not None:
        snapshot, _ = decode(stored)
        same = Checkpoints(reference / "checkpoints", config.checkpoints)
        expected = {decode(read)[0].done: read for read in map(read_stored, same.paths())}[snapshot.done]
        if stored.tensors != expected.tensors and not _equal(snapshot.tensors, decode(expected)[0].tensors):
            raise AssertionError(f"iteration {snapshot.done}: another trainer than the uninterrupted run's")
    return len(broken)


def _equal(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return these.keys() == those.keys() and all(torch.equal(these[name], those[name]) for name in these)


def main() -> None:
    """Run until so many kills have been survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    build_karlo(folder / "karlo")
    config = short_config(folder, folder / "karlo", iterations=6, checkpoints={"keep": 100})
    log = folder / "trainer.log"

    reference = folder / "reference"
    start = time.monotonic()
    wait(in_child(lambda: attempt(config, reference), lambda: None, log))
    whole_s = time.monotonic() - start
    expected = essence(reference)
    print(f"uninterrupted: {whole_s:.1f} s, {len(HELD_OUT)} held-out prompts", flush=True)

    kills = runs = broken = 0
    while kills < arguments.kills:
        path = folder / f"killed-{runs}"
        while True:
            prepare, delay = (lambda: None), None
            if kills >= arguments.kills:
                pass  # the last run ends in peace
            elif kills % 2:
                half = chance.random() < 0.5
                number = chance.randint(1, 20 if half else 80)
                prepare = lambda number=number, half=half: die_in_call(number, half)  # noqa: E731
            else:
                delay = chance.uniform(0.0, 0.6 * whole_s)
            child = in_child(lambda path=path: attempt(config, path), prepare, log)
            if not wait(child, delay):
                break
            kills += 1
            broken += check_checkpoints(config, path, reference)
        if essence(path) != expected:
            raise AssertionError(f"{path}: not the uninterrupted run")
        shutil.rmtree(path)
        runs += 1
    print(
        f"{kills} kills in {runs} runs, {time.monotonic() - start:.0f} s: every run resumed and ended bitwise"
    )
    print(f"equal to the uninterrupted one; {broken} checkpoints were found half there")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
