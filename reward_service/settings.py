"""Configuration files: one YAML file with a section `service:` and a section `trainer:`.

Each program reads its own section into a frozen model that defines every key. Every error is a `ConfigError`
with a message of one line: the file, the key, the problem, the remedy.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from reward_service.runtime.errors import ConfigError as ConfigError  # re-exported
from reward_service.runtime.errors import one_line as one_line
from reward_service.runtime.yaml12 import YamlError, parse_yaml

SECTIONS = ("service", "trainer")
_NO_HOME = "{} has no home folder here; write the whole path, or set the environment variable HOME"
DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "miniature.yaml"


class Settings(BaseModel):
    """Base class of configuration models: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=BaseModel)


def _resolve_path(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    path = expand_user(path)
    if folder is None or path.is_absolute():
        return path
    # Not resolved: a symbolic link may point to another file tomorrow, as those of mounted secrets do.
    return Path(os.path.normpath(Path(folder) / path))


def expand_user(path: Path) -> Path:
    """Return the path with a leading `~` or `~user` replaced by a home folder.

    Raises:
        ValueError: the user has no home folder
    """
    if not str(path).startswith("~"):
        return path
    first = path.parts[0]
    if first == "~" and os.environ.get("HOME") == "":
        raise ValueError(_NO_HOME.format(first))
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(_NO_HOME.format(first)) from None


#: A path in a configuration; a relative one is relative to the folder of the configuration file.
ConfigPath = Annotated[Path, AfterValidator(_resolve_path)]


def load_section(
    model: type[M], path: Path, section: str, overrides: Sequence[str] = (), presets: str | None = None
) -> M:
    """Read one section of a configuration file.

    Args:
        model: the pydantic model of the section
        path: the YAML file
        section: `service` or `trainer`
        overrides: `key.subkey=value` strings, relative to the section. Values are YAML, but those of settings
            that are texts or paths are taken as they are, apart from `null` and quotes around the whole
        presets: `key.subkey` of a mapping in the file, from such keys to values; overrides take precedence

    Raises:
        ConfigError: the file, a key or a value is invalid; the message is one line
    """
    values = _select_section(_read_yaml(path), path, section)
    for key, value in (_read_presets(values, presets) if presets else {}).items():
        _set_key(values, str(key), value, f"{presets}: {key}")
    for override in overrides:
        _apply_override(model, values, override)
    return _validate(model, values, section, f"{path}: ", {"folder": path.resolve().parent})


def with_changes(settings: M, section: str, values: Mapping[str, Any], prefix: str = "") -> M:
    """Return a copy of the settings with some values replaced.

    Args:
        settings: a model of the section
        section: name of the section, for error messages
        values: new values by dotted key
        prefix: prefix of error messages

    Raises:
        ConfigError: a key or value is invalid
    """
    dumped = settings.model_dump(mode="json")
    for key, value in values.items():
        _set_key(dumped, key, value, f"{prefix}{key}")
    return _validate(type(settings), dumped, section, prefix, None)


def _validate(
    model: type[M], values: Mapping[str, Any], section: str, prefix: str, context: Mapping[str, Any] | None
) -> M:
    try:
        return model.model_validate(values, context=dict(context or {}))
    except ValidationError as error:
        raise ConfigError(f"{prefix}{_describe(error, model, section)}") from None


def _read_presets(values: Mapping[str, Any], dotted: str) -> Mapping[str, Any]:
    found: Any = values
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; name one with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({one_line(error)}); name a YAML file") from None
    try:
        document = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML ({error}); correct it") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected the sections {' and '.join(SECTIONS)} at the top")
    return document


def _select_section(document: Mapping[str, Any], path: Path, section: str) -> dict[str, Any]:
    for key in document:
        if key not in SECTIONS:
            raise ConfigError(f"{path}: unknown key {key!r} at the top; {_suggest(str(key), SECTIONS)}")
    values = document.get(section)
    if values is None:
        raise ConfigError(f"{path}: section {section!r} is missing; add it or name another --config")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: section {section!r} must be a mapping, not {type(values).__name__}")
    return values


def _apply_override(model: type[BaseModel], values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: write it as key.subkey=value")
    if not text.strip():  # an unset variable of a shell must not switch a setting off
        raise ConfigError(f"override {override!r}: the value is empty; write null for none")
    try:
        value = _override_value(_annotation(model, keys), text)
    except YamlError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML ({error}); quote it") from None
    _set_key(values, dotted.strip(), value, f"override {override!r}")


def _override_value(annotation: Any, text: str) -> Any:
    """Return the value of an override.

    A path or another text is taken as it is, whatever YAML would make of it, unless all of it is quoted.
    """
    inner = _unwrap(annotation)
    is_path = inner is Path
    if not is_path and not _is_text(annotation):
        return parse_yaml(text)
    if text.strip() == "null" and inner is not annotation:
        return None
    plain = _unquoted(text.strip()) or (text if is_path else text.strip())
    # A path object, so that a name that is not UTF-8 is valid.
    return Path(plain) if is_path else plain


def _unquoted(text: str) -> str | None:
    """Return the text within the quotes of YAML; None if the text is not a quoted one."""
    if len(text) < 2 or text[0] not in "\"'" or text[-1] != text[0]:
        return None
    try:
        return str(parse_yaml(text))
    except YamlError:
        return None


def _is_text(annotation: Any) -> bool:
    """Return whether a setting's value is a string, or a string or null."""
    if annotation is None or _is_model(annotation):
        return False
    schema = TypeAdapter(annotation).json_schema()
    kinds = {part.get("type") for part in schema.get("anyOf", [schema])}
    return "string" in kinds and kinds <= {"string", "null"}


def _set_key(values: dict[str, Any], dotted: str, value: Any, prefix: str) -> None:
    *keys, last = dotted.split(".")
    for key in keys:
        inner = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{prefix}: {key!r} is a value, not a mapping")
        values = inner
    values[last] = value


def _describe(error: ValidationError, model: type[BaseModel], section: str) -> str:
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    key = ".".join((section, *map(str, first["loc"])))
    return f"{key}: {_describe_problem(first, model)}{more}"


def _describe_problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    location = detail["loc"]
    if detail["type"] == "extra_forbidden":
        return f"unknown key; {_suggest(str(location[-1]), _known_keys(model, location[:-1]))}"
    if detail["type"] == "missing":
        return "required, but missing; add it"
    message, found = one_line(detail["msg"].removeprefix("Value error, ")), detail["input"]
    shown = one_line(repr(str(found) if isinstance(found, Path) else found))
    remedy = "; put it in quotes" if _is_unquoted_text(detail) else ""
    return f"{message[:1].lower()}{message[1:]}" + (f" (found {shown})" if len(shown) <= 60 else "") + remedy


def _is_unquoted_text(detail: ErrorDetails) -> bool:
    """Return whether YAML made a number or a boolean of what should be a text or a path."""
    return detail["type"] in ("string_type", "path_type") and isinstance(detail["input"], int | float)


def _suggest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known keys: {', '.join(sorted(known))}" if known else "remove it"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return the field names of the model at `location` below `model`; empty if it is not a model."""
    inner = _unwrap(_annotation(model, location))
    return tuple(inner.model_fields) if _is_model(inner) else ()


def _annotation(model: type[BaseModel], location: Sequence[int | str]) -> Any:
    """Return the annotation of the setting at `location` below `model`; None if there is none."""
    found: Any = model
    for part in location:
        inner = _unwrap(found)
        if _is_model(inner):
            field = inner.model_fields.get(str(part))
            found = field.annotation if field else None
        else:  # a key of dict[str, X], an index of list[X]
            found = (get_args(inner) or (None,))[-1]
    return found


def _unwrap(annotation: Any) -> Any:
    """Return `X` of `X | None` and of `Annotated[X, ...]`."""
    if get_origin(annotation) is Annotated:
        return _unwrap(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _unwrap(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
