"""Kill the trainer with SIGKILL at random moments, resume each time, and compare with the uninterrupted run.

    python -m tests.support.trainer.kill_driver FOLDER [--kills 25] [--seed 0]

Importing torch takes longer than a run of the tiny Karlo: this process imports everything once and forks a
trainer for each attempt. Moments of two kinds alternate: after a random delay, and at a random one of the
calls that write to the disk (write, fsync, rename, rmdir, ...), half of them with the file's content half
written. After each kill, every checkpoint must be complete, or absent.
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

from tests.support.trainer.resumable import HELD_OUT, comparable_content, short_config, train
from tests.trainer.conftest import build_karlo
from trainer.config import TrainerConfig
from trainer.runs.checkpoints import Checkpoints, decode, read_stored
from trainer.runs.folder import CONFIG_FILE, RunFolder, is_finished, resumed_config

LONGEST_RUN_S = 900.0  # some seconds on an idle machine
DISK_CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "truncate")


def attempt(config: TrainerConfig, path: Path) -> None:
    """Begin or resume the run as the command does."""
    if (path / CONFIG_FILE).exists():
        config = resumed_config(path, None, [])
        run = RunFolder.resume(path)
        run.write_config(config)
    else:
        run = RunFolder.create(config, path)
    if not is_finished(run, config.iterations):
        train(config, run)


def fork(work: Callable[[], None], prepare: Callable[[], None], log: Path) -> int:
    """Start the work in a child process and return its process number."""
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
    """Kill this process in the n-th call that writes to the disk; with `half`, in the middle of a file."""
    remaining = number

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def dying(*arguments: object, **keywords: object) -> object:
            nonlocal remaining
            remaining -= 1
            if remaining <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return dying

    def write_half(path: Path, content: bytes) -> int:
        nonlocal remaining
        remaining -= 1
        if remaining <= 0:
            write_bytes(path, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_bytes(path, content)

    write_bytes = Path.write_bytes
    if half:
        Path.write_bytes = write_half  # type: ignore[method-assign, assignment]
    else:
        for name in DISK_CALLS:
            setattr(os, name, counted(getattr(os, name)))


def wait(child: int, kill_after_s: float | None = None) -> bool:
    """Wait for the child; return whether it was killed, by itself or here after `kill_after_s`."""
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
    """Compare the newest checkpoint with the uninterrupted run's; return the number of incomplete ones."""
    broken: list[str] = []
    checkpoints = Checkpoints(path / "checkpoints", config.checkpoints)
    stored = checkpoints.latest(broken.append)
    if stored is not None:
        snapshot, _ = decode(stored)
        same = Checkpoints(reference / "checkpoints", config.checkpoints)
        expected = {decode(read)[0].done: read for read in map(read_stored, same.paths())}[snapshot.done]
        if stored.tensors != expected.tensors and not _equal(snapshot.tensors, decode(expected)[0].tensors):
            raise AssertionError(f"iteration {snapshot.done}: differs from the uninterrupted run")
    return len(broken)


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def main() -> None:
    """Kill and resume runs until there were `--kills` kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    build_karlo(folder / "karlo")
    config = short_config(folder, folder / "karlo", iterations=6, checkpoints={"keep": 100})
    log = folder / "trainer.log"

    reference = folder / "reference"
    start = time.monotonic()
    wait(fork(lambda: attempt(config, reference), lambda: None, log))
    whole_s = time.monotonic() - start
    expected = comparable_content(reference)
    print(f"uninterrupted: {whole_s:.1f} s, {len(HELD_OUT)} held-out prompts", flush=True)

    kills = runs = broken = 0
    while kills < arguments.kills:
        path = folder / f"killed-{runs}"
        while True:
            prepare, delay = (lambda: None), None
            if kills >= arguments.kills:
                pass  # the last run ends normally
            elif kills % 2:
                half = rng.random() < 0.5
                number = rng.randint(1, 20 if half else 80)
                prepare = lambda number=number, half=half: die_in_call(number, half)  # noqa: E731
            else:
                delay = rng.uniform(0.0, 0.6 * whole_s)
            child = fork(lambda path=path: attempt(config, path), prepare, log)
            if not wait(child, delay):
                break
            kills += 1
            broken += check_checkpoints(config, path, reference)
        if comparable_content(path) != expected:
            raise AssertionError(f"{path}: differs from the uninterrupted run")
        shutil.rmtree(path)
        runs += 1
    print(
        f"{kills} kills in {runs} runs, {time.monotonic() - start:.0f} s: every run resumed and ended bitwise"
    )
    print(f"equal to the uninterrupted one; {broken} checkpoints were incomplete")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
