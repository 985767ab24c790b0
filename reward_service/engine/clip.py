"""One CLIP tower: embedding images and prompts with it, and remembering the prompts.

Forward passes of a few fixed sizes, each compiled or captured once: less waiting for the CPU on a GPU.

A CUDA graph replays fixed shapes. So a batch is filled up to the next bucket (1, 2, 4, 8 ... rows) with
copies of its last row, and what these give is dropped.

The last block of a transformer, at the one token that is read.

Behind the last block CLIP looks at a single token: the class token of an image, the end token of a prompt.
Keys and values are needed of every token, but query, attention output and MLP only of that one. The result
is that of the whole block up to rounding, and 2.5 to 3.5 % of a forward pass are saved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from reward_service.engine.preprocessing import Tokenizer, Tokens, padded

Encode: TypeAlias = Callable[[Tensor], Tensor]
Prepare: TypeAlias = Callable[[Encode, Tensor], Encode]

# A forward pass is compiled per tower and bucket, but torch counts them all against one limit (8 by default),
# beyond which it would quietly go on uncompiled.
_MAX_COMPILED = 256


def accelerated(encode: Encode, mode: str) -> Encode:
    """`encode` as the configuration's `acceleration` says: none, compile or graphs."""
    if mode == "none":
        return encode
    return Bucketed(encode, compiled if mode == "compile" else captured)


def buckets(most: int) -> list[int]:
    """The sizes that batches of 1 to `most` rows are filled up to: powers of two."""
    return [2**power for power in range((most - 1).bit_length() + 1)]


class Bucketed:
    """`encode`, in passes of which each size is prepared once.

    Args:
        prepare: makes the pass of one size, given `encode` and an input of that size
    """

    def __init__(self, encode: Encode, prepare: Prepare) -> None:
        self._encode, self._prepare = encode, prepare
        self._passes: dict[int, Encode] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """Encode rows, (N, ...) -> (N, D)."""
        size = buckets(len(rows))[-1]
        filled = torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])
        if size not in self._passes:
            self._passes[size] = self._prepare(self._encode, filled)
        # A copy: the next replay writes over what a graph has returned.
        return self._passes[size](filled)[: len(rows)].clone()


def compiled(encode: Encode, example: Tensor) -> Encode:
    """A pass through torch.compile; on a GPU as a CUDA graph as well."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = settings.accumulated_recompile_limit = _MAX_COMPILED
    # Not mode="reduce-overhead": its graphs work only on the thread that made them, and towers are loaded on
    # one thread and used on another (https://github.com/pytorch/pytorch/issues/123177).
    compiled_pass = torch.compile(encode, dynamic=False)
    return captured(compiled_pass, example) if example.is_cuda else compiled_pass


def captured(encode: Encode, example: Tensor) -> Encode:
    """A pass as a CUDA graph: the same kernels as without, started by one call."""
    inputs = example.clone()
    # Once outside the graph, on another stream, so that libraries allocate their workspaces.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        encode(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = encode(inputs)

    def replay(rows: Tensor) -> Tensor:
        inputs.copy_(rows)
        graph.replay()
        return outputs

    return replay


def block_at(block: Any, hidden: Tensor, at: Tensor, mask: Tensor | None = None) -> Tensor:
    """A residual attention block's output at one token of each row.

    Args:
        block: open_clip's block; of another kind than the plain one, it is computed whole
        hidden: (N, L, D)
        at: which token, int64 (N,)
        mask: added to the attention's logits, (L, L)

    Returns:
        (N, D)
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if not is_plain(block):
        whole: Tensor = block(hidden, attn_mask=mask)[rows, at]
        return whole
    width, attention = hidden.shape[-1], block.attn
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    normed = block.ln_1(hidden)
    query = F.linear(normed[rows, at], weight[:width], bias[:width])[:, None]
    keys, values = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    q, k, v = (_by_head(tensor, attention.num_heads) for tensor in (query, keys, values))
    mixed = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[at][:, None, None])
    token = hidden[rows, at] + block.ls_1(attention.out_proj(mixed.flatten(1)))
    result: Tensor = token + block.ls_2(block.mlp(block.ln_2(token)))
    return result


def is_plain(block: nn.Module) -> bool:
    """Whether a block is of the kind that every published CLIP is made of."""
    return type(block) is ResidualAttentionBlock


def read_first_token(visual: Any) -> None:
    """Let a vision transformer compute its last block at the class token alone, if it reads no other."""
    pools = getattr(visual, "pool_type", None), getattr(visual, "attn_pool", None)
    if pools == ("tok", None) and not visual.output_tokens:
        visual.transformer.resblocks[-1] = _FirstToken(visual.transformer.resblocks[-1])


class _FirstToken(nn.Module):
    """A block whose output is its first token alone: (N, L, D) -> (N, 1, D)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        first = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return block_at(self.block, hidden, first, attn_mask)[:, None]


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """(N, L, D) as (N, heads, L, D / heads)."""
    count, length, width = tensor.shape
    return tensor.view(count, length, heads, width // heads).transpose(1, 2)


@dataclass(frozen=True)
class TextEmbeddings:
    """Unit embeddings of prompts, float32 (N, D), and which prompts lost words."""

    vectors: Tensor
    truncated: list[bool]


class Tower:
    """A loaded CLIP model. The trunk computes in `dtype`; embeddings are normalised in float32.

    In deterministic mode every image and prompt has a forward pass of its own: nothing else is there that
    its embedding could depend on.

    Args:
        model: open_clip's CLIP, float32 on the CPU; its last block is changed in place
        identity: hash of weights, architecture and tokenizer
        cache_entries: prompts whose embeddings are kept, the least recently used goes first
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
        """Unit embeddings of prepared images.

        Args:
            pixels: float32 (N, 3, size_px, size_px)

        Returns:
            float32 (N, D) on the tower's device
        """
        pixels = pixels.to(self._device, self._dtype)
        if not deterministic:
            return self._encode(pixels)
        # Copies, because the alignment of memory may change the order of additions too.
        return torch.cat([self._encode(image[None].clone()) for image in pixels])

    def accelerate(self, mode: str, most: int) -> None:
        """Compile or capture the passes over 1 to `most` images, now, for that can take minutes.

        Args:
            mode: none, compile or graphs
        """
        self._encode = accelerated(self._encode_images, mode)
        for rows in [] if mode == "none" else buckets(most):
            self.embed_images(torch.zeros(rows, 3, self.size_px, self.size_px))

    def embed_texts(
        self, prompts: Sequence[str], *, batch: int = 64, deterministic: bool = False
    ) -> TextEmbeddings:
        """Unit embeddings of prompts, each distinct prompt computed once and kept.

        Args:
            batch: most prompts of one forward pass
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
