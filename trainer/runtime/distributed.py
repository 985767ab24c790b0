"""Data-parallel processes of one job: rank, shares, collective operations and a common end on errors.

Processes are parallel over groups. Each samples and scores the groups of its own share of the prompts. Scores
are gathered, so that advantages are computed from all groups. Each optimizer batch is chosen from all
transitions; every process replays those whose images it sampled, and the gradients are summed. A job of one
process and a job of many therefore take the same optimizer steps, up to float32 rounding.

`Processes` is both the interface and the job of a single process. `LaunchedProcesses` connects the processes
that `accelerate launch` or torchrun started, with torch.distributed. All communication uses gloo over the
CPU, on GPUs as well: messages are small (the gradient of a rank-8 LoRA on Karlo's decoder is 9 MB per
optimizer step), and when a process dies gloo raises an error in the others at once, while NCCL leaves them
waiting inside a kernel that no signal reaches.

torch is imported only in a job of several processes, so that light programs can import this module.
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
from trainer.runtime.errors import JobError, RunError, reason, user_message

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Errors that a user can fix; any other exception is a defect of the program.
USER_ERRORS = (ConfigError, RewardClientError, RunError, OSError)

# Number of processes as set by the launcher: torchrun and accelerate, then MPI's launchers.
WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


# ----------------------------------------------------------------------------- launcher's environment


def launched_world_size() -> int:
    """Return the number of processes that the launcher reports; 1 without a launcher."""
    values = (os.environ.get(name) for name in WORLD_SIZE_VARIABLES)
    return max((int(value) for value in values if value), default=1)


def is_first_of_job() -> bool:
    """Return whether this is the only process of its job, or the one of rank 0."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_machine() -> bool:
    """Return whether this is the only process of its job on this machine, or the one of local rank 0."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


# -------------------------------------------------------------------------------------------- processes


class Processes:
    """Processes of a job as seen by one of them; this base class is a job of a single process.

    `gather` and `all_reduce` are collective: all processes must call them in the same order. They are all
    that a subclass has to implement, every other method is built on them.
    """

    rank = 0
    world_size = 1

    @property
    def main(self) -> bool:
        """True for the process of rank 0, which writes files and logs."""
        return self.rank == 0

    def device(self, requested: str) -> str:
        """Return this process's own device if `requested` is "cpu" or "cuda"."""
        return requested

    def gather(self, message: bytes) -> list[bytes]:
        """Return the messages of all processes in order of rank. Raises JobError if a process is gone."""
        return [message]

    def all_reduce(self, tensors: Sequence["Tensor"]) -> None:
        """Replace each tensor by its sum over all processes, bit-identical on all of them."""

    # ----------------------------------------------------------------------------------------- shares

    def bounds(self, count: int) -> tuple[int, int]:
        """Return the first index and one past the last of this process's share of `count` items."""
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's contiguous share; shares differ in length by 1 at most."""
        start, stop = self.bounds(len(items))
        return items[start:stop]

    # ------------------------------------------------------------------------------------- collectives

    def gather_values(self, value: T) -> list[T]:
        """Return a JSON value of every process, in order of rank."""
        if self.world_size == 1:
            return [value]
        return [json.loads(message) for message in self.gather(json.dumps(value).encode())]

    def gather_rows(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        """Return an array (n, ...) of every process, in order of rank; n may differ."""
        if self.world_size == 1:
            return [rows]
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(rows), allow_pickle=False)
        messages = self.gather(buffer.getvalue())
        return [np.load(io.BytesIO(message), allow_pickle=False) for message in messages]

    def broadcast(self, value: T) -> T:
        """Return the main process's JSON value."""
        return self.gather_values(value)[0]

    def maximum(self, value: int) -> int:
        """Return the largest of the processes' values, so that a stop signal to one process stops all."""
        return max(self.gather_values(value))

    # -------------------------------------------------------------------------------------- agreement

    def check_same(self, what: str, values: Mapping[str, Any], remedy: str) -> None:
        """Raise JobError on all processes if the JSON `values` of one differ from the main process's.

        Args:
            what: name of the values in the message, such as "configuration"
            values: JSON values by name
            remedy: end of the message
        """
        everyone = self.gather_values({key: json.dumps(value) for key, value in values.items()})
        for rank, other in enumerate(everyone):
            for key in sorted({*everyone[0], *other}):
                expected, found = everyone[0].get(key, "missing"), other.get(key, "missing")
                if found != expected:
                    raise JobError(
                        f"process {rank} has a different {what} than process 0: "
                        f"{key} is {found[:80]} instead of {expected[:80]}; {remedy}",
                        quiet=not self.main,
                    )

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise an error of one process within this block in all processes.

        All processes must run the block. In a job of one process, errors pass unchanged.

        Raises:
            JobError: one of `USER_ERRORS` was raised in a process; `quiet` in all but the main process, so
                that it is reported once
        """
        own_error = None
        try:
            yield
        except JobError:  # raised in all processes already, or another process is gone
            raise
        except USER_ERRORS as error:
            if self.world_size == 1:
                raise
            own_error = error
        if self.world_size == 1:
            return
        everyone = self.gather_values(user_message(own_error) if own_error else None)
        failed = {rank: message for rank, message in enumerate(everyone) if message is not None}
        if failed:
            rank, message = next(iter(failed.items()))
            prefix = "" if rank == 0 else f"process {rank} of {self.world_size}: "
            raise JobError(prefix + message, quiet=not self.main) from own_error


ALONE = Processes()


class LaunchedProcesses(Processes):
    """Processes that a launcher started, as seen by one of them; connected by torch.distributed."""

    def __init__(self, rank: int, world_size: int, device: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device

    def device(self, requested: str) -> str:
        """See `Processes.device`; a device with a number is returned unchanged."""
        return self._device if requested == "cuda" and self._device.startswith("cuda") else requested

    def gather(self, message: bytes) -> list[bytes]:
        """See `Processes.gather`."""
        import torch

        own = torch.frombuffer(bytearray(message or b"\0"), dtype=torch.uint8)
        sizes = self._all_gather(torch.tensor([len(message)]))
        longest = max(1, *(int(size) for size in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        messages = self._all_gather(padded)
        return [bytes(m[: int(n)].numpy()) for m, n in zip(messages, sizes, strict=True)]

    def _all_gather(self, tensor: "Tensor") -> list["Tensor"]:
        import torch
        import torch.distributed as dist

        received = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self._reporting_lost_processes():
            dist.all_gather(received, tensor)
        return received

    def all_reduce(self, tensors: "Sequence[Tensor]") -> None:
        """See `Processes.all_reduce`; all tensors are sent as one, in the first one's dtype."""
        import torch
        import torch.distributed as dist

        if not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
        with self._reporting_lost_processes():
            dist.all_reduce(flat)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.detach().copy_(piece.view_as(tensor))

    @contextmanager
    def _reporting_lost_processes(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo: connection closed, or timeout
            raise JobError(
                f"process {self.rank} of {self.world_size} lost the connection to the others "
                f"({reason(error)}); one of them died or hung: fix the error it reports, "
                "then start the job again with --resume"
            ) from error


# -------------------------------------------------------------------------------------------- joining


@contextmanager
def open_processes(config: ProcessesConfig, device: str) -> Iterator[Processes]:
    """Connect to the other processes that `accelerate launch` or torchrun started, if there are any.

    Args:
        config: settings `trainer.processes`
        device: requested device, such as "cuda"

    Yields:
        the processes of the job, as seen by this one; `ALONE` without a launcher

    Raises:
        ConfigError: the launcher started one process although several were requested
        JobError: the others do not connect within `timeout_s`
    """
    if launched_world_size() > 1:
        with _join(config, device) as processes:
            yield processes
        return
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
        # accelerate sets the port for two processes or more, but with --cpu it starts one all the same.
        raise ConfigError(
            "accelerate launch --cpu starts a single process whatever --num_processes is; "
            "use --multi_gpu instead (it needs no GPU) and set trainer.device=cpu"
        )
    yield ALONE


@contextmanager
def _join(config: ProcessesConfig, device: str) -> Iterator[Processes]:
    """Connect to the other processes; disconnect on exit."""
    from accelerate import PartialState

    timeout = timedelta(seconds=config.timeout_s)
    try:
        state = PartialState(cpu=not device.startswith("cuda"), backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise JobError(
            f"the other processes did not connect within {config.timeout_s:.0f} s ({reason(error)}); "
            "start all of them again together (timeout: trainer.processes.timeout_s)"
        ) from error
    try:
        yield LaunchedProcesses(state.process_index, state.num_processes, str(state.device))
    finally:
        state.destroy_process_group()
