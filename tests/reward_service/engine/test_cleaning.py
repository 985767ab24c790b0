"""Cleaning of prompts: equal to ftfy and html.unescape, and defined where these raise or take too long."""

from __future__ import annotations

import html
import random
import unicodedata

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tokenizing import mojibake, references
from reward_service.engine.cleaning import clean_lines, compose, fix_line

PIECES = st.one_of(
    st.sampled_from(
        ("&amp;", "&#38;", "amp;", "#38;", "lt;", "eacute;", "&", ";", "Ã", "©", "\ufffd", "\n", "\r")
    ),
    st.sampled_from(
        ("<", "＆", "；", "\u037e", "\u0301", "\u0315", "Σ", "\x85", "\x1c", "\xa0", "\ud83d", "\ude00")
    ),
    st.text(max_size=5),
)


def clean(prompt: str) -> str:
    return " ".join(clean_lines(prompt))


def reference(prompt: str) -> str:
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


@given(prompt=st.lists(PIECES, max_size=30).map("".join))
@settings(max_examples=300, deadline=None)
def test_cleaning_equals_the_reference(prompt: str) -> None:
    """Whatever the order in which references, broken encodings and marks have to be fixed."""
    assert clean(prompt) == reference(prompt)


@pytest.mark.parametrize("seed", range(20))
def test_nested_references_resolve_level_by_level(seed: int) -> None:
    """The order shows in the result if they resolve to characters of a broken encoding."""
    rng = random.Random(seed)
    prompt = "".join(rng.choice((references, references, mojibake))(rng) for _ in range(30))
    assert clean(prompt) == reference(prompt)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        (f"a &#{'9' * 4301}; b", "a \ufffd b"),
        (f"a &#{'9' * 9000} b", "a \ufffd b"),
        (f"a &#{'0' * 5000}65; b", "a a b"),
        (f"a &#{'0' * 5000}; b", "a \ufffd b"),
        (f"a &amp;#{'9' * 5000}; b", "a \ufffd b"),
        (f"a &#x{'9' * 5000}; b", "a \ufffd b"),
    ],
    ids=["4,301 nines", "no semicolon", "zeros", "only zeros", "escaped", "hexadecimal"],
)
def test_numeric_references_of_any_length(prompt: str, cleaned: str) -> None:
    """html.unescape raises beyond 4,300 digits; the number's value decides instead, as for fewer digits."""
    assert clean(prompt) == cleaned


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("&" + "amp;" * 2400 + "lt;", "<"),
        ("é&" + "amp;" * 2400 + "lt;", "é<"),
        ("é&" + "#38;" * 2400 + "eacute;", "éé"),
        ("é" + "&#5&#5&#5&#5&#4" * 400 + "8" + ";" * 2000, "é8"),
    ],
    ids=["ascii", "not ascii", "numeric", "in the middle"],
)
def test_thousands_of_nested_references(prompt: str, cleaned: str) -> None:
    """ftfy needs one pass for each level: seconds."""
    assert clean(prompt) == cleaned


def test_lines_are_cleaned_only_when_they_are_read() -> None:
    """The first words of a long prompt do not cost the whole prompt."""
    lines = clean_lines("one\n\x00\n\ntwo\nthree\n")
    assert next(lines) == "one"
    assert list(lines) == ["two", "three"]


def test_references_after_a_tag_are_left_to_html() -> None:
    """From the first line with a `<` on, ftfy resolves none, in later lines neither."""
    for prompt in ("&NTILDE;\n<b>\n&NTILDE;", "<\n&amp;amp;amp;amp;lt;", "&lt;\n&NTILDE;"):
        assert clean(prompt) == reference(prompt)


@pytest.mark.parametrize(
    "marks", ["\u0315\u0300", "\u0344\u0327", "\u0f73\u0301\u0f71", "\u034f\u0327\u0301"]
)
def test_long_runs_of_marks_are_composed_as_python_does_it(marks: str) -> None:
    """In any order of their classes, with marks that decompose and marks of class 0."""
    rng = random.Random(0)
    for start in ("a", "é", "\u0f40", ""):
        text = start + "".join(rng.choice(marks) for _ in range(300)) + "b"
        assert compose(text) == unicodedata.normalize("NFC", text)
        assert fix_line(text, with_references=True) == ftfy.fix_text(text)
