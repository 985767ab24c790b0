"""Karlo's components and the two stages that the policy does not train: conditioning and super-resolution.

diffusers' `UnCLIPPipeline.from_pretrained` cannot read Karlo's own `model_index.json`, so each component is
loaded from its subfolder. The functions below repeat `UnCLIPPipeline.__call__` stage by stage, with explicit
generators: one list per stage, one generator per image.

Gradient checkpointing of the decoder: keep what enters its blocks, compute what is inside once more.

diffusers' own switch covers the residual blocks only. In Karlo's decoder the attention blocks keep more than
those, so they are covered as well, through diffusers' attention processors.
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

Run = Callable[..., Tensor]  # run(block, *arguments): the block's output, its inside forgotten until needed


def keep_few_activations(decoder: Any, run: Run | None = None) -> None:
    """Have `decoder`, a UNet2DConditionModel, checkpoint its residual and attention blocks under gradient.

    Results and gradients stay the same bit for bit where the kernels are deterministic.
    """
    run = run or _again
    decoder.enable_gradient_checkpointing(run)
    # A dict is emptied by diffusers while it is read.
    decoder.set_attn_processor(
        {name: Checkpointed(processor, run) for name, processor in decoder.attn_processors.items()}
    )


class Checkpointed:
    """An attention processor that keeps its inputs only."""

    def __init__(self, processor: Any, run: Run) -> None:
        self._processor = processor
        self._run = run

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """What the processor answers; the names are those that diffusers passes."""
        inputs = (attn, hidden_states, encoder_hidden_states, attention_mask)
        if not torch.is_grad_enabled():
            output: Tensor = self._processor(*inputs)
            return output
        return self._run(self._processor, *inputs)


def _again(block: Any, *inputs: Any) -> Tensor:
    # There is no dropout: the random state needs no keeping, which on a GPU would cost a synchronisation.
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output


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
    """The ten components, named as `UnCLIPPipeline`'s arguments. Networks are frozen, in eval mode."""

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

    def parts(self) -> dict[str, Any]:
        """Keyword arguments for `UnCLIPPipeline(**parts)`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @contextmanager
    def decoder_only(self) -> Iterator[None]:
        """Within this context the other networks wait in the CPU's memory; nothing else about them changes.

        A device that shares the CPU's memory has nothing to gain: there it does nothing.
        """
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
        """Where the decoder lives; all components live together, but for `decoder_only`."""
        device = self.decoder.device
        assert isinstance(device, torch.device)
        return device


def _move(networks: Sequence[Any], device: torch.device) -> None:
    for network in networks:
        network.to(device)
    if device.type == "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()  # others on the device, such as a scorer, may use what is free now


class Text(NamedTuple):
    """Text encoder output of N prompts."""

    embeds: Tensor  # (N, E) pooled and projected
    hidden: Tensor  # (N, T, E) token by token
    mask: Tensor  # (N, T) bool, true where there is a token

    def select(self, rows: Sequence[int]) -> "Text":
        """These rows, in this order."""
        index = torch.tensor(rows, device=self.embeds.device)
        return Text(*(field[index] for field in self))


class Condition(NamedTuple):
    """What the decoder is told about N images: (context, additive time embedding, mask) for both branches.

    The unconditional fields have 0 rows when guidance is off.
    """

    context: Tensor  # (N, T + 4, C)
    time: Tensor  # (N, 4 * width)
    mask: Tensor  # (N, T + 4) bool
    context_unconditional: Tensor
    time_unconditional: Tensor
    mask_unconditional: Tensor

    def select(self, rows: Tensor) -> "Condition":
        """These rows (int64 index), in this order; rows may repeat."""
        return Condition(*(field[rows] if len(field) else field for field in self))

    @property
    def guided(self) -> bool:
        """Whether an unconditional branch is there."""
        return len(self.context_unconditional) > 0


def join_conditions(conditions: Sequence[Condition]) -> Condition:
    """The rows of all conditions, one after the other."""
    return Condition(*(torch.cat(field) for field in zip(*conditions, strict=True)))


def load_karlo(
    source: ModelSource,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder_dtype: torch.dtype | None = None,
) -> Karlo:
    """All components from a folder, or from a hub repository at a pinned revision.

    The networks compute in `dtype`, the decoder in `decoder_dtype` where it is given.

    Raises ConfigError, in one line, for a folder that is not there or a component that cannot be read.
    """
    root = str(source.path) if source.path is not None else str(source.repo)
    if source.path is not None and not (Path(root) / "decoder").is_dir():
        raise ConfigError(
            f"{root}: no Karlo model here (no decoder/ inside); set trainer.karlo.path or .repo"
        )
    dtypes = {"decoder": decoder_dtype or dtype}
    parts = {
        name: _load_component(root, source, name, device, dtypes.get(name, dtype)) for name in COMPONENTS
    }
    return Karlo(**parts)


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
def encode_text(karlo: Karlo, prompts: Sequence[str]) -> Text:
    """Text embeddings of the prompts, padded to the tokenizer's full length and truncated with EOT kept."""
    tokens = karlo.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=karlo.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    output = karlo.text_encoder(tokens.input_ids.to(karlo.device))
    return Text(output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool().to(karlo.device))


@torch.no_grad()
def sample_prior(
    karlo: Karlo, text: Text, unconditional: Text, generators: Generators, steps: int, guidance: float
) -> Tensor:
    """CLIP image embeddings (N, E) for N texts, one generator each; `unconditional`: the empty prompt.

    The scheduler's arithmetic and the result are float32, whatever the prior's precision.
    """
    rows, guided = len(text.embeds), guidance > 1
    if guided:
        text = Text(*(torch.cat([u.expand_as(c), c]) for u, c in zip(unconditional, text, strict=True)))
    shape = (rows, karlo.prior.config.embedding_dim)
    latents = randn_tensor(shape, generator=generators, device=karlo.device, dtype=torch.float32)
    dtype = karlo.prior.dtype
    scheduler = karlo.prior_scheduler
    scheduler.set_timesteps(steps)
    for t, t_previous in _pairs(scheduler.timesteps):
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
    karlo: Karlo, text: Text, unconditional: Text, embeddings: Tensor, guided: bool
) -> Condition:
    """Project text and image embeddings (N, E) into the decoder's inputs; with the empty branch if guided."""
    rows = len(embeddings)
    if guided:
        text = Text(*(torch.cat([u.expand_as(c), c]) for u, c in zip(unconditional, text, strict=True)))
    context, time = karlo.text_proj(
        image_embeddings=embeddings.to(karlo.text_proj.dtype),
        prompt_embeds=text.embeds,
        text_encoder_hidden_states=text.hidden,
        do_classifier_free_guidance=guided,
    )
    mask = F.pad(text.mask, (karlo.text_proj.clip_extra_context_tokens, 0), value=True)
    inputs = (context, time, mask)
    conditional = (field[-rows:] for field in inputs)
    empty = (field[:-rows] for field in inputs)
    return Condition(*conditional, *empty)


@torch.no_grad()
def super_resolve(karlo: Karlo, images_small: Tensor, generators: Generators, steps: int) -> Tensor:
    """Final images (N, 3, H, W) in [-1, 1] from decoder images (N, 3, h, w) in [-1, 1]; steps >= 2.

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
    for t, t_previous in _pairs(scheduler.timesteps):
        unet = karlo.super_res_last if t_previous is None else karlo.super_res_first
        inputs = torch.cat([latents, upscaled], dim=1).to(unet.dtype)
        output = unet(sample=inputs, timestep=t).sample.float()
        latents = scheduler.step(
            output, t, latents, prev_timestep=t_previous, generator=generators
        ).prev_sample
    images: Tensor = latents.clamp(-1, 1)
    return images


def to_uint8(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] to uint8 (N, H, W, 3) on the CPU, rounded as the pipeline rounds."""
    unit = (images.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def _pairs(timesteps: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Each timestep with the one that follows it in the chain; None after the last."""
    return list(zip(timesteps, [*timesteps[1:], None], strict=True))
