"""Prompts to token ids: each model's own tokenizer, EOT kept when truncating, special tokens neutralised."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ftfy
import torch
from torch import Tensor

# A prompt that spells a special token would otherwise inject it: `<|endoftext|>` empties the prompt in
# transformers, `<start_of_text>` starts a new one in open_clip. Tokenizers ignore case here, so do we.
_SPECIAL = re.compile(r"<(\|(?:startoftext|endoftext)\||start_of_text|end_of_text)>", re.IGNORECASE)


@dataclass(frozen=True)
class Tokens:
    """Token ids of one prompt, start and end included; ``truncated`` if some had to go."""

    ids: tuple[int, ...]
    truncated: bool


class Tokenizer(Protocol):
    """What a tower needs of a tokenizer."""

    @property
    def context(self) -> int:
        """Most tokens of a prompt, start and end included."""
        ...

    @property
    def pad_id(self) -> int:
        """What fills the rest."""
        ...

    def __call__(self, prompt: str) -> Tokens:
        """Tokens of one prompt, at most ``context`` of them, the end token always last."""
        ...


def neutralise(prompt: str) -> str:
    """Set special-token strings apart, so that they are read as the characters they are written with."""
    return _SPECIAL.sub(r"< \1 >", prompt)


def openai_cleaning(prompt: str) -> str:
    """What OpenAI's CLIP does before its BPE: mend encodings, resolve HTML entities twice, one space each."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class HuggingFaceTokenizer:
    """transformers' CLIP tokenizer; with ``cleaning="openai"`` it equals OpenAI's own.

    :param folder: holds vocab.json and merges.txt
    :param context: most tokens of a prompt, start and end included
    """

    def __init__(self, folder: Path, context: int, cleaning: str = "none") -> None:
        from transformers import CLIPTokenizer  # takes seconds, and only this layout needs it

        self._tokenizer: Any = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        self._clean = openai_cleaning if cleaning == "openai" else str
        self.context = context
        self.pad_id = int(self._tokenizer.pad_token_id)
        self._end = int(self._tokenizer.eos_token_id)

    def __call__(self, prompt: str) -> Tokens:
        """See :class:`Tokenizer`."""
        ids = self._tokenizer(neutralise(self._clean(prompt)), verbose=False)["input_ids"]
        return _cut(ids, self.context, self._end)


class OpenClipTokenizer:
    """open_clip's tokenizer.

    :param vocabulary: a gzipped BPE file
    :param context: most tokens of a prompt, start and end included
    """

    pad_id = 0

    def __init__(self, vocabulary: Path, context: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer: Any = SimpleTokenizer(str(vocabulary), context_length=context)
        clean = tokenizer.clean_fn
        # After its cleaning, not before: that resolves entities, and `&lt;end_of_text&gt;` is one too.
        tokenizer.clean_fn = lambda prompt: neutralise(clean(prompt))
        self._tokenizer = tokenizer
        self.context = context

    def __call__(self, prompt: str) -> Tokens:
        """See :class:`Tokenizer`."""
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        return _cut([start, *self._tokenizer.encode(prompt), end], self.context, end)


def _cut(ids: Sequence[int], context: int, end: int) -> Tokens:
    if len(ids) <= context:
        return Tokens(tuple(ids), truncated=False)
    # Without the end token, whose place gives the embedding, every long caption would look the same.
    return Tokens((*ids[: context - 1], end), truncated=True)


def padded(rows: Sequence[Tokens], pad_id: int, length: int) -> Tensor:
    """Token ids as int64 of shape (len(rows), length), filled up with ``pad_id``."""
    return torch.tensor([[*row.ids, *[pad_id] * (length - len(row.ids))] for row in rows])
