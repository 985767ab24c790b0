"""Several processes in one job: which of them this is, and the few things they have to agree on.

Data parallel over groups. Every process draws and scores the groups of its own share of the prompts; scores
are gathered, so that advantages come from all groups; each optimizer batch is chosen from all transitions,
every process replays those whose images it drew, and the gradients are added. A job of one process and a
job of many therefore make the same optimizer steps, to the rounding of float32.

`Processes` is the job of one process, and the interface; `trainer.runtime.distributed` has the one of many.

The processes of a job as torch.distributed connects them, set up by Hugging Face Accelerate.

Everything goes by gloo, over the CPU, on GPUs as well. What is exchanged is small (the gradient of a LoRA of
rank 8 on Karlo's decoder is 9 MB an optimizer step), and where a process dies gloo raises an error in the
others at once, while NCCL leaves them waiting inside a kernel that no signal reaches.

Whether a launcher started this process, and how many others. Alone, no torch is imported.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from reward_service.client import RewardClientError
from trainer.config import ConfigError, ProcessesConfig
from trainer.runtime.errors import JobError, RunError, reason, said

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

KNOWN = (ConfigError, RewardClientError, RunError, OSError)  # what a user can mend; anything else is a fault


class Processes:
    """The processes of a job as one of them sees them; by default it is alone.

    Whatever takes part in `gather` or `add` must be called by all processes in the same order: these two are
    all that another kind of job has to define, everything else here is made of them.
    """

    rank = 0
    world = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """This process's own device where `wanted` is "cpu" or "cuda"."""
        return wanted

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all processes, in order of rank. Raises JobError where one is gone."""
        return [message]

    def add(self, tensors: Sequence["Tensor"]) -> None:
        """Replace each tensor by its sum over all processes, equal to the bit on all of them."""

    # ----------------------------------------------------------------------------------------- shares

    def bounds(self, count: int) -> tuple[int, int]:
        """First and one past the last of `count` things in a row that are this process's own."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """This process's own run of the things. Shares differ by one at most and join in order of rank."""
        start, stop = self.bounds(len(things))
        return things[start:stop]

    # --------------------------------------------------------------------------------------- messages

    def gather_values(self, value: T) -> list[T]:
        """A JSON value of every process, in order of rank."""
        if self.world == 1:
            return [value]
        return [json.loads(message) for message in self.gather(json.dumps(value).encode())]

    def gather_rows(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        """An array (n, ...) of every process, in order of rank; n may differ."""
        if self.world == 1:
            return [rows]
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(rows), allow_pickle=False)
        messages = self.gather(buffer.getvalue())
        return [np.load(io.BytesIO(message), allow_pickle=False) for message in messages]

    def from_main(self, value: T) -> T:
        """The main process's JSON value."""
        return self.gather_values(value)[0]

    def largest(self, value: int) -> int:
        """The largest of the processes' values: how one that has been told to stop stops all of them."""
        return max(self.gather_values(value))

    # -------------------------------------------------------------------------------------- agreement

    def check_alike(self, what: str, values: Mapping[str, Any], remedy: str) -> None:
        """Raises JobError, on all processes, where one has other JSON `values` than the main process."""
        everyone = self.gather_values({key: json.dumps(value) for key, value in values.items()})
        for rank, other in enumerate(everyone):
            for key in sorted({*everyone[0], *other}):
                here, there = everyone[0].get(key, "nothing"), other.get(key, "nothing")
                if here != there:
                    raise JobError(
                        f"process {rank} has another {what} than process 0: "
                        f"{key} is {there[:80]} there, {here[:80]} here; {remedy}",
                        quiet=not self.main,
                    )

    @contextmanager
    def one_fate(self) -> Iterator[None]:
        """What a user can mend and goes wrong in one process within this block ends all of them with a line.

        All processes must come through the block. Raises JobError on all of them, and has only the main
        process speak. Alone, errors pass as they are.
        """
        mine = None
        try:
            yield
        except JobError:  # of all processes already, or one of them is gone
            raise
        except KNOWN as error:
            if self.world == 1:
                raise
            mine = error
        if self.world == 1:
            return
        everyone = self.gather_values(said(mine) if mine else None)
        failed = {rank: message for rank, message in enumerate(everyone) if message is not None}
        if failed:
            rank, message = next(iter(failed.items()))
            where = "" if rank == 0 else f"process {rank} of {self.world}: "
            raise JobError(where + message, quiet=not self.main) from mine


ALONE = Processes()


class Launched(Processes):
    """One of several processes that a launcher started."""

    def __init__(self, rank: int, world: int, device: str) -> None:
        self.rank = rank
        self.world = world
        self._device = device

    def device(self, wanted: str) -> str:
        """See `Processes.device`; a device with a number stays what it is."""
        return self._device if wanted == "cuda" and self._device.startswith("cuda") else wanted

    def gather(self, message: bytes) -> list[bytes]:
        """See `Processes.gather`."""
        import torch

        own = torch.frombuffer(bytearray(message or b"\0"), dtype=torch.uint8)
        sizes = self._gather(torch.tensor([len(message)]))
        longest = max(1, *(int(size) for size in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        messages = self._gather(padded)
        return [bytes(m[: int(n)].numpy()) for m, n in zip(messages, sizes, strict=True)]

    def _gather(self, tensor: "Tensor") -> list["Tensor"]:
        import torch
        import torch.distributed as dist

        received = [torch.empty_like(tensor) for _ in range(self.world)]
        with self._together():
            dist.all_gather(received, tensor)
        return received

    def add(self, tensors: "Sequence[Tensor]") -> None:
        """See `Processes.add`; all tensors travel as one, in the first one's dtype."""
        import torch
        import torch.distributed as dist

        if not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
        with self._together():
            dist.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.detach().copy_(piece.view_as(tensor))

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's: the connection was closed, or the others did not come
            raise JobError(
                f"process {self.rank} of {self.world} lost the others ({reason(error)}); "
                "one of them died or hung: mend what it says, then start the job again with --resume"
            ) from error


@contextmanager
def join(config: ProcessesConfig, device: str) -> Iterator[Processes]:
    """Meet the other processes; leave them on the way out. Raises JobError where they do not appear."""
    from accelerate import PartialState

    timeout = timedelta(seconds=config.timeout_s)
    try:
        state = PartialState(cpu=not device.startswith("cuda"), backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise JobError(
            f"the other processes did not appear within {config.timeout_s:.0f} s ({reason(error)}); "
            "start them again together (trainer.processes.timeout_s)"
        ) from error
    try:
        yield Launched(state.process_index, state.num_processes, str(state.device))
    finally:
        state.destroy_process_group()


# How many processes a launcher started: torchrun and accelerate, then what MPI's launchers say.
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@contextmanager
def open_processes(config: ProcessesConfig, device: str) -> Iterator[Processes]:
    """The processes that `accelerate launch` or torchrun started, this one among them; else this one alone.

    Raises ConfigError where a launcher was asked for several and has started one, JobError where the others
    do not appear within `timeout_s`.
    """
    if launched_world() > 1:
        with join(config, device) as processes:
            yield processes
        return
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
        # accelerate sets the port for two processes or more, and with --cpu then starts one all the same.
        raise ConfigError(
            "accelerate launch --cpu starts a single process whatever --num_processes says; "
            "say --multi_gpu in its place (it needs no GPU) and set trainer.device=cpu"
        )
    yield ALONE


def launched_world() -> int:
    """How many processes the launcher says it has started; 1 without a launcher."""
    said_by = (os.environ.get(name) for name in WORLD)
    return max((int(count) for count in said_by if count), default=1)


def second_on_its_machine() -> bool:
    """Whether a launcher started the same command on this machine in another process before this one."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def first_of_job() -> bool:
    """Whether this is the only process of its job, or the first one that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
