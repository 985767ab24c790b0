"""Tokenizing of a request's prompts, before its pairs are queued. No torch."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeAlias

from reward_service.engine.types import Pair, PromptError
from reward_service.protocol import item_problem
from reward_service.requests.parsing import DecodedRequest

#: Tokens of one prompt by tower.
PromptTokens: TypeAlias = Mapping[str, Any]
#: Runs work off the event loop, in turn with that of other requests.
Run: TypeAlias = Callable[[Callable[[], dict[str, PromptTokens]]], Awaitable[dict[str, PromptTokens]]]

# Some fifty short prompts, or one of the longest: some 10 ms of work, 100 ms at worst.
_SLICE_CHARS = 10_000
_PROMPT_CHARS = 100  # cost of a prompt beyond its characters


class PromptTokenizer(Protocol):
    """Interface of the engine."""

    def tokenize(self, prompt: str, names: Sequence[str] | None = None) -> PromptTokens:
        """Return a prompt's tokens by tower, for the evaluators `names`."""


async def tokenize_request(request: DecodedRequest, engine: PromptTokenizer, run: Run) -> DecodedRequest:
    """Return the request with the tokens of its prompts.

    Args:
        request: the request
        engine: tokenizes one prompt
        run: runs the work on one slice of the prompts at a time

    Raises:
        ProblemError: if a prompt cannot be tokenized
    """
    started_s = time.perf_counter()
    tokens: dict[str, PromptTokens] = {}
    for part in prompt_slices(request.pairs):
        tokens |= await run(partial(tokenize_slice, engine, part, request.evaluators))
    pairs = [replace(pair, tokens=tokens[pair.prompt]) for pair in request.pairs]
    return replace(request, pairs=pairs, decode_s=request.decode_s + time.perf_counter() - started_s)


def prompt_slices(pairs: Sequence[Pair]) -> Iterator[dict[str, int]]:
    """Yield the distinct prompts, with the index of the first pair of each, in parts of similar cost."""
    first: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        first.setdefault(pair.prompt, index)
    part: dict[str, int] = {}
    chars = 0
    for prompt, index in first.items():
        part[prompt] = index
        chars += _PROMPT_CHARS + len(prompt)
        if chars >= _SLICE_CHARS:
            yield part
            part, chars = {}, 0
    if part:
        yield part


def tokenize_slice(
    engine: PromptTokenizer, prompts: Mapping[str, int], names: Sequence[str]
) -> dict[str, PromptTokens]:
    """Return the tokens of each prompt, given with the index of its item; call it off the event loop."""
    tokens = {}
    for prompt, index in prompts.items():
        try:
            tokens[prompt] = engine.tokenize(prompt, names)
        except PromptError as error:
            raise item_problem("invalid_request", f"item {index}: {error}", index) from error
    return tokens
