"""Effects of bfloat16, activation checkpointing and offloading on images, gradients and memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import PROMPTS, SAMPLING, FakeScorer, make_policy
from trainer.config import ConfigError, ModelSource, TrainerConfig, load_trainer_config
from trainer.rl.karlo import Karlo, enable_activation_checkpointing, load_karlo
from trainer.rl.policy import DecoderPolicy
from trainer.rl.rollout import DropCount, collect_rollout, group_keys
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import new_training_state, update_policy
from trainer.runs.setup import load_sampler
from trainer.runtime.rng import ImageKey

HALF = torch.bfloat16
KEYS = [ImageKey(0, 0, 0, prompt, 0) for prompt in PROMPTS]


@pytest.fixture
def half(karlo_folder: Path) -> Karlo:
    """Tiny Karlo in bfloat16."""
    return load_karlo(ModelSource(path=karlo_folder), dtype=HALF)


def gradients(policy: DecoderPolicy, sampler: ImageSampler) -> list[Tensor]:
    """Return the gradient of some function of a replay, by parameter of the adapter."""
    sampled = sampler.sample(KEYS)
    x_t = sampled.trajectory.latents[:, 2]
    move = policy.replay(x_t, torch.full((len(KEYS),), 2), sampled.condition)
    (move.mean.square().sum() + move.sigma.sum()).backward()
    found = [weight.grad.clone() for weight in policy.lora.values()]
    for weight in policy.lora.values():
        weight.grad = None
    return found


def test_only_networks_are_half(half: Karlo) -> None:
    """LoRA, its gradients, trajectories and values between the stages stay float32."""
    policy = make_policy(half, lora=True)
    sampler = ImageSampler(half, policy, SAMPLING)
    sampled = sampler.sample(KEYS)
    assert {parameter.dtype for parameter in half.prior.parameters()} == {HALF}
    assert half.decoder.dtype == HALF
    assert {weight.dtype for weight in policy.lora.values()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients(policy, sampler)} == {torch.float32}
    for field in sampled.trajectory:
        assert field.dtype == torch.float32
    mean = sampled.trajectory.means
    assert not torch.equal(mean, mean.to(HALF).float())


def test_half_precision_samples_nearly_the_same(half: Karlo, karlo: Karlo) -> None:
    """The noise is float32 whatever the networks' precision: equal seeds give similar images."""
    latents = [
        ImageSampler(it, make_policy(it), SAMPLING).sample(KEYS).trajectory.latents for it in (half, karlo)
    ]
    assert torch.equal(latents[0][:, 0], latents[1][:, 0])
    assert (latents[0] - latents[1]).abs().mean() < 0.02


def test_disabled_adapter_is_half_base_bit_for_bit(half: Karlo, karlo_folder: Path) -> None:
    """A disabled float32 adapter on a bfloat16 decoder does not change any latent."""
    before = ImageSampler(half, make_policy(half), SAMPLING).sample(KEYS).trajectory.latents
    policy = make_policy(half, lora=True)
    sampler = ImageSampler(half, policy, SAMPLING)
    with policy.base():
        off = sampler.sample(KEYS).trajectory.latents
    assert torch.equal(off, before)
    assert not torch.equal(sampler.sample(KEYS).trajectory.latents, before)


def test_lora_is_saved_and_loaded_in_float32(half: Karlo, karlo_folder: Path, tmp_path: Path) -> None:
    """A loaded LoRA equals the trained one; it is not rounded to the decoder's precision."""
    policy = make_policy(half, lora=True)
    policy.save_lora(tmp_path)
    fresh = make_policy(load_karlo(ModelSource(path=karlo_folder), dtype=HALF))
    fresh.load_lora(tmp_path)
    for name, weight in policy.lora.items():
        assert torch.equal(fresh.lora[name], weight)


@pytest.mark.parametrize("accumulate", [1, 8])
def test_first_ratio_is_one_in_half_precision(
    karlo_folder: Path, trainer_config: TrainerConfig, accumulate: int
) -> None:
    """Recomputing the old policy gives ratio 1 exactly, although sampling rounds differently."""
    records = {}
    for recompute in (None, False):
        config = _changed(
            trainer_config,
            precision="bfloat16",
            update={"micro_batch": 3, "accumulate": accumulate, "recompute_old": recompute},
        )
        sampler = load_sampler(config)
        sampler.policy.add_lora(config.lora, seed=0)
        training = new_training_state(sampler.policy, config, 2)
        keys = group_keys(PROMPTS[:2], 4, seed=0, fold=0, iteration=0)
        rollout = collect_rollout(sampler, FakeScorer(), keys, config.rollout, 8, DropCount(0.05))
        # Like GPU kernels with other batch shapes; those of the tiny model round identically.
        means = rollout.trajectory.means
        trajectory = rollout.trajectory._replace(means=means + 0.004 * means.abs().amax() * means.sign())
        rollout = rollout._replace(trajectory=trajectory)
        records[recompute] = update_policy(
            training, rollout, FakeScorer.evaluators, config, fold=0, iteration=0
        )
    assert records[None]["first_ratio"] == 1.0
    assert abs(float(str(records[False]["first_ratio"])) - 1) > 0.01
    assert records[None]["updates"] == (1 if accumulate == 8 else records[False]["updates"])
    assert float(str(records[None]["approx_kl"])) < float(str(records[False]["approx_kl"])) / 2


def _changed(config: TrainerConfig, **changes: object) -> TrainerConfig:
    values = config.model_dump()
    for name, change in changes.items():
        values[name] = values[name] | change if isinstance(change, dict) else change
    return TrainerConfig.model_validate(values)


def test_float16_is_refused() -> None:
    """float16 is 50 times slower on a CPU; the message names the setting and the allowed values."""
    file = Path(__file__).resolve().parents[3] / "configs" / "miniature.yaml"
    with pytest.raises(ConfigError, match=r"precision.*bfloat16"):
        load_trainer_config(file, ["precision=float16"])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_activation_checkpointing_changes_no_gradient(karlo_folder: Path, dtype: torch.dtype) -> None:
    """Recomputed activations are bit-identical, and so are the gradients."""
    found = []
    for checkpointed in (False, True):
        karlo = load_karlo(ModelSource(path=karlo_folder), dtype=dtype)
        if checkpointed:
            enable_activation_checkpointing(karlo.decoder)
        policy = make_policy(karlo, lora=True)
        found.append(gradients(policy, ImageSampler(karlo, policy, SAMPLING)))
    for plain, checkpointed in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, checkpointed)


def test_activation_checkpointing_saves_memory(karlo: Karlo) -> None:
    """Autograd keeps less than half of the activations."""
    policy = make_policy(karlo, lora=True)
    condition = ImageSampler(karlo, policy, SAMPLING).sample(KEYS).condition
    x_t, step = torch.randn(len(KEYS), 3, 8, 8), torch.full((len(KEYS),), 2)

    def saved_numbers() -> int:
        sizes: dict[int, int] = {}

        def record(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            move = policy.replay(x_t, step, condition)
        assert move.mean.requires_grad
        return sum(sizes.values())

    before = saved_numbers()
    enable_activation_checkpointing(karlo.decoder)
    assert saved_numbers() < before / 2


def test_idle_networks_leave_device_and_return(sampler: ImageSampler) -> None:
    """Idle networks are on the CPU within the context, and on the device again afterwards."""
    karlo = sampler._karlo
    moved: list[tuple[str, str]] = []
    networks = ("text_encoder", "text_proj", "prior", "super_res_first", "super_res_last")
    on_device = _KarloOnDevice(karlo, moved, networks)
    with on_device.decoder_only():
        assert moved == [(name, "cpu") for name in networks]
    assert moved[len(networks) :] == [(name, "meta") for name in networks]


class _KarloOnDevice(Karlo):
    """Karlo on device "meta", whose networks only record the devices they are moved to."""

    def __init__(self, karlo: Karlo, moved: list[tuple[str, str]], networks: tuple[str, ...]) -> None:
        components = karlo.components()
        for name in networks:
            components[name] = _RecordingNetwork(name, moved)
        components["decoder"] = type("Decoder", (), {"device": torch.device("meta")})
        super().__init__(**components)


class _RecordingNetwork:
    def __init__(self, name: str, moved: list[tuple[str, str]]) -> None:
        self.name, self.moved = name, moved

    def to(self, device: torch.device) -> None:
        self.moved.append((self.name, device.type))


def test_offloading_changes_no_image(karlo_folder: Path) -> None:
    """Images after offloading equal those without."""
    found = []
    for offload in ("none", "idle"):
        karlo = load_karlo(ModelSource(path=karlo_folder))
        sampler = ImageSampler(karlo, make_policy(karlo), SAMPLING, offload=offload)
        with sampler.offloaded():
            pass
        found.append(sampler.sample(KEYS).images)
    assert (found[0] == found[1]).all()
