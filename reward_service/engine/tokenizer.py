"""Tokenizers: prompts to token ids, as each model's own tokenizer does it.

One difference from the references: special tokens that a prompt spells out are read as plain text. As in the
references, a truncated prompt keeps its end token, and a prompt that is empty after cleaning becomes start
and end token only: it is scored as the empty prompt.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ftfy
import regex  # type: ignore[import-untyped]  # its stubs are a separate package
import torch
from torch import Tensor

# A prompt that spells a special token would inject it: `<|endoftext|>` empties the prompt in transformers,
# `<start_of_text>` starts a new one in open_clip.
_SPECIAL = re.compile(
    r"(?<=<\|)(?:startoftext|endoftext)(?=\|>)|(?<=<)(?:start_of_text|end_of_text)(?=>)", re.IGNORECASE
)
# OpenAI CLIP's rule for splitting a cleaned prompt into words.
_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_MAX_CACHED_WORDS = 100_000


@dataclass(frozen=True)
class Tokens:
    """Token ids of one prompt, start and end token included, and whether it was truncated."""

    ids: tuple[int, ...]
    truncated: bool


class Tokenizer(Protocol):
    """Tokenizer of a tower."""

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt, start and end token included."""
        ...

    @property
    def pad_id(self) -> int:
        """Token id that fills the positions after the end token."""
        ...

    def __call__(self, prompt: str) -> Tokens:
        """Return the tokens of one prompt, at most `context_length`; the last is always the end token."""
        ...


class HuggingFaceTokenizer:
    """transformers' CLIP tokenizer; with `cleaning="openai"` it equals OpenAI's own.

    Args:
        folder: folder of vocab.json and merges.txt
        context_length: maximum number of tokens of a prompt, start and end token included
        cleaning: `none` (transformers' own) or `openai`
    """

    def __init__(self, folder: Path, context_length: int, cleaning: str = "none") -> None:
        from transformers import CLIPTokenizer  # takes seconds, and only this layout needs it

        # Not from_pretrained: other files of the folder would change the tokens, but not the fingerprint.
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        self._tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=merges)
        self._openai = cleaning == "openai"
        if self._openai:
            _reduce_to_bpe(self._tokenizer.backend_tokenizer)
        self.context_length = context_length
        self.pad_id = int(self._tokenizer.pad_token_id)
        self._start, self._end = int(self._tokenizer.bos_token_id), int(self._tokenizer.eos_token_id)

    def __call__(self, prompt: str) -> Tokens:
        """See `Tokenizer`."""
        cleaned = clean_openai(prompt) if self._openai else prompt
        ids = _encode_as_text(self._encode, cleaned, self._start, self._end)
        return _truncate([self._start, *ids, self._end], self.context_length)

    def _encode(self, cleaned: str) -> list[int]:
        if self._openai:
            words = _WORDS.findall(cleaned)
            encoded = self._tokenizer.backend_tokenizer.encode(words, is_pretokenized=True)
            return list(encoded.ids[1:-1])
        return list(self._tokenizer(cleaned, verbose=False)["input_ids"][1:-1])


class OpenClipTokenizer:
    """open_clip's tokenizer.

    Args:
        vocabulary: a gzipped BPE file
        context_length: maximum number of tokens of a prompt, start and end token included
    """

    pad_id = 0

    def __init__(self, vocabulary: Path, context_length: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._tokenizer: Any = SimpleTokenizer(str(vocabulary), context_length=context_length)
        self._clean = self._tokenizer.clean_fn
        # `__call__` cleans, once: cleaning resolves entities, and `&lt;end_of_text&gt;` is one too.
        self._tokenizer.clean_fn = str
        self._special_words = dict(self._tokenizer.cache)
        self.context_length = context_length

    def __call__(self, prompt: str) -> Tokens:
        """See `Tokenizer`."""
        if len(self._tokenizer.cache) > _MAX_CACHED_WORDS:
            # open_clip caches every word it has ever encoded, without a limit.
            self._tokenizer.cache = dict(self._special_words)
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        ids = _encode_as_text(self._tokenizer.encode, self._clean(prompt), start, end)
        return _truncate([start, *ids, end], self.context_length)


def pad_tokens(rows: Sequence[Tokens], pad_id: int, length: int) -> Tensor:
    """Return token ids as int64 (len(rows), length), padded with `pad_id`."""
    return torch.tensor([[*row.ids, *[pad_id] * (length - len(row.ids))] for row in rows])


def clean_openai(prompt: str) -> str:
    """Clean a prompt as OpenAI's CLIP does before BPE.

    Fix broken encodings, resolve HTML entities twice, collapse white space, lower the case.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


def neutralize_special_tokens(prompt: str) -> str:
    """Insert spaces into spelled-out special tokens, so that they are tokenized as plain characters.

    The spaces go between letters and signs, where a word ends anyway: a tokenizer without that special token
    returns the same ids with and without them.
    """
    return _SPECIAL.sub(r" \g<0> ", prompt)


def _encode_as_text(encode: Callable[[str], list[int]], cleaned: str, start: int, end: int) -> list[int]:
    """Return the reference's ids; if they contain a special token, those of the neutralized prompt."""
    ids = encode(cleaned)
    return encode(neutralize_special_tokens(cleaned)) if start in ids or end in ids else ids


def _truncate(ids: Sequence[int], context_length: int) -> Tokens:
    if len(ids) <= context_length:
        return Tokens(tuple(ids), truncated=False)
    # The embedding is read at the end token; without it, all long prompts would be embedded alike.
    return Tokens((*ids[: context_length - 1], ids[-1]), truncated=True)


def _reduce_to_bpe(backend: Any) -> None:
    """Remove the steps before BPE that transformers adds to OpenAI's, or does differently.

    Its lower-casing ignores the final sigma, it composes accents (NFC), and it follows another version of
    Unicode in what is a letter.
    """
    from tokenizers import normalizers, pre_tokenizers

    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
