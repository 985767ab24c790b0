"""One CLIP tower: embedding pictures and prompts with it, and remembering the prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from reward_service.acceleration import Encode, accelerated, buckets
from reward_service.blocks import block_at, read_first_token
from reward_service.text import Tokenizer, Tokens, padded


@dataclass(frozen=True)
class TextEmbeddings:
    """Unit embeddings of prompts, float32 (N, D), and which prompts lost words."""

    vectors: Tensor
    truncated: list[bool]


class Tower:
    """A loaded CLIP model. The trunk computes in ``dtype``; embeddings are normalised in float32.

    In deterministic mode every picture and prompt has a forward pass of its own: nothing else is there that
    its embedding could depend on.

    :param model: open_clip's CLIP, float32 on the CPU; its last block is changed in place
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
        read_first_token(self._model.visual)
        self._encode: Encode = self._encode_images
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
        if not deterministic:
            return self._encode(pixels)
        # Copies, because the alignment of memory may change the order of additions too.
        return torch.cat([self._encode(picture[None].clone()) for picture in pixels])

    def accelerate(self, mode: str, most: int) -> None:
        """Compile or capture the passes over 1 to ``most`` pictures, now, for that can take minutes.

        :param mode: none, compile or graphs
        """
        self._encode = accelerated(self._encode_images, mode)
        for rows in [] if mode == "none" else buckets(most):
            self.embed_images(torch.zeros(rows, 3, self.size_px, self.size_px))

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
        step = 1 if deterministic else batch
        for start in range(0, len(new), step):
            part = new[start : start + step]
            found.update(zip(part, self._embed_new(part), strict=True))
        self._remember({(prompt, deterministic): found[prompt] for prompt in new})
        vectors = torch.stack([found[prompt][0] for prompt in prompts])
        return TextEmbeddings(vectors, [found[prompt][1] for prompt in prompts])

    def forget_texts(self) -> None:
        """Empty the cache of prompts."""
        self._cache.clear()

    def forget_text(self, prompt: str) -> None:
        """Compute one prompt anew the next time."""
        for deterministic in (False, True):
            self._cache.pop((prompt, deterministic), None)

    @torch.inference_mode()
    def _embed_new(self, prompts: Sequence[str]) -> list[tuple[Tensor, bool]]:
        rows: list[Tokens] = [self._tokenizer(prompt) for prompt in prompts]
        # Attention is causal: what comes after the longest prompt's end changes nothing and is left out.
        length = max(len(row.ids) for row in rows)
        ids = padded(rows, self._tokenizer.pad_id, length).to(self._device)
        last = torch.tensor([len(row.ids) - 1 for row in rows], device=self._device)
        vectors = self._encode_texts(ids, last)
        # Copies: a view in the cache would keep its whole batch alive.
        return [(vector.clone(), row.truncated) for vector, row in zip(vectors, rows, strict=True)]

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(self._model.visual(pixels).float(), dim=-1)

    def _encode_texts(self, ids: Tensor, last: Tensor) -> Tensor:
        model, length = self._model, ids.shape[1]
        hidden = model.token_embedding(ids) + model.positional_embedding[:length]
        mask, blocks = self._mask[:length, :length], model.transformer.resblocks
        for block in blocks[:-1]:
            hidden = block(hidden, attn_mask=mask)
        at_end = model.ln_final(block_at(blocks[-1], hidden, last, mask))
        return F.normalize((at_end @ model.text_projection).float(), dim=-1)

    def _remember(self, entries: dict[tuple[str, bool], tuple[Tensor, bool]]) -> None:
        self._cache.update(entries)
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)
