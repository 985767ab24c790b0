"""Hostile prompts: entities, endless words, emoji, combining marks, mojibake. Deterministic for a name."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

LONGEST = 10_000
_EMOJI = tuple(chr(code) for code in range(0x1F300, 0x1F600))
_WORDS = ("illumination", "extraordinary", "photograph", "watercolour", "cathedral", "understanding")
_SKIN, _JOINER, _SELECTOR = "\U0001f3fd", "\u200d", "\ufe0f"
_SYLLABLES = ("ab", "er", "in", "tion", "qu", "str", "eau")

Sender = Callable[[int], str]


def entities(digits: int) -> str:
    """Return a character reference of this many digits, more than `int` accepts above 4,300."""
    return f"&#{'9' * digits};"


def random_word(number: int, length: int = LONGEST) -> str:
    """Return a word of random letters."""
    return "".join(random.Random(number).choices(string.ascii_lowercase, k=length))


def repeated_syllables(number: int) -> str:
    """Return a word of syllables that have merges of their own."""
    rng = random.Random(number)
    return "".join(rng.choices(_SYLLABLES, k=LONGEST))[:LONGEST]


def emoji_word(number: int) -> str:
    """Return emoji without blanks, which are one word to the tokenizers."""
    return "".join(random.Random(number).choices(_EMOJI, k=LONGEST))


def emoji_words(number: int) -> str:
    """Return short words of emoji."""
    rng = random.Random(number)
    return " ".join("".join(rng.choices(_EMOJI, k=4)) for _ in range(LONGEST // 5))


def ordinary_words(number: int) -> str:
    """Return ordinary words, all of them new."""
    rng = random.Random(number)
    return " ".join(rng.choice(_WORDS) + str(rng.randrange(10**6)) for _ in range(LONGEST))[:LONGEST]


def joined_emoji(number: int) -> str:
    """Return emoji with skin tones, selectors and joiners between them."""
    rng = random.Random(number)
    return "".join(rng.choice(_EMOJI) + _SKIN + _SELECTOR + _JOINER for _ in range(LONGEST // 4))


def combining_marks(number: int) -> str:
    """Return one letter under thousands of combining marks of several classes, in an order to be sorted."""
    marks = [chr(code) for code in (*range(0x300, 0x34F), *range(0x591, 0x5BD), *range(0x1DC0, 0x1DE0))]
    return "a" + "".join(random.Random(number).choices(marks, k=LONGEST - 1))


def mojibake(number: int) -> str:
    """Return UTF-8 that was read as Latin-1 several times over, which ftfy repairs step by step."""
    text = f"“é”—{number} "
    for _ in range(4):
        text = text.encode().decode("latin-1")
    return (text * LONGEST)[:LONGEST]


def half_mojibake(number: int) -> str:
    """Return mojibake that cannot be repaired, with what looks like it around."""
    return ("Ã©â€™ÃÂ€Â " * LONGEST)[: LONGEST - 9] + f"\u4e2d{number:08d}"


def nested_entities(number: int) -> str:
    """Return an ampersand that was escaped thousands of times."""
    return f"{number} &" + "amp;" * ((LONGEST - 20) // 4)


def open_entities(number: int) -> str:
    """Return references without an end."""
    return (f"{number}" + "&#" * LONGEST)[:LONGEST]


def apostrophes(number: int) -> str:
    """Return contractions, which have branches of their own in the word pattern."""
    return (f"{number}" + "'s't're've'm'll'd" * LONGEST)[:LONGEST]


def blanks(number: int) -> str:
    """Return kinds of white space around single letters."""
    rng = random.Random(number)
    return "".join(rng.choices(" \t\n\r\v\f\x1c\x85\xa0\u2003\u2028\u3000a", k=LONGEST))


def expanding(number: int) -> str:
    """Return characters that become many when they are normalized or put in lower case."""
    return (f"{number}" + "\ufdfaİ\u0390\ufb03" * LONGEST)[:LONGEST]


def han(number: int) -> str:
    """Return ideographs, each three bytes long."""
    rng = random.Random(number)
    return "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(LONGEST))


def escapes(number: int) -> str:
    """Return control characters and terminal escapes."""
    return (f"{number}" + "\x1b[0;31m\x1b[\x00\x7f\x9b" * LONGEST)[:LONGEST]


def long_digits(number: int) -> str:
    """Return one number of thousands of digits, in several scripts."""
    return (f"{number}" + "1٢३๔５" * LONGEST)[:LONGEST]


def many_references(number: int) -> str:
    """Return thousands of short character references."""
    return (f"{number}" + "&#x1F600;&Eacute;&notit;" * LONGEST)[:LONGEST]
