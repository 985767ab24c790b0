"""uint8 RGB to a tower's input. Two ways, each exactly its reference's.

`crop` (OpenAI CLIP, LAION aesthetic, PickScore): bicubic on uint8 pixels so that the shortest edge fits,
then the centre square. `letterbox` (HPSv2): bicubic with antialias on floats so that the longest edge fits,
then black around it, before normalising. A resize on floats differs from one on uint8 by up to 24 grey
levels, so neither may stand in for the other.

Prompts to token ids: each model's own tokenizer, EOT kept when truncating, special tokens neutralised.

A prompt of nothing but white space, or of which cleaning leaves nothing, is start and end alone: it is scored
as the empty prompt, as the references do.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import ftfy
import numpy as np
import regex  # type: ignore[import-untyped]  # its stubs are a package of their own
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reward_service.images import Pixels

# A prompt that spells a special token would inject it: `<|endoftext|>` empties the prompt in transformers,
# `<start_of_text>` starts a new one in open_clip.
_SPECIAL = re.compile(
    r"(?<=<\|)(?:startoftext|endoftext)(?=\|>)|(?<=<)(?:start_of_text|end_of_text)(?=>)", re.IGNORECASE
)
# How OpenAI's CLIP cuts a cleaned prompt into words.
_WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_CACHED_WORDS = 100_000


@dataclass(frozen=True)
class Tokens:
    """Token ids of one prompt, start and end included; `truncated` if some had to go."""

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
        """Tokens of one prompt, at most `context` of them, the end token always last."""
        ...


def neutralise(prompt: str) -> str:
    """Set special-token strings apart, so that they are read as the characters they are written with.

    The spaces go between letters and signs, where a word ends anyway: a tokenizer to which the string is
    nothing special gives the same ids as without them.
    """
    return _SPECIAL.sub(r" \g<0> ", prompt)


def openai_cleaning(prompt: str) -> str:
    """What OpenAI's CLIP does before its BPE: mend encodings, resolve HTML entities twice, one space each,
    lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


class HuggingFaceTokenizer:
    """transformers' CLIP tokenizer; with `cleaning="openai"` it equals OpenAI's own.

    Args:
        folder: holds vocab.json and merges.txt
        context: most tokens of a prompt, start and end included
    """

    def __init__(self, folder: Path, context: int, cleaning: str = "none") -> None:
        from transformers import CLIPTokenizer  # takes seconds, and only this layout needs it

        # Not from_pretrained: what else lies in the folder would change the tokens, but not the fingerprint.
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        self._tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=merges)
        self._openai = cleaning == "openai"
        if self._openai:
            _leave_only_bpe(self._tokenizer.backend_tokenizer)
        self.context = context
        self.pad_id = int(self._tokenizer.pad_token_id)
        self._start, self._end = int(self._tokenizer.bos_token_id), int(self._tokenizer.eos_token_id)

    def __call__(self, prompt: str) -> Tokens:
        """See `Tokenizer`."""
        cleaned = openai_cleaning(prompt) if self._openai else prompt
        ids = _harmless(self._ids, cleaned, self._start, self._end)
        return _cut([self._start, *ids, self._end], self.context)

    def _ids(self, cleaned: str) -> list[int]:
        if self._openai:
            words = _WORDS.findall(cleaned)
            encoded = self._tokenizer.backend_tokenizer.encode(words, is_pretokenized=True)
            return list(encoded.ids[1:-1])
        return list(self._tokenizer(cleaned, verbose=False)["input_ids"][1:-1])


def _leave_only_bpe(backend: Any) -> None:
    """Take away what transformers does before BPE and OpenAI does not, or does otherwise.

    Its lower case knows no final sigma, it composes accents (NFC), and its letters are another Unicode's.
    """
    from tokenizers import normalizers, pre_tokenizers

    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


class OpenClipTokenizer:
    """open_clip's tokenizer.

    Args:
        vocabulary: a gzipped BPE file
        context: most tokens of a prompt, start and end included
    """

    pad_id = 0

    def __init__(self, vocabulary: Path, context: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self._tokenizer: Any = SimpleTokenizer(str(vocabulary), context_length=context)
        self._clean = self._tokenizer.clean_fn
        # The cleaning is done here, once: it resolves entities, and `&lt;end_of_text&gt;` is one too.
        self._tokenizer.clean_fn = str
        self._special_words = dict(self._tokenizer.cache)
        self.context = context

    def __call__(self, prompt: str) -> Tokens:
        """See `Tokenizer`."""
        if len(self._tokenizer.cache) > _CACHED_WORDS:
            # open_clip remembers every word it ever saw; a service meets words without end.
            self._tokenizer.cache = dict(self._special_words)
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        ids = _harmless(self._tokenizer.encode, self._clean(prompt), start, end)
        return _cut([start, *ids, end], self.context)


def _harmless(encode: Callable[[str], list[int]], cleaned: str, start: int, end: int) -> list[int]:
    """The reference's own ids, unless the prompt spells a start or an end: then those of its characters."""
    ids = encode(cleaned)
    return encode(neutralise(cleaned)) if start in ids or end in ids else ids


def _cut(ids: Sequence[int], context: int) -> Tokens:
    if len(ids) <= context:
        return Tokens(tuple(ids), truncated=False)
    # Without the end token, whose place gives the embedding, every long caption would look the same.
    return Tokens((*ids[: context - 1], ids[-1]), truncated=True)


def padded(rows: Sequence[Tokens], pad_id: int, length: int) -> Tensor:
    """Token ids as int64 of shape (len(rows), length), filled up with `pad_id`."""
    return torch.tensor([[*row.ids, *[pad_id] * (length - len(row.ids))] for row in rows])


# The built-in map, or a thread pool's: Pillow and torch let other threads run meanwhile.
Map: TypeAlias = Callable[[Callable[[Pixels], Tensor], Sequence[Pixels]], Iterable[Tensor]]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """One way to prepare images; equal values share their pixels, and its text enters the fingerprint.

    `half_pixel` says where a centre crop with an odd surplus lies: torchvision (OpenAI's reference) rounds
    half to even, transformers (PickScore's) rounds down.
    """

    method: Literal["crop", "letterbox"]
    size_px: int
    half_pixel: Literal["even", "down"] = "even"
    antialias: Literal[True] = True
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD

    def __call__(self, images: Sequence[Pixels], each: Map = map) -> Tensor:
        """Prepare images of any sizes.

        Args:
            each: what applies the preparation to every image, in their order

        Returns:
            float32 of shape (N, 3, size_px, size_px) on the CPU
        """
        fit = self._crop if self.method == "crop" else self._letterbox
        unit = torch.stack(list(each(fit, images)))
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (unit - mean) / std

    def shared(self, images: Sequence[Pixels]) -> Preprocessing:
        """The value whose pixels equal this one's for these images, one for both `half_pixel` rules.

        They differ only where an odd surplus lies between an even and the next odd half: 3, 7, 11 ...
        """
        if self.method == "letterbox" or any(self._rules_differ(image) for image in images):
            return self
        return replace(self, half_pixel="even")

    def _rules_differ(self, image: Pixels) -> bool:
        return any((edge - self.size_px) % 4 == 3 for edge in self._resized(image))

    def _resized(self, image: Pixels) -> tuple[int, int]:
        """(height, width) after the crop's resize; int(), not round(): the references cut to whole pixels."""
        height, width, _ = image.shape
        short = min(height, width)
        return int(self.size_px * height / short), int(self.size_px * width / short)

    def _crop(self, rgb: Pixels) -> Tensor:
        size, (new_height, new_width) = self.size_px, self._resized(rgb)
        image = Image.fromarray(rgb)
        if (new_width, new_height) != image.size:
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        top, left = self._offset(new_height - size), self._offset(new_width - size)
        return _unit(np.asarray(image)[top : top + size, left : left + size])

    def _offset(self, surplus_px: int) -> int:
        return round(surplus_px / 2) if self.half_pixel == "even" else surplus_px // 2

    def _letterbox(self, image: Pixels) -> Tensor:
        """HPSv2's ResizeMaxSize: rounded sizes, the odd pixel of padding below and to the right."""
        unit, size = _unit(image), self.size_px
        scale = size / max(image.shape[:2])
        if scale != 1.0:
            # A very long image must keep at least one row; the reference would fail.
            new = [max(1, round(edge * scale)) for edge in image.shape[:2]]
            unit = F.interpolate(unit[None], new, mode="bicubic", align_corners=False, antialias=True)[0]
        pad_y, pad_x = size - unit.shape[1], size - unit.shape[2]
        return F.pad(unit, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))


def _unit(image: Pixels) -> Tensor:
    """uint8 (H, W, 3) as float32 (3, H, W) in [0, 1]."""
    # A copy in any case: of one pixel it would be the caller's own array, which may be read-only.
    channels_first = np.array(image.transpose(2, 0, 1), order="C")
    return torch.from_numpy(channels_first).to(torch.float32).div(255)
