"""Weights: read tensor by tensor without running pickled code, converted to open_clip's names, and loaded.

Loading never holds a second copy of a model: a checkpoint is memory-mapped, each tensor is copied once to its
final device and dtype, and the mapping is renewed from time to time so that its pages do not add up. Beyond
the model itself this costs the host `WINDOW_BYTES` and one tensor.

All towers are open_clip's CLIP. A checkpoint of transformers' CLIPModel is converted:

=====================================  ==============================================
transformers                           open_clip
=====================================  ==============================================
`*.layers.N.self_attn.{q,k,v}_proj`    `*.resblocks.N.attn.in_proj_*` (stacked)
`*.layers.N.self_attn.out_proj`        `*.resblocks.N.attn.out_proj`
`*.layers.N.layer_norm{1,2}`           `*.resblocks.N.ln_{1,2}`
`*.layers.N.mlp.fc{1,2}`               `*.resblocks.N.mlp.{c_fc,c_proj}`
`{visual,text}_projection.weight`      `visual.proj`, `text_projection` (transposed)
=====================================  ==============================================
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reward_service.engine.files import LocalFile, ProgressCallback, ProgressMeter, no_progress, read_json
from reward_service.engine.types import ModelError
from reward_service.settings import one_line

StateDict = dict[str, Tensor]
Shape = tuple[int, ...]

_MAX_SHOWN_KEYS = 3
WINDOW_BYTES = 256 << 20
#: Raised for files that are truncated or hold anything but tensors. torch.load raises UnpicklingError for the
#: latter; pickle itself is not used.
_UNREADABLE = (
    SafetensorError,
    UnpicklingError,
    OSError,
    zipfile.BadZipFile,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    AttributeError,
    TypeError,
)

_LAYER_NORM_EPS = 1e-5
_RENAMED = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_BLOCKS = {"vision_model": "visual.transformer.resblocks", "text_model": "transformer.resblocks"}
_IN_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_LAYER = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class WeightSource:
    """Tensors of a checkpoint that make one weight: several are stacked; `transposed` transposes each."""

    keys: tuple[str, ...]
    transposed: bool = False


class Checkpoint:
    """An open file of weights.

    Args:
        file: a safetensors file, or a state dict saved by torch

    Raises:
        ModelError: the file is truncated, or holds anything but tensors
    """

    def __init__(self, file: LocalFile) -> None:
        self.file = file
        self._open()
        self.shapes: dict[str, Shape] = {key: self._shape(key) for key in self._stored_names}

    def tensor(self, key: str) -> Tensor:
        """Return one tensor on the CPU, in the file's dtype; valid only until the next call."""
        if self._mapped_bytes > WINDOW_BYTES:
            self._open()
        stored = self._stored_names[key]
        tensor: Tensor = (
            self._state[stored] if self._safetensors is None else self._safetensors.get_tensor(stored)
        )
        self._mapped_bytes += tensor.nbytes
        return tensor

    def state_dict(self) -> StateDict:
        """Return a copy of all tensors, for small files."""
        return {key: self.tensor(key).clone() for key in self.shapes}

    def _open(self) -> None:
        self._mapped_bytes = 0
        self._safetensors: Any = None
        self._state: StateDict = {}
        try:
            if self.file.path.suffix == ".safetensors":
                self._safetensors = safe_open(self.file.path, framework="pt", device="cpu")
                names = list(self._safetensors.keys())
            else:
                self._state = _open_pickled(self.file.path)
                names = list(self._state)
        except _UNREADABLE as error:
            cause = _describe_unreadable(self.file, one_line(error)[:120])
            raise ModelError(f"{self.file.path}: not a whole file of weights: {cause}") from None
        self._stored_names = {name.removeprefix("module."): name for name in names}

    def _shape(self, key: str) -> Shape:
        stored = self._stored_names[key]
        if self._safetensors is None:
            return tuple(self._state[stored].shape)
        return tuple(self._safetensors.get_slice(stored).get_shape())


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    device: torch.device,
    dtype: torch.dtype,
    *,
    float32: Iterable[str] = (),
    progress: ProgressCallback = no_progress,
) -> None:
    """Load a module built on the meta device: copy each weight once, to its final device and dtype.

    Args:
        module: the module to load
        checkpoint: the open file of weights
        sources: source of each of the module's weights
        device: device of the weights
        dtype: dtype of the weights
        float32: names of weights that stay float32 on the CPU
        progress: receives progress reports

    Raises:
        ModelError: a weight is missing or unknown, or a shape differs
    """
    expected = check_weights(module, checkpoint, sources)
    exempt = set(float32)
    meter = ProgressMeter(progress, f"loading {checkpoint.file.source}", checkpoint.file.size_bytes)
    state = {}
    for key, shape in expected.items():
        place = (torch.device("cpu"), torch.float32) if key in exempt else (device, dtype)
        state[key] = _assemble(checkpoint, sources[key], shape, *place, meter)
    module.load_state_dict(state, assign=True)


def check_weights(
    module: nn.Module, checkpoint: Checkpoint, sources: Mapping[str, WeightSource]
) -> dict[str, Shape]:
    """Compare a module with a checkpoint, reading only the checkpoint's header.

    Shapes are compared before names, because a shape identifies the wrong architecture better than a name.

    Returns:
        shapes of the module's weights

    Raises:
        ModelError: a weight is missing or unknown, or a shape differs
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    file, found = checkpoint.file.source, checkpoint.shapes
    common = expected.keys() & sources.keys()
    for key in sorted(common):
        _check_shapes(file, key, sources[key], expected[key], found)
    needed = {name for key in common for name in sources[key].keys}
    missing = (needed | (expected.keys() - sources.keys())) - (found.keys() & needed)
    unknown = {name for key in sources.keys() - expected.keys() for name in sources[key].keys}
    for verb, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            shown = ", ".join(sorted(names)[:_MAX_SHOWN_KEYS])
            more = f" and {len(names) - _MAX_SHOWN_KEYS} more" if len(names) > _MAX_SHOWN_KEYS else ""
            counts = f"expected {len(needed | missing)} tensors, found {len(needed - missing) + len(unknown)}"
            raise ModelError(
                f"{file}: the checkpoint {verb} {shown}{more}: {counts}; use this tower's checkpoint"
            )
    return expected


def sources_in_open_clip(keys: Iterable[str]) -> dict[str, WeightSource]:
    """Return the source of each weight in a checkpoint with open_clip's own names.

    Old checkpoints hold the causal mask, which is not a weight.
    """
    return {key: WeightSource((key,)) for key in keys if key != "attn_mask"}


def sources_in_transformers(keys: Iterable[str]) -> dict[str, WeightSource]:
    """Return the source of each of open_clip's weights in a CLIPModel's checkpoint.

    Unknown keys keep their name.
    """
    sources = {}
    for key in keys:
        if key.endswith(".position_ids"):
            continue
        if key in _TRANSPOSED:
            sources[_TRANSPOSED[key]] = WeightSource((key,), transposed=True)
        elif match := _LAYER.fullmatch(key):
            name, source = _source_in_layer(match)
            sources[name] = source
        else:
            sources[_RENAMED.get(key, key)] = WeightSource((key,))
    return sources


def convert_state_dict(state: StateDict) -> StateDict:
    """Return a CLIPModel's state dict under open_clip's names."""
    return {name: _join(source, state) for name, source in sources_in_transformers(state).items()}


def convert_config(path: Path) -> dict[str, Any]:
    """Return open_clip's model configuration for the `config.json` of transformers' CLIPModel.

    Raises:
        ModelError: not a CLIP model, or one that open_clip's class cannot express
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPConfig

    kind = read_json(path).get("model_type")
    if kind != "clip":
        raise ModelError(f"{path}: expected model_type clip, found {kind}")
    try:
        config: Any = CLIPConfig.from_json_file(str(path))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: not a CLIP model's configuration ({one_line(error)[:160]})") from None
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act or vision.hidden_act not in ("quick_gelu", "gelu"):
        raise ModelError(f"{path}: hidden_act must be quick_gelu or gelu in both halves")
    if {vision.layer_norm_eps, text.layer_norm_eps} != {_LAYER_NORM_EPS}:
        raise ModelError(f"{path}: layer_norm_eps must be {_LAYER_NORM_EPS} in both halves")
    return {
        "embed_dim": config.projection_dim,
        # Easily overlooked: OpenAI's towers were trained with QuickGELU, most others with GELU.
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }


def _source_in_layer(match: re.Match[str]) -> tuple[str, WeightSource]:
    half, number, part, kind = match.groups()
    block = f"{_BLOCKS[half]}.{number}"
    if part in _STACKED:
        layer = match[0].removesuffix(f"{part}.{kind}")
        keys = tuple(f"{layer}{name}.{kind}" for name in _STACKED)
        return f"{block}.attn.in_proj_{kind}", WeightSource(keys)
    return f"{block}.{_IN_BLOCK.get(part, part)}.{kind}", WeightSource((match[0],))


def _join(source: WeightSource, state: StateDict) -> Tensor:
    pieces = [state[key].T if source.transposed else state[key] for key in source.keys]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()


def _assemble(
    checkpoint: Checkpoint,
    source: WeightSource,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    meter: ProgressMeter,
) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device=device)
    pieces = weight.chunk(len(source.keys)) if len(source.keys) > 1 else (weight,)
    for key, piece in zip(source.keys, pieces, strict=True):
        tensor = checkpoint.tensor(key)
        piece.copy_(tensor.T if source.transposed else tensor)
        meter.add(tensor.nbytes)
    return weight


def _check_shapes(
    file: str, key: str, source: WeightSource, expected: Shape, found: Mapping[str, Shape]
) -> None:
    if len(source.keys) > 1:
        expected = (expected[0] // len(source.keys), *expected[1:])
    for name in source.keys:
        shape = found.get(name, expected)
        shape = shape[::-1] if source.transposed and name in found else shape
        if shape != expected:
            shapes = f"expected {list(expected)}, found {list(shape)}"
            raise ModelError(f"{file}: {key}: {shapes}; this is another architecture's checkpoint")


def _open_pickled(path: Path) -> StateDict:
    # Only zip archives can be memory-mapped; older files are read whole.
    mapped = zipfile.is_zipfile(path)
    if mapped and _is_torchscript(path):
        found = "expected a state dict, found a TorchScript archive"
        raise ModelError(f"{path}: {found}; name the same model's checkpoint in layout huggingface")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{path}: expected a state dict of tensors, found something else; name another file")
    return state


def _is_torchscript(path: Path) -> bool:
    """Return True for archives of code with weights, such as OpenAI's CLIP files; torch's test."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _describe_unreadable(file: LocalFile, error: str) -> str:
    """Describe a file that could not be opened: what was expected and found, and the remedy."""
    if file.path.suffix == ".safetensors":
        expected = _safetensors_size(file.path)
        size = f"expected {expected} bytes by its header" if expected else "expected a safetensors header"
        return f"{size}, found {file.size_bytes} ({error}); fetch it again"
    return f"expected an archive of tensors, found {file.size_bytes} other bytes ({error}); fetch it again"


def _safetensors_size(path: Path) -> int | None:
    """Return the size in bytes by a safetensors file's header; None without a header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
        return 8 + int(length) + max(ends)
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError, IndexError):
        return None
