"""Corrupted requests, made from valid bodies and images. Deterministic for a seed."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from PIL import Image

from reward_service.protocol import JSON, MSGPACK
from tests.support.faults.requests import sample_image

FORM = "multipart/form-data; boundary=frontier"
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, ord('"'), ord("["), ord("{"), ord(","), ord("\\"), ord("-"))
_NUMBERS = (0, 1, 3, 0x7F, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_PIECES = (
    b"\0", b"\r\n", b"--frontier", b"null", b"1e999", b"-1", b"NaN", b"\\ud800", b'":{"', b"]]", b"[[[[",
    b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1", b"\xef\xbf\xbd", b"IEND", b"\xff\xd9", b"VP8X",
    b"9" * 400, b"content-disposition",
)  # fmt: skip
Body = tuple[str, bytes]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one to four corruptions."""
    corrupted = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if corrupted:
            rng.choice(_CORRUPTIONS)(corrupted, rng)
    return bytes(corrupted)


def _flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice(_INTERESTING)


def _number(data: bytearray, rng: random.Random) -> None:
    """Overwrite what may be a length or a size, most likely in the first bytes."""
    form = rng.choice((">I", "<I", ">H", "<H"))
    at = rng.randrange(min(len(data), rng.choice((64, 4096))))
    number = rng.choice(_NUMBERS) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
    packed = struct.pack(form, number)
    data[at : at + len(packed)] = packed


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 32)]


def _double(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randint(1, 64)]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(_PIECES)


def _shuffle(data: bytearray, rng: random.Random) -> None:
    a, b = rng.randrange(len(data)), rng.randrange(len(data))
    data[a], data[b] = data[b], data[a]


_CORRUPTIONS = (_flip, _flip, _set, _number, _cut, _remove, _double, _insert, _shuffle)


def images() -> list[bytes]:
    """Return small image files of every format and colour mode."""
    grey = np.random.default_rng(5).integers(0, 256, (9, 14), np.uint8)
    kept = [sample_image("PNG"), sample_image("JPEG"), sample_image("JPEG", progressive=True, quality=95)]
    kept += [sample_image("WEBP"), sample_image("WEBP", lossless=True), sample_image("PNG", compress_level=0)]
    return [*kept, *_of_other_modes(grey)]


def _of_other_modes(grey: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> list[bytes]:
    image, made = Image.fromarray(grey), []
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, form, options in (
        ("P", "PNG", {"transparency": 3}), ("LA", "PNG", {}), ("1", "PNG", {}), ("RGBA", "WEBP", {}),
        ("I;16", "PNG", {}), ("CMYK", "JPEG", {}), ("L", "JPEG", {"exif": exif.tobytes()}),
    ):  # fmt: skip
        file = io.BytesIO()
        image.convert(mode).save(file, form, **options)
        made.append(file.getvalue())
    return made


def bodies(files: Sequence[bytes]) -> list[Body]:
    """Return valid requests of each content type, with these images and with raw ones."""
    rng = np.random.default_rng(6)
    raw = rng.integers(0, 256, (4, 5, 3), np.uint8).tobytes()
    options = {"normalization": "z", "weights": {"clip": 1.0, "hpsv2": 0.5}, "evaluators": ["clip", "hpsv2"]}
    made: list[Body] = []
    for file in files:
        images = [{"data": file}, {"data": raw, "format": "raw", "shape": [4, 5, 3]}]
        items = [{"prompt": f"a rëd circle {index}", "image": it} for index, it in enumerate(images)]
        request = {"items": items, **options, "allow_partial": True}
        made.append((MSGPACK, msgspec.msgpack.encode(request)))
        made.append((JSON, msgspec.json.encode(request)))
        made.append((FORM, _form(file)))
    return made


def _form(file: bytes) -> bytes:
    fields = {"prompt": b"a red circle", "weights": b'{"clip": 1}', "deterministic": b"true"}
    start = b'--frontier\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    parts = [start % (name.encode(), b"", value) for name, value in fields.items()]
    parts.append(start % (b"image", b'; filename="a.png"\r\nContent-Type: image/png', file))
    return b"".join(parts) + b"--frontier--\r\n"


def request_with(file: bytes, kind: str) -> Body:
    """Return a valid request with a corrupted image, which a corrupted body seldom reaches."""
    if kind == MSGPACK:
        return kind, msgspec.msgpack.encode({"items": [{"prompt": "x", "image": {"data": file}}]})
    if kind == JSON:
        image = {"data": base64.b64encode(file).decode()}
        return kind, json.dumps({"items": [{"prompt": "x", "image": image}]}).encode()
    return kind, _form(file)


def mutants(seed: int) -> Callable[[], Body]:
    """Return a generator function of corrupted requests, half in the body and half in the image."""
    rng = random.Random(seed)
    files = images()
    valid = bodies(files)

    def one() -> Body:
        if rng.random() < 0.5:
            kind, body = rng.choice(valid)
            return kind, mutated(body, rng)
        return request_with(mutated(rng.choice(files), rng), rng.choice((MSGPACK, JSON, FORM)))

    return one
