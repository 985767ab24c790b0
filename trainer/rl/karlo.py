"""Karlo's components and its stages around the decoder: text encoder, prior, super-resolution.

diffusers' `UnCLIPPipeline.from_pretrained` cannot read Karlo's own `model_index.json`, so each component is
loaded from its subfolder. The stage functions reproduce `UnCLIPPipeline.__call__` with explicit generators:
one list per stage, one generator per image. The decoder itself is sampled by `trainer.rl.policy`; its
activation checkpointing is at the end of this module.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel
from diffusers.schedulers import UnCLIPScheduler
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from trainer.config import ConfigError, ModelSource
from trainer.runtime.errors import reason

Generators = list[torch.Generator]

COMPONENTS: dict[str, type[Any]] = {
    "text_encoder": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "text_proj": UnCLIPTextProjModel,
    "prior": PriorTransformer,
    "prior_scheduler": UnCLIPScheduler,
    "decoder": UNet2DConditionModel,
    "decoder_scheduler": UnCLIPScheduler,
    "super_res_first": UNet2DModel,
    "super_res_last": UNet2DModel,
    "super_res_scheduler": UnCLIPScheduler,
}


@dataclass(frozen=True)
class Karlo:
    """Karlo's ten components, named like `UnCLIPPipeline`'s arguments. Networks are frozen, in eval mode."""

    text_encoder: Any
    tokenizer: Any
    text_proj: Any
    prior: Any
    prior_scheduler: Any
    decoder: Any
    decoder_scheduler: Any
    super_res_first: Any
    super_res_last: Any
    super_res_scheduler: Any

    def components(self) -> dict[str, Any]:
        """Return the components by name, as in `UnCLIPPipeline(**karlo.components())`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @contextmanager
    def decoder_only(self) -> Iterator[None]:
        """Move the other networks to the CPU's memory within this context; does nothing on the CPU."""
        device = self.device
        idle = (self.text_encoder, self.text_proj, self.prior, self.super_res_first, self.super_res_last)
        if device.type != "cpu":
            _move(idle, torch.device("cpu"))
        try:
            yield
        finally:
            if device.type != "cpu":
                _move(idle, device)

    @property
    def device(self) -> torch.device:
        """Device of the decoder; all components share it, except within `decoder_only`."""
        device = self.decoder.device
        assert isinstance(device, torch.device)
        return device


def _move(networks: Sequence[Any], device: torch.device) -> None:
    for network in networks:
        network.to(device)
    if device.type == "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()  # release the memory to other processes on the device, such as a scorer


class TextEncoding(NamedTuple):
    """Text encoder output of N prompts."""

    embeds: Tensor  # (N, E) pooled and projected
    hidden: Tensor  # (N, T, E) token by token
    mask: Tensor  # (N, T) bool, True at tokens


class Condition(NamedTuple):
    """Decoder inputs of N images: context, additive time embedding and mask, for both guidance branches.

    The unconditional fields have 0 rows if guidance is off.
    """

    context: Tensor  # (N, T + 4, C)
    time: Tensor  # (N, 4 * width)
    mask: Tensor  # (N, T + 4) bool
    context_unconditional: Tensor
    time_unconditional: Tensor
    mask_unconditional: Tensor

    def select(self, rows: Tensor) -> "Condition":
        """Return these rows (int64 index), in this order; rows may repeat."""
        return Condition(*(field[rows] if len(field) else field for field in self))

    @property
    def guided(self) -> bool:
        """True if there is an unconditional branch."""
        return len(self.context_unconditional) > 0


def join_conditions(conditions: Sequence[Condition]) -> Condition:
    """Concatenate the rows of all conditions."""
    return Condition(*(torch.cat(field) for field in zip(*conditions, strict=True)))


def load_karlo(
    source: ModelSource,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder_dtype: torch.dtype | None = None,
) -> Karlo:
    """Load all components from a folder, or from a hub repository at a pinned revision.

    Args:
        source: folder or repository
        device: device of all networks
        dtype: precision of the networks
        decoder_dtype: precision of the decoder, if it differs

    Raises:
        ConfigError: the folder does not exist or a component cannot be read
    """
    root = str(source.path) if source.path is not None else str(source.repo)
    if source.path is not None and not (Path(root) / "decoder").is_dir():
        raise ConfigError(
            f"{root}: no Karlo model here (missing folder decoder/); set trainer.karlo.path or .repo"
        )
    dtypes = {"decoder": decoder_dtype or dtype}
    components = {
        name: _load_component(root, source, name, device, dtypes.get(name, dtype)) for name in COMPONENTS
    }
    return Karlo(**components)


def _load_component(root: str, source: ModelSource, name: str, device: str, dtype: torch.dtype) -> Any:
    kind = COMPONENTS[name]
    options: dict[str, Any] = {"subfolder": name}
    if source.path is None:
        options["revision"] = source.revision
    if issubclass(kind, torch.nn.Module):
        options |= {"torch_dtype" if kind.__module__.startswith("diffusers") else "dtype": dtype}
    try:
        component = kind.from_pretrained(root, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{root}: cannot load Karlo's {name}: {reason(error)}") from error
    if isinstance(component, torch.nn.Module):
        component.eval().requires_grad_(False).to(device)
    return component


@torch.no_grad()
def encode_text(karlo: Karlo, prompts: Sequence[str]) -> TextEncoding:
    """Encode the prompts, padded or truncated (keeping the EOT token) to the tokenizer's full length."""
    tokens = karlo.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=karlo.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    output = karlo.text_encoder(tokens.input_ids.to(karlo.device))
    return TextEncoding(
        output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool().to(karlo.device)
    )


@torch.no_grad()
def sample_prior(
    karlo: Karlo,
    text: TextEncoding,
    unconditional: TextEncoding,
    generators: Generators,
    steps: int,
    guidance: float,
) -> Tensor:
    """Sample CLIP image embeddings (N, E) for N texts.

    The scheduler's arithmetic and the result are float32, whatever the prior's precision.

    Args:
        karlo: the components
        text: N encoded prompts
        unconditional: the encoded empty prompt, 1 or N rows
        generators: one per image
        steps: number of denoising steps
        guidance: classifier-free guidance scale; off at 1 or below
    """
    rows, guided = len(text.embeds), guidance > 1
    if guided:
        text = _prepend_unconditional(text, unconditional)
    shape = (rows, karlo.prior.config.embedding_dim)
    latents = randn_tensor(shape, generator=generators, device=karlo.device, dtype=torch.float32)
    dtype = karlo.prior.dtype
    scheduler = karlo.prior_scheduler
    scheduler.set_timesteps(steps)
    for t, t_previous in _with_next(scheduler.timesteps):
        x0 = karlo.prior(
            torch.cat([latents] * 2).to(dtype) if guided else latents.to(dtype),
            timestep=t,
            proj_embedding=text.embeds,
            encoder_hidden_states=text.hidden,
            attention_mask=text.mask,
        ).predicted_image_embedding.float()
        if guided:
            unconditional_x0, conditional_x0 = x0.chunk(2)
            x0 = unconditional_x0 + guidance * (conditional_x0 - unconditional_x0)
        latents = scheduler.step(
            x0, timestep=t, sample=latents, generator=generators, prev_timestep=t_previous
        ).prev_sample
    embeddings: Tensor = karlo.prior.post_process_latents(latents)
    return embeddings


@torch.no_grad()
def decoder_condition(
    karlo: Karlo, text: TextEncoding, unconditional: TextEncoding, embeddings: Tensor, guided: bool
) -> Condition:
    """Project text and image embeddings (N, E) to the decoder's inputs; both branches if `guided`."""
    rows = len(embeddings)
    if guided:
        text = _prepend_unconditional(text, unconditional)
    context, time = karlo.text_proj(
        image_embeddings=embeddings.to(karlo.text_proj.dtype),
        prompt_embeds=text.embeds,
        text_encoder_hidden_states=text.hidden,
        do_classifier_free_guidance=guided,
    )
    mask = F.pad(text.mask, (karlo.text_proj.clip_extra_context_tokens, 0), value=True)
    inputs = (context, time, mask)
    conditional = (field[-rows:] for field in inputs)
    without_prompt = (field[:-rows] for field in inputs)
    return Condition(*conditional, *without_prompt)


@torch.no_grad()
def super_resolve(karlo: Karlo, images_small: Tensor, generators: Generators, steps: int) -> Tensor:
    """Upscale decoder images (N, 3, h, w) in [-1, 1] to final images (N, 3, H, W) in [-1, 1]; steps >= 2.

    Both are float32, and so is the scheduler's arithmetic, whatever the networks' precision.
    """
    size = karlo.super_res_first.config.sample_size
    shape = (len(images_small), karlo.super_res_first.config.in_channels // 2, size, size)
    latents = randn_tensor(shape, generator=generators, device=karlo.device, dtype=images_small.dtype)
    upscaled = F.interpolate(
        images_small, size=[size, size], mode="bicubic", align_corners=False, antialias=True
    )
    scheduler = karlo.super_res_scheduler
    scheduler.set_timesteps(steps)
    for t, t_previous in _with_next(scheduler.timesteps):
        unet = karlo.super_res_last if t_previous is None else karlo.super_res_first
        inputs = torch.cat([latents, upscaled], dim=1).to(unet.dtype)
        output = unet(sample=inputs, timestep=t).sample.float()
        latents = scheduler.step(
            output, t, latents, prev_timestep=t_previous, generator=generators
        ).prev_sample
    images: Tensor = latents.clamp(-1, 1)
    return images


def to_uint8(images: Tensor) -> Tensor:
    """Convert images (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3) on the CPU, rounded like the pipeline."""
    unit = (images.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def _prepend_unconditional(text: TextEncoding, unconditional: TextEncoding) -> TextEncoding:
    """Return 2N rows for classifier-free guidance: the empty prompt N times, then the N texts."""
    return TextEncoding(
        *(
            torch.cat([empty.expand_as(field), field])
            for empty, field in zip(unconditional, text, strict=True)
        )
    )


def _with_next(timesteps: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Return each timestep with the next one in the chain; None after the last."""
    return list(zip(timesteps, [*timesteps[1:], None], strict=True))


# ------------------------------------------------------------------------ activation checkpointing

# run(block, *inputs) returns the block's output; the block's activations are recomputed when needed.
CheckpointFunction = Callable[..., Tensor]


def enable_activation_checkpointing(decoder: Any, run: CheckpointFunction | None = None) -> None:
    """Checkpoint the residual and attention blocks of `decoder`, a UNet2DConditionModel, under gradient.

    diffusers' own switch covers the residual blocks only. In Karlo's decoder the attention blocks keep more
    than those, so they are covered as well, through diffusers' attention processors. Results and gradients
    are bit-identical if the kernels are deterministic.
    """
    run = run or _checkpoint
    decoder.enable_gradient_checkpointing(run)
    # A new dict: diffusers empties the one that it is given.
    decoder.set_attn_processor(
        {name: CheckpointedAttention(processor, run) for name, processor in decoder.attn_processors.items()}
    )


class CheckpointedAttention:
    """Attention processor that keeps only its inputs for the backward pass."""

    def __init__(self, processor: Any, run: CheckpointFunction) -> None:
        self._processor = processor
        self._run = run

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the processor's output; the argument names are those that diffusers passes."""
        inputs = (attn, hidden_states, encoder_hidden_states, attention_mask)
        if not torch.is_grad_enabled():
            output: Tensor = self._processor(*inputs)
            return output
        return self._run(self._processor, *inputs)


def _checkpoint(block: Any, *inputs: Any) -> Tensor:
    # Without dropout the random state need not be preserved, which on a GPU would cost a synchronisation.
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output
