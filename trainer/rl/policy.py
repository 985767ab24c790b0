"""Policy: Karlo's decoder with a LoRA; sampling and replay share one denoising step function."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config import LORA_FILE, ConfigError, LoraSettings
from trainer.rl.diffusion import Schedule, Transition, guide, make_schedule, transition
from trainer.rl.karlo import Condition, Generators
from trainer.runtime.errors import reason

ADAPTER = "default"

GuidanceGradient = Literal["both", "conditional"]


class Trajectory(NamedTuple):
    """Latents of N images over S denoising steps; float32: half precision changes the log-probability."""

    latents: Tensor  # (N, S + 1, C, H, W), from noise to image
    means: Tensor  # (N, S, C, H, W), of the policy that sampled
    sigmas: Tensor  # (N, S, C, H, W), 0 in the last step
    clamp_fraction: Tensor  # (N, S)

    def select(self, rows: Tensor) -> "Trajectory":
        """Return the trajectories of these images (int64 index)."""
        return Trajectory(*(field[rows] for field in self))


def join_trajectories(trajectories: list[Trajectory]) -> Trajectory:
    """Concatenate the images of all trajectories."""
    return Trajectory(*(torch.cat(field) for field in zip(*trajectories, strict=True)))


class DecoderPolicy:
    """Karlo's decoder as a stochastic policy over denoising steps.

    Transitions have the network's own sigma. The objective chooses if a ratio uses it or, for a frozen
    variance head, the sigma of the policy that sampled in both terms.
    """

    def __init__(self, decoder: Any, scheduler: Any, *, steps: int, guidance: float) -> None:
        expected = {"prediction_type": "epsilon", "variance_type": "learned_range", "clip_sample": True}
        found = {key: scheduler.config[key] for key in expected}
        if found != expected or scheduler.config["clip_sample_range"] != 1:
            raise ConfigError(
                f"Karlo's decoder_scheduler: found {found}; expected {expected} and clip_sample_range 1"
            )
        scheduler.set_timesteps(steps)
        self.decoder = decoder
        self.guidance = guidance
        self.schedule: Schedule = make_schedule(
            scheduler.betas, scheduler.alphas_cumprod, scheduler.timesteps
        ).to(decoder.device)

    # --------------------------------------------------------------------------- sampling and replay

    @torch.no_grad()
    def sample(
        self, condition: Condition, generators: Generators, start: Generators | None = None
    ) -> Trajectory:
        """Denoise N images, each with the noise of its own generator.

        Args:
            condition: decoder inputs, N rows
            generators: one per image; the initial noise is sampled first, then one noise per step
            start: generators of the initial noise and of step 0, which is never trained; images with equal
                ones start from the same noise
        """
        count = len(condition.context)
        size = self.decoder.config.sample_size
        shape = (count, self.decoder.config.in_channels, size, size)
        device = self.decoder.device
        start = start or generators
        x_t = randn_tensor(shape, generator=start, device=device, dtype=torch.float32)
        latents, means, sigmas, clamped = [x_t], [], [], []
        for i in range(self.schedule.steps):
            step = torch.full((count,), i, device=device)
            move = self._step(x_t, step, condition)
            x_t = move.mean
            if i < self.schedule.steps - 1:
                source = start if i == 0 else generators
                noise = randn_tensor(shape, generator=source, device=device, dtype=torch.float32)
                x_t = move.mean + move.sigma * noise
            latents.append(x_t)
            means.append(move.mean)
            sigmas.append(move.sigma)
            clamped.append(move.clamp_fraction)
        return Trajectory(*(torch.stack(parts, dim=1) for parts in (latents, means, sigmas, clamped)))

    def replay(
        self,
        x_t: Tensor,
        step: Tensor,
        condition: Condition,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Transition:
        """Return the current policy's transitions, under gradient, at latents (M, C, H, W) and steps (M,)."""
        return self._step(x_t, step, condition, guidance_gradient)

    def _step(
        self,
        x_t: Tensor,
        step: Tensor,
        condition: Condition,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Transition:
        """Compute one denoising step; both sampling and replay call the network here and nowhere else."""
        timesteps = self.schedule.timesteps[step]
        if not condition.guided:
            eps, v = self._predict(x_t, timesteps, *condition[:3]).chunk(2, dim=1)
            return transition(self.schedule, step, x_t, eps, v)
        if guidance_gradient == "both" or not torch.is_grad_enabled():
            inputs = (torch.cat(pair) for pair in zip(condition[3:], condition[:3], strict=True))
            unconditional, conditional = self._predict(
                x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), *inputs
            ).chunk(2)
        else:
            with torch.no_grad():
                unconditional = self._predict(x_t, timesteps, *condition[3:])
            conditional = self._predict(x_t, timesteps, *condition[:3])
        eps, v = conditional.chunk(2, dim=1)
        eps = guide(unconditional.chunk(2, dim=1)[0], eps, self.guidance)
        return transition(self.schedule, step, x_t, eps, v)

    def _predict(self, x_t: Tensor, timesteps: Tensor, context: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        dtype = self.decoder.dtype
        output: Tensor = self.decoder(
            sample=x_t.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=context.to(dtype),
            class_labels=time.to(dtype),
            attention_mask=mask,
        ).sample
        # At least float32: half precision would change the log-probability.
        return output.to(torch.promote_types(output.dtype, torch.float32))

    # ----------------------------------------------------------------------------------------- LoRA

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Add a new adapter (zero change) to the decoder; `seed` initialises its random half.

        Raises:
            ConfigError: the decoder has no module of a configured target
        """
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets),
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.decoder.add_adapter(config, adapter_name=ADAPTER)
            except ValueError as error:
                raise ConfigError(
                    f"trainer.lora.targets {list(settings.targets)}: {reason(error)}"
                ) from error
        self._lora_in_float32()

    def _lora_in_float32(self) -> None:
        for parameter in self.lora.values():
            parameter.data = parameter.data.float()

    @property
    def lora(self) -> dict[str, nn.Parameter]:
        """Parameters of the adapter by name; empty without an adapter."""
        return {name: weight for name, weight in self.decoder.named_parameters() if ".lora_" in name}

    @torch.no_grad()
    def lora_norm(self) -> float:
        """Return the Frobenius norm of the adapter's change of all the decoder's weights."""
        squares = [
            # |BA|^2 = sum of (B'B) * (AA'): two r x r matrices instead of a whole weight
            (scale**2 * (up.T @ up * (down @ down.T)).sum()).double()
            for down, up, scale in self._adapter_pairs()
        ]
        return float(torch.stack(squares).sum().clamp(min=0).sqrt()) if squares else 0.0

    def _adapter_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield A (r, inputs), B (outputs, r) and the scale of each adapted module, convolutions flat."""
        for module in self.decoder.modules():
            if ADAPTER in getattr(module, "lora_A", {}):
                down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
                yield down.flatten(1), up.flatten(1), module.scaling[ADAPTER]

    @contextmanager
    def base(self) -> Iterator[None]:
        """Disable the adapter within this context: the base policy, bit for bit."""
        self.decoder.disable_adapters()
        try:
            yield
        finally:
            self.decoder.enable_adapters()

    def save_lora(self, folder: Path) -> None:
        """Write the adapter as diffusers/PEFT safetensors, with its configuration in the file's metadata."""
        self.decoder.save_lora_adapter(folder, adapter_name=ADAPTER, weight_name=LORA_FILE)

    def load_lora(self, folder: Path) -> None:
        """Load an adapter that `save_lora` wrote.

        Raises:
            ConfigError: there is no LoRA in the folder, or it does not fit the decoder
        """
        file = folder / LORA_FILE
        if not file.is_file():
            raise ConfigError(
                f"{folder}: no LoRA here (missing file {LORA_FILE}); expected the lora folder of a run"
            )
        try:
            with safe_open(file, "pt") as stored:
                names = set(stored.keys())
            if not any(".lora_" in name for name in names):
                raise ValueError("the file contains no LoRA weights")
            with _silence_libraries():
                self.decoder.load_lora_adapter(
                    folder, prefix=None, weight_name=LORA_FILE, adapter_name=ADAPTER, use_safetensors=True
                )
            # Weights without a counterpart are ignored silently: the policy would sample as if untrained.
            unmatched = names ^ set(get_peft_model_state_dict(self.decoder, adapter_name=ADAPTER))
            if unmatched:
                raise ValueError(f"{len(unmatched)} weights have no counterpart, such as {min(unmatched)}")
            # Loading has rounded the adapter to the decoder's precision.
            self._lora_in_float32()
            set_peft_model_state_dict(self.decoder, load_file(file), adapter_name=ADAPTER)
        except (ValueError, LookupError, RuntimeError, OSError, SafetensorError) as error:
            raise ConfigError(f"{folder}: this LoRA does not fit this decoder: {reason(error)}") from error


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Suppress log messages and warnings of libraries; `load_lora` checks the result itself."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


class MovingAverage:
    """Exponential moving average of the adapter, which is evaluated and saved as the result.

    The decay starts small and rises to its final value, so that the random start is soon forgotten.
    """

    def __init__(self, policy: DecoderPolicy, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._policy = policy
        self.average = {name: weight.detach().clone() for name, weight in policy.lora.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current adapter."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        for name, weight in self._policy.lora.items():
            self.average[name].lerp_(weight, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the policy's adapter by the average within this context."""
        current = {name: weight.detach().clone() for name, weight in self._policy.lora.items()}
        _assign(self._policy.lora, self.average)
        try:
            yield
        finally:
            _assign(self._policy.lora, current)


@torch.no_grad()
def _assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
