"""UTF-8 and CSV: the line of every error, and what a spreadsheet writes."""

import pytest

from reward_service.runtime.text_files import CsvSyntaxError, CsvTable, TextFileError, decode_utf8


def test_rows_have_the_line_at_which_they_begin() -> None:
    """Quoted line ends and blank lines count, with every kind of line end."""
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["Image , PROMPT", 'a,"two', 'lines"', "", "b,x", ""])
        table = CsvTable(text, ("image", "prompt"))
        assert table.header == ["image", "prompt"]
        assert [(line, fields[0]) for line, fields in table.rows()] == [(2, "a"), (5, "b")]


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("image;prompt", "a semicolon"),
        ('"image";"prompt"', "a semicolon"),
        ("Image\tPrompt\tseed", "a tab"),
        ("prompt|image", "a vertical bar"),
        ("sep=;", "a semicolon"),
    ],
)
def test_other_separators_are_named(header: str, name: str) -> None:
    """A German spreadsheet writes semicolons: the message is not that a column is missing."""
    with pytest.raises(TextFileError, match=f"line 1: the separator is a comma, not {name}"):
        CsvTable(f"{header}\na;b\n", ("image", "prompt"))


def test_a_missing_column_is_left_to_the_caller() -> None:
    """A comma-separated header without the wanted columns is a header."""
    assert CsvTable("text,user;name\n", ("prompt",)).header == ["text", "user;name"]


def test_an_open_quote_is_reported_where_it_begins() -> None:
    """The reader notices it at the end of the file."""
    with pytest.raises(CsvSyntaxError, match="line 3"):
        list(CsvTable('prompt\na\n"b\nc\nd\n', ("prompt",)).rows())


def test_bytes_that_are_not_utf8_have_a_line() -> None:
    """The byte order mark of a spreadsheet is not part of the text."""
    assert decode_utf8(b"\xef\xbb\xbfprompt") == "prompt"
    with pytest.raises(TextFileError, match="line 2: not UTF-8 text"):
        decode_utf8(b"a\ncaf\xe9\n")
