"""Random weights in the published layouts, numerically as stable as trained ones.

Branches of the residual stream are scaled by 1/√layers, so that activations stay of unit size and rounding
errors do not grow with depth; biases, positions and attention are wide enough that every token and every
image affects the score. (With open_clip's own initialisation, all scores are almost the same.)
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from safetensors.torch import save_file
from torch import Tensor

HEAD_SIZES = (768, 1024, 128, 64, 16, 1)
LOGIT_SCALE = math.log(100.0)
_MERGES = 49152 - 256 - 2
# Gain of each kind of matrix, under open_clip's names; the standard deviation is gain/√inputs.
_GAINS = {"in_proj_weight": 1.6, "out_proj.weight": 2.0, "c_fc.weight": 1.5, "c_proj.weight": 2.0}
_UNIT = ("token_embedding.weight", "class_embedding")
_PROJECTIONS = ("visual.proj", "text_projection")


def model_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """Return open_clip's configuration of an architecture, optionally with fewer layers in both halves."""
    config = open_clip.get_model_config(name)
    if layers is not None:
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = layers
    return dict(config)


def random_state(config: Mapping[str, Any], seed: int, *, half: bool = False) -> dict[str, Tensor]:
    """Return a random state dict under open_clip's and OpenAI's names.

    Args:
        config: open_clip's configuration of the model
        seed: seed of the weights
        half: round the weights to fp16, as OpenAI's published ones are
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in open_clip.CLIP(**config).state_dict().items()}
    depth = {"visual": config["vision_cfg"]["layers"], "text": config["text_cfg"]["layers"]}
    state = {}
    for name, shape in shapes.items():
        layers = depth["visual" if name.startswith("visual") else "text"]
        values = torch.empty(shape).normal_(generator=generator) if shape else torch.tensor(LOGIT_SCALE)
        values = _scaled(name, values, layers)
        state[name] = values.half().float() if half else values
    return state


def _scaled(name: str, values: Tensor, layers: int) -> Tensor:
    if name == "logit_scale":
        return values
    if re.search(r"ln_\w+\.weight$", name):
        return values.mul_(0.2).add_(1.0)
    if name.endswith("bias"):
        return values.mul_(0.2)
    if name in _UNIT:
        return values
    if name.endswith("positional_embedding"):
        return values.mul_(0.5)
    if name in _PROJECTIONS:
        return values.div_(math.sqrt(values.shape[0]))
    inputs = values[0].numel()
    gain = next((gain for suffix, gain in _GAINS.items() if name.endswith(suffix)), 1.0)
    branch_ends = name.endswith(("out_proj.weight", "c_proj.weight"))
    return values.mul_(gain / math.sqrt(inputs) / (math.sqrt(2 * layers) if branch_ends else 1.0))


def write_open_clip(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Write HPSv2's layout, `{"state_dict": …}` under open_clip's names, and return its path."""
    folder.mkdir(parents=True)
    path = folder / "HPS_random.pt"
    torch.save({"state_dict": dict(state)}, path)
    return path


def write_openai(folder: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a state dict that OpenAI's `clip.load` reads, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ViT-random.pt"
    torch.save(dict(state), path)
    return path


def write_huggingface(folder: Path, config: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """Write transformers' layout from a state dict under open_clip's names, which is emptied."""
    folder.mkdir(parents=True)
    renamed = huggingface_names(config, state)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface_config(config)))
    write_tokenizer(folder)


def huggingface_names(config: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under transformers' names, mostly sharing storage; `state` is emptied.

    It is written independently of the service's own conversion, in the reverse direction, so that one checks
    the other.

    Raises:
        ValueError: `state` has weights that transformers' layout does not have
    """
    renamed: dict[str, Tensor] = {"logit_scale": state.pop("logit_scale")}
    vision, text = "vision_model", "text_model"
    for key, target in (
        ("visual.class_embedding", f"{vision}.embeddings.class_embedding"),
        ("visual.conv1.weight", f"{vision}.embeddings.patch_embedding.weight"),
        ("visual.positional_embedding", f"{vision}.embeddings.position_embedding.weight"),
        ("token_embedding.weight", f"{text}.embeddings.token_embedding.weight"),
        ("positional_embedding", f"{text}.embeddings.position_embedding.weight"),
    ):
        renamed[target] = state.pop(key)
    for key, target in (
        ("visual.ln_pre", f"{vision}.pre_layrnorm"),
        ("visual.ln_post", f"{vision}.post_layernorm"),
        ("ln_final", f"{text}.final_layer_norm"),
    ):
        for kind in ("weight", "bias"):
            renamed[f"{target}.{kind}"] = state.pop(f"{key}.{kind}")
    renamed["visual_projection.weight"] = state.pop("visual.proj").T.contiguous()
    renamed["text_projection.weight"] = state.pop("text_projection").T.contiguous()
    for prefix, half, part in (("visual.", vision, "vision_cfg"), ("", text, "text_cfg")):
        for number in range(config[part]["layers"]):
            block = f"{prefix}transformer.resblocks.{number}"
            _move_block(state, renamed, block, f"{half}.encoder.layers.{number}")
    if state:
        raise ValueError(f"weights without a place in transformers' layout: {sorted(state)}")
    return renamed


def _move_block(state: dict[str, Tensor], renamed: dict[str, Tensor], block: str, layer: str) -> None:
    for kind in ("weight", "bias"):
        thirds = state.pop(f"{block}.attn.in_proj_{kind}").chunk(3)
        for letter, third in zip("qkv", thirds, strict=True):
            renamed[f"{layer}.self_attn.{letter}_proj.{kind}"] = third.contiguous()
        for old, new in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            renamed[f"{layer}.{new}.{kind}"] = state.pop(f"{block}.{old}.{kind}")


def huggingface_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' `config.json` of the same architecture."""
    vision, text, width = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    vision_config = {
        "hidden_size": vision["width"],
        "intermediate_size": 4 * vision["width"],
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision.get("head_width", 64),
        "patch_size": vision["patch_size"],
        "image_size": vision["image_size"],
        "hidden_act": activation,
        "projection_dim": width,
    }
    # The published files have transformers' old token numbers, which select its code for the last token.
    text_config = {
        "hidden_size": text["width"],
        "intermediate_size": 4 * text["width"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "hidden_act": activation,
        "projection_dim": width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "vision_config": vision_config,
        "text_config": text_config,
    }


_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "CLIPProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(open_clip.OPENAI_DATASET_MEAN),
    "image_std": list(open_clip.OPENAI_DATASET_STD),
}


def write_tokenizer(folder: Path) -> None:
    """Write transformers' CLIP tokenizer of OpenAI's BPE file, 49,408 tokens, and its image processor."""
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1 : _MERGES + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))


def write_head(folder: Path, seed: int) -> Path:
    """Write LAION's aesthetic head (`layers.N.weight` and `.bias`, N = 0, 2, 4, 6, 7) and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (inputs, outputs) in zip((0, 2, 4, 6, 7), pairwise(HEAD_SIZES), strict=True):
        weight = torch.empty(outputs, inputs).normal_(generator=generator)
        state[f"layers.{number}.weight"] = weight * (1.6 / math.sqrt(inputs))
        state[f"layers.{number}.bias"] = torch.empty(outputs).normal_(generator=generator) * 0.1
    # A unit embedding times five random layers is small; the published head scores from 1 to 10.
    state["layers.7.weight"] *= 2.5
    state["layers.7.bias"] += 5.0
    path = folder / "head.pth"
    torch.save(state, path)
    return path
