"""Configuration files: one YAML file with a section `service:` and a section `trainer:`.

Each program reads its own section into a frozen model that defines every key. Every error is a `ConfigError`
with a message of one line: the file, the key, the problem, the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

SECTIONS = ("service", "trainer")
DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "miniature.yaml"


def configure_openmp() -> None:
    """Let OpenMP's idle threads spin for microseconds, then sleep; call it before torch is imported.

    Service and trainer often share cores. Threads that keep spinning slow the other program down by up to
    four times; threads that sleep at once make small operations as slow on two cores as on one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


class ConfigError(Exception):
    """A configuration that cannot be used; the message is one line."""


class Settings(BaseModel):
    """Base class of configuration models: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=BaseModel)


def _resolve_path(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    path = path.expanduser()
    return path if folder is None or path.is_absolute() else (Path(folder) / path).resolve()


#: A path in a configuration; a relative one is relative to the folder of the configuration file.
ConfigPath = Annotated[Path, AfterValidator(_resolve_path)]


class _Loader(yaml.SafeLoader):
    """Loader that reads `1e-3` as a number; YAML 1.1 reads it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


#: PyYAML raises the last three for impossible dates, wrong tags and deep nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, AttributeError, RecursionError)


def load_section(
    model: type[M], path: Path, section: str, overrides: Sequence[str] = (), presets: str | None = None
) -> M:
    """Read one section of a configuration file.

    Args:
        model: the pydantic model of the section
        path: the YAML file
        section: `service` or `trainer`
        overrides: `key.subkey=value` strings, relative to the section; values are YAML
        presets: `key.subkey` of a mapping in the file, from such keys to values; overrides take precedence

    Raises:
        ConfigError: the file, a key or a value is invalid; the message is one line
    """
    values = _select_section(_read_yaml(path), path, section)
    for key, value in (_read_presets(values, presets) if presets else {}).items():
        _set_key(values, str(key), value, f"{presets}: {key}")
    for override in overrides:
        _apply_override(values, override)
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
        document = _parse(text)
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: not valid YAML ({one_line(error)}); correct it") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected the sections {' and '.join(SECTIONS)} at the top")
    return document


def _parse(text: str) -> Any:
    """Parse YAML into plain values only: the loader is a SafeLoader."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader's subclass


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


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: write it as key.subkey=value")
    try:
        value = _parse(text)
    except _NOT_YAML:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None
    _set_key(values, dotted.strip(), value, f"override {override!r}")


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
    message = one_line(detail["msg"].removeprefix("Value error, "))
    shown = one_line(repr(detail["input"]))
    return f"{message[:1].lower()}{message[1:]}" + (f" (found {shown})" if len(shown) <= 60 else "")


def _suggest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known keys: {', '.join(sorted(known))}" if known else "remove it"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Return the field names of the model at `location` below `model`; empty if it is not a model."""
    inner: Any = model
    for part in location:
        if _is_model(inner):
            field = inner.model_fields.get(str(part))
            inner = _unwrap(field.annotation) if field else None
        else:  # a key of dict[str, X], an index of list[X]
            inner = _unwrap((get_args(inner) or (None,))[-1])
    return tuple(inner.model_fields) if _is_model(inner) else ()


def _unwrap(annotation: Any) -> Any:
    """Return `X` of `X | None` and of `Annotated[X, ...]`."""
    if get_origin(annotation) is Annotated:
        return _unwrap(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _unwrap(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def one_line(message: object) -> str:
    """Return the message on one line, with single spaces."""
    return " ".join(str(message).split())
