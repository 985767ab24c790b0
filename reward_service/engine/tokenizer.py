"""Tokenizers: prompts to token ids, as each model's own tokenizer does it, in bounded time.

A prompt is tokenized from its beginning, and no further than its tokens are read: the rest costs nothing.
Differences from the references:

* special tokens that a prompt spells out are read as plain text;
* lone surrogates become U+FFFD, as OpenAI's cleaning does it; transformers' tokenizer raises;
* those of the cleaning: see `reward_service.engine.cleaning`.

As in the references, a truncated prompt keeps its end token, and a prompt that is empty after cleaning
becomes start and end token only: it is scored as the empty prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import regex  # type: ignore[import-untyped]  # its stubs are a separate package
import torch
from ftfy.fixes import fix_surrogates
from torch import Tensor

from reward_service.engine.cleaning import clean_lines

# A prompt that spells a special token would inject it: `<|endoftext|>` empties the prompt in transformers,
# `<start_of_text>` starts a new one in open_clip.
_SPECIAL = re.compile(
    r"(?<=<\|)(?:startoftext|endoftext)(?=\|>)|(?<=<)(?:start_of_text|end_of_text)(?=>)",
    re.IGNORECASE | re.ASCII,  # a long s is no s: where this changes the words, the token was special
)
# OpenAI CLIP's rule for splitting a cleaned prompt into words.
_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
# Words that are encoded at once, and characters that are normalized at once: neither much more than what
# fills a context.
_WORDS_AT_ONCE = 16
_PORTION_CHARS = 1000


@dataclass(frozen=True)
class Tokens:
    """Token ids of one prompt, start and end token included, and whether it was truncated."""

    ids: tuple[int, ...]
    truncated: bool


class Tokenizer(Protocol):
    """Tokenizer of a tower; safe on any thread."""

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
        tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=merges)
        self.context_length = context_length
        self.pad_id = int(tokenizer.pad_token_id)
        self._start, self._end = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self._special = {str(tokenizer.bos_token), str(tokenizer.eos_token)}
        self._backend = tokenizer.backend_tokenizer
        self._openai = cleaning == "openai"
        # OpenAI's words are not split any further: transformers' lower-casing ignores the final sigma, it
        # composes accents (NFC), and it follows another version of Unicode in what is a letter.
        self._encode = _word_encoder(self._backend.model, split_bytes=self._openai)

    def __call__(self, prompt: str) -> Tokens:
        """See `Tokenizer`."""
        words = _openai_words(prompt, _WORDS, self._special) if self._openai else self._own_words(prompt)
        return _encode_words(words, self._encode, self._start, self._end, self.context_length)

    def _own_words(self, prompt: str) -> Iterator[str]:
        """Yield the words as transformers splits them, each byte already a letter of the vocabulary."""
        text = fix_surrogates(prompt)
        if any(token in text for token in self._special):
            text = neutralize_special_tokens(text)
        normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
        for portion in _portions(text):
            for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(portion)):
                yield word


class OpenClipTokenizer:
    """open_clip's tokenizer; its byte pair encoding, in Python, takes quadratic time and is not used.

    Args:
        vocabulary: a gzipped BPE file
        context_length: maximum number of tokens of a prompt, start and end token included
    """

    pad_id = 0

    def __init__(self, vocabulary: Path, context_length: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer
        from tokenizers.models import BPE

        tokenizer: Any = SimpleTokenizer(str(vocabulary))
        words, ranks = tokenizer.encoder, tokenizer.bpe_ranks
        # Other lines, such as an empty last one, are never applied.
        merges = [
            merge
            for merge in sorted(ranks, key=ranks.__getitem__)
            if len(merge) == 2 and words.keys() >= {*merge}
        ]
        model = BPE(vocab=words, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>")
        self.context_length = context_length
        self._pattern, self._special = tokenizer.pat, set(tokenizer.cache)
        self._start, self._end = tokenizer.sot_token_id, tokenizer.eot_token_id
        self._encode = _word_encoder(model, split_bytes=True)

    def __call__(self, prompt: str) -> Tokens:
        """See `Tokenizer`."""
        words = _openai_words(prompt, self._pattern, self._special)
        return _encode_words(words, self._encode, self._start, self._end, self.context_length)


class CachedTokenizer:
    """Tokenizer that keeps the tokens of the prompts used last; safe on any thread.

    The cache holds no prompts, which can be long, but their hashes.

    Args:
        tokenizer: tokenizes the prompts that are not cached
        entries: capacity
    """

    def __init__(self, tokenizer: Tokenizer, entries: int) -> None:
        self.context_length, self.pad_id = tokenizer.context_length, tokenizer.pad_id
        self._tokenizer, self._entries = tokenizer, entries
        self._lock = threading.Lock()
        self._cache: OrderedDict[bytes, Tokens] = OrderedDict()

    def __call__(self, prompt: str) -> Tokens:
        """See `Tokenizer`."""
        key = hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=16).digest()
        with self._lock:
            if (tokens := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                return tokens
        tokens = self._tokenizer(prompt)
        with self._lock:
            self._cache[key] = tokens
            while len(self._cache) > self._entries:
                self._cache.popitem(last=False)
        return tokens


def pad_tokens(rows: Sequence[Sequence[int]], pad_id: int, length: int) -> Tensor:
    """Return token ids as int64 (len(rows), length), padded with `pad_id`."""
    return torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])


def neutralize_special_tokens(prompt: str) -> str:
    """Insert spaces into spelled-out special tokens, so that they are tokenized as plain characters.

    The spaces go between letters and signs, where a word ends anyway: a tokenizer without that special token
    returns the same ids with and without them.
    """
    return _SPECIAL.sub(r" \g<0> ", prompt)


def _openai_words(prompt: str, pattern: Any, special: Container[str]) -> Iterator[str]:
    """Yield the words of a prompt as OpenAI cleans and splits it; those of a special token as plain text."""
    for line in clean_lines(prompt):
        words = pattern.findall(line)
        if any(word in special for word in words):
            words = pattern.findall(neutralize_special_tokens(line))
        yield from words


def _portions(text: str) -> Iterator[str]:
    """Yield the text in parts, cut before spaces: transformers normalizes and splits each as in the whole."""
    start = 0
    while start < len(text):
        end = text.find(" ", start + _PORTION_CHARS)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def _word_encoder(model: Any, *, split_bytes: bool) -> Callable[[list[str]], list[int]]:
    """Return a function that encodes words by the model's merges alone, without special tokens.

    Args:
        model: `tokenizers.models.BPE`, whose time grows with n log n
        split_bytes: whether the bytes of the words are still to be mapped to letters of the vocabulary
    """
    from tokenizers import Tokenizer, pre_tokenizers

    backend = Tokenizer(model)
    if split_bytes:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda words: list(backend.encode(words, is_pretokenized=True).ids)


def _encode_words(
    words: Iterator[str],
    encode: Callable[[list[str]], list[int]],
    start: int,
    end: int,
    context_length: int,
) -> Tokens:
    """Return the tokens of a prompt; reads no more words than fill the context."""
    content = context_length - 2
    ids: list[int] = []
    while len(ids) <= content and (batch := list(islice(words, _WORDS_AT_ONCE))):
        ids += encode(batch)
    # The embedding is read at the end token; without it, all long prompts would be embedded alike.
    return Tokens((start, *ids[:content], end), truncated=len(ids) > content)
