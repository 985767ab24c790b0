"""The plan against the published model's known sizes, and against what a run really takes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.trainer.conftest import FakeScorer
from trainer.config import ConfigError, TrainerConfig, load_trainer_config
from trainer.plan.meta import draft
from trainer.plan.plan import Plan, make_plan
from trainer.rl.rollout import DropCount, collect_rollout, group_keys
from trainer.rl.train import new_training_state, update_policy
from trainer.runs.setup import load_sampler, quiet_libraries

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
KARLO, MINIATURE = CONFIGS / "karlo.yaml", CONFIGS / "miniature.yaml"
# Between our estimate and torch's own record of its allocations.
FACTOR = 1.35


def karlo_plan(*overrides: str, processes: int = 1) -> Plan:
    quiet_libraries()
    return make_plan(load_trainer_config(KARLO, ["device=cpu", *overrides]), 4, processes)


@pytest.fixture(scope="module")
def published() -> Plan:
    return karlo_plan()


def test_published_networks_have_their_published_sizes(published: Plan) -> None:
    """Without a download: parameters in millions, as the checkpoints have them."""
    millions = {name: round(number / 1e6) for name, number in published.parameters.items() if name != "lora"}
    assert millions == {
        "text_encoder": 124,
        "text_proj": 8,
        "prior": 1022,
        "decoder": 885,
        "super_res_first": 692,
        "super_res_last": 692,
    }
    assert published.weights_bytes["prior"] == pytest.approx(2 * published.parameters["prior"], rel=0.001)


@pytest.mark.parametrize(("rank", "millions"), [(4, 1.13), (8, 2.26), (16, 4.51), (32, 9.02)])
def test_adapter_has_its_published_size(rank: int, millions: float) -> None:
    """132 modules, all of them in float32."""
    blueprint = draft(load_trainer_config(KARLO, [f"lora.rank={rank}"]))
    weights = blueprint.policy.lora.values()
    assert len(weights) == 2 * 132
    assert round(sum(weight.numel() for weight in weights) / 1e6, 2) == millions
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_flops_of_an_image_match_known_values(published: Plan) -> None:
    """8.2 TFLOP in the prior, 30.4 in the decoder and 59.5 in super-resolution, at 25, 25 and 7 steps."""
    images, embeddings = published.counts["pictures"], published.counts["image embeddings"]
    assert published.flops["prior"] / embeddings / 1e12 == pytest.approx(8.2, abs=0.1)
    assert published.flops["decoder"] / images / 1e12 == pytest.approx(30.4, abs=0.1)
    assert published.flops["super-resolution"] / images / 1e12 == pytest.approx(59.5, abs=0.1)


@pytest.mark.slow
def test_checkpointing_and_offload_reduce_the_planned_memory(published: Plan) -> None:
    """Checkpointing cuts the update's activations to a third for more arithmetic; offloading its weights."""
    few = karlo_plan("update.gradient_checkpointing=true")
    assert few.activations_bytes["update"] < published.activations_bytes["update"] / 3
    assert 1.1 < few.flops["update"] / published.flops["update"] < 1.5
    away = karlo_plan("memory.offload=idle")
    assert published.peak_bytes["update"] - away.peak_bytes["update"] > 5e9
    assert away.peak_bytes["drawing"] == published.peak_bytes["drawing"]
    assert published.weights_bytes["lora"] == 20 * published.parameters["lora"]


def test_processes_share_an_iteration(published: Plan) -> None:
    """Whole groups each; weights are not shared."""
    half = karlo_plan(processes=2)
    for name in ("prompts", "pictures", "transitions", "scores"):
        assert half.counts[name] * 2 == published.counts[name]
    assert half.weights_bytes == published.weights_bytes


def test_plan_warns_of_too_little_memory_and_noisy_ratios() -> None:
    """Each warning names the setting that helps."""
    huge = ["sampling.micro_batch=1000000", "rollout.prompts_per_iteration=1000000"]
    plan = make_plan(load_trainer_config(MINIATURE, huge), 4)
    assert any("sampling.micro_batch" in warning for warning in plan.warnings)
    noisy = make_plan(load_trainer_config(MINIATURE, ["precision=bfloat16"]), 4)
    assert any("decoder_precision" in warning for warning in noisy.warnings)
    assert not make_plan(load_trainer_config(MINIATURE), 4).warnings


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimate_is_near_the_measured_memory(trainer_config: TrainerConfig, checkpointing: bool) -> None:
    """Activations of drawing and update, within the stated factor of the allocations that torch records."""
    values = trainer_config.model_dump()
    values["sampling"] |= {"micro_batch": 64}
    values["rollout"] |= {"images_per_prompt": 32}
    values["update"] |= {"gradient_checkpointing": checkpointing, "micro_batch": 32}
    config = TrainerConfig.model_validate(values)
    plan = make_plan(config, 2)
    sampler = load_sampler(config)
    sampler.policy.add_lora(config.lora, seed=0)
    training = new_training_state(sampler.policy, config, 2)
    keys = group_keys(("a", "b"), 32, seed=0, fold=0, iteration=0)
    drawn = peak(lambda: sampler.sample(keys, config.rollout.share))
    rollout = collect_rollout(sampler, FakeScorer(), keys, config.rollout, 64, DropCount(0.05))
    updated = peak(
        lambda: update_policy(training, rollout, FakeScorer.evaluators, config, fold=0, iteration=0)
    )
    stages = {stage: size for stage, size in plan.activations_bytes.items() if stage != "update"}
    kept = plan.kept_bytes
    expected = {
        # One batch: its trajectory is there once as steps and once joined.
        "draw": max(stages.values()) + kept["trajectories"],
        "update": plan.activations_bytes["update"] + kept["transitions"],
    }
    for name, measured in (("draw", drawn), ("update", updated)):
        assert 1 / FACTOR < expected[name] / measured < FACTOR, (name, expected[name], measured)


def peak(work: Callable[[], object]) -> int:
    """Most bytes that `work` had allocated at one time, by the profiler's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        result = work()
    del result
    events = record.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def test_unknown_repository_is_one_line() -> None:
    """Nothing is downloaded for a plan."""
    with pytest.raises(ConfigError, match=r"trainer\.karlo\.repo.*download") as caught:
        karlo_plan("karlo.repo=nobody/nothing", "karlo.revision=main")
    assert "\n" not in str(caught.value)


def test_command_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON for other programs; no model is loaded and no service is called."""
    from trainer import cli

    monkeypatch.setattr("sys.argv", ["reward-trainer", "plan", "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak_bytes"]["update"] > plan["weights_bytes"]["decoder"] > 0
    assert not torch.cuda.is_initialized()
