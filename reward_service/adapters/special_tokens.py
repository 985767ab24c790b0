"""Special tokens in decoded text: removed at its ends, where trainers and chat templates put them.

A trainer that decodes with `skip_special_tokens=False` leaves `<s>`, padding and the end of the turn around a
text, and a chat template puts `<|im_start|>user` before it. To an evaluator they are words like any other, so
they change its score. Removed, with the white space beside them, are:

- any name between `<|` and `|>`, or `<｜` and `｜>`, such as `<|im_end|>` and `<|endoftext|>`;
- the usual names of tokens in other brackets, such as `<s>`, `</s>`, `<pad>`, `<end_of_turn>` and `[INST]`;
- the role behind the start of a turn, as in `<|im_start|>user` and `<start_of_turn>model`.

Everything else stays as it is: tokens between words, other tags such as `<b>`, and white space at the ends of
a text without special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from reward_service.client import InputError

_ROLES = "system|developer|user|human|assistant|model|tool|ipython"
_TURN = r"<\|[^<>|\s]{1,64}\|>|<｜[^<>｜\s]{1,64}｜>|<(?:start|end)_of_[a-z]+>|\[/?INST\]|<</?SYS>>"
_OTHER = r"</?s>|<(?:pad|unk|bos|eos|sop|eop|mask|cls|sep)>|\[(?:PAD|UNK|BOS|EOS|g?MASK|CLS|SEP)\]"
_START = r"<\|im_start\|>|<\|start_header_id\|>|<\|start\|>|<start_of_turn>"
_HEADER = rf"(?:{_START})(?:{_ROLES})(?=\s*(?:\n|<|\Z))"
_TOKEN = re.compile(f"{_HEADER}|{_TURN}|{_OTHER}")
_TURN_TOKEN = re.compile(_TURN)


def strip_special_tokens(text: Any) -> Any:
    """Return a text without the special tokens at its ends, and anything but a text unchanged."""
    return _strip_leading_tokens(_strip_trailing_tokens(text)) if isinstance(text, str) else text


def _strip_leading_tokens(text: str) -> str:
    end = 0
    for token in _TOKEN.finditer(text):
        if text[end : token.start()].strip():
            break
        end = token.end()
    return text[end:].lstrip() if end else text


def _strip_trailing_tokens(text: str) -> str:
    start = len(text)
    for token in reversed(list(_TOKEN.finditer(text))):
        if text[token.end() : start].strip():
            break
        start = token.start()
    return text[:start].rstrip() if start < len(text) else text


def plain_prompts(prompts: Iterable[Any]) -> list[Any]:
    """Return prompts without the special tokens at their ends.

    Raises:
        InputError: a prompt has tokens of a chat template between its words, so it is more than one message
    """
    plain = list(map(strip_special_tokens, prompts))
    for index, prompt in enumerate(plain):
        if isinstance(prompt, str) and (found := _TURN_TOKEN.search(prompt)):
            message = (
                f"has the token {found[0]} between its words, as of a chat template with several messages"
            )
            raise InputError(f"prompt {index} {message}; name another argument with the texts to score")
    return plain


def plain_responses(queries: Iterable[str], prompts: Iterable[str]) -> list[str]:
    """Return the responses of queries, which begin with their prompts, without special tokens at their ends.

    Raises:
        InputError: a query does not begin with its prompt, apart from special tokens
    """
    return [
        _response(index, query, prompt)
        for index, (query, prompt) in enumerate(zip(queries, prompts, strict=True))
    ]


def _response(index: int, query: str, prompt: str) -> str:
    if not query.startswith(prompt):
        # Decoding may have put the beginning of the sequence, padding or a blank before the prompt.
        query, prompt = _strip_leading_tokens(query).lstrip(), _strip_leading_tokens(prompt).lstrip()
    if not query.startswith(prompt):
        remedy = "pass the texts to score in another argument, and name it with texts"
        raise InputError(f"query {index} does not begin with its prompt; {remedy}")
    # A policy that ends its turn at once has written an empty text; the service needs at least one character.
    return strip_special_tokens(query[len(prompt) :]).strip() or " "
