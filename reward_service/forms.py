"""multipart/form-data as a score request, for people with curl. No torch, no web.

Prompts and images pair up in the order they come in: as many prompts as images, or one for all of them::

    curl -F prompt='a red circle' -F image=@one.png -F image=@two.jpg http://127.0.0.1:8000/score

Further fields, each at most once: ``evaluators`` (names with commas between), ``weights`` (a JSON object),
``normalization``, ``deterministic`` and ``allow_partial`` (true or false).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from reward_service.protocol import MAX_PAIRS, MalformedBodyError, ScoreRequest, not_the_schema

MULTIPART = "multipart/form-data"
OPTIONS = ("evaluators", "weights", "normalization", "deterministic", "allow_partial")
_MOST_PARTS = 2 * MAX_PAIRS + len(OPTIONS)
_BOOLEANS = {"true": True, "false": False}

# It quotes the sender.
logging.getLogger(MultipartParser.__module__).setLevel(logging.ERROR)


def decode_form(body: bytes | bytearray, content_type: str) -> ScoreRequest:
    """Decode a form.

    :param content_type: the whole header, with the boundary
    :raises MalformedBodyError: not a form at all (``syntax``), or not one that makes a request
    """
    prompts: list[str] = []
    images: list[bytes] = []
    options: dict[str, Any] = {}
    for name, value in _parts(bytes(body), content_type):
        if name == "image":
            images.append(value)
        elif name == "prompt":
            prompts.append(_text(value, "prompt"))
        elif name not in OPTIONS:
            known = ", ".join(("prompt", "image", *OPTIONS))
            raise _unfit(f"a field has another name than {known}")
        elif name in options:
            raise _unfit(f"field {name} comes twice; it may come once")
        else:
            options[name] = _option(name, _text(value, name))
    items = [
        {"prompt": prompt, "image": {"data": image}}
        for prompt, image in zip(_one_each(prompts, images), images, strict=True)
    ]
    try:
        return msgspec.convert({"items": items, **options}, ScoreRequest, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise not_the_schema(error) from None


def _one_each(prompts: list[str], images: list[bytes]) -> list[str]:
    if len(prompts) == 1:
        return prompts * len(images)
    if len(prompts) != len(images):
        counts = f"{len(prompts)} prompts for {len(images)} images"
        raise _unfit(f"{counts}; send one prompt for all images, or one each")
    return prompts


def _option(name: str, text: str) -> Any:
    if name == "evaluators":
        return [part.strip() for part in text.split(",")]
    if name == "weights":
        try:
            return msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            raise _unfit('field weights is not JSON; write it as {"clip": 1}') from None
    if name == "normalization":
        return text
    if text not in _BOOLEANS:
        raise _unfit(f"field {name} must be true or false")
    return _BOOLEANS[text]


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _unfit(f"field {name} is not UTF-8") from None


def _unfit(detail: str) -> MalformedBodyError:
    return MalformedBodyError(detail, syntax=False)


class _Collector:
    """Callbacks of the parser: the parts by name, in their order."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bytes]] = []
        self.whole = False
        self._field, self._value = b"", b""
        self._name: str | None = None
        self._pieces: list[bytes] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._collect("_field"),
            "on_header_value": self._collect("_value"),
            "on_header_end": self._header,
            "on_part_data": lambda body, start, end: self._pieces.append(body[start:end]),
            "on_part_end": self._end,
            "on_end": lambda: setattr(self, "whole", True),
        }

    def _collect(self, attribute: str) -> Callable[[bytes, int, int], None]:
        return lambda body, start, end: setattr(self, attribute, getattr(self, attribute) + body[start:end])

    def _begin(self) -> None:
        if len(self.parts) == _MOST_PARTS:
            raise _unfit(f"more than {_MOST_PARTS} fields; send fewer pairs a request")
        self._name, self._pieces = None, []

    def _header(self) -> None:
        if self._field.lower() == b"content-disposition":
            _, parameters = parse_options_header(self._value)
            self._name = parameters.get(b"name", b"").decode("latin-1")
        self._field, self._value = b"", b""

    def _end(self) -> None:
        if self._name is None:
            raise MalformedBodyError("the body is not a valid form: a field has no name", syntax=True)
        self.parts.append((self._name, b"".join(self._pieces)))


def _parts(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary")
    if not boundary:
        raise MalformedBodyError("the body is not a valid form: its type names no boundary", syntax=True)
    collector = _Collector()
    try:
        MultipartParser(boundary, collector.callbacks()).write(body)
    except FormParserError:
        raise MalformedBodyError("the body is not a valid form", syntax=True) from None
    if not collector.whole:
        raise MalformedBodyError("the body is not a valid form: it breaks off", syntax=True)
    return collector.parts
