"""YAML documents by the core schema of YAML 1.2, with duplicate keys refused.

PyYAML parses the syntax. Which plain scalar is a number, a boolean or null follows YAML 1.2: `010` is ten,
`0o10` eight, and `1:30`, `1_000`, `yes` and `2024-01-01` are strings. Merge keys (`<<`) and tags beyond the
core schema are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from reward_service.runtime.errors import one_line

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_TRUE = ("true", "True", "TRUE")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class YamlError(ValueError):
    """A document that is not valid YAML; the message is one line.

    Attributes:
        line: line number, from 1; None if it is not known
    """

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(one_line(problem if line is None else f"line {line}: {problem}"))
        self.line = line


class DuplicateKeyError(YamlError):
    """A key that a mapping has twice."""


def parse_yaml(text: str) -> Any:
    """Return the plain values of a document; None if it is empty.

    Raises:
        YamlError: invalid syntax, a duplicate key or an unknown tag
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - it constructs plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(error.problem or "invalid", mark.line + 1 if mark else None) from None
    except RecursionError:
        raise YamlError("too deeply nested") from None
    except DuplicateKeyError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an escape beyond Unicode
        raise YamlError(str(error)) from None


def dump_yaml(value: Any, *, allow_unicode: bool = False) -> str:
    """Return plain values as a document that `parse_yaml` and readers of YAML 1.1 read alike."""
    return str(
        yaml.dump(
            value, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode, default_flow_style=False
        )
    )


class _Loader(yaml.BaseLoader):
    """Loader of the core schema."""

    def construct_null(self, node: yaml.Node) -> None:
        """Return None."""
        if not _NULL.match(_text(node)):
            raise ConstructorError(None, None, "expected null", node.start_mark)

    def construct_bool(self, node: yaml.Node) -> bool:
        """Return a boolean."""
        text = _text(node)
        if not _BOOL.match(text):
            raise ConstructorError(None, None, "expected true or false", node.start_mark)
        return text in _TRUE

    def construct_int(self, node: yaml.Node) -> int:
        """Return an integer: decimal, `0o17` or `0xff`."""
        text = _text(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            if _INT.match(text):
                return int(text, base)
        except ValueError:  # more digits than Python converts
            pass
        raise ConstructorError(None, None, "expected an integer of usual size", node.start_mark)

    def construct_float(self, node: yaml.Node) -> float:
        """Return a number, also `.inf` and `.nan`."""
        text = _text(node)
        if not _FLOAT.match(text):
            raise ConstructorError(None, None, "expected a number", node.start_mark)
        name = text.lstrip("+-").lower()
        if name == ".nan":
            return math.nan
        if name == ".inf":
            return -math.inf if text.startswith("-") else math.inf
        return float(text)

    def construct_text(self, node: yaml.Node) -> str:
        """Return a string."""
        return _text(node)

    def construct_list(self, node: yaml.Node) -> list[Any]:
        """Return a list."""
        if not isinstance(node, yaml.SequenceNode):
            raise ConstructorError(None, None, "expected a list", node.start_mark)
        return list(self.construct_sequence(node, deep=True))

    def construct_dict(self, node: yaml.Node) -> dict[Hashable, Any]:
        """Return a mapping; refuse a key that it has twice, and a merge key."""
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, "expected a mapping", node.start_mark)
        lines: dict[Hashable, int] = {}
        values: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, "a key must be a scalar", key_node.start_mark)
            if key == "<<" and key_node.style is None:
                problem = "merge keys (<<) are not part of YAML 1.2; write the keys out"
                raise ConstructorError(None, None, problem, key_node.start_mark)
            if key in values:
                problem = f"the key {key!r} is there twice, first in line {lines[key]}; remove one"
                raise DuplicateKeyError(problem, line)
            lines[key] = line
            values[key] = self.construct_object(value_node, deep=True)
        return values

    def refuse_tag(self, node: yaml.Node) -> None:
        """Raise an error about a tag that the core schema does not have."""
        raise ConstructorError(None, None, f"unknown tag {node.tag}; write a plain value", node.start_mark)


def _text(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConstructorError(None, None, "expected a single value", node.start_mark)
    return str(node.value)


_CONSTRUCTORS: dict[str, Callable[[_Loader, yaml.Node], Any]] = {
    "null": _Loader.construct_null,
    "bool": _Loader.construct_bool,
    "int": _Loader.construct_int,
    "float": _Loader.construct_float,
    "str": _Loader.construct_text,
    "seq": _Loader.construct_list,
    "map": _Loader.construct_dict,
}
for _name, _construct in _CONSTRUCTORS.items():
    _Loader.add_constructor(f"{_TAG}{_name}", _construct)
_Loader.add_constructor(None, _Loader.refuse_tag)

# In the order of their precedence: every integer is a number too.
_RESOLVERS: dict[str, tuple[re.Pattern[str], list[str]]] = {
    "null": (_NULL, ["~", "n", "N", ""]),
    "bool": (_BOOL, list("tTfF")),
    "int": (_INT, list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
}


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes strings which YAML 1.1 or 1.2 would read as something else."""


for _name, (_pattern, _first) in _RESOLVERS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)
