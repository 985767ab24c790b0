"""Fuzzing of the tokenizers: no prompt raises, each has the references' ids, and each takes at most 50 ms.

    python -m benchmarks.tokenizing                      # 2,000 prompts: a minute or two
    python -m benchmarks.tokenizing --count 1000000      # hours, most of them in the references

The vocabulary is the published one of 49,408 words. The references are open_clip's SimpleTokenizer, the same
with OpenAI's special tokens, which is OpenAI's own, and transformers' CLIPTokenizer. Nothing is compared
where the reference raises; where it finds a special token, it is given the prompt with spaces in the token.
Times are of the thread's CPU, so that other load does not count.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]  # its stubs are a separate package
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from transformers import CLIPTokenizer

from benchmarks.parity.weights import write_tokenizer
from reward_service.engine.tokenizer import (
    HuggingFaceTokenizer,
    OpenClipTokenizer,
    Tokenizer,
    neutralize_special_tokens,
)

CONTEXT, START, END = 77, 49406, 49407
LIMIT_S = 0.05
MAX_CHARS = 10_000
_MAX_SHOWN = 20
#: Lengths in characters, and how often they are drawn; most prompts are short, and the references slow.
_LENGTHS = ((30, 50), (120, 35), (500, 10), (2500, 4), (MAX_CHARS, 1))
# The reference takes quadratic time for a word: 24 s for 10,000 letters. Such words have their own test.
_LONGEST_WORD = 400
_MAX_CACHED = 100_000

_SPECIAL = (
    *("<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>", "<|ENDOFTEXT|>", "<|pad|>"),
    *(
        "&lt;|endoftext|&gt;",
        "&amp;lt;end_of_text&amp;gt;",
        "＜|ｅｎｄｏｆｔｅｘｔ|＞",
        "<\u017ftart_of_text>",
        "<",
        "|>",
    ),
)
_REFERENCES = (
    *("&amp;", "&lt;", "&#38;", "&#x26;", "&AMP;", "&#x301;", "&#65286;", "&notit;", "&#0;", "&#xD800;", "&"),
    *("&#1114112;", "&#x110000;", "&amp", "&#", ";", "&#894;", "&Eacute;", "&EACUTE;", "&nbsp;", "&#10;"),
)
_WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "Café",
    "naïve",
    "ΟΔΟΣ",
    "İstanbul",
    "'s",
    "'LL",
    "ﬁre",
    "12½",
    "“q”",
    "K",
)
_SPACES = (
    " ",
    "\n",
    "\t",
    "\r\n",
    "\x85",
    "\u2028",
    "\u3000",
    "\xa0",
    "\u200b",
    "\x1c",
    "\x0b",
    "\ufeff",
    "\x00",
)
_EMOJI = (
    "👩\u200d🚀",
    "👨\u200d👩\u200d👧\u200d👦",
    "🏴\U000e0067\U000e0062\U000e007f",
    "👍🏽",
    "🇩🇪",
    "❤\ufe0f",
    "😀",
)
_ENCODINGS = ("latin-1", "cp1252", "cp1251", "cp1250", "cp1253", "macroman", "cp437", "iso-8859-2")


@cache
def characters() -> dict[str, list[str]]:
    """Return all characters by Unicode category, surrogates included."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for code in range(sys.maxunicode + 1):
        found[unicodedata.category(chr(code))].append(chr(code))
    return dict(found)


def ascii_text(rng: random.Random) -> str:
    """Return printable and other ASCII characters."""
    return "".join(chr(rng.randrange(0 if rng.random() < 0.1 else 0x20, 0x80)) for _ in range(8))


def any_character(rng: random.Random) -> str:
    """Return a character of any category, each as likely, repeated or followed by others of it."""
    category = characters()[rng.choice(list(characters()))]
    few = [rng.choice(category) for _ in range(rng.randint(1, 3))]
    return "".join(rng.choice(few) for _ in range(rng.choice((1, 2, 5, 40))))


def combining_marks(rng: random.Random) -> str:
    """Return a letter with many combining marks in any order."""
    marks = rng.sample(characters()["Mn"], 5)
    return rng.choice("aeo가\u1100\u0915") + "".join(rng.choice(marks) for _ in range(rng.choice((1, 3, 50))))


def emoji(rng: random.Random) -> str:
    """Return emoji sequences, with or without spaces."""
    return "".join(rng.choice((*_EMOJI, " ")) for _ in range(rng.randint(1, 20)))


def references(rng: random.Random) -> str:
    """Return character references, nested or broken."""
    if rng.random() < 0.3:
        part = rng.choice(("amp;", "#38;", "#x26;", "AMP;"))
        return "&" + part * rng.randint(1, 12) + rng.choice(("lt;", "eacute;", "copy;", "", "#65286;"))
    digits = rng.choice(("9", "0")) * rng.choice((1, 8, 700)) + "65"
    return rng.choice((*_REFERENCES, f"&#{digits};", f"&#x{digits};"))


def mojibake(rng: random.Random) -> str:
    """Return text that was decoded with a wrong encoding, once or twice."""
    text = rng.choice(("é", "“quoted”", "naïve café", "日本", "😀", "Привет", "ñ — x", "à la"))
    for _ in range(rng.randint(1, 2)):
        text = text.encode().decode(rng.choice(_ENCODINGS), "replace")
    return text + rng.choice(("", " ", "x"))


def long_word(rng: random.Random) -> str:
    """Return one long word: random letters, one letter or signs."""
    letters = rng.choice(("abcdefghijklmnopqrstuvwxyz", "ab", "a", "!?.,-", "äöüß", "一二三四"))
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, _LONGEST_WORD)))


def white_space(rng: random.Random) -> str:
    """Return a long run of white space and invisible characters."""
    few = rng.sample(_SPACES, 2)
    return "".join(rng.choice(few) for _ in range(rng.choice((1, 3, 100))))


def special_tokens(rng: random.Random) -> str:
    """Return a spelled-out special token, or parts of one."""
    return rng.choice(_SPECIAL)


def words(rng: random.Random) -> str:
    """Return an ordinary word and a space."""
    return rng.choice(_WORDS) + " "


GENERATORS: tuple[Callable[[random.Random], str], ...] = (
    *(ascii_text, any_character, combining_marks, emoji, references, mojibake, long_word, white_space),
    *(special_tokens, words),
)


def generate(rng: random.Random) -> tuple[str, str]:
    """Return the name of a generator, or `mixed`, and a prompt of up to 10,000 characters."""
    lengths, weights = zip(*_LENGTHS, strict=True)
    length = rng.randint(0, rng.choices(lengths, weights)[0])
    pieces = GENERATORS if rng.random() < 0.5 else (rng.choice(GENERATORS),)
    prompt = ""
    while len(prompt) < length:
        prompt += rng.choice(pieces)(rng)
    return "mixed" if len(pieces) > 1 else pieces[0].__name__, prompt[:length]


class References:
    """The references' ids of a prompt.

    Args:
        folder: folder with vocab.json and merges.txt
    """

    def __init__(self, folder: Path) -> None:
        self._open_clip, self._openai = SimpleTokenizer(), _openai_tokenizer()
        self._clean: Callable[[str], str] = self._open_clip.clean_fn
        self._transformers: Any = CLIPTokenizer.from_pretrained(folder)

    def __call__(self, prompt: str) -> dict[str, list[int]]:
        """Return ids by tokenizer, without those for which the reference raises."""
        found = {}
        try:
            cleaned = self._clean(prompt)
        except ValueError:  # a character reference of more than 4,300 digits
            pass
        else:
            found["openai"] = self._of_cleaned(self._openai, cleaned)
            found["open_clip"] = self._of_cleaned(self._open_clip, cleaned)
        if not any("\ud800" <= char <= "\udfff" for char in prompt):
            found["huggingface"] = self._of_prompt(prompt)
        return found

    @staticmethod
    def _of_cleaned(tokenizer: SimpleTokenizer, cleaned: str) -> list[int]:
        tokenizer.clean_fn = str
        if len(tokenizer.cache) > _MAX_CACHED:
            tokenizer.cache = dict(islice(tokenizer.cache.items(), 2))  # the special tokens
        ids = tokenizer.encode(cleaned)
        if START in ids or END in ids:
            ids = tokenizer.encode(neutralize_special_tokens(cleaned))
        return _cut([START, *ids, END])

    def _of_prompt(self, prompt: str) -> list[int]:
        ids = self._transformers(prompt, verbose=False)["input_ids"]
        if START in ids[1:-1] or END in ids[1:-1]:
            ids = self._transformers(neutralize_special_tokens(prompt), verbose=False)["input_ids"]
        return _cut(ids)


def _openai_tokenizer() -> SimpleTokenizer:
    tokenizer = SimpleTokenizer()
    tokenizer.pat = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )
    tokenizer.cache = {token: token for token in ("<|startoftext|>", "<|endoftext|>")}
    tokenizer.encoder |= {"<|startoftext|>": START, "<|endoftext|>": END}
    return tokenizer


def _cut(ids: list[int]) -> list[int]:
    return ids if len(ids) <= CONTEXT else [*ids[: CONTEXT - 1], END]


@dataclass
class Findings:
    """Counts, the slowest prompt by tokenizer and generator in seconds, and descriptions of failures."""

    prompts: int = 0
    compared: int = 0
    slowest_s: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    failures: list[str] = field(default_factory=list)


def load_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """Write the published vocabulary to a folder, and return the three tokenizers with it."""
    write_tokenizer(folder)
    return {
        "openai": HuggingFaceTokenizer(folder, CONTEXT, "openai"),
        "huggingface": HuggingFaceTokenizer(folder, CONTEXT),
        "open_clip": OpenClipTokenizer(Path(default_bpe()), CONTEXT),
    }


def fuzz(
    tokenizers: dict[str, Tokenizer], expected: References, prompts: Iterator[tuple[str, str]]
) -> Findings:
    """Tokenize prompts and compare their ids with the references'."""
    findings = Findings()
    for generator, prompt in prompts:
        wanted = expected(prompt)
        findings.prompts += 1
        for name, tokenizer in tokenizers.items():
            started_s = time.thread_time()
            try:
                ids = list(tokenizer(prompt).ids)
            except Exception as error:  # noqa: BLE001 - any is a finding
                findings.failures.append(f"{name} raises {type(error).__name__}: {prompt!a}")
                continue
            key = name, generator
            findings.slowest_s[key] = max(findings.slowest_s[key], time.thread_time() - started_s)
            if name in wanted:
                findings.compared += 1
                if ids != wanted[name]:
                    findings.failures.append(f"{name} differs from its reference: {prompt!a}")
    return findings


def report(findings: Findings) -> str:
    """Return the findings as a table in Markdown."""
    names = sorted({name for name, _ in findings.slowest_s})
    lines = [
        f"{findings.prompts:,} prompts, {findings.compared:,} comparisons, {len(findings.failures)} failures",
        "",
        f"| prompts | {' | '.join(f'{name}, slowest ms' for name in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for generator in sorted({generator for _, generator in findings.slowest_s}):
        times = (f"{findings.slowest_s[name, generator] * 1000:.1f}" for name in names)
        lines.append(f"| {generator.replace('_', ' ')} | {' | '.join(times)} |")
    return "\n".join([*lines, *(f"\n{line[:1000]}" for line in findings.failures[:_MAX_SHOWN])])


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzz, print the findings, and exit with status 1 on a failure or a slow prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="number of prompts (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (0)")
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        tokenizers, expected = load_tokenizers(Path(folder)), References(Path(folder))
        findings = fuzz(tokenizers, expected, (generate(rng) for _ in range(options.count)))
    print(report(findings))
    if findings.failures or max(findings.slowest_s.values(), default=0.0) > LIMIT_S:
        sys.exit(1)


if __name__ == "__main__":
    main()
