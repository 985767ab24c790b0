"""YAML by the core schema of YAML 1.2: plain scalars, duplicate keys, tags and written documents."""

import math
from typing import Any

import pytest
import yaml

from reward_service.runtime.yaml12 import DuplicateKeyError, YamlError, dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("Null", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("2024-99-99", "2024-99-99"),
        ("1e3", 1000.0),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("=", "="),
        ("!!str 010", "010"),
        ("!!float 3", 3.0),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("٣", "٣"),
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    """Numbers of base 60, dates and yes or no are strings; a leading zero is no octal number."""
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", r"line 3: the key 'a' is there twice, first in line 1"),
        ("a:\n  b: 1\n  'b': 2", r"line 3: the key 'b' .* line 2"),
        ("{1: x, 0x1: y}", r"the key 1 is there twice"),
    ],
)
def test_duplicate_keys_are_refused_with_both_lines(text: str, words: str) -> None:
    """Also in an inner mapping, and if they are written differently."""
    with pytest.raises(DuplicateKeyError, match=words):
        parse_yaml(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: b: c",
        "- 1\n---\n- 2",
        "&a [*a]",
        "*nothing",
        "a: 1\n<<: {b: 2}",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2024-01-01",
        "!!python/object/apply:os.system [true]",
        "!!int x",
        "!!bool yes",
        "!!null x",
        "!!map x",
        "!!seq {a: 1}",
        "!!str [a]",
        "? [a]\n: 1",
        '"\\UFFFFFFFF"',
        "9" * 5000,
        "[" * 5000,
        "a:\n\tb",
        "\0",
    ],
)
def test_everything_else_is_one_error_of_one_line(text: str) -> None:
    """Syntax errors, unknown tags, merge keys, numbers without end: never an exception of the library."""
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_written_documents_read_the_same_in_both_versions() -> None:
    """A run that is called 1e3 or yes resumes under this name; other programs read YAML 1.1."""
    texts = ["010", "1:30", "1e3", "0o17", "yes", "~", "null", "", "2024-01-01", "1_000", "=", "<<", "a #b"]
    values = {"texts": texts, "numbers": [1e-5, 1.0, math.inf, 1e22, -3], "none": None, "010": True, 5: "é"}
    for text in (dump_yaml(values), dump_yaml(values, allow_unicode=True)):
        assert parse_yaml(text) == yaml.safe_load(text) == values
