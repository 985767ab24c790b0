"""Random full-size models in memory: our engine, and the references over the same tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import default_bpe
from torch import Tensor

from benchmarks.parity.weights import (
    huggingface_config,
    huggingface_names,
    model_config,
    random_state,
    write_head,
    write_tokenizer,
)
from benchmarks.references import (
    Loop,
    aesthetic_loop,
    clip_loop,
    head_module,
    hps_loop,
    open_clip_model,
    pickscore_loop,
    transformers_model,
)
from reward_service.engine import RewardEngine
from reward_service.evaluators import Evaluator, LinearHead, fold, preprocessing_of
from reward_service.text import HuggingFaceTokenizer, OpenClipTokenizer, Tokenizer
from reward_service.towers import Tower

ARCHITECTURES = {"clip": "ViT-L-14-quickgelu", "pickscore": "ViT-H-14", "hps": "ViT-H-14"}
EVALUATORS = {"aesthetic": "clip", "clip": "clip", "pickscore": "pickscore", "hpsv2": "hps"}


@dataclass(frozen=True)
class Models:
    """Everything to compare; ``bare`` holds open_clip's unchanged models by tower."""

    engine: RewardEngine
    loops: dict[str, Loop]
    bare: dict[str, Any]
    configs: dict[str, dict[str, Any]]

    @property
    def towers(self) -> dict[str, Tower]:
        """Our towers, each once."""
        return {each.tower_name: each.tower for each in self.engine.evaluators.values()}


def build(folder: Path, layers: int | None, device: torch.device, dtype: torch.dtype, batch: int) -> Models:
    """Make them.

    :param folder: a few small files are written here: tokenizer and head
    :param layers: cut every transformer to so many; None for the published sizes
    """
    head, tokenizers = _small_files(folder)
    configs = {name: model_config(architecture, layers) for name, architecture in ARCHITECTURES.items()}
    towers, bare = {}, {}
    for seed, (name, config) in enumerate(configs.items()):
        model = open_clip_model(config, random_state(config, seed))
        towers[name] = Tower(model, tokenizers[name], name, device, dtype, cache_entries=4096)
        bare[name] = open_clip_model(config, _tensors(model))
    engine = RewardEngine(_evaluators(towers, head), batch, device, dtype)
    return Models(engine, _loops(bare, head, configs["pickscore"], folder, device, dtype), bare, configs)


def random_engine(
    folder: Path,
    towers: Sequence[str],
    layers: int | None,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
) -> RewardEngine:
    """The engine alone, with those evaluators that look through one of ``towers``.

    The other parameters are those of :func:`build`.
    """
    head, tokenizers = _small_files(folder)
    made = {}
    for seed, name in enumerate(towers):
        config = model_config(ARCHITECTURES[name], layers)
        model = open_clip_model(config, random_state(config, seed))
        made[name] = Tower(model, tokenizers[name], name, device, dtype, cache_entries=4096)
    return RewardEngine(_evaluators(made, head), batch, device, dtype)


def _small_files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tokenizer]]:
    """The head, and tokenizers by tower."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    write_tokenizer(folder)
    head = torch.load(write_head(folder, seed=0), weights_only=True)
    tokenizers: dict[str, Tokenizer] = {
        "clip": OpenClipTokenizer(Path(default_bpe()), 77),
        "pickscore": HuggingFaceTokenizer(folder, 77),
        "hps": OpenClipTokenizer(Path(default_bpe()), 77),
    }
    return head, tokenizers


def _tensors(model: open_clip.CLIP) -> dict[str, Tensor]:
    """A tower's state dict under open_clip's own names; the tower has wrapped the last block."""
    return {key.replace(".block.", "."): tensor for key, tensor in model.state_dict().items()}


def _evaluators(towers: dict[str, Tower], head: dict[str, Tensor]) -> dict[str, Evaluator]:
    weight, bias = fold(head, "head")
    made: dict[str, Evaluator] = {}
    for kind, name in EVALUATORS.items():
        if name not in towers:
            continue
        linear = LinearHead(weight, bias, "head") if kind == "aesthetic" else None
        way = preprocessing_of(kind, towers[name].size_px)  # type: ignore[arg-type]  # the four kinds
        made[kind] = Evaluator(kind, kind, name, towers[name], way, "random", linear)  # type: ignore[arg-type]
    return made


def _loops(
    bare: dict[str, Any],
    head: dict[str, Tensor],
    pickscore: dict[str, Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Loop]:
    state = {key: tensor.detach() for key, tensor in bare["pickscore"].state_dict().items()}
    model = transformers_model(huggingface_config(pickscore), huggingface_names(pickscore, state))
    return {
        "aesthetic": aesthetic_loop(bare["clip"], head_module(head), device, dtype),
        "clip": clip_loop(bare["clip"], device, dtype),
        "pickscore": pickscore_loop(model, folder, device, dtype),
        "hpsv2": hps_loop(bare["hps"], device, dtype),
    }
