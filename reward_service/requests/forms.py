"""Form decoding: a multipart/form-data body, as curl sends it, to a score request. No torch.

Prompts and images pair up in order: as many prompts as images, or one prompt for all images:

    curl --form-string prompt='a red circle' -F image=@one.png -F image=@two.jpg http://127.0.0.1:8000/score

Further fields, each at most once: `evaluators` (names separated by commas), `weights` (a JSON object),
`normalization`, `deterministic` and `allow_partial` (`true` or `false`).

Text belongs into `--form-string`. With `-F`, curl cuts a text at the first `;`, drops quotation marks and
reads files named after `@` or `<`. The service cannot see a cut, only what curl makes of some words behind a
`;` or `@`: a file name, a content type, a transfer encoding or a header. A text field with one of these is
refused, except for what other programs send with every text: `text/plain` with the charset UTF-8, a transfer
encoding that changes nothing, and `Content-Length`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from reward_service.protocol import (
    MAX_PAIRS,
    MAX_PROMPT_CHARS,
    MalformedBodyError,
    ScoreRequest,
    WeightsByEvaluator,
    schema_error,
)

MULTIPART = "multipart/form-data"
#: Fields of a form besides `prompt` and `image`.
OPTIONS = ("evaluators", "weights", "normalization", "deterministic", "allow_partial")

_MAX_PARTS = 2 * MAX_PAIRS + len(OPTIONS)
_MAX_OPTION_BYTES = 8192
_MAX_PROMPT_BYTES = 4 * MAX_PROMPT_CHARS  # UTF-8 has at most 4 bytes per character
# The parser's work on a header is quadratic in its parameters.
_MAX_HEADER_CHARS, _MAX_PARAMETERS = 4096, 16
_MAX_PADDING = 16
# Copying one piece takes less than a millisecond, in which no other thread runs.
_CHUNK_BYTES = 2**20
_BOOLEANS = {"true": True, "false": False}
_TEXT_TYPES = ("text/plain; charset=utf-8", "text/plain; charset=utf8")
_JSON_TYPES = ("application/json", "application/json; charset=utf-8")
_PLAIN_ENCODINGS = (b"", b"7bit", b"8bit", b"binary")
_KNOWN_HEADERS = {b"content-disposition", b"content-type", b"content-transfer-encoding", b"content-length"}

# Its log messages quote the request.
logging.getLogger(MultipartParser.__module__).setLevel(logging.ERROR)


def decode_form(body: bytes | bytearray, content_type: str) -> ScoreRequest:
    """Decode a form.

    Args:
        body: the request body
        content_type: the whole header, with the boundary

    Raises:
        MalformedBodyError: if the body is not a form (`syntax`), or the form is not a valid request
    """
    prompts: list[str] = []
    images: list[bytes] = []
    options: dict[str, Any] = {}
    for part in _parts(body, content_type):
        name = part.name()
        if name == "image":
            _check_encoding(part, name)
            images.append(part.value())
        elif name == "prompt":
            prompts.append(_prompt(part, len(prompts)))
        elif name not in OPTIONS:
            known = ", ".join(("prompt", "image", *OPTIONS))
            raise _invalid_form(f"unknown field; expected one of {known}")
        elif name in options:
            raise _invalid_form(f"field {name} is given twice; send it once")
        else:
            options[name] = _option(name, _text(part, name, _MAX_OPTION_BYTES))
    items = [
        {"prompt": prompt, "image": {"data": image}}
        for prompt, image in zip(_prompt_per_image(prompts, images), images, strict=True)
    ]
    try:
        return msgspec.convert({"items": items, **options}, ScoreRequest, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise schema_error(error) from None


# Fields -----------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """One part of the form: its headers by lower-case name, and its content in pieces."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)

    def name(self) -> str:
        """Return the name of the field.

        Raises:
            MalformedBodyError: if it has none (`syntax`)
        """
        name = self.disposition().get(b"name")
        if name is None:
            raise MalformedBodyError("the body is not a valid form: a field has no name", syntax=True)
        return name.decode("latin-1")

    def value(self) -> bytes:
        """Return the content."""
        return b"".join(self.pieces)

    def disposition(self) -> dict[bytes, bytes]:
        """Return the parameters of the header Content-Disposition."""
        return _parsed(self.headers.get(b"content-disposition", b""))[1]


def _prompt(part: _Part, index: int) -> str:
    if sum(map(len, part.pieces)) > _MAX_PROMPT_BYTES:
        raise _invalid_form(f"the prompt is longer than {MAX_PROMPT_CHARS} characters; shorten it", index)
    text = _text(part, "prompt", _MAX_PROMPT_BYTES)
    if not text:
        remedy = "send a text, with curl as --form-string prompt=TEXT, because -F cuts it at a ;"
        raise _invalid_form(f"field prompt is empty; {remedy}", index)
    return text


def _text(part: _Part, name: str, max_bytes: int) -> str:
    _check_text(part, name)
    if sum(map(len, part.pieces)) > max_bytes:
        raise _invalid_form(f"field {name} is longer than {max_bytes} bytes")
    try:
        return part.value().decode()
    except UnicodeDecodeError:
        raise _invalid_form(f"field {name} is not UTF-8") from None


def _check_text(part: _Part, name: str) -> None:
    """Refuse a text field that has a file name, or headers that change its meaning."""
    if (found := _unexpected(part, name)) is not None:
        remedy = f"with curl send it as --form-string {name}=TEXT, because -F changes ; @ < and quotes"
        raise _invalid_form(f"field {name} has {found}, but must be plain text; {remedy}")
    _check_encoding(part, name)


def _unexpected(part: _Part, name: str) -> str | None:
    """Return what a field has that no plain text has; None if there is nothing."""
    if part.disposition().keys() - {b"name"}:
        return "a file name"
    types = _TEXT_TYPES + (_JSON_TYPES if name == "weights" else ())
    sent = part.headers.get(b"content-type")
    if sent is not None and _normalized_type(sent) not in types:
        return "a Content-Type"
    return "an unknown header" if part.headers.keys() - _KNOWN_HEADERS else None


def _normalized_type(header: bytes) -> str:
    """Return a media type and its parameters in lower case, without quotation marks."""
    name, parameters = _parsed(header)
    parts = [name, *(b"%s=%s" % parameter for parameter in parameters.items())]
    return b"; ".join(parts).decode("latin-1").lower()


def _check_encoding(part: _Part, name: str) -> None:
    encoding = part.headers.get(b"content-transfer-encoding", b"")
    if encoding.strip().lower() not in _PLAIN_ENCODINGS:
        raise _invalid_form(f"field {name} has a Content-Transfer-Encoding; send its bytes as they are")


def _prompt_per_image(prompts: list[str], images: list[bytes]) -> list[str]:
    if len(prompts) == 1:
        return prompts * len(images)
    if len(prompts) != len(images):
        counts = f"{len(prompts)} prompts for {len(images)} images"
        raise _invalid_form(f"{counts}; send one prompt for all images, or one prompt per image")
    return prompts


def _option(name: str, text: str) -> Any:
    if name == "evaluators":
        return [part.strip() for part in text.split(",")]
    if name == "weights":
        return _weights(text)
    if name == "normalization":
        return text
    if text not in _BOOLEANS:
        raise _invalid_form(f"field {name} must be true or false")
    return _BOOLEANS[text]


def _weights(text: str) -> dict[str, float] | None:
    try:
        return msgspec.json.decode(text, type=WeightsByEvaluator | None)
    except msgspec.ValidationError as error:
        raise schema_error(error, "$.weights") from None
    except (msgspec.DecodeError, RecursionError):
        raise _invalid_form('field weights is not JSON; send a JSON object such as {"clip": 1}') from None


def _invalid_form(detail: str, index: int | None = None) -> MalformedBodyError:
    return MalformedBodyError(detail, syntax=False, index=index)


# Parts ------------------------------------------------------------------------------------------------


class _PartCollector:
    """Callbacks for the multipart parser; collects the parts in order."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.complete = False
        self._field, self._value = b"", b""

    def callbacks(self) -> Any:
        return {
            "on_part_begin": lambda: self.parts.append(_Part()),
            "on_header_begin": self._on_header_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_part_data": lambda body, start, end: self.parts[-1].pieces.append(body[start:end]),
            "on_end": self._on_end,
        }

    def _on_header_begin(self) -> None:
        self._field, self._value = b"", b""

    def _on_header_field(self, body: bytes, start: int, end: int) -> None:
        self._field += body[start:end]

    def _on_header_value(self, body: bytes, start: int, end: int) -> None:
        self._value += body[start:end]

    def _on_header_end(self) -> None:
        headers, name = self.parts[-1].headers, self._field.lower()
        if name in headers:
            raise MalformedBodyError("the body is not a valid form: a field has a header twice", syntax=True)
        headers[name] = self._value

    def _on_end(self) -> None:
        self.complete = True


def _parts(body: bytes | bytearray, content_type: str) -> Iterable[_Part]:
    boundary = _parsed(content_type.encode("latin-1", "replace"))[1].get(b"boundary")
    if not boundary:
        raise MalformedBodyError("the body is not a valid form: Content-Type has no boundary", syntax=True)
    _check_delimiters(body, b"\r\n--" + boundary)
    collector = _PartCollector()
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        for start in range(0, len(body), _CHUNK_BYTES):
            parser.write(bytes(body[start : start + _CHUNK_BYTES]))
    except FormParserError:
        raise MalformedBodyError("the body is not a valid form", syntax=True) from None
    if not collector.complete:
        raise MalformedBodyError("the body is not a valid form: it is incomplete", syntax=True)
    return collector.parts


def _check_delimiters(body: bytes | bytearray, delimiter: bytes) -> None:
    """Bound the parser's work: behind each delimiter it takes bytes one by one, even endless white space."""
    # The first delimiter needs no line end before it, and the last one begins no field.
    end, count = 0, 0 if body.startswith(delimiter[2:]) else -1
    while (start := body.find(delimiter, end)) >= 0:
        end, count = start + len(delimiter), count + 1
        if count > _MAX_PARTS:
            raise _invalid_form(f"more than {_MAX_PARTS} fields; send fewer pairs per request")
        padding = body[end : end + _MAX_PADDING + 1]
        if len(padding) > _MAX_PADDING and not padding.strip(b" \t"):
            raise MalformedBodyError(
                "the body is not a valid form: white space after a boundary", syntax=True
            )


def _parsed(header: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the value of a header and its parameters by name."""
    if len(header) > _MAX_HEADER_CHARS or header.count(b";") > _MAX_PARAMETERS:
        raise MalformedBodyError(
            "the body is not a valid form: a header has too many parameters", syntax=True
        )
    return parse_options_header(header)
