"""The policy: Karlo's decoder with a LoRA, sampled and replayed through one step function."""

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
    """The denoising of N images in S steps, in float32: half precision would move the log-probability."""

    latents: Tensor  # (N, S + 1, C, H, W), from noise to image
    means: Tensor  # (N, S, C, H, W), of the policy that sampled
    sigmas: Tensor  # (N, S, C, H, W), 0 in the last step
    clamp_fraction: Tensor  # (N, S)

    def select(self, rows: Tensor) -> "Trajectory":
        """These images (int64 index)."""
        return Trajectory(*(field[rows] for field in self))


def join_trajectories(trajectories: list[Trajectory]) -> Trajectory:
    """The images of all trajectories, one after the other."""
    return Trajectory(*(torch.cat(field) for field in zip(*trajectories, strict=True)))


class DecoderPolicy:
    """Karlo's decoder as a stochastic policy over denoising steps.

    A `Transition` carries the network's own sigma. Whether a ratio uses it or, for a frozen variance head,
    that of the policy that sampled in both terms is the objective's choice.
    """

    def __init__(self, decoder: Any, scheduler: Any, *, steps: int, guidance: float) -> None:
        wanted = {"prediction_type": "epsilon", "variance_type": "learned_range", "clip_sample": True}
        found = {key: scheduler.config[key] for key in wanted}
        if found != wanted or scheduler.config["clip_sample_range"] != 1:
            raise ConfigError(f"decoder_scheduler: {found} is not Karlo's {wanted} with clip range 1")
        scheduler.set_timesteps(steps)
        self.decoder = decoder
        self.guidance = guidance
        self.schedule: Schedule = make_schedule(
            scheduler.betas, scheduler.alphas_cumprod, scheduler.timesteps
        ).to(decoder.device)

    # ------------------------------------------------------------------------------------- the chain

    @torch.no_grad()
    def sample(
        self, condition: Condition, generators: Generators, start: Generators | None = None
    ) -> Trajectory:
        """Denoise N images, each from its own generator: initial noise first, then one draw a step.

        `start` generators, where given, take over what is never trained at the beginning: the initial noise
        and that of step 0. Several images may have equal ones.
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
        """Transitions of the policy as it is now, under gradient, at latents (M, C, H, W) and steps (M,)."""
        return self._step(x_t, step, condition, guidance_gradient)

    def _step(
        self,
        x_t: Tensor,
        step: Tensor,
        condition: Condition,
        guidance_gradient: GuidanceGradient = "both",
    ) -> Transition:
        """One denoising step: the one place where the network is called, for sampling and for replay."""
        timesteps = self.schedule.timesteps[step]
        if not condition.guided:
            eps, v = self._predict(x_t, timesteps, *condition[:3]).chunk(2, dim=1)
            return transition(self.schedule, step, x_t, eps, v)
        if guidance_gradient == "both" or not torch.is_grad_enabled():
            inputs = (torch.cat(pair) for pair in zip(condition[3:], condition[:3], strict=True))
            empty, told = self._predict(x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), *inputs).chunk(2)
        else:
            with torch.no_grad():
                empty = self._predict(x_t, timesteps, *condition[3:])
            told = self._predict(x_t, timesteps, *condition[:3])
        eps, v = told.chunk(2, dim=1)
        eps = guide(empty.chunk(2, dim=1)[0], eps, self.guidance)
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
        # Never less than float32: half precision would move the log-probability.
        return output.to(torch.promote_types(output.dtype, torch.float32))

    # -------------------------------------------------------------------------------------- the LoRA

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Put a fresh adapter (zero change) on the decoder; `seed` decides its random half."""
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
        """The adapter's parameters by name; empty where there is no adapter."""
        return {name: weight for name, weight in self.decoder.named_parameters() if ".lora_" in name}

    @torch.no_grad()
    def lora_norm(self) -> float:
        """Frobenius norm of the change that the adapter makes to the decoder's weights, all together."""
        squares = [
            # |BA|^2 = sum of (B'B) * (AA'): two r x r matrices instead of a whole weight
            (scale**2 * (up.T @ up * (down @ down.T)).sum()).double()
            for down, up, scale in self._adapter_pairs()
        ]
        return float(torch.stack(squares).sum().clamp(min=0).sqrt()) if squares else 0.0

    def _adapter_pairs(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """A (r, inputs), B (outputs, r) and the scale of each adapted module, convolutions flattened."""
        for module in self.decoder.modules():
            if ADAPTER in getattr(module, "lora_A", {}):
                down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
                yield down.flatten(1), up.flatten(1), module.scaling[ADAPTER]

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context the adapter is off: the base policy, bit for bit."""
        self.decoder.disable_adapters()
        try:
            yield
        finally:
            self.decoder.enable_adapters()

    def save_lora(self, folder: Path) -> None:
        """Write the adapter as diffusers/PEFT safetensors, configuration in the file's metadata."""
        self.decoder.save_lora_adapter(folder, adapter_name=ADAPTER, weight_name=LORA_FILE)

    def load_lora(self, folder: Path) -> None:
        """Load an adapter that `save_lora` wrote. Raises ConfigError where it does not fit the decoder."""
        file = folder / LORA_FILE
        if not file.is_file():
            raise ConfigError(f"{folder}: no LoRA here (no {LORA_FILE}); give the lora folder of a run")
        try:
            with safe_open(file, "pt") as stored:
                names = set(stored.keys())
            if not any(".lora_" in name for name in names):
                raise ValueError("there are no LoRA weights in it")
            with _libraries_silent():
                self.decoder.load_lora_adapter(
                    folder, prefix=None, weight_name=LORA_FILE, adapter_name=ADAPTER, use_safetensors=True
                )
            # What has no place in the decoder is passed over in silence: it would draw as if untrained.
            strangers = names ^ set(get_peft_model_state_dict(self.decoder, adapter_name=ADAPTER))
            if strangers:
                raise ValueError(f"{len(strangers)} weights have no counterpart, the first {min(strangers)}")
            # Loading has rounded the adapter to the decoder's precision.
            self._lora_in_float32()
            set_peft_model_state_dict(self.decoder, load_file(file), adapter_name=ADAPTER)
        except (ValueError, LookupError, RuntimeError, OSError, SafetensorError) as error:
            raise ConfigError(f"{folder}: this LoRA does not fit this decoder: {reason(error)}") from error


@contextmanager
def _libraries_silent() -> Iterator[None]:
    """Whatever they log or warn of within this context is raised, or checked, by the caller."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


class MovingAverage:
    """Exponential moving average of the adapter; what is evaluated and shipped.

    The decay starts small and rises to its final value, so that the random start does not linger.
    """

    def __init__(self, policy: DecoderPolicy, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._policy = policy
        self.average = {name: weight.detach().clone() for name, weight in policy.lora.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the adapter as it is now into the average."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        for name, weight in self._policy.lora.items():
            self.average[name].lerp_(weight, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the policy is the average."""
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
