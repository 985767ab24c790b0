"""CLIP tower: image and text embeddings of one model, with a cache of text embeddings.

Two ways to do less work per forward pass, both opaque to the users of `Tower`:

* the last transformer block is computed only at the one token whose output CLIP uses;
* passes over images can be compiled or captured as CUDA graphs, once per batch size. Batches are padded to
  powers of two, so that few sizes exist.
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

from reward_service.engine.tokenizer import CachedTokenizer, Tokenizer, Tokens, pad_tokens

Encode: TypeAlias = Callable[[Tensor], Tensor]
Prepare: TypeAlias = Callable[[Encode, Tensor], Encode]

# A pass is compiled per tower and batch size, but torch counts all of them against one limit (8 by default),
# and silently runs uncompiled beyond it.
_MAX_COMPILED = 256


@dataclass(frozen=True)
class TextEmbeddings:
    """Unit embeddings of prompts, float32 (N, D), and whether each prompt was truncated."""

    vectors: Tensor
    truncated: list[bool]


class Tower:
    """A loaded CLIP model. The trunk computes in `dtype`; embeddings are normalized in float32.

    In deterministic mode every image and prompt has a forward pass of its own, so that its embedding depends
    on nothing else.

    Args:
        model: open_clip's CLIP, float32 on the CPU; its last block is changed in place
        tokenizer: the tokenizer that the model was trained with
        identity: hash of weights, architecture and tokenizer
        device: device of the trunk
        dtype: dtype of the trunk
        cache_entries: capacity of the caches of tokens and of text embeddings (the least recently used
            are evicted)
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
        # Read before the trunk is rounded: bfloat16 would move a scale of 100 by up to 0.4.
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.identity = identity
        self.size_px = int(model.visual.image_size[0])
        self.embedding_size = int(model.visual.output_dim)
        self._device, self._dtype = device, dtype
        #: Tokenizer with a cache; the only attribute that other threads may use while the tower is in use.
        self.tokenizer = CachedTokenizer(tokenizer, cache_entries)
        self.model: Any = model.to(device, dtype).eval().requires_grad_(False)
        shorten_last_block(self.model.visual)
        self._encode: Encode = self._encode_images
        size = (tokenizer.context_length,) * 2
        self._mask = torch.full(size, float("-inf"), device=device, dtype=dtype).triu(1)
        self._cache: OrderedDict[tuple[tuple[int, ...], bool], Tensor] = OrderedDict()
        self._cache_entries = cache_entries

    @torch.inference_mode()
    def embed_images(self, pixels: Tensor, *, deterministic: bool = False) -> Tensor:
        """Return unit embeddings of preprocessed images.

        Args:
            pixels: float32 (N, 3, size_px, size_px)
            deterministic: embed each image in a forward pass of its own

        Returns:
            float32 (N, D) on the tower's device
        """
        pixels = pixels.to(self._device, self._dtype)
        if not deterministic:
            return self._encode(pixels)
        # Copies, because memory alignment may change the order of additions too.
        return torch.cat([self._encode(image[None].clone()) for image in pixels])

    def accelerate(self, mode: str, max_images: int) -> None:
        """Compile or capture the passes over 1 to `max_images` images now, which can take minutes.

        Args:
            mode: `none`, `compile` or `graphs`
            max_images: largest batch
        """
        self._encode = accelerate_encoder(self._encode_images, mode)
        for rows in [] if mode == "none" else bucket_sizes(max_images):
            self.embed_images(torch.zeros(rows, 3, self.size_px, self.size_px))

    def embed_texts(
        self, prompts: Sequence[str], *, batch_size: int = 64, deterministic: bool = False
    ) -> TextEmbeddings:
        """Return unit embeddings of prompts; see `embed_tokens`."""
        rows = [self.tokenizer(prompt) for prompt in prompts]
        return self.embed_tokens(rows, batch_size=batch_size, deterministic=deterministic)

    def embed_tokens(
        self, rows: Sequence[Tokens], *, batch_size: int = 64, deterministic: bool = False
    ) -> TextEmbeddings:
        """Return unit embeddings of tokenized prompts; equal ones are computed once and cached.

        Args:
            rows: what the tower's tokenizer returned
            batch_size: maximum number of prompts of one forward pass
            deterministic: embed each prompt in a forward pass of its own
        """
        vectors: dict[tuple[int, ...], Tensor] = {}
        distinct = list(dict.fromkeys(row.ids for row in rows))
        for ids in distinct:
            if (vector := self._cache.get((ids, deterministic))) is not None:
                self._cache.move_to_end((ids, deterministic))
                vectors[ids] = vector
        missing = [ids for ids in distinct if ids not in vectors]
        step = 1 if deterministic else batch_size
        for start in range(0, len(missing), step):
            part = missing[start : start + step]
            vectors.update(zip(part, self._compute_texts(part), strict=True))
        self._add_to_cache({(ids, deterministic): vectors[ids] for ids in missing})
        stacked = torch.stack([vectors[row.ids] for row in rows])
        return TextEmbeddings(stacked, [row.truncated for row in rows])

    def clear_text_cache(self) -> None:
        """Empty the text cache."""
        self._cache.clear()

    def evict_text(self, prompt: str) -> None:
        """Remove one prompt from the text cache."""
        ids = self.tokenizer(prompt).ids
        for deterministic in (False, True):
            self._cache.pop((ids, deterministic), None)

    def _add_to_cache(self, entries: dict[tuple[tuple[int, ...], bool], Tensor]) -> None:
        self._cache.update(entries)
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)

    @torch.inference_mode()
    def _compute_texts(self, rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
        # Attention is causal: positions after the longest prompt's end have no effect and are left out.
        length = max(map(len, rows))
        ids = pad_tokens(rows, self.tokenizer.pad_id, length).to(self._device)
        last = torch.tensor([len(row) - 1 for row in rows], device=self._device)
        # Copies: a view in the cache would keep its whole batch alive.
        return [vector.clone() for vector in self._encode_texts(ids, last)]

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.model.visual(pixels).float(), dim=-1)

    def _encode_texts(self, ids: Tensor, last: Tensor) -> Tensor:
        model, length = self.model, ids.shape[1]
        hidden = model.token_embedding(ids) + model.positional_embedding[:length]
        mask, blocks = self._mask[:length, :length], model.transformer.resblocks
        for block in blocks[:-1]:
            hidden = block(hidden, attn_mask=mask)
        at_end = model.ln_final(block_output_at(blocks[-1], hidden, last, mask))
        return F.normalize((at_end @ model.text_projection).float(), dim=-1)


def shorten_last_block(visual: Any) -> None:
    """Compute a vision transformer's last block at the class token only, if the model pools by that token.

    After the last block CLIP uses a single token: the class token of an image, the end token of a prompt.
    Keys and values are needed for every token, but query, attention output and MLP only for that one. The
    result equals the whole block's up to rounding, and saves 2.5 to 3.5 % of a forward pass.
    """
    pooling = getattr(visual, "pool_type", None), getattr(visual, "attn_pool", None)
    if pooling == ("tok", None) and not visual.output_tokens:
        visual.transformer.resblocks[-1] = _ClassTokenBlock(visual.transformer.resblocks[-1])


def block_output_at(block: Any, hidden: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a residual attention block's output at one token of each row.

    Args:
        block: open_clip's block; one that is not of the standard kind is computed whole
        hidden: (N, L, D)
        positions: index of the token, int64 (N,)
        mask: added to the attention logits, (L, L)

    Returns:
        (N, D)
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if not is_standard_block(block):
        whole: Tensor = block(hidden, attn_mask=mask)[rows, positions]
        return whole
    width, attention = hidden.shape[-1], block.attn
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    normed = block.ln_1(hidden)
    query = F.linear(normed[rows, positions], weight[:width], bias[:width])[:, None]
    keys, values = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    q, k, v = (_split_heads(tensor, attention.num_heads) for tensor in (query, keys, values))
    row_mask = None if mask is None else mask[positions][:, None, None]
    attended = F.scaled_dot_product_attention(q, k, v, row_mask)
    token = hidden[rows, positions] + block.ls_1(attention.out_proj(attended.flatten(1)))
    result: Tensor = token + block.ls_2(block.mlp(block.ln_2(token)))
    return result


def is_standard_block(block: nn.Module) -> bool:
    """Return True for open_clip's plain residual attention block, which all published CLIP models use."""
    return type(block) is ResidualAttentionBlock


class _ClassTokenBlock(nn.Module):
    """A block that returns only its first token: (N, L, D) -> (N, 1, D)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        first = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        return block_output_at(self.block, hidden, first, attn_mask)[:, None]


def _split_heads(tensor: Tensor, heads: int) -> Tensor:
    """Return (N, L, D) as (N, heads, L, D / heads)."""
    count, length, width = tensor.shape
    return tensor.view(count, length, heads, width // heads).transpose(1, 2)


def accelerate_encoder(encode: Encode, mode: str) -> Encode:
    """Return `encode` for the configured `acceleration`: `none`, `compile` or `graphs`."""
    if mode == "none":
        return encode
    return BucketedEncoder(encode, compile_encoder if mode == "compile" else capture_cuda_graph)


def bucket_sizes(max_rows: int) -> list[int]:
    """Return the batch sizes that 1 to `max_rows` rows are padded to: powers of two."""
    return [2**power for power in range((max_rows - 1).bit_length() + 1)]


class BucketedEncoder:
    """Run `encode` in fixed batch sizes, each prepared once at its first use.

    A batch is padded to the next size with copies of its last row; their results are dropped.

    Args:
        encode: (N, ...) -> (N, D)
        prepare: returns the pass of one size, given `encode` and an example input of that size
    """

    def __init__(self, encode: Encode, prepare: Prepare) -> None:
        self._encode, self._prepare = encode, prepare
        self._passes: dict[int, Encode] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """Encode rows, (N, ...) -> (N, D)."""
        size = bucket_sizes(len(rows))[-1]
        padded = torch.cat([rows, rows[-1:].expand(size - len(rows), *rows.shape[1:])])
        if size not in self._passes:
            self._passes[size] = self._prepare(self._encode, padded)
        # A copy: the next replay of a CUDA graph overwrites its output.
        return self._passes[size](padded)[: len(rows)].clone()


def compile_encoder(encode: Encode, example: Tensor) -> Encode:
    """Return a pass through `torch.compile`; on a GPU it is captured as a CUDA graph as well."""
    settings: Any = torch._dynamo.config
    settings.recompile_limit = settings.accumulated_recompile_limit = _MAX_COMPILED
    # Not mode="reduce-overhead": its graphs work only on the thread that made them, and towers are loaded on
    # one thread and used on another (https://github.com/pytorch/pytorch/issues/123177).
    compiled = torch.compile(encode, dynamic=False)
    return capture_cuda_graph(compiled, example) if example.is_cuda else compiled


def capture_cuda_graph(encode: Encode, example: Tensor) -> Encode:
    """Return a pass as a CUDA graph: the same kernels, started by one call."""
    inputs = example.clone()
    # One run outside the graph, on another stream, so that libraries allocate their workspaces.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        encode(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = encode(inputs)

    def replay(rows: Tensor) -> Tensor:
        inputs.copy_(rows)
        graph.replay()
        return outputs

    return replay
