"""MkDocs hooks: settings reference from the configuration models, Mermaid from this repository."""

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema

import reward_service.config
import trainer.config

MERMAID = "assets/mermaid/mermaid.js"
REFERENCES: dict[str, tuple[str, str, type[BaseModel]]] = {
    "reference/service-settings.md": ("Service settings", "service", reward_service.config.ServiceConfig),
    "reference/trainer-settings.md": ("Trainer settings", "trainer", trainer.config.TrainerConfig),
}
LIMITS = {
    "exclusiveMinimum": ">",
    "minimum": "≥",
    "exclusiveMaximum": "<",
    "maximum": "≤",
    "minLength": "length ≥",
    "minProperties": "entries ≥",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for path, (title, section, model) in REFERENCES.items():
        files.append(File.generated(config, path, content=settings_page(title, section, model)))
    return files


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Load Mermaid on the pages that have a diagram; the theme would fetch it from a public host."""
    if 'class="mermaid"' not in output:
        return output
    depth = page.file.url.count("/")
    return output.replace("</body>", f'<script src="{"../" * depth}{MERMAID}"></script></body>')


def settings_page(title: str, section: str, model: type[BaseModel]) -> str:
    """Return the Markdown reference of one section: a table for each of its models."""
    introduction = (
        f"All keys of the `{section}:` section of a configuration file, generated from the model "
        f"`{model.__module__}.{model.__name__}`. Set a key in the file, or on the command line with "
        f"`--set KEY=VALUE`. [Configuration](../configuration.md) explains the file."
    )
    return "\n".join([f"# {title}", "", introduction, "", *_section("", model, {})]) + "\n"


@dataclass(frozen=True)
class _Setting:
    """One row of a table."""

    key: str
    kind: str
    default: str
    meaning: str


def _section(prefix: str, model: type[BaseModel], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield the Markdown lines of a model and of its nested models.

    Args:
        prefix: dotted key of the model, ending with a dot; empty at the top
        model: the model
        defaults: values of this section that the parent model sets, in place of the model's own
    """
    inner: list[tuple[str, type[BaseModel], Mapping[str, Any]]] = []
    rows: list[_Setting] = []
    for name, field in model.model_fields.items():
        nested = _nested(field.annotation)
        default = defaults.get(name, field.get_default(call_default_factory=True, validated_data={}))
        if nested is None:
            rows.append(_setting(prefix, name, model, field, default))
            continue
        named = get_origin(_bare(field.annotation)) is dict
        values: Mapping[str, Any] = default.model_dump(mode="json") if isinstance(default, BaseModel) else {}
        inner.append((f"{prefix}{name}.{'NAME.' if named else ''}", nested, values))
    if prefix:
        yield from (f"## `{prefix[:-1]}`", "")
    yield from (_docstring(model)[0], "")
    if rows:
        described = any(row.meaning for row in rows)
        yield from (
            "| key | type | default |" + described * " meaning |",
            "|---|---|---|" + described * "---|",
        )
        for row in rows:
            yield f"| `{row.key}` | {row.kind} | {row.default} |" + described * f" {row.meaning} |"
        yield ""
    for key, nested, values in inner:
        yield from _section(key, nested, values)


def _setting(prefix: str, name: str, model: type[BaseModel], field: FieldInfo, default: Any) -> _Setting:
    schema = _schema(model)
    return _Setting(
        key=prefix + name,
        kind=_cell(_kind(schema["properties"][name], schema.get("$defs", {}))),
        default="**required**" if field.is_required() else _cell(f"`{_shown(default)}`"),
        meaning=_cell(_meaning(name, model, field)),
    )


def _meaning(name: str, model: type[BaseModel], field: FieldInfo) -> str:
    """Return a field's description in the words of a configuration file, which has null for None."""
    text = field.description or _attributes(model).get(name) or _comments(model).get(name, "")
    return re.sub(r"\bNone\b", "null", text)


def _shown(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    return json.dumps(value, default=str, ensure_ascii=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _kind(schema: JsonSchemaValue, definitions: Mapping[str, Any]) -> str:
    """Return a type in words: its name, its choices or its range."""
    if "$ref" in schema:
        return _kind(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(it, definitions) for it in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{it}`" for it in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = str(schema.get("type", "any"))
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})]
        kind = "list of " + " and ".join(_kind(it, definitions) for it in items[:1])
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"mapping of names to {_kind(schema['additionalProperties'], definitions)}"
    elif schema.get("format") == "path":
        kind = "path"
    limits = [f"{sign} {schema[key]:,}".removesuffix(".0") for key, sign in LIMITS.items() if key in schema]
    pattern = [f"like `{schema['pattern']}`"] if "pattern" in schema else []
    return ", ".join([kind, *limits, *pattern])


class _Schema(GenerateJsonSchema):
    """JSON schema in which a type that JSON does not have is a string."""

    def handle_invalid_for_json_schema(self, schema: CoreSchema, error_info: str) -> JsonSchemaValue:  # noqa: ARG002
        return {"type": "string"}


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(schema_generator=_Schema)


@cache
def _comments(model: type[BaseModel]) -> dict[str, str]:
    """Return the source comments of each field: those above it, then those at its end."""
    source = textwrap.dedent(inspect.getsource(model))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {it.start[0]: it.string.lstrip("#: ") for it in tokens if it.type == tokenize.COMMENT}
    lines = source.splitlines()
    found: dict[str, str] = {}
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for statement in tree.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        first = statement.lineno
        while first > 1 and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        own = range(first, (statement.end_lineno or statement.lineno) + 1)
        found[statement.target.id] = " ".join(comments[number] for number in own if number in comments)
    return found


@cache
def _docstring(model: type[BaseModel]) -> tuple[str, str]:
    """Return a model's docstring in two parts: the text, and the content of its `Attributes:` section."""
    text, _, attributes = inspect.cleandoc(model.__doc__ or "").partition("\nAttributes:\n")
    return text.strip(), attributes


@cache
def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """Return the descriptions in the `Attributes:` section of a model's docstring."""
    lines = re.split(r"^    (\w+): *", _docstring(model)[1], flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(lines[1::2], lines[2::2], strict=True)}


def _bare(annotation: Any) -> Any:
    """Return `X` of `X | None` and of `Annotated[X, ...]`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _bare(next(it for it in get_args(annotation) if it is not type(None)))
    return annotation


def _nested(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that holds one, or a mapping of names to such; None for a plain value."""
    bare = _bare(annotation)
    if get_origin(bare) is dict:
        bare = _bare(get_args(bare)[1])
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None
