"""Policy: replay equals sampling; adapters are added, disabled, saved and loaded exactly."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import PROMPTS, SAMPLING, make_policy
from trainer.config import ConfigError, LoraSettings, ModelSource
from trainer.rl.diffusion import log_ratio, mean_log_prob
from trainer.rl.karlo import Condition, Karlo, decoder_condition, encode_text, load_karlo
from trainer.rl.policy import DecoderPolicy, MovingAverage, Trajectory
from trainer.rl.sampler import ImageSampler


def condition_of(karlo: Karlo, count: int = 4, guided: bool = True) -> Condition:
    text = encode_text(karlo, PROMPTS[:count])
    embeddings = torch.randn(count, text.embeds.shape[1], generator=torch.Generator().manual_seed(3))
    return decoder_condition(karlo, text, encode_text(karlo, [""]), embeddings, guided)


def sample(policy: DecoderPolicy, condition: Condition) -> Trajectory:
    count = len(condition.context)
    return policy.sample(condition, [torch.Generator().manual_seed(seed) for seed in range(count)])


@pytest.mark.parametrize("gradient", ["both", "conditional"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_replay_equals_sampling(karlo: Karlo, guidance: float, gradient: str) -> None:
    """Before the first update every ratio is 1 within 1e-5, with equal sigma."""
    policy = make_policy(karlo, SAMPLING.model_copy(update={"decoder_guidance": guidance}), lora=True)
    condition = condition_of(karlo, guided=guidance > 1)
    trajectory = sample(policy, condition)
    for i in range(policy.schedule.steps - 1):
        x_t, x_p = trajectory.latents[:, i], trajectory.latents[:, i + 1]
        mean, sigma = trajectory.means[:, i], trajectory.sigmas[:, i]
        move = policy.replay(x_t, torch.full((4,), i), condition, gradient)
        assert (log_ratio(x_p, move.mean, move.sigma, mean, sigma).exp() - 1).abs().max() < 1e-5
        old, new = mean_log_prob(x_p, mean, sigma), mean_log_prob(x_p, move.mean, sigma)
        assert ((new - old).exp() - 1).abs().max() < 1e-5
        assert torch.equal(move.sigma, sigma)


def test_replay_in_micro_batches_equals_whole_batch(karlo: Karlo) -> None:
    """The micro-batch size affects memory only: same means, same summed gradient."""
    policy = make_policy(karlo, lora=True)
    condition = condition_of(karlo)
    trajectory = sample(policy, condition)
    image, step = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([1, 2, 3, 4, 3, 1])
    x_t = trajectory.latents[image, step]

    def gradients(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        means = []
        for rows in torch.arange(6).split(size):
            move = policy.replay(x_t[rows], step[rows], condition.select(image[rows]))
            move.mean.square().sum().backward()
            means.append(move.mean.detach())
        found = [weight.grad.clone() for weight in policy.lora.values()]
        for weight in policy.lora.values():
            weight.grad = None
        return torch.cat(means), found

    whole, parts = gradients(6), gradients(2)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-5)
    for part, full in zip(parts[1], whole[1], strict=True):
        torch.testing.assert_close(part, full, atol=1e-4, rtol=1e-3)


def test_conditional_guidance_gradient_excludes_other_branch(karlo: Karlo) -> None:
    """The option changes the gradient and nothing else."""
    policy = make_policy(karlo, lora=True)
    condition = condition_of(karlo)
    x_t, step = sample(policy, condition).latents[:, 2], torch.full((4,), 2)
    found = {}
    for gradient in ("both", "conditional"):
        move = policy.replay(x_t, step, condition, gradient)
        move.mean.sum().backward()
        found[gradient] = (move.mean.detach(), [w.grad.clone() for w in policy.lora.values()])
        for weight in policy.lora.values():
            weight.grad = None
    torch.testing.assert_close(found["both"][0], found["conditional"][0], atol=1e-5, rtol=1e-5)
    pairs = zip(found["both"][1], found["conditional"][1], strict=True)
    assert any((a - b).abs().max() > 1e-3 * a.abs().max() for a, b in pairs)


def test_disabled_adapter_is_base_bit_for_bit(karlo: Karlo) -> None:
    """The base policy has exactly the published weights."""
    condition = condition_of(karlo)
    before = sample(make_policy(karlo), condition)
    policy = make_policy(karlo, lora=True)
    tuned = sample(policy, condition)
    with policy.base():
        off = sample(policy, condition)
    assert torch.equal(off.latents, before.latents)
    assert not torch.allclose(tuned.latents, before.latents, atol=1e-3)
    assert torch.equal(sample(policy, condition).latents, tuned.latents)


@pytest.mark.parametrize("targets", [("to_q", "add_k_proj"), ("to_out.0", "conv1", "conv2")])
def test_saved_lora_samples_the_same_after_loading(
    karlo: Karlo, karlo_folder: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """A saved LoRA equals the trained one, with linear and convolutional targets and alpha."""
    policy = make_policy(karlo)
    policy.add_lora(LoraSettings(rank=2, alpha=5, targets=targets), seed=0)
    for weight in policy.lora.values():
        torch.nn.init.normal_(weight, std=0.1)
    policy.save_lora(tmp_path)
    other = load_karlo(ModelSource(path=karlo_folder))
    fresh = make_policy(other)
    fresh.load_lora(tmp_path)
    expected = sample(policy, condition_of(karlo)).latents
    assert torch.equal(sample(fresh, condition_of(other)).latents, expected)


def test_unusable_lora_is_reported_in_one_line(karlo: Karlo, tmp_path: Path) -> None:
    """A missing or damaged LoRA is a ConfigError of one line."""
    policy = make_policy(karlo)
    with pytest.raises(ConfigError, match="no LoRA here"):
        policy.load_lora(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="does not fit") as caught:
        policy.load_lora(tmp_path)
    assert "\n" not in str(caught.value)


def test_lora_with_unmatched_weights_is_refused(
    karlo: Karlo, karlo_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another model's LoRA is a one-line error without library output; it is never ignored silently."""
    make_policy(karlo, lora=True).save_lora(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    invalid = (
        ({"x": torch.zeros(1)}, "no LoRA weights"),
        ({name.replace("blocks", "blox"): weight for name, weight in weights.items()}, "no counterpart"),
        ({name: weight.repeat_interleave(2, dim=0) for name, weight in weights.items()}, "size mismatch"),
    )
    for contents, message in invalid:
        save_file(contents, file, metadata=metadata)
        policy = make_policy(load_karlo(ModelSource(path=karlo_folder)))
        capfd.readouterr()
        with pytest.raises(ConfigError, match=message) as caught:
            policy.load_lora(tmp_path)
        assert "\n" not in str(caught.value)
        assert capfd.readouterr().err == ""


def test_unknown_targets_are_reported_in_one_line(karlo: Karlo) -> None:
    """The error for a misspelled module name contains the name of the setting."""
    with pytest.raises(ConfigError, match=r"trainer\.lora\.targets") as caught:
        make_policy(karlo).add_lora(LoraSettings(targets=("to_quarry",)), seed=0)
    assert "\n" not in str(caught.value)


def test_seed_determines_adapter_without_touching_global_rng(karlo_folder: Path) -> None:
    """The same seed gives the same adapter, independent of the global random state."""
    starts = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        policy = make_policy(load_karlo(ModelSource(path=karlo_folder)))
        policy.add_lora(LoraSettings(rank=2), seed=7)
        starts.append(torch.cat([weight.flatten() for weight in policy.lora.values()]))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(noise)))
    assert torch.equal(*starts)


def test_moving_average_lags_and_restores_policy(karlo: Karlo) -> None:
    """Evaluation uses the average; training continues from the last update."""
    policy = make_policy(karlo, lora=True)
    average = MovingAverage(policy, 0.9)
    name, weight = next(iter(policy.lora.items()))
    start = weight.detach().clone()
    for _ in range(50):
        weight.data += 1.0
        average.update()
    last = weight.detach().clone()
    with average.applied():
        inside = policy.lora[name].detach().clone()
    assert (inside > start).all()
    assert (inside < last).all()
    assert torch.equal(policy.lora[name], last)


def test_batch_size_changes_no_image(sampler: ImageSampler) -> None:
    """Every image depends only on its own random streams."""
    from trainer.rl.rollout import group_keys

    keys = group_keys(PROMPTS, 2, seed=1, fold=0, iteration=0)
    whole = sampler.sample(keys)
    for size in (1, 3):
        other = ImageSampler(sampler._karlo, sampler.policy, SAMPLING)
        for start in range(0, len(keys), size):
            part = other.sample(keys[start : start + size])
            latents = whole.trajectory.latents[start : start + size]
            torch.testing.assert_close(part.trajectory.latents, latents, atol=1e-4, rtol=1e-4)
            difference = part.images.astype(int) - whole.images[start : start + size].astype(int)
            assert abs(difference).max() <= 1
