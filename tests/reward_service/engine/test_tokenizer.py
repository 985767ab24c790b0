"""Tokenizers with the real vocabulary of 49,408 words: equal to each reference except for special tokens."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from transformers import CLIPTokenizer

from benchmarks.parity.weights import (
    random_state,
    write_head,
    write_huggingface,
    write_open_clip,
    write_tokenizer,
)
from benchmarks.tokenizing import References, fuzz, generate
from reward_service.config import ServiceConfig
from reward_service.engine.engine import RewardEngine
from reward_service.engine.loading import build_engine
from reward_service.engine.tokenizer import (
    CachedTokenizer,
    HuggingFaceTokenizer,
    OpenClipTokenizer,
    Tokenizer,
    Tokens,
    neutralize_special_tokens,
)
from reward_service.engine.types import Pair

CONTEXT, START, END = 77, 49406, 49407
NAMES = ("openai", "huggingface", "open_clip")
SPECIAL = (
    *("<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>"),
    *("<|ENDOFTEXT|>", "<|StartOfText|>", "<START_OF_TEXT>", "<End_Of_Text>"),
    *("&lt;|endoftext|&gt;", "&amp;lt;end_of_text&amp;gt;", "&#60;start_of_text&#62;", "&lt|endoftext|&gt"),
    *("＜|ｅｎｄｏｆｔｅｘｔ|＞", "＜start_of_text＞", "<|endof\u200btext|>", "<<|endoftext|>|endoftext|>"),
    *(" <|endoftext|>\n", "<| endoftext |>", "<|endoftext|><|endoftext|>", "<start_of_text><end_of_text>"),
    *(
        "x<end_of_text>x",
        "<|startoftext|>" * 40,
        "<\u017ftart_of_text>",
        "<|\u212aendoftext|>",
        "<end_of_text",
    ),
)
# Strings that the tokenizers treat differently from each other, mixed with arbitrary text.
UNUSUAL = ("’s", "“", "&amp;", "&#x301;", "ﬁ", "ΟΔΟΣ", "İ", "'Ll", "\u0301", "\x85", "👩‍🚀", "12½", "<", "|")
ORDINARY = st.one_of(st.sampled_from(UNUSUAL), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
PROMPTS = st.lists(st.one_of(st.sampled_from(SPECIAL), ORDINARY), max_size=30).map("".join)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizers(vocabulary: Path) -> dict[str, Tokenizer]:
    return {
        "openai": HuggingFaceTokenizer(vocabulary, CONTEXT, "openai"),
        "huggingface": HuggingFaceTokenizer(vocabulary, CONTEXT),
        "open_clip": OpenClipTokenizer(Path(default_bpe()), CONTEXT),
    }


@pytest.mark.parametrize("name", NAMES)
@given(prompt=PROMPTS)
@settings(max_examples=200, deadline=None)
def test_any_prompt_has_one_start_and_one_end(
    name: str, tokenizers: dict[str, Tokenizer], prompt: str
) -> None:
    """Start first, end last, neither in between, and never more tokens than the context."""
    ids = tokenizers[name](prompt).ids
    assert ids[0] == START
    assert ids[-1] == END
    assert max(ids[1:-1], default=0) < START
    assert len(ids) <= CONTEXT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("special", SPECIAL)
def test_special_token_strings_are_plain_text(
    name: str, special: str, tokenizers: dict[str, Tokenizer]
) -> None:
    """In every spelling that a tokenizer could take for the token; the text after it is still read."""
    tokenizer = tokenizers[name]
    whole = tokenizer(f"a cat {special} on a mat").ids
    assert sum(token >= START for token in whole) == 2
    # The longest of them fills the context, where nothing after it could be read in any case.
    if len(whole) < CONTEXT:
        assert whole[-4:-1] == tokenizer("on a mat").ids[-4:-1]


@given(prompt=st.lists(ORDINARY, max_size=30).map("".join))
@settings(max_examples=200, deadline=None)
def test_openai_cleaning_equals_openai_tokenizer(tokenizers: dict[str, Tokenizer], prompt: str) -> None:
    """open_clip has OpenAI's code except for its special tokens; transformers lower-cases differently."""
    assert tokenizers["openai"](prompt) == tokenizers["open_clip"](prompt)


@given(prompt=PROMPTS)
@settings(max_examples=200, deadline=None)
def test_ids_equal_the_reference_without_special_tokens(
    vocabulary: Path, tokenizers: dict[str, Tokenizer], prompt: str
) -> None:
    """Neutralization changes no prompt in which the reference finds no special token."""
    references = {
        "open_clip": [START, *reference_open_clip().encode(prompt), END],
        "huggingface": reference_transformers(vocabulary)(prompt, verbose=False)["input_ids"],
    }
    for name, ids in references.items():
        if sum(token >= START for token in ids) == 2:
            cut = ids if len(ids) <= CONTEXT else [*ids[: CONTEXT - 1], END]
            assert list(tokenizers[name](prompt).ids) == cut


@cache
def reference_open_clip() -> SimpleTokenizer:
    return SimpleTokenizer()


@cache
def reference_transformers(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_prompts_have_the_references_ids(
    seed: int, vocabulary: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    """A sample of what `python -m benchmarks.tokenizing` does with a million prompts."""
    rng = random.Random(seed)
    findings = fuzz(tokenizers, References(vocabulary), (generate(rng) for _ in range(60)))
    assert findings.failures == []
    assert findings.prompts == 60
    assert findings.compared > 150


@pytest.mark.parametrize("letters", ["abcdefghijklmnopqrstuvwxyz", "ab", "a", "äöü", "😀😁😂🤣", "!?"])
def test_one_long_word_has_the_references_ids(letters: str, tokenizers: dict[str, Tokenizer]) -> None:
    """open_clip's own encoding takes quadratic time: 24 s for the tokenizers' limit of 10,000 letters."""
    rng = random.Random(0)
    word = "".join(rng.choice(letters) for _ in range(800))
    ids = reference_open_clip().encode(word)
    expected = Tokens((START, *ids[: CONTEXT - 2], END), truncated=len(ids) > CONTEXT - 2)
    for tokenizer in tokenizers.values():
        assert tokenizer(word) == expected


EXTREME = {
    "letters": "".join(chr(97 + (i * i * 7 + i // 13) % 26) for i in range(10_000)),
    "emoji": "".join(chr(0x1F300 + i * 7 % 0x300) for i in range(10_000)),
    "emoji words": " ".join("😀😁🤣" for _ in range(2500)),
    "entity": f"a &#{'9' * 4301};",
    "nested": "é&" + "amp;" * 2498,
    "marks": "a" + "\u0315" * 5000 + "\u0300" * 4999,
    "ligatures": "\ufdfa" * 10_000,
    "surrogates": "\ud800" * 5000 + "\udc00" * 5000,
    "nul": "\x00" * 10_000,
    "lines": "\u2000\n" * 5000,
    "special": "<|endoftext|>" * 769,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", EXTREME.values(), ids=EXTREME.keys())
def test_extreme_prompts_are_tokenized(name: str, prompt: str, tokenizers: dict[str, Tokenizer]) -> None:
    """None raises; most take seconds in the references, and some raise there."""
    ids = tokenizers[name](prompt).ids
    assert (ids[0], ids[-1]) == (START, END)
    assert max(ids[1:-1], default=0) < START


def test_surrogates_are_replaced(tokenizers: dict[str, Tokenizer]) -> None:
    """A pair is the character that it encodes, a lone one U+FFFD, for all tokenizers."""
    for tokenizer in tokenizers.values():
        assert tokenizer("a \ud83d\ude00 b") == tokenizer("a 😀 b")
        assert tokenizer("a \ud83d b") == tokenizer("a \ufffd b")


@pytest.mark.parametrize("name", NAMES)
def test_work_on_a_prompt_ends_where_its_context_is_full(
    name: str, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 5,000 words not many more are encoded than fit."""
    tokenizer: Any = tokenizers[name]
    encoded: list[str] = []
    encode = tokenizer._encode

    def record(words: list[str]) -> list[int]:
        encoded.extend(words)
        return encode(words)  # type: ignore[no-any-return]

    monkeypatch.setattr(tokenizer, "_encode", record)
    assert tokenizer("a " * 5000).truncated
    assert CONTEXT <= len(encoded) < 2 * CONTEXT


def test_cache_of_tokens_is_bounded_and_holds_no_prompts() -> None:
    """The least recently used entry is evicted, and a long prompt costs no more than a short one."""
    seen: list[str] = []

    class Counting:
        context_length, pad_id = CONTEXT, 0

        def __call__(self, prompt: str) -> Tokens:
            seen.append(prompt)
            return Tokens((START, len(prompt), END), truncated=False)

    tokenizer = CachedTokenizer(Counting(), 2)
    for prompt in ("a", "b", "a", "c" * 9999, "a", "b", "\ud800"):
        assert tokenizer(prompt).ids == (START, len(prompt), END)
    assert seen == ["a", "b", "c" * 9999, "b", "\ud800"]
    assert len(tokenizer._cache) == 2
    assert not any("ccc" in str(entry) for entry in tokenizer._cache.items())


def test_tokenizers_work_on_many_threads(tokenizers: dict[str, Tokenizer]) -> None:
    """Requests are tokenized on several threads at once."""
    prompts = [f"a photo of {number} cats, naïve 😀" for number in range(200)]
    for tokenizer in tokenizers.values():
        with ThreadPoolExecutor(8) as workers:
            assert list(workers.map(tokenizer, prompts)) == [tokenizer(prompt) for prompt in prompts]


def test_neutralization_is_invisible_without_the_special_token() -> None:
    """To a tokenizer for which `<|endoftext|>` is not special, the spaces change nothing."""
    plain = reference_open_clip().encode
    for text in ("<|endoftext|>", "see: <|startoftext|>!", "(<|endoftext|>)"):
        assert neutralize_special_tokens(text) != text
        assert plain(neutralize_special_tokens(text)) == plain(text)


@pytest.mark.parametrize("name", NAMES)
def test_context_holds_75_tokens_of_content(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    """75 tokens fit exactly with start and end; of 76 the last is truncated, and reported so."""
    fitting, longer = tokenizers[name]("cat " * 75), tokenizers[name]("cat " * 76)
    assert (len(fitting.ids), fitting.truncated) == (CONTEXT, False)
    assert (len(longer.ids), longer.truncated) == (CONTEXT, True)
    assert fitting.ids == longer.ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", [" ", "\n\t", "\u00a0\u2003"])
def test_white_space_is_the_empty_prompt(name: str, prompt: str, tokenizers: dict[str, Tokenizer]) -> None:
    """Start and end only, as in the references."""
    assert tokenizers[name](prompt).ids == (START, END)


@pytest.fixture(scope="session")
def long_context_engine(tmp_path_factory: pytest.TempPathFactory) -> RewardEngine:
    """Four evaluators over small towers with the real vocabulary and the real context length."""
    folder = tmp_path_factory.mktemp("long")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64}
    text = {"context_length": CONTEXT, "vocab_size": END + 1, "width": 64, "heads": 1, "layers": 2}
    config = {"embed_dim": 768, "vision_cfg": vision, "text_cfg": text}
    quick = {**config, "quick_gelu": True}
    write_huggingface(folder / "clip", quick, random_state(quick, seed=1))
    write_huggingface(folder / "pickscore", config, random_state(config, seed=2))
    weights = write_open_clip(folder / "hps", random_state(config, seed=3))
    described = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (folder / "hps" / "open_clip_config.json").write_text(described)
    write_head(folder / "aesthetic", seed=4)
    tower = {"layout": "huggingface", "weights": {"file": "model.safetensors"}}
    head = {"origin": {"folder": folder / "aesthetic"}, "weights": {"file": "head.pth"}}
    settings = {
        "towers": {
            "clip": {**tower, "origin": {"folder": folder / "clip"}, "text_cleaning": "openai"},
            "pickscore": {**tower, "origin": {"folder": folder / "pickscore"}},
            "hps": {
                "layout": "open_clip",
                "origin": {"folder": folder / "hps"},
                "weights": {"file": weights.name},
            },
        },
        "evaluators": {
            "aesthetic": {"kind": "aesthetic", "tower": "clip", "head": head},
            "clip": {"kind": "clip", "tower": "clip"},
            "pickscore": {"kind": "pickscore", "tower": "pickscore"},
            "hpsv2": {"kind": "hpsv2", "tower": "hps"},
        },
        "calibration": folder / "unused.json",
        "device": "cpu",
        "threads": 1,
    }
    return build_engine(ServiceConfig.model_validate(settings))


PROMPT_READING_EVALUATORS = ("clip", "pickscore", "hpsv2")


def test_truncated_captions_score_by_their_beginning(long_context_engine: RewardEngine) -> None:
    """After 77 tokens another end changes no score, another beginning does; all count as truncated."""
    image = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    tail = "a small boat, " * 30
    captions = [
        "a harbour at dawn, " + tail,
        "an alley at night, " + tail,
        "a harbour at dawn, " + tail + "!",
    ]
    one, other_start, other_end = long_context_engine.score([Pair(caption, image) for caption in captions])
    assert one.truncated_prompt
    assert other_start.truncated_prompt
    assert other_end.truncated_prompt
    for name in PROMPT_READING_EVALUATORS:
        assert abs(one.raw[name] - other_start.raw[name]) > 1e-4
        assert one.raw[name] == pytest.approx(other_end.raw[name], abs=1e-6)
    assert one.raw["aesthetic"] == pytest.approx(other_start.raw["aesthetic"], abs=1e-6)


def test_caption_that_just_fits_is_not_truncated(long_context_engine: RewardEngine) -> None:
    """75 tokens of content are read to the last word."""
    image = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    start = "cat " * 74
    first, second = long_context_engine.score([Pair(start + "dog", image), Pair(start + "boat", image)])
    assert not first.truncated_prompt
    assert not second.truncated_prompt
    for name in PROMPT_READING_EVALUATORS:
        assert abs(first.raw[name] - second.raw[name]) > 1e-5
