"""Small checkpoints with random weights in the published layouts, which load in milliseconds."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import yaml
from open_clip.tokenizer import bytes_to_unicode
from torch import nn
from transformers import CLIPConfig, CLIPModel

SIZE_PX, PROJECTION, CONTEXT = 32, 96, 24
MERGES = ["a n", "an d</w>", "r e", "re d</w>", "s q", "c i", "ci r", "t h", "th e</w>"]
HEAD_SIZES = (PROJECTION, 64, 32, 16, 8, 1)
SCALES = {"aesthetic": (5.0, 1.0), "clip": (0.0, 0.1), "pickscore": (0.0, 5.0), "hpsv2": (0.0, 0.1)}


@dataclass(frozen=True)
class Checkpoints:
    """Folder of the checkpoints, and the configuration that names them."""

    folder: Path
    config: Path

    @property
    def clip(self) -> Path:
        return self.folder / "clip"

    @property
    def pickscore(self) -> Path:
        return self.folder / "pickscore"

    @property
    def hps(self) -> Path:
        return self.folder / "hps"

    @property
    def head(self) -> Path:
        return self.folder / "aesthetic" / "head.pth"


def write_checkpoints(folder: Path) -> Checkpoints:
    """Write all checkpoints and a configuration."""
    torch.manual_seed(7)
    _write_huggingface(folder / "clip", "quick_gelu")
    _write_huggingface(folder / "pickscore", "gelu")
    _write_open_clip(folder / "hps")
    _write_head(folder / "aesthetic")
    scales = {name: {"mean": mean, "std": std} for name, (mean, std) in SCALES.items()}
    table = {"provisional": True, "provenance": "random weights", "evaluators": scales}
    (folder / "calibration.json").write_text(json.dumps(table))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"service": service_section()}))
    return Checkpoints(folder, config)


def service_section() -> dict[str, object]:
    """Return the `service:` section for these checkpoints, with paths relative to the file."""
    clip = {"layout": "huggingface", "origin": {"folder": "clip"}, "weights": {"file": "model.safetensors"}}
    hps = {"layout": "open_clip", "origin": {"folder": "hps"}, "weights": {"file": "HPS.pt"}}
    head = {"origin": {"folder": "aesthetic"}, "weights": {"file": "head.pth"}}
    return {
        "towers": {
            "clip": {**clip, "text_cleaning": "openai"},
            "pickscore": {**clip, "origin": {"folder": "pickscore"}},
            "hps": {**hps, "vocabulary": "bpe.txt.gz"},
        },
        "evaluators": {
            "aesthetic": {"kind": "aesthetic", "tower": "clip", "head": head},
            "clip": {"kind": "clip", "tower": "clip"},
            "pickscore": {"kind": "pickscore", "tower": "pickscore"},
            "hpsv2": {"kind": "hpsv2", "tower": "hps"},
        },
        "calibration": "calibration.json",
        "device": "cpu",
        "threads": 1,
        "port": 0,
    }


def _vocabulary(start: str, end: str) -> dict[str, int]:
    letters = list(bytes_to_unicode().values())
    merged = ["".join(merge.split()) for merge in MERGES]
    words = [*letters, *[letter + "</w>" for letter in letters], *merged, start, end]
    return {word: index for index, word in enumerate(words)}


def _randomize(model: nn.Module) -> None:
    """Set weights large enough that activations, crops and tokens affect the scores visibly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)


def _write_huggingface(folder: Path, activation: str) -> None:
    folder.mkdir(parents=True)
    vocabulary = _vocabulary("<|startoftext|>", "<|endoftext|>")
    half = {"hidden_act": activation, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = vocabulary["<|endoftext|>"]
    text = {
        **half,
        "vocab_size": len(vocabulary),
        "hidden_size": PROJECTION,
        "intermediate_size": 2 * PROJECTION,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {**half, "hidden_size": 64, "intermediate_size": 192, "image_size": SIZE_PX, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION)
    model = CLIPModel(config)
    _randomize(model)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    model.save_pretrained(folder)
    _write_tokenizer(folder, vocabulary)
    crop = {"height": SIZE_PX, "width": SIZE_PX}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE_PX},
        "crop_size": crop,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def hps_model_config() -> dict[str, object]:
    """Return the architecture of the small HPS model, as open_clip's model configuration."""
    vocabulary = _vocabulary("<start_of_text>", "<end_of_text>")
    vision = {"image_size": SIZE_PX, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    text = {"context_length": CONTEXT, "vocab_size": len(vocabulary), "width": 96, "heads": 4, "layers": 2}
    return {"embed_dim": PROJECTION, "vision_cfg": vision, "text_cfg": text}


def _write_open_clip(folder: Path) -> None:
    folder.mkdir(parents=True)
    model_config = hps_model_config()
    model = open_clip.CLIP(**model_config)
    _randomize(model)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS.pt")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_config, "preprocess_cfg": {}})
    )
    with gzip.open(folder / "bpe.txt.gz", "wb") as file:
        # No newline after the last merge: it would become another entry and shift the special tokens.
        file.write("\n".join(["#version: 0.2", *MERGES]).encode())


def head_module() -> nn.Sequential:
    """Return LAION's head as trained: linear layers with dropout between them."""
    a, b, c, d, e, f = HEAD_SIZES
    return nn.Sequential(
        nn.Linear(a, b),
        nn.Dropout(0.2),
        nn.Linear(b, c),
        nn.Dropout(0.2),
        nn.Linear(c, d),
        nn.Dropout(0.1),
        nn.Linear(d, e),
        nn.Linear(e, f),
    )


def _write_head(folder: Path) -> None:
    folder.mkdir(parents=True)
    head = head_module()
    _randomize(head)
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, folder / "head.pth")
