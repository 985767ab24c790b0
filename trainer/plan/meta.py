"""Karlo's networks on the meta device, and a meter of their memory and FLOPs.

The networks are built from their configurations, without weights. Configurations come from the model's folder
or the hub's cache; those of the published Karlo are built in (from diffusers' conversion script), so planning
needs no download.
"""

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.schedulers import UnCLIPScheduler
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextConfig

from trainer.config import ConfigError, ModelSource, TrainerConfig
from trainer.rl.karlo import COMPONENTS
from trainer.rl.policy import DecoderPolicy
from trainer.runtime.errors import reason


class Meter(TorchDispatchMode):
    """Counter of FLOPs and memory, operator by operator, within `metered`.

    (torch's own FlopCounterMode keeps every module's inputs alive, which would distort the memory.)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0  # matrix products, convolutions and attention; a multiply-add is two
        self.held_bytes = 0  # outputs of operators that are still referenced
        self.peak_bytes = 0  # maximum of held_bytes
        self._known: dict[int, object] = {}

    def restart(self) -> None:
        """Reset the counters; memory that is held now stays counted."""
        self.flops = 0
        self.peak_bytes = self.held_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
        inputs = {_identity(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _identity(tensor) not in inputs:
                self._hold(tensor.untyped_storage())
        return output

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._drop, key, storage.nbytes())
            self.held_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _drop(self, key: int, size: int) -> None:
        del self._known[key]
        self.held_bytes -= size


@contextmanager
def metered() -> Iterator[Meter]:
    """Count within this context, with attention as the fused kernel of real devices.

    Not counted: memory inside kernels (a convolution's workspace) and the allocator's fragmentation.
    """
    # Meta tensors would take the unfused path, whose attention matrices no device keeps.
    with patch.object(F, "scaled_dot_product_attention", _fused_attention), Meter() as meter:
        yield meter


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    shape = (*query.shape[:-1], key.shape[-2])
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query,
        key,
        value,
        None if attn_mask is None else attn_mask.expand(shape),
        torch.is_grad_enabled(),
        is_causal=options.get("is_causal", False),
    )[0]
    return output


def size_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])


NETWORKS = ("text_encoder", "text_proj", "prior", "decoder", "super_res_first", "super_res_last")

_WIDTHS = {"layers_per_block": 3, "block_out_channels": [320, 640, 960, 1280]}
_SUPER_RESOLUTION = _WIDTHS | {
    "sample_size": 256,
    "in_channels": 6,
    "out_channels": 3,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    "add_attention": False,
}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "kakaobrain/karlo-v1-alpha": {
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "projection_dim": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "text_proj": {"time_embed_dim": 1280, "cross_attention_dim": 1536},
        "prior": {},
        "decoder": _WIDTHS
        | {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 6,
            "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
            "cross_attention_dim": 1536,
            "attention_head_dim": 64,
            "class_embed_type": "identity",
            "resnet_time_scale_shift": "scale_shift",
        },
        "super_res_first": _SUPER_RESOLUTION,
        "super_res_last": _SUPER_RESOLUTION,
    }
}


@dataclass(frozen=True)
class Blueprint:
    """Karlo's networks on the meta device, in the precision of the run, and the policy with its adapter."""

    text_encoder: Any
    text_proj: Any
    prior: Any
    decoder: Any
    super_res_first: Any
    super_res_last: Any
    policy: DecoderPolicy

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Networks by name; the decoder's parameters include the adapter's."""
        return {name: getattr(self, name) for name in NETWORKS}

    @property
    def tokens(self) -> int:
        """Length of a prompt, padded."""
        return int(self.text_encoder.config.max_position_embeddings)


def draft(config: TrainerConfig, device: str = "meta") -> Blueprint:
    """Build the networks of a run; on a real device their weights are random.

    Raises:
        ConfigError: their configurations are missing or damaged
    """
    networks = {name: _network(config.karlo, name, device) for name in NETWORKS}
    for name, network in networks.items():
        precision = config.policy_precision if name == "decoder" else config.precision
        network.requires_grad_(False).to(getattr(torch, precision))
    policy = DecoderPolicy(
        networks["decoder"],
        UnCLIPScheduler(variance_type="learned_range"),
        steps=config.sampling.decoder_steps,
        guidance=config.sampling.decoder_guidance,
    )
    policy.add_lora(config.lora, seed=0)
    return Blueprint(**networks, policy=policy)


def _network(source: ModelSource, name: str, device: str) -> Any:
    values = _values(source, name)
    kind = COMPONENTS[name]
    try:
        with torch.device(device):
            if name == "text_encoder":
                return kind(CLIPTextConfig.from_dict(values))
            return kind.from_config(values)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"trainer.karlo: {name}/config.json does not describe a {name}: {reason(error)}"
        ) from error


def _values(source: ModelSource, name: str) -> dict[str, Any]:
    file = source.path / name / "config.json" if source.path else _cached(source, name)
    if file is None and source.repo in PUBLISHED:
        return PUBLISHED[source.repo][name]
    if file is None:
        raise ConfigError(
            f"trainer.karlo.repo: {source.repo} is not in the hub's cache; download it, or set karlo.path"
        )
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({reason(error)}); set trainer.karlo.path") from error
    return values


def _cached(source: ModelSource, name: str) -> Path | None:
    found = try_to_load_from_cache(str(source.repo), f"{name}/config.json", revision=source.revision)
    return Path(found) if isinstance(found, str) else None
