"""Files of weights, read tensor by tensor and without pickle, and modules filled from them.

Loading never holds a second copy of a model: a checkpoint is mapped, each tensor is copied once, to the
device and dtype where it stays, and the mapping is renewed from time to time so that the pages read do not
add up. Beyond the models themselves that costs the host _WINDOW_BYTES and one tensor.

transformers' CLIPModel as open_clip's CLIP: configuration and names, so that one class serves all.

=====================================  ==============================================
transformers                           open_clip
=====================================  ==============================================
`*.layers.N.self_attn.{q,k,v}_proj`  `*.resblocks.N.attn.in_proj_*` (stacked)
`*.layers.N.self_attn.out_proj`      `*.resblocks.N.attn.out_proj`
`*.layers.N.layer_norm{1,2}`         `*.resblocks.N.ln_{1,2}`
`*.layers.N.mlp.fc{1,2}`             `*.resblocks.N.mlp.{c_fc,c_proj}`
`{visual,text}_projection.weight`    `visual.proj`, `text_projection` (transposed)
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
from typing import Any

import torch
from torch import Tensor, nn

from reward_service.engine.files import LocalFile, Meter, ModelError, Note, silent
from reward_service.settings import one_line

__all__ = ["Checkpoint", "ModelError", "Part", "StateDict", "check", "fill", "read_json"]

StateDict = dict[str, Tensor]
Shape = tuple[int, ...]

_SHOWN_KEYS = 3
_WINDOW_BYTES = 256 << 20


@dataclass(frozen=True)
class Part:
    """Where a weight comes from: one tensor of the checkpoint, or several stacked; transposed if so said."""

    keys: tuple[str, ...]
    transposed: bool = False


class Checkpoint:
    """An open file of weights.

    Raises:
        ModelError: it is cut off, or holds anything but tensors
    """

    def __init__(self, file: LocalFile) -> None:
        self.file = file
        self._open()
        self.shapes: dict[str, Shape] = {key: self._shape(key) for key in self._stored}

    def tensor(self, key: str) -> Tensor:
        """One tensor on the CPU, in the file's dtype; to be copied before the next one is asked for."""
        if self._mapped_bytes > _WINDOW_BYTES:
            self._open()
        stored = self._stored[key]
        tensor: Tensor = self._lazy.get_tensor(stored) if self._lazy is not None else self._state[stored]
        self._mapped_bytes += tensor.nbytes
        return tensor

    def state_dict(self) -> StateDict:
        """All of it at once, for small files."""
        return {key: self.tensor(key).clone() for key in self.shapes}

    def _open(self) -> None:
        self._mapped_bytes, self._lazy, self._state = 0, None, {}
        try:
            if self.file.path.suffix == ".safetensors":
                self._lazy = _open_safetensors(self.file.path)
                names = list(self._lazy.keys())
            else:
                self._state = _open_pickled(self.file.path)
                names = list(self._state)
        except _BROKEN as error:
            cause = _cause(self.file, one_line(error)[:120])
            raise ModelError(f"{self.file.path}: not a whole file of weights: {cause}") from None
        self._stored = {name.removeprefix("module."): name for name in names}

    def _shape(self, key: str) -> Shape:
        stored = self._stored[key]
        if self._lazy is not None:
            return tuple(self._lazy.get_slice(stored).get_shape())
        return tuple(self._state[stored].shape)


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    parts: Mapping[str, Part],
    device: torch.device,
    dtype: torch.dtype,
    *,
    float32: Iterable[str] = (),
    note: Note = silent,
) -> None:
    """Give a module built on the meta device its weights, each copied once to where it stays.

    Args:
        parts: where each of the module's weights comes from
        float32: weights that stay float32 on the CPU

    Raises:
        ModelError: a weight is missing or unknown, or a shape differs
    """
    expected = check(module, checkpoint, parts)
    exempt, meter = set(float32), Meter(note, f"loading {checkpoint.file.source}", checkpoint.file.size_bytes)
    state = {}
    for key, shape in expected.items():
        place = (torch.device("cpu"), torch.float32) if key in exempt else (device, dtype)
        state[key] = _assemble(checkpoint, parts[key], shape, *place, meter)
    module.load_state_dict(state, assign=True)


def check(module: nn.Module, checkpoint: Checkpoint, parts: Mapping[str, Part]) -> dict[str, Shape]:
    """Compare a module with a checkpoint, of which only the header is read.

    Shapes before names: where both differ, a width says more about the architecture than a list.

    Returns:
        shapes of the module's weights

    Raises:
        ModelError: a weight is missing or unknown, or a shape differs
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    source, found = checkpoint.file.source, checkpoint.shapes
    for key in sorted(expected.keys() & parts.keys()):
        _check_shapes(source, key, parts[key], expected[key], found)
    known = {name for key in expected.keys() & parts.keys() for name in parts[key].keys}
    lacking = (known | (expected.keys() - parts.keys())) - (found.keys() & known)
    unknown = {name for key in parts.keys() - expected.keys() for name in parts[key].keys}
    for verb, names in (("lacks", lacking), ("has unknown", unknown)):
        if names:
            shown = ", ".join(sorted(names)[:_SHOWN_KEYS])
            more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            counts = f"expected {len(known | lacking)} tensors, found {len(known - lacking) + len(unknown)}"
            raise ModelError(f"{source}: the checkpoint {verb} {shown}{more}: {counts}; is it this tower's?")
    return expected


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: it is not one
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({one_line(error)}); fetch it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _assemble(
    checkpoint: Checkpoint, part: Part, shape: Shape, device: torch.device, dtype: torch.dtype, meter: Meter
) -> Tensor:
    whole = torch.empty(shape, dtype=dtype, device=device)
    pieces = whole.chunk(len(part.keys)) if len(part.keys) > 1 else (whole,)
    for key, piece in zip(part.keys, pieces, strict=True):
        tensor = checkpoint.tensor(key)
        piece.copy_(tensor.T if part.transposed else tensor)
        meter.add(tensor.nbytes)
    return whole


def _check_shapes(source: str, key: str, part: Part, expected: Shape, found: Mapping[str, Shape]) -> None:
    if len(part.keys) > 1:
        expected = (expected[0] // len(part.keys), *expected[1:])
    for name in part.keys:
        shape = found.get(name, expected)
        shape = shape[::-1] if part.transposed and name in found else shape
        if shape != expected:
            shapes = f"expected {list(expected)}, found {list(shape)}"
            raise ModelError(f"{source}: {key}: {shapes}; this is another architecture's checkpoint")


def _open_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt", device="cpu")


def _open_pickled(path: Path) -> StateDict:
    # Only zip archives can be mapped; older files are read whole.
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
    """As torch tells: OpenAI's own CLIP files are code with weights, which is not loaded."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _cause(file: LocalFile, error: str) -> str:
    """What was expected and found of a file that could not be opened."""
    if file.path.suffix == ".safetensors":
        expected = _safetensors_bytes(file.path)
        size = f"expected {expected} bytes by its header" if expected else "expected a safetensors header"
        return f"{size}, found {file.size_bytes} ({error}); fetch it again"
    return f"expected an archive of tensors, found {file.size_bytes} other bytes ({error}); fetch it again"


def _safetensors_bytes(path: Path) -> int | None:
    """The size in bytes that a safetensors header promises; None without a header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
        return 8 + int(length) + max(ends)
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError, IndexError):
        return None


def _broken() -> tuple[type[Exception], ...]:
    # torch.load's refusal of anything but tensors; pickle itself is not used.
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    known = (
        OSError,
        zipfile.BadZipFile,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
    )
    return (SafetensorError, UnpicklingError, *known)


_BROKEN = _broken()


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


def open_clip_config(path: Path) -> dict[str, Any]:
    """open_clip's model configuration for transformers' `config.json`.

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
        # The trap of this conversion: OpenAI's towers were trained with QuickGELU, most others with GELU.
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


def open_clip_parts(keys: Iterable[str]) -> dict[str, Part]:
    """Where open_clip's weights lie in a CLIPModel's checkpoint; unknown keys stand for themselves."""
    parts = {}
    for key in keys:
        if key.endswith(".position_ids"):
            continue
        if key in _TRANSPOSED:
            parts[_TRANSPOSED[key]] = Part((key,), transposed=True)
        elif match := _LAYER.fullmatch(key):
            name, part = _layer_part(match)
            parts[name] = part
        else:
            parts[_RENAMED.get(key, key)] = Part((key,))
    return parts


def open_clip_names(state: StateDict) -> StateDict:
    """A whole CLIPModel's state dict under open_clip's names."""
    return {name: _join(part, state) for name, part in open_clip_parts(state).items()}


def own_parts(keys: Iterable[str]) -> dict[str, Part]:
    """The same for a checkpoint with open_clip's own names; the causal mask of old ones is no weight."""
    return {key: Part((key,)) for key in keys if key != "attn_mask"}


def _join(part: Part, state: StateDict) -> Tensor:
    pieces = [state[key].T if part.transposed else state[key] for key in part.keys]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()


def _layer_part(match: re.Match[str]) -> tuple[str, Part]:
    half, number, part, kind = match.groups()
    block = f"{_BLOCKS[half]}.{number}"
    if part in _STACKED:
        layer = match[0].removesuffix(f"{part}.{kind}")
        return f"{block}.attn.in_proj_{kind}", Part(tuple(f"{layer}{name}.{kind}" for name in _STACKED))
    return f"{block}.{_IN_BLOCK.get(part, part)}.{kind}", Part((match[0],))
