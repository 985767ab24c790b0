"""bfloat16, checkpointing, offloading and compilation: what they may change, and what they may not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import PROMPTS, SAMPLING, FakeScorer, make_policy
from trainer.config import ConfigError, ModelSource, TrainerConfig, load_trainer_config
from trainer.rl.karlo import Karlo, keep_few_activations, load_karlo
from trainer.rl.policy import DecoderPolicy
from trainer.rl.rollout import DropCount, collect, group_keys
from trainer.rl.sampler import ImageSampler
from trainer.rl.train import improve, new_training_state
from trainer.runs.setup import load_sampler
from trainer.runtime.rng import ImageKey

HALF = torch.bfloat16
KEYS = [ImageKey(0, 0, 0, prompt, 0) for prompt in PROMPTS]


@pytest.fixture
def half(karlo_folder: Path) -> Karlo:
    """The tiny Karlo in bfloat16."""
    return load_karlo(ModelSource(path=karlo_folder), dtype=HALF)


def gradients(policy: DecoderPolicy, sampler: ImageSampler) -> list[Tensor]:
    """Of some function of a replay, by parameter of the adapter."""
    drawing = sampler.draw(KEYS)
    x_t = drawing.trajectory.latents[:, 2]
    move = policy.replay(x_t, torch.full((len(KEYS),), 2), drawing.condition)
    (move.mean.square().sum() + move.sigma.sum()).backward()
    found = [weight.grad.clone() for weight in policy.lora.values()]
    for weight in policy.lora.values():
        weight.grad = None
    return found


def test_only_the_networks_are_half(half: Karlo) -> None:
    """LoRA, its gradients, trajectories and what lies between the stages stay float32."""
    policy = make_policy(half, lora=True)
    sampler = ImageSampler(half, policy, SAMPLING)
    drawing = sampler.draw(KEYS)
    assert {parameter.dtype for parameter in half.prior.parameters()} == {HALF}
    assert half.decoder.dtype == HALF
    assert {weight.dtype for weight in policy.lora.values()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients(policy, sampler)} == {torch.float32}
    for field in drawing.trajectory:
        assert field.dtype == torch.float32
    mean = drawing.trajectory.means
    assert not torch.equal(mean, mean.to(HALF).float())


def test_half_precision_draws_nearly_the_same(half: Karlo, karlo: Karlo) -> None:
    """The noise is drawn in float32 whatever the networks' precision: same seeds, images nearly alike."""
    drawn = [
        ImageSampler(it, make_policy(it), SAMPLING).draw(KEYS).trajectory.latents for it in (half, karlo)
    ]
    assert torch.equal(drawn[0][:, 0], drawn[1][:, 0])
    assert (drawn[0] - drawn[1]).abs().mean() < 0.02


def test_the_half_adapter_off_is_the_base_bit_for_bit(half: Karlo, karlo_folder: Path) -> None:
    """A float32 adapter on a bfloat16 decoder leaves no trace when it is off."""
    before = ImageSampler(half, make_policy(half), SAMPLING).draw(KEYS).trajectory.latents
    policy = make_policy(half, lora=True)
    sampler = ImageSampler(half, policy, SAMPLING)
    with policy.base():
        off = sampler.draw(KEYS).trajectory.latents
    assert torch.equal(off, before)
    assert not torch.equal(sampler.draw(KEYS).trajectory.latents, before)


def test_a_lora_keeps_all_its_digits_through_a_half_decoder(
    half: Karlo, karlo_folder: Path, tmp_path: Path
) -> None:
    """Saved and loaded, it is what was trained, not rounded to the decoder's precision."""
    policy = make_policy(half, lora=True)
    policy.save_lora(tmp_path)
    fresh = make_policy(load_karlo(ModelSource(path=karlo_folder), dtype=HALF))
    fresh.load_lora(tmp_path)
    for name, weight in policy.lora.items():
        assert torch.equal(fresh.lora[name], weight)


@pytest.mark.parametrize("accumulate", [1, 8])
def test_the_first_ratio_is_one_in_half_precision(
    karlo_folder: Path, trainer_config: TrainerConfig, accumulate: int
) -> None:
    """Exactly, though sampling rounded otherwise than the update's batches do, and KL starts at 0 as well."""
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
        rollout = collect(sampler, FakeScorer(), keys, config.rollout, 8, DropCount(0.05))
        # As real kernels do in batches of other shapes; those of the tiny model round alike.
        means = rollout.trajectory.means
        trajectory = rollout.trajectory._replace(means=means + 0.004 * means.abs().amax() * means.sign())
        rollout = rollout._replace(trajectory=trajectory)
        records[recompute] = improve(training, rollout, FakeScorer.evaluators, config, fold=0, iteration=0)
    assert records[None]["first_ratio"] == 1.0
    assert abs(float(str(records[False]["first_ratio"])) - 1) > 0.01
    assert records[None]["updates"] == (1 if accumulate == 8 else records[False]["updates"])
    assert float(str(records[None]["approx_kl"])) < float(str(records[False]["approx_kl"])) / 2


def _changed(config: TrainerConfig, **changes: object) -> TrainerConfig:
    values = config.model_dump()
    for name, change in changes.items():
        values[name] = values[name] | change if isinstance(change, dict) else change
    return TrainerConfig.model_validate(values)


def test_fp16_is_refused() -> None:
    """It is 50 times slower on a CPU; the message names the field and what may be said."""
    file = Path(__file__).resolve().parents[3] / "configs" / "miniature.yaml"
    with pytest.raises(ConfigError, match=r"precision.*bfloat16"):
        load_trainer_config(file, ["precision=float16"])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_checkpointing_changes_no_gradient(karlo_folder: Path, dtype: torch.dtype) -> None:
    """Nor an image: activations that are computed again are the same activations."""
    found = []
    for few in (False, True):
        karlo = load_karlo(ModelSource(path=karlo_folder), dtype=dtype)
        if few:
            keep_few_activations(karlo.decoder)
        policy = make_policy(karlo, lora=True)
        found.append(gradients(policy, ImageSampler(karlo, policy, SAMPLING)))
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, again)


def test_checkpointing_keeps_fewer_activations(karlo: Karlo) -> None:
    """What autograd saves outside the blocks is a small part of what it saves without checkpoints."""
    policy = make_policy(karlo, lora=True)
    condition = ImageSampler(karlo, policy, SAMPLING).draw(KEYS).condition
    x_t, step = torch.randn(len(KEYS), 3, 8, 8), torch.full((len(KEYS),), 2)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            move = policy.replay(x_t, step, condition)
        assert move.mean.requires_grad
        return sum(sizes.values())

    before = kept()
    keep_few_activations(karlo.decoder)
    assert kept() < before / 2


def test_what_rests_leaves_a_device_and_comes_back(sampler: ImageSampler) -> None:
    """Offloaded networks are on the CPU while the update runs, and draw the same as before afterwards."""
    karlo = sampler._karlo
    moved: list[tuple[str, str]] = []
    networks = ("text_encoder", "text_proj", "prior", "super_res_first", "super_res_last")
    fake = _Elsewhere(karlo, moved, networks)
    with fake.decoder_only():
        assert moved == [(name, "cpu") for name in networks]
    assert moved[len(networks) :] == [(name, "meta") for name in networks]


class _Elsewhere(Karlo):
    """A Karlo that says that it is on another device, with networks that only tell where they are sent."""

    def __init__(self, karlo: Karlo, moved: list[tuple[str, str]], networks: tuple[str, ...]) -> None:
        parts = karlo.parts()
        for name in networks:
            parts[name] = _Recorder(name, moved)
        parts["decoder"] = type("Decoder", (), {"device": torch.device("meta")})
        super().__init__(**parts)


class _Recorder:
    def __init__(self, name: str, moved: list[tuple[str, str]]) -> None:
        self.name, self.moved = name, moved

    def to(self, device: torch.device) -> None:
        self.moved.append((self.name, device.type))


def test_offloading_changes_nothing(karlo_folder: Path) -> None:
    """The images after a rest are those without one."""
    found = []
    for offload in ("none", "idle"):
        karlo = load_karlo(ModelSource(path=karlo_folder))
        sampler = ImageSampler(karlo, make_policy(karlo), SAMPLING, offload=offload)
        with sampler.resting():
            pass
        found.append(sampler.draw(KEYS).images)
    assert (found[0] == found[1]).all()
