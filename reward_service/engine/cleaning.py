"""Text cleaning of OpenAI's CLIP, line by line and in bounded time.

It equals the reference, `" ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()`, with
these differences:

* a decimal character reference of any length is resolved; `html.unescape` raises for more than 4,300 digits,
  which is Python's limit for integers;
* ftfy resolves nested character references (`&amp;amp;lt;`) level by level and repeats all its steps for
  each; after a limit, which takes thousands of characters of them, the others are resolved at once.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator

import ftfy
import regex  # type: ignore[import-untyped]  # its stubs are a separate package
from ftfy import chardata, fixes
from ftfy.badness import is_bad

# ftfy's steps after the encoding, in its order; NFC follows.
_CHARACTER_FIXES = (
    fixes.fix_c1_controls,
    fixes.fix_latin_ligatures,
    fixes.fix_character_width,
    fixes.uncurl_quotes,
    fixes.fix_line_breaks,
    fixes.fix_surrogates,
    fixes.remove_terminal_escapes,
    fixes.remove_control_chars,
)
# Those that look at one character at a time.
_REPLACEMENTS = {**chardata.LIGATURES, **chardata.WIDTH_MAP, **chardata.CONTROL_CHARS}
# A line of these characters alone is cleaned to nothing: white space, but for one that ftfy takes for the
# ellipsis of another encoding, and the control characters that ftfy removes.
_NOTHING = "".join(char for code in range(0x3001) if (char := chr(code)).isspace() and char != "\x85")
_NOTHING += "".join(map(chr, chardata.CONTROL_CHARS))
# ftfy's longest character reference: `&#`, 24 letters or digits, `;`.
_MAX_REFERENCE_CHARS = 27
# `&` and what leaves `&` each time that the first of it is resolved.
_CHAIN = re.compile(r"&((?:amp;|AMP;|#0{0,20}38;|#[xX]0{0,20}26;)+)")
# Characters that are passed over in one line before the limit: about 20 ms. Text with a broken encoding takes
# longer. A line of 1,000 characters stays far below.
_MAX_PASSED_CHARS, _BROKEN_COST, _MIN_PASSES = 80_000, 4, 4
# Longer than Python's integer limit at its smallest setting.
_LONG_NUMBER = re.compile(r"&#([0-9]{641,})")
_MAX_DIGITS = 8  # more than any code point has
_LONG_MARKS = regex.compile(r"\p{M}{32,}")


def clean_lines(prompt: str) -> Iterator[str]:
    """Yield the cleaned lines of a prompt that are not empty, one at a time.

    Joined by spaces they are the cleaned prompt: no step of the reference looks beyond a line break, except
    that ftfy resolves no character references from the first line with a `<` on.
    """
    with_references = True
    cleaned: dict[tuple[str, bool], str] = {}  # thousands of equal lines can be cleaned to nothing
    for line in re.findall(r"[^\n]*\n|[^\n]+", prompt):
        if not line.strip(_NOTHING):
            continue
        with_references = with_references and "<" not in line
        key = line, with_references
        if key not in cleaned:
            resolved = resolve_references(resolve_references(fix_line(*key)))
            cleaned[key] = " ".join(resolved.split()).lower()
        if cleaned[key]:
            yield cleaned[key]


def fix_line(line: str, with_references: bool) -> str:
    """Return `ftfy.fix_text(line)`.

    Args:
        line: text without a line break, but for its last character
        with_references: whether to resolve character references
    """
    encoded = ""
    passes = passed = 0
    while passes < _MIN_PASSES or passed < _MAX_PASSED_CHARS:
        before = line
        resolved = fixes.unescape_html(line) if with_references else line
        if resolved != encoded:  # what `fix_encoding` returns, it does not change
            encoded = ftfy.fix_encoding(resolved)
        line = _fix_characters(encoded)
        if line == before:
            return line
        if line == resolved:
            line = _shorten_chains(line)
        passes += 1
        passed += len(line) * (_BROKEN_COST if is_bad(line) else 1)
    return _resolve_nested(line) if with_references else line


def resolve_references(text: str) -> str:
    """Return `html.unescape(text)`, which raises if a decimal character reference has too many digits."""
    return html.unescape(_LONG_NUMBER.sub(_shorten_number, text))


def compose(text: str) -> str:
    """Return the text in NFC.

    `unicodedata.normalize` takes quadratic time to reorder a long run of combining marks: they are sorted
    before, as NFC sorts them.
    """
    return unicodedata.normalize("NFC", _LONG_MARKS.sub(_sort_marks, text))


def _fix_characters(text: str) -> str:
    if text.isascii() and text.removesuffix("\n").isprintable():
        return text
    for fix in _CHARACTER_FIXES:
        text = fix(text)
    return compose(text)


def _shorten_chains(text: str) -> str:
    """Resolve references such as `&amp;amp;amp;lt;` as far as nothing but `&` comes out of any of them.

    ftfy would pass over the text once for each level. To its other steps, `&` and `;` are the same.
    """
    rest = _CHAIN.sub(" ", text)
    if fixes.unescape_html(rest) != rest:
        return text
    levels = min((chain.count(";") for chain in _CHAIN.findall(text)), default=1) - 1
    return _CHAIN.sub(lambda chain: "&" + chain[1].split(";", levels)[-1], text)


def _resolve_nested(text: str) -> str:
    """Return the text with all character references resolved, also those that others resolve to.

    No two references overlap, so the order does not matter unless other steps change the text in between;
    each makes the text shorter: linear time.
    """
    pending = list(reversed(text))
    done: list[str] = []
    while pending:
        done.append(pending.pop())
        if done[-1] != ";":
            continue
        tail = "".join(done[-_MAX_REFERENCE_CHARS:])
        reference = tail[tail.rfind("&") :] if "&" in tail else ""
        resolved = fixes.unescape_html(reference)
        if resolved != reference:
            del done[-len(reference) :]
            pending += reversed(unicodedata.normalize("NFC", resolved.translate(_REPLACEMENTS)))
    return "".join(done)


def _shorten_number(number: re.Match[str]) -> str:
    return f"&#{number[1].lstrip('0')[:_MAX_DIGITS] or '0'}"


def _sort_marks(marks: re.Match[str]) -> str:
    """Return a run of marks decomposed, and sorted by combining class between marks of class 0."""
    done: list[str] = []
    run: list[str] = []
    for mark in "".join(unicodedata.normalize("NFD", mark) for mark in marks[0]):
        if unicodedata.combining(mark):
            run.append(mark)
        else:
            done += [*sorted(run, key=unicodedata.combining), mark]
            run = []
    return "".join([*done, *sorted(run, key=unicodedata.combining)])
