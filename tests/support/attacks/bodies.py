"""Hostile bodies: forms, JSON and msgpack whose parts cost much more than their bytes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from reward_service.protocol import JSON, MSGPACK
from tests.support.attacks import png

BOUNDARY = b"frontier"
FORM = "multipart/form-data; boundary=frontier"
#: Just below the largest body.
LARGE = 60_000_000


@dataclass(frozen=True)
class Message:
    """One request: its target, its headers without those of the length, and its body."""

    body: bytes = b""
    content_type: str = JSON
    path: str = "/v1/score"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def pairs(prompts: Sequence[str], images: Iterable[bytes]) -> Message:
    """Return a request for the scores of pairs in msgpack."""
    items = [{"prompt": p, "image": {"data": i}} for p, i in zip(prompts, images, strict=True)]
    return Message(msgspec.msgpack.encode({"items": items}), MSGPACK)


def images(*files: bytes) -> Message:
    """Return a request for the scores of images under one prompt."""
    return pairs(["an image"] * len(files), files)


def texts(*prompts: str) -> Message:
    """Return a request for the scores of prompts on one small image."""
    return pairs(prompts, [png.flat()] * len(prompts))


def deterministic(count: int) -> Message:
    """Return a request for deterministic scores, which run in batches of their own."""
    items = [{"prompt": f"prompt {n}", "image": {"data": png.flat()}} for n in range(count)]
    return Message(msgspec.msgpack.encode({"items": items, "deterministic": True}), MSGPACK)


def raw_pixels(side_px: int) -> Message:
    """Return a request with one large image of raw pixels."""
    image = {"data": bytes(3 * side_px**2), "format": "raw", "shape": (side_px, side_px, 3)}
    return Message(msgspec.msgpack.encode({"items": [{"prompt": "x", "image": image}]}), MSGPACK)


def part(name: str, content: bytes, more: bytes = b"") -> bytes:
    """Return one part of a form."""
    start = b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n' % (BOUNDARY, name.encode(), more)
    return start + content + b"\r\n"


def form(*parts: bytes) -> Message:
    """Return a form of a prompt, an image and further parts."""
    pair = part("prompt", b"a red circle") + part("image", png.flat(), b'; filename="a.png"')
    return Message(pair + b"".join(parts) + b"--%s--\r\n" % BOUNDARY, FORM)


def raw_form(content: bytes, content_type: str = FORM) -> Message:
    """Return a form of bytes of choice."""
    return Message(content, content_type)


def form_field(name: str, unit: bytes, size: int = LARGE) -> Message:
    """Return a form with one field that repeats a unit up to a size in bytes."""
    return form(part(name, unit * (size // len(unit))))


def form_json(name: str, unit: bytes, size: int = LARGE) -> Message:
    """Return a form with one field that is a JSON object, which repeats a member up to a size in bytes."""
    return form(part(name, b"{" + _listed(unit, size) + b"}"))


def form_parts(count: int) -> Message:
    """Return a form of this many empty prompts."""
    return raw_form(part("prompt", b"") * count + b"--%s--\r\n" % BOUNDARY)


def form_head(unit: bytes, size: int = LARGE) -> Message:
    """Return a form with one part whose headers repeat a unit up to a size in bytes."""
    return raw_form(b"--%s\r\n" % BOUNDARY + unit * (size // len(unit)) + b"\r\n\r\nx\r\n--frontier--\r\n")


def form_of_full_headers() -> Message:
    """Return a form of as many parts as are parsed, each with as long headers as are parsed."""
    header = b'Content-Disposition: form-data; name="image"' + b"; a" * 1300
    head = b"--%s\r\n" % BOUNDARY + b"\r\n".join([header] * 7) + b"\r\n\r\n\r\n"
    return raw_form(head * 2000 + b"--%s--\r\n" % BOUNDARY)


def near_boundaries(size: int = LARGE) -> Message:
    """Return a form whose image consists of almost-boundaries."""
    unit = b"\r\n--frontie"
    return form(part("image", unit * (size // len(unit)), b'; filename="b.png"'))


def json_text(text: bytes) -> Message:
    """Return a JSON body of choice."""
    return Message(text)


def json_items(unit: bytes, size: int = LARGE) -> Message:
    """Return a JSON request whose list of items repeats a unit up to a size in bytes."""
    return Message(b'{"items":[' + _listed(unit, size) + b"]}")


def json_image(data: str) -> Message:
    """Return a JSON request with an image of base64 of choice."""
    return Message(json.dumps({"items": [{"prompt": "x", "image": {"data": data}}]}).encode())


def json_beside(member: bytes) -> Message:
    """Return a valid JSON request with one more member."""
    image = base64.b64encode(png.flat()).decode()
    valid = json.dumps({"items": [{"prompt": "x", "image": {"data": image}}]}).encode()
    return Message(valid[:-1] + b"," + member + b"}")


def msgpack_items(unit: bytes, size: int = LARGE) -> Message:
    """Return a msgpack request whose list of items repeats an encoded value up to a size in bytes."""
    count = size // len(unit)
    return Message(b"\x81\xa5items\xdd" + count.to_bytes(4, "big") + unit * count, MSGPACK)


def msgpack_value(name: bytes, head: bytes, unit: bytes, size: int = LARGE) -> Message:
    """Return a msgpack request that begins with a member of many values.

    Args:
        name: name of the member, shorter than 32 bytes
        head: first byte of the value, whose number of entries follows in 4 bytes
        unit: encoded entry
        size: size in bytes
    """
    count = size // len(unit)
    key = bytes([0xA0 | len(name)]) + name
    return Message(b"\x82" + key + head + count.to_bytes(4, "big") + unit * count + b"\xa5items\x90", MSGPACK)


def msgpack_repeated(name: bytes, value: bytes, before: bytes = b"", size: int = LARGE) -> Message:
    """Return msgpack with a map whose keys are all equal, behind some bytes."""
    entry = bytes([0xA0 | len(name)]) + name + value
    count = size // len(entry)
    return Message(before + b"\xdf" + count.to_bytes(4, "big") + entry * count, MSGPACK)


def msgpack_nested(depth: int) -> Message:
    """Return msgpack lists inside each other."""
    return Message(b"\x81\xa5items" + b"\x91" * depth + b"\xc0", MSGPACK)


def _listed(unit: bytes, size: int) -> bytes:
    """Return a unit again and again, separated by commas, up to a size in bytes."""
    return (unit + b",") * (size // (len(unit) + 1)) + unit
