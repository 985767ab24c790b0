"""One CLIP tower: loading it from either published layout, and embedding pictures and prompts with it."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from reward_service.checkpoints import (
    ModelError,
    StateDict,
    fetch,
    fetch_optional,
    files_sha256,
    fill,
    read_json,
    read_weights,
)
from reward_service.config import TowerConfig
from reward_service.conversion import open_clip_config, open_clip_names
from reward_service.preprocess import OPENAI_MEAN, OPENAI_STD
from reward_service.text import HuggingFaceTokenizer, OpenClipTokenizer, Tokenizer, padded

#: Rows of every forward pass in deterministic mode, whatever the batch: one shape, so one order of additions.
FIXED_ROWS = 8
_TOKENIZER_FILES = ("vocab.json", "merges.txt")
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")


@dataclass(frozen=True)
class TextEmbeddings:
    """Unit embeddings of prompts, float32 (N, D), and which prompts lost words."""

    vectors: Tensor
    truncated: list[bool]


class Tower:
    """A loaded CLIP model. The trunk computes in ``dtype``; embeddings are normalised in float32.

    :param model: open_clip's CLIP, float32 on the CPU
    :param identity: hash of weights, architecture and tokenizer
    :param cache_entries: prompts whose embeddings are kept, the least recently used goes first
    """

    def __init__(
        self,
        model: open_clip.CLIP,
        tokenizer: Tokenizer,
        identity: str,
        device: torch.device,
        dtype: torch.dtype,
        cache_entries: int,
    ) -> None:
        # Read before the trunk is rounded: bf16 would move a scale of 100 by up to 0.4.
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.identity = identity
        self.size_px = int(model.visual.image_size[0])
        self.embedding_size = int(model.visual.output_dim)
        self._device, self._dtype = device, dtype
        self._tokenizer = tokenizer
        self._model: Any = model.to(device, dtype).eval().requires_grad_(False)
        self._mask = torch.full((tokenizer.context,) * 2, float("-inf"), device=device, dtype=dtype).triu(1)
        self._cache: OrderedDict[tuple[str, bool], tuple[Tensor, bool]] = OrderedDict()
        self._cache_entries = cache_entries

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor, *, deterministic: bool = False) -> Tensor:
        """Unit embeddings of prepared pictures.

        :param pixels: float32 (N, 3, size_px, size_px)
        :returns: float32 (N, D) on the tower's device
        """
        pixels = pixels.to(self._device, self._dtype)
        return _in_fixed_rows(self._encode_images, (pixels,), enabled=deterministic)

    def embed_texts(
        self, prompts: Sequence[str], *, batch: int = 64, deterministic: bool = False
    ) -> TextEmbeddings:
        """Unit embeddings of prompts, each distinct prompt computed once and kept.

        :param batch: most prompts of one forward pass
        """
        found: dict[str, tuple[Tensor, bool]] = {}
        for prompt in dict.fromkeys(prompts):
            if (entry := self._cache.get((prompt, deterministic))) is not None:
                self._cache.move_to_end((prompt, deterministic))
                found[prompt] = entry
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        for start in range(0, len(new), batch):
            part = new[start : start + batch]
            found.update(zip(part, self._embed_new(part, deterministic), strict=True))
        self._remember({(prompt, deterministic): found[prompt] for prompt in new})
        vectors = torch.stack([found[prompt][0] for prompt in prompts])
        return TextEmbeddings(vectors, [found[prompt][1] for prompt in prompts])

    @torch.inference_mode()
    def _embed_new(self, prompts: Sequence[str], deterministic: bool) -> list[tuple[Tensor, bool]]:
        rows = [self._tokenizer(prompt) for prompt in prompts]
        # Attention is causal: what comes after the longest prompt's end changes nothing and is left out.
        length = self._tokenizer.context if deterministic else max(len(row.ids) for row in rows)
        ids = padded(rows, self._tokenizer.pad_id, length).to(self._device)
        last = torch.tensor([len(row.ids) - 1 for row in rows], device=self._device)
        vectors = _in_fixed_rows(self._encode_texts, (ids, last), enabled=deterministic)
        # Copies: a view in the cache would keep its whole batch alive.
        return [(vector.clone(), row.truncated) for vector, row in zip(vectors, rows, strict=True)]

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(self._model.visual(pixels).float(), dim=-1)

    def _encode_texts(self, ids: Tensor, last: Tensor) -> Tensor:
        model, length = self._model, ids.shape[1]
        hidden = model.token_embedding(ids) + model.positional_embedding[:length]
        hidden = model.transformer(hidden, attn_mask=self._mask[:length, :length])
        at_end = model.ln_final(hidden)[torch.arange(len(ids), device=ids.device), last]
        return F.normalize((at_end @ model.text_projection).float(), dim=-1)

    def _remember(self, entries: dict[tuple[str, bool], tuple[Tensor, bool]]) -> None:
        self._cache.update(entries)
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)


def load_tower(
    config: TowerConfig, device: torch.device, dtype: torch.dtype, cache_entries: int = 4096
) -> Tower:
    """Load a tower from its published layout.

    :raises ModelError: in one line, whatever keeps the model from being used
    """
    state, weights_sha = read_weights(config.origin, config.weights)
    name = f"{config.origin}/{config.weights.file}"
    model_config = _model_config(config)
    context = int(model_config["text_cfg"].get("context_length", 77))
    tokenizer, tokenizer_sha = _tokenizer(config, context)
    model = _build(model_config, name)
    fill(model, open_clip_names(state) if config.layout == "huggingface" else _without_mask(state), name)
    parts = [weights_sha, json.dumps(model_config, sort_keys=True), tokenizer_sha, config.text_cleaning]
    identity = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Tower(model, tokenizer, identity, device, dtype, cache_entries)


def _model_config(config: TowerConfig) -> dict[str, Any]:
    if config.layout == "huggingface":
        return open_clip_config(fetch(config.origin, "config.json"))
    if config.architecture is None:
        path = fetch(config.origin, "open_clip_config.json")
        found = read_json(path)
        _check_normalisation(found.get("preprocess_cfg", {}), str(path))
        model_config = found.get("model_cfg")
    else:
        path = Path(config.architecture)
        model_config = open_clip.get_model_config(config.architecture)
    if not isinstance(model_config, dict) or "text_cfg" not in model_config:
        raise ModelError(f"{path}: not an architecture that open_clip knows; see open_clip.list_models()")
    if "hf_model_name" in model_config["text_cfg"] or "timm_model_name" in model_config["vision_cfg"]:
        raise ModelError(f"{path}: only CLIP's own vision and text transformers can be a tower")
    return model_config


def _check_normalisation(found: dict[str, Any], name: str) -> None:
    expected = {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)}
    for key, values in expected.items():
        if key in found and list(found[key]) != values:
            raise ModelError(f"{name}: preprocess_cfg.{key}: expected {values}, found {found[key]}")


def _tokenizer(config: TowerConfig, context: int) -> tuple[Tokenizer, str]:
    """The tokenizer, and the hash of its files."""
    if config.layout == "open_clip":
        own = Path(open_clip.tokenizer.default_bpe())
        path = fetch(config.origin, config.vocabulary) if config.vocabulary else own
        return OpenClipTokenizer(path, context), files_sha256([path])
    origin = config.tokenizer or config.origin
    files = [fetch(origin, name) for name in _TOKENIZER_FILES]
    files += fetch_optional(origin, _TOKENIZER_EXTRAS)
    return HuggingFaceTokenizer(files[0].parent, context, config.text_cleaning), files_sha256(files)


def _build(model_config: dict[str, Any], name: str) -> open_clip.CLIP:
    try:
        # On the meta device: nothing is allocated or drawn, the weights come from the file.
        with torch.device("meta"):
            model = open_clip.CLIP(**model_config)
    except (TypeError, ValueError, AssertionError) as error:
        raise ModelError(f"{name}: open_clip cannot build this architecture ({error})") from None
    # The one buffer that no checkpoint fills; the tower has a causal mask of its own.
    model.attn_mask = None
    return model


def _without_mask(state: StateDict) -> StateDict:
    """Old checkpoints carry the causal mask, which is no weight."""
    return {key: tensor for key, tensor in state.items() if key != "attn_mask"}


def _in_fixed_rows(encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, enabled: bool) -> Tensor:
    """``encode(*inputs)``; if enabled, in forward passes of exactly FIXED_ROWS rows, the last one padded."""
    if not enabled:
        return encode(*inputs)
    count, parts = len(inputs[0]), []
    for start in range(0, count, FIXED_ROWS):
        rows = [_fill_rows(tensor[start : start + FIXED_ROWS]) for tensor in inputs]
        parts.append(encode(*rows))
    return torch.cat(parts)[:count]


def _fill_rows(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows[-1:].expand(FIXED_ROWS - len(rows), *rows.shape[1:])])
