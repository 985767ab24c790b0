"""Data-parallel jobs: the same steps as one process, errors reported once and raised in all.

Threads stand in for processes; test_launched.py starts real ones.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.trainer.job_comparison import TOLERANCE, WAIT_S, assert_equal_records, with_sections
from tests.support.trainer.recording import RecordingCallback
from tests.trainer.conftest import PROMPTS, FakeScorer, make_policy
from trainer.config import ConfigError, EvaluationConfig, ModelSource, TrainerConfig, flatten
from trainer.evaluation.evaluate import measure
from trainer.rl.karlo import load_karlo
from trainer.rl.rewards import ScoringError
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import train_fold
from trainer.runs.setup import check_processes_agree, check_prompts_per_process
from trainer.runtime.distributed import ALONE, Processes, open_processes
from trainer.runtime.errors import EvaluationError, JobError, RolloutError

T = TypeVar("T")


class ThreadProcesses(Processes):
    """Process of a job whose processes are threads."""

    def __init__(self, rank: int, world_size: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, world_size
        self._table, self._barrier = table, barrier

    def _exchange(self, value: T) -> list[T]:
        self._table[self.rank] = value
        self._barrier.wait(WAIT_S)
        everyone = list(self._table)
        self._barrier.wait(WAIT_S)
        return everyone

    def gather(self, message: bytes) -> list[bytes]:
        return self._exchange(message)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        everyone = self._exchange([tensor.detach().clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*everyone, strict=True), strict=True):
            tensor.detach().copy_(torch.stack(parts).sum(dim=0))


def run_in_all(world_size: int, work: Callable[[Processes], T]) -> list[T | Exception]:
    """Return the result or exception of `work` in each of `world_size` processes."""
    table: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size)
    outcomes: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadProcesses(rank, world_size, table, barrier))
        except Exception as error:  # noqa: BLE001 - the test inspects it
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    return outcomes


# ---------------------------------------------------------------------------- shares and collectives


@pytest.mark.parametrize(("count", "world_size"), [(8, 2), (8, 3), (3, 4), (0, 2), (7, 1)])
def test_share_covers_all_items_evenly(count: int, world_size: int) -> None:
    """No item is sampled twice or left out, and shares differ in length by 1 at most."""
    shares = run_in_all(world_size, lambda processes: processes.share(range(count)))
    assert [item for share in shares for item in share] == list(range(count))  # type: ignore[union-attr]
    sizes = [len(share) for share in shares]  # type: ignore[arg-type]
    assert max(sizes) - min(sizes) <= 1


def test_collectives_return_values_in_order_of_rank() -> None:
    """Every process gets the same values, and rows of different lengths, in order of rank."""

    def work(processes: Processes) -> tuple[list[Any], list[Any], Any, int]:
        rows = np.full((processes.rank, 2), processes.rank, dtype=np.float64)
        return (
            processes.gather_values({"rank": processes.rank}),
            [part.tolist() for part in processes.gather_rows(rows)],
            processes.broadcast(f"from {processes.rank}"),
            processes.maximum(-processes.rank),
        )

    expected = ([{"rank": 0}, {"rank": 1}, {"rank": 2}], [[], [[1, 1]], [[2, 2]] * 2], "from 0", 0)
    assert run_in_all(3, work) == [expected] * 3


# ------------------------------------------------------------------------------------------ agreement


def test_fail_together_raises_in_all_and_reports_once() -> None:
    """No process waits for a failed one; the main process reports the error and its rank."""

    def work(processes: Processes) -> None:
        with processes.fail_together():
            if processes.rank == 1:
                raise EvaluationError("the service is down")

    outcomes = run_in_all(3, work)
    assert [str(error) for error in outcomes] == ["process 1 of 3: the service is down"] * 3
    assert all(isinstance(error, JobError) for error in outcomes)
    assert [error.quiet for error in outcomes] == [False, True, True]  # type: ignore[union-attr]


def test_fail_together_is_transparent_without_failure() -> None:
    """Successful processes continue, and in a job of one process an error keeps its type."""

    def work(processes: Processes) -> str:
        with processes.fail_together():
            return "done"

    assert run_in_all(2, work) == ["done", "done"]
    with pytest.raises(EvaluationError), ALONE.fail_together():
        raise EvaluationError("unchanged")


def test_check_same_refuses_different_configurations(trainer_config: TrainerConfig) -> None:
    """The message names the process, the setting and both values."""

    def work(processes: Processes) -> None:
        config = trainer_config.model_copy(update={"seed": processes.rank})
        values = flatten(config.model_dump(mode="json"))
        processes.check_same("configuration", values, "start them with the same configuration")

    for error in run_in_all(2, work):
        assert isinstance(error, JobError)
        assert "process 1 has a different configuration than process 0: seed is 1 instead of 0" in str(error)


def test_check_refuses_different_adapters(karlo_folder: Path, trainer_config: TrainerConfig) -> None:
    """LoRAs that differ by one weight would diverge unnoticed; equal ones pass."""

    def work(difference: float) -> list[Any]:
        samplers = [new_sampler(karlo_folder, trainer_config) for _ in range(2)]
        next(iter(samplers[1].policy.lora.values())).data.flatten()[0] += difference
        return run_in_all(
            2, lambda it: check_processes_agree(trainer_config, FakeScorer(), samplers[it.rank].policy, it)
        )

    assert work(0.0) == [None, None]
    assert ["a different adapter" in str(error) for error in work(1e-3)] == [True, True]


def test_check_refuses_more_processes_than_prompts(trainer_config: TrainerConfig) -> None:
    """A group belongs to one process, so there must be at least one group for each."""
    for outcome in run_in_all(
        3, lambda processes: check_prompts_per_process(trainer_config, PROMPTS, processes)
    ):
        assert isinstance(outcome, ConfigError)
        assert "prompts_per_iteration: 2 prompts cannot be shared among 3 processes" in str(outcome)


# --------------------------------------------------------------------------------------- equal results


def new_sampler(folder: Path, config: TrainerConfig) -> ImageSampler:
    karlo = load_karlo(ModelSource(path=folder))
    sampler = ImageSampler(karlo, make_policy(karlo), config.sampling)
    sampler.policy.add_lora(config.lora, seed=0)
    return sampler


def train(
    folder: Path, config: TrainerConfig, world_size: int, fault: Callable[[Sequence[str]], object] = len
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Train with `world_size` processes.

    Returns:
        (weights, moving average, deviations) of each process, and the records of the main one
    """
    samplers = [
        new_sampler(folder, config) for _ in range(world_size)
    ]  # not in the threads: peft seeds the global generator
    callbacks = [RecordingCallback() for _ in range(world_size)]

    def work(processes: Processes) -> tuple[Tensor, Tensor, Tensor]:
        training = train_fold(
            samplers[processes.rank],
            FakeScorer(fault),  # type: ignore[arg-type]
            PROMPTS,
            config,
            callback=callbacks[processes.rank],
            processes=processes,
        )
        weights = torch.cat([weight.detach().flatten() for weight in training.policy.lora.values()])
        average = torch.cat([weight.flatten() for weight in training.average.average.values()])
        return weights, average, training.deviations.deviation

    if world_size == 1:
        return [work(ALONE)], callbacks[0].records
    outcomes = run_in_all(world_size, work)
    assert not any(callback.records for callback in callbacks[1:])
    return outcomes, callbacks[0].records


@pytest.mark.parametrize(
    ("world_size", "update"),
    [
        (2, {"micro_batch": 4, "accumulate": 2}),
        (2, {"micro_batch": 3, "accumulate": 1}),  # the last batch, of one transition, is in one process
        (3, {"micro_batch": 16, "accumulate": 1}),  # 4 groups for 3 processes
    ],
)
def test_several_processes_take_the_same_steps_as_one(
    world_size: int, update: dict[str, int], karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Weights, moving average, deviations and all diagnostics agree with one process, on every rank."""
    config = with_sections(trainer_config, rollout={"prompts_per_iteration": 4}, update=update)
    [alone], expected = train(karlo_folder, config, 1)
    several, records = train(karlo_folder, config, world_size)
    start = torch.cat([w.detach().flatten() for w in new_sampler(karlo_folder, config).policy.lora.values()])
    assert (alone[0] - start).abs().max() > 1e-3  # something was learned
    for weights, average, deviation in several:
        torch.testing.assert_close(weights, alone[0], **TOLERANCE)
        torch.testing.assert_close(average, alone[1], **TOLERANCE)
        torch.testing.assert_close(deviation, alone[2], rtol=1e-4, atol=1e-6)
        assert torch.equal(weights, several[0][0])
    assert_equal_records(records, expected)


def fail_for(prompt: str) -> Callable[[Sequence[str]], None]:
    def fault(prompts: Sequence[str]) -> None:
        if prompt in prompts:
            raise ScoringError("lost", retryable=False)

    return fault


def test_group_dropped_by_one_process_counts_in_all(
    karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """A process whose only group has no scores continues with the others' and takes the same steps."""
    config = with_sections(trainer_config, rollout={"prompts_per_iteration": 4}, sampling={"micro_batch": 4})
    [alone], expected = train(karlo_folder, config, 1, fail_for(PROMPTS[0]))
    several, records = train(karlo_folder, config, 4, fail_for(PROMPTS[0]))
    assert [record["dropped_groups"] for record in records] == [1, 1]
    for weights, *_ in several:
        torch.testing.assert_close(weights, alone[0], **TOLERANCE)
    assert_equal_records(records, expected)


def test_too_many_dropped_groups_stop_all_processes(
    karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """If no group is scored every process raises the error and none waits."""
    fail_always = fail_for("")

    def fault(prompts: Sequence[str]) -> None:
        fail_always([*prompts, ""])

    outcomes, _ = train(karlo_folder, with_sections(trainer_config), 2, fault)
    for error in outcomes:
        assert isinstance(error, (JobError, RolloutError))
        assert "2 of 2 groups have no scores" in str(error)


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_is_split_and_complete_in_every_process(
    world_size: int, karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Images and scores equal those of one process, in order, even if a process has no share."""
    config = EvaluationConfig(images_per_prompt=2, micro_batch=3)
    samplers = [new_sampler(karlo_folder, trainer_config) for _ in range(world_size + 1)]
    prompts = PROMPTS[:2]
    alone = measure(samplers[world_size], FakeScorer(), prompts, config, "alone")
    for shared in run_in_all(
        world_size, lambda it: measure(samplers[it.rank], FakeScorer(), prompts, config, "shared", it)
    ):
        assert shared.prompts == alone.prompts  # type: ignore[union-attr]
        for name in ("images", "raw", "z"):
            found, expected = getattr(shared, name), getattr(alone, name)
            assert found.shape == expected.shape
            np.testing.assert_allclose(found.astype(float), expected.astype(float), atol=1)


# ------------------------------------------------------------------------------------------- launching


def test_open_processes_refuses_single_process_cpu_launch(
    monkeypatch: pytest.MonkeyPatch, trainer_config: TrainerConfig
) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, which is an error."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with open_processes(trainer_config.processes, "cpu") as processes:
        assert processes.world_size == 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    with (
        pytest.raises(ConfigError, match="use --multi_gpu instead"),
        open_processes(trainer_config.processes, "cpu"),
    ):
        pass
