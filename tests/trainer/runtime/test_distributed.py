"""Several processes make one job: the same steps as one process, one voice, one end.

Threads play the processes; test_launched.py starts real ones.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.trainer.alike import TOLERANCE, WAIT_S, assert_equal_records, changed
from tests.trainer.conftest import PROMPTS, FakeScorer, make_policy
from trainer.config import ConfigError, EvaluationConfig, ModelSource, TrainerConfig, flat
from trainer.evaluation.evaluate import measure
from trainer.rl.karlo import load_karlo
from trainer.rl.rewards import ScoringError
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import train_fold
from trainer.runs.setup import check_alike, check_share
from trainer.runtime.distributed import ALONE, Processes, open_processes
from trainer.runtime.errors import EvaluationError, JobError, RolloutError

T = TypeVar("T")


class Threads(Processes):
    """A process of a job whose processes are threads."""

    def __init__(self, rank: int, world: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world = rank, world
        self._table, self._barrier = table, barrier

    def _exchange(self, value: T) -> list[T]:
        self._table[self.rank] = value
        self._barrier.wait(WAIT_S)
        everyone = list(self._table)
        self._barrier.wait(WAIT_S)
        return everyone

    def gather(self, message: bytes) -> list[bytes]:
        return self._exchange(message)

    def add(self, tensors: Sequence[Tensor]) -> None:
        everyone = self._exchange([tensor.detach().clone() for tensor in tensors])
        for tensor, parts in zip(tensors, zip(*everyone, strict=True), strict=True):
            tensor.detach().copy_(torch.stack(parts).sum(dim=0))


def together(world: int, work: Callable[[Processes], T]) -> list[T | Exception]:
    """What `work` gives, or raises, in each of `world` processes."""
    table: list[Any] = [None] * world
    barrier = threading.Barrier(world)
    outcomes: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(Threads(rank, world, table, barrier))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test wants to see
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    return outcomes


# ------------------------------------------------------------------------------- shares and messages


@pytest.mark.parametrize(("count", "world"), [(8, 2), (8, 3), (3, 4), (0, 2), (7, 1)])
def test_shares_join_to_the_whole_and_are_even(count: int, world: int) -> None:
    """Nothing is drawn twice or left out, and no process has two things more than another."""
    shares = together(world, lambda processes: processes.share(range(count)))
    assert [thing for share in shares for thing in share] == list(range(count))  # type: ignore[union-attr]
    sizes = [len(share) for share in shares]  # type: ignore[arg-type]
    assert max(sizes) - min(sizes) <= 1


def test_what_is_gathered_is_in_order_of_rank_everywhere() -> None:
    """Values and rows of different lengths arrive whole, in every process alike."""

    def work(processes: Processes) -> tuple[list[Any], list[Any], Any, int]:
        rows = np.full((processes.rank, 2), processes.rank, dtype=np.float64)
        return (
            processes.gather_values({"rank": processes.rank}),
            [part.tolist() for part in processes.gather_rows(rows)],
            processes.from_main(f"said by {processes.rank}"),
            processes.largest(-processes.rank),
        )

    expected = ([{"rank": 0}, {"rank": 1}, {"rank": 2}], [[], [[1, 1]], [[2, 2]] * 2], "said by 0", 0)
    assert together(3, work) == [expected] * 3


# ------------------------------------------------------------------------------------------ agreement


def test_a_failure_of_one_process_is_raised_in_all_and_said_once() -> None:
    """No process waits for one that has failed; the main one says what happened and where."""

    def work(processes: Processes) -> None:
        with processes.one_fate():
            if processes.rank == 1:
                raise EvaluationError("the service is asleep")

    outcomes = together(3, work)
    assert [str(error) for error in outcomes] == ["process 1 of 3: the service is asleep"] * 3
    assert all(isinstance(error, JobError) for error in outcomes)
    assert [error.quiet for error in outcomes] == [False, True, True]  # type: ignore[union-attr]


def test_without_a_failure_one_fate_changes_nothing() -> None:
    """What goes well goes on, and alone an error keeps its type."""

    def work(processes: Processes) -> str:
        with processes.one_fate():
            return "done"

    assert together(2, work) == ["done", "done"]
    with pytest.raises(EvaluationError), ALONE.one_fate():
        raise EvaluationError("as it is")


def test_processes_with_different_configurations_are_refused(trainer_config: TrainerConfig) -> None:
    """The message names the process, the setting and both values."""

    def work(processes: Processes) -> None:
        config = trainer_config.model_copy(update={"seed": processes.rank})
        values = flat(config.model_dump(mode="json"))
        processes.check_alike("configuration", values, "start them alike")

    for error in together(2, work):
        assert isinstance(error, JobError)
        assert "process 1 has another configuration than process 0: seed is 1 there, 0 here" in str(error)


def test_processes_with_different_adapters_are_refused(
    karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """A LoRA that differs by a bit would drift apart unseen; equal ones pass."""

    def work(difference: float) -> list[Any]:
        studios = [new_studio(karlo_folder, trainer_config) for _ in range(2)]
        next(iter(studios[1].policy.lora.values())).data.flatten()[0] += difference
        return together(2, lambda it: check_alike(trainer_config, FakeScorer(), studios[it.rank].policy, it))

    assert work(0.0) == [None, None]
    assert ["another adapter" in str(error) for error in work(1e-3)] == [True, True]


def test_more_processes_than_prompts_are_refused(trainer_config: TrainerConfig) -> None:
    """Whole groups go to one process, so there must be one for each."""
    for outcome in together(3, lambda processes: check_share(trainer_config, PROMPTS, processes)):
        assert isinstance(outcome, ConfigError)
        assert "prompts_per_iteration: 2 prompts cannot be shared among 3 processes" in str(outcome)


# --------------------------------------------------------------------------------------- equal results


def new_studio(folder: Path, config: TrainerConfig) -> ImageSampler:
    karlo = load_karlo(ModelSource(path=folder))
    sampler = ImageSampler(karlo, make_policy(karlo), config.sampling)
    sampler.policy.add_lora(config.lora, seed=0)
    return sampler


def train(
    folder: Path, config: TrainerConfig, world: int, fault: Callable[[Sequence[str]], object] = len
) -> tuple[list[Any], list[dict[str, Any]]]:
    """What `world` processes end with: (weights, moving average, deviations) each, and the main one's log."""
    studios = [new_studio(folder, config) for _ in range(world)]  # peft seeds torch's one generator: in turn
    logs: list[list[dict[str, Any]]] = [[] for _ in range(world)]

    def work(processes: Processes) -> tuple[Tensor, Tensor, Tensor]:
        training = train_fold(
            studios[processes.rank],
            FakeScorer(fault),  # type: ignore[arg-type]
            PROMPTS,
            config,
            log=logs[processes.rank].append,
            processes=processes,
        )
        weights = torch.cat([weight.detach().flatten() for weight in training.policy.lora.values()])
        average = torch.cat([weight.flatten() for weight in training.average.average.values()])
        return weights, average, training.deviations.deviation

    if world == 1:
        return [work(ALONE)], logs[0]
    outcomes = together(world, work)
    assert not any(logs[1:])
    return outcomes, logs[0]


@pytest.mark.parametrize(
    ("world", "update"),
    [
        (2, {"micro_batch": 4, "accumulate": 2}),
        (2, {"micro_batch": 3, "accumulate": 1}),  # the last batch is a single transition: one has none of it
        (3, {"micro_batch": 16, "accumulate": 1}),  # 4 groups among 3
    ],
)
def test_several_processes_take_the_steps_of_one(
    world: int, update: dict[str, int], karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Weights, moving average, deviations and every diagnostic agree with one process; no rank drifts."""
    config = changed(trainer_config, rollout={"prompts_per_iteration": 4}, update=update)
    [alone], expected = train(karlo_folder, config, 1)
    several, records = train(karlo_folder, config, world)
    start = torch.cat([w.detach().flatten() for w in new_studio(karlo_folder, config).policy.lora.values()])
    assert (alone[0] - start).abs().max() > 1e-3  # something was learned
    for weights, average, deviation in several:
        torch.testing.assert_close(weights, alone[0], **TOLERANCE)
        torch.testing.assert_close(average, alone[1], **TOLERANCE)
        torch.testing.assert_close(deviation, alone[2], rtol=1e-4, atol=1e-6)
        assert torch.equal(weights, several[0][0])
    assert_equal_records(records, expected)


def lose(prompt: str) -> Callable[[Sequence[str]], None]:
    def fault(prompts: Sequence[str]) -> None:
        if prompt in prompts:
            raise ScoringError("lost", retryable=False)

    return fault


def test_a_group_lost_by_one_process_is_lost_to_all(
    karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """The process whose only groups got no scores goes on with the others' and takes the same steps."""
    config = changed(trainer_config, rollout={"prompts_per_iteration": 4}, sampling={"micro_batch": 4})
    [alone], expected = train(karlo_folder, config, 1, lose(PROMPTS[0]))
    several, records = train(karlo_folder, config, 4, lose(PROMPTS[0]))
    assert [record["dropped_groups"] for record in records] == [1, 1]
    for weights, *_ in several:
        torch.testing.assert_close(weights, alone[0], **TOLERANCE)
    assert_equal_records(records, expected)


def test_too_many_lost_groups_stop_all_processes(karlo_folder: Path, trainer_config: TrainerConfig) -> None:
    """Where no group is scored each process says so and none waits."""
    everything = lose("")

    def fault(prompts: Sequence[str]) -> None:
        everything([*prompts, ""])

    outcomes, _ = train(karlo_folder, changed(trainer_config), 2, fault)
    for error in outcomes:
        assert isinstance(error, (JobError, RolloutError))
        assert "2 of 2 groups got no scores" in str(error)


@pytest.mark.parametrize("world", [2, 3])
def test_an_evaluation_is_shared_and_whole_in_every_process(
    world: int, karlo_folder: Path, trainer_config: TrainerConfig
) -> None:
    """Images and scores are those of one process, in the same order, also where a process has no share."""
    config = EvaluationConfig(images_per_prompt=2, micro_batch=3)
    studios = [new_studio(karlo_folder, trainer_config) for _ in range(world + 1)]
    prompts = PROMPTS[:2]
    alone = measure(studios[world], FakeScorer(), prompts, config, "alone")
    for shared in together(
        world, lambda it: measure(studios[it.rank], FakeScorer(), prompts, config, "shared", it)
    ):
        assert shared.prompts == alone.prompts  # type: ignore[union-attr]
        for name in ("pictures", "raw", "z"):
            found, wanted = getattr(shared, name), getattr(alone, name)
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found.astype(float), wanted.astype(float), atol=1)


# ------------------------------------------------------------------------------------------- launching


def test_the_launcher_that_starts_one_process_for_many_is_refused(
    monkeypatch: pytest.MonkeyPatch, trainer_config: TrainerConfig
) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, which must not pass for two."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with open_processes(trainer_config.processes, "cpu") as processes:
        assert processes.world == 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    with (
        pytest.raises(ConfigError, match="say --multi_gpu in its place"),
        open_processes(trainer_config.processes, "cpu"),
    ):
        pass
