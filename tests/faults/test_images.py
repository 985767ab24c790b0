"""Invalid and oversized images: 422 with the item's index, in little memory."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults.conftest import RunningService
from tests.support.faults.bystander import Bystander, undisturbed
from tests.support.faults.requests import OK, Outcome, encoded, outcome, post, request_of, sample_image

NOT_ONE, LARGE = (422, "not_an_image"), (422, "image_too_large")
LONG, SHAPE, SCHEMA = (422, "image_too_long"), (422, "bad_shape"), (422, "invalid_request")
FORMATS = ("PNG", "JPEG", "WEBP")
#: Memory that rejecting an image may take, whatever its decoded size.
MEMORY_BYTES = 64 * 2**20


@pytest.fixture(autouse=True, scope="module")
def bystander(running: RunningService, expected_scores: Any) -> Iterator[Bystander]:
    """One client for all tests, which take milliseconds each."""
    with undisturbed(running.url, expected_scores) as one:
        yield one


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 1, more: bytes = b"") -> bytes:
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + more + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def square_png(side: int) -> bytes:
    """Return a black PNG with one bit a pixel, which is a small file."""
    return png(side, side, bytes(side * (1 + (side + 7) // 8)))


def jpeg_of(width: int, height: int) -> bytes:
    """Return a small JPEG whose header states another size."""
    data = bytearray(sample_image("JPEG"))
    at = re.search(rb"\xff\xc0..\x08", data, re.DOTALL)
    assert at
    data[at.end() : at.end() + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def riff(kind: bytes, body: bytes) -> bytes:
    inner = b"WEBP" + kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


def vp8x(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return riff(b"VP8X", b"\0\0\0\0" + sides)


def animation(sides: int, frames: int) -> bytes:
    shown = [Image.fromarray(np.full((sides, sides, 3), frame, np.uint8)) for frame in range(frames)]
    file = io.BytesIO()
    shown[0].save(file, "WEBP", save_all=True, append_images=shown[1:])
    return file.getvalue()


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return sample_image("JPEG", exif=found.tobytes())


BOMBS: dict[str, tuple[Callable[[], bytes], Outcome]] = {
    "a PNG of 169 megapixels": (lambda: square_png(13_000), LARGE),
    "a PNG of 2 gigapixels": (lambda: png(2**31 - 1, 1, b"\0"), LARGE),
    "a PNG of 2^62 pixels": (lambda: png(2**31 - 1, 2**31 - 1, b"\0"), LARGE),
    "a PNG without width": (lambda: png(0, 8, b"\0"), NOT_ONE),
    "a PNG with more rows than told": (lambda: png(8, 8, bytes(2**26)), OK),
    "a PNG with a text of 64 MiB": (
        lambda: png(8, 8, bytes(16), more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26), 9))),
        OK,
    ),
    "a PNG with a colour profile of 64 MiB": (
        lambda: png(8, 8, bytes(16), more=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26), 9))),
        OK,
    ),
    "a PNG longer than it is wide": (lambda: png(1, 4000, bytes(8000)), LONG),
    "a JPEG of 65,535 squared": (lambda: jpeg_of(65_535, 65_535), LARGE),
    "a JPEG of 65,535 by 1": (lambda: jpeg_of(65_535, 1), LONG),
    "a JPEG without height": (lambda: jpeg_of(16, 0), NOT_ONE),
    "a WebP of 2^48 pixels": (lambda: vp8x(2**24, 2**24), LARGE),
    "a lossy WebP of 16,383 squared": (
        lambda: riff(b"VP8 ", b"\x30\x01\0\x9d\x01\x2a\xff\x3f\xff\x3f"), LARGE),
    "a lossless WebP of 16,384 squared": (lambda: riff(b"VP8L", b"\x2f" + b"\xff" * 4), LARGE),
    "an animation of 200 frames": (lambda: animation(64, 200), OK),
}  # fmt: skip


def peak_bytes() -> int:
    """Return the largest resident memory of this process since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.parametrize("name", BOMBS)
def test_decoder_bomb(service: RunningService, name: str) -> None:
    """It is rejected by its header, or decoded as far as needed; never expanded."""
    make, expected = BOMBS[name]
    body = request_of("x", image=encoded(make()))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    response = post(service.url, body)
    assert outcome(response) == expected
    assert peak_bytes() - before < MEMORY_BYTES


ODD: dict[str, tuple[bytes, Outcome]] = {
    "nothing": (b"", NOT_ONE),
    "text": (b"hello", NOT_ONE),
    "GIF": (sample_image("GIF"), NOT_ONE),
    "BMP": (sample_image("BMP"), NOT_ONE),
    "TIFF": (sample_image("TIFF"), NOT_ONE),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOT_ONE),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NOT_ONE),
    "PNG's signature alone": (b"\x89PNG\r\n\x1a\n", NOT_ONE),
    "JPEG's signature alone": (b"\xff\xd8\xff", NOT_ONE),
    "WebP's signature alone": (b"RIFF\x04\0\0\0WEBP", NOT_ONE),
    "a JPEG called PNG": (sample_image("JPEG"), OK),
    "an orientation of 8": (exif(8), OK),
    "an orientation of 65,535": (exif(65_535), OK),
    "something after its end": (sample_image() + b"more", OK),
}


@pytest.mark.parametrize("name", ODD)
def test_unsupported_image_format(service: RunningService, name: str) -> None:
    """The format is detected by the first bytes, whatever the name says."""
    data, expected = ODD[name]
    assert outcome(post(service.url, request_of("x", image=encoded(data)))) == expected
    if expected == OK and name.startswith("a JPEG called"):
        called = encoded(data) | {"format": "png"}
        assert outcome(post(service.url, request_of("x", image=called))) == NOT_ONE


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_image(service: RunningService, form: str) -> None:
    """Cut anywhere, it is rejected: half an image has no score."""
    data = sample_image(form)
    for cut in sorted({1, 4, 11, 20, len(data) // 3, len(data) // 2, len(data) - 20, len(data) - 3}):
        response = post(service.url, request_of("x", image=encoded(data[:cut])))
        assert (cut, outcome(response)) == (cut, NOT_ONE)
        assert response.json()["errors"][0]["index"] == 0


@pytest.mark.parametrize("form", FORMATS)
def test_corrupted_image(service: RunningService, form: str) -> None:
    """It is rejected, or decoded if that is possible; never a server error."""
    rng = np.random.default_rng(2)
    data = sample_image(form)
    statuses = set()
    for _ in range(25):
        spoilt = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            spoilt[place] = rng.integers(0, 256)
        statuses.add(post(service.url, request_of("x", image=encoded(bytes(spoilt)))).status_code)
    assert statuses <= {200, 422}
    assert 422 in statuses


RAW: dict[str, tuple[list[Any] | None, Outcome]] = {
    "right": ([1, 1, 3], OK),
    "no shape": (None, SHAPE),
    "more than came": ([2, 1, 3], SHAPE),
    "huge": ([10**9, 10**9, 3], LARGE),
    "2^62 pixels": ([2**31 - 1, 2**31 - 1, 3], LARGE),
    "beyond 31 bits": ([2**31, 1, 3], SCHEMA),
    "a side beyond 64 bits": ([2**70, 1, 3], SCHEMA),
    "a side of 4,000 digits": ([int("9" * 4000), 1, 3], SCHEMA),
    "long": ([1, 101, 3], LONG),
    "nothing": ([0, 0, 3], SCHEMA),
    "negative": ([-1, -1, 3], SCHEMA),
    "four channels": ([1, 1, 4], SCHEMA),
    "two numbers": ([1, 3], SCHEMA),
    "fractions": ([1.5, 2, 3], SCHEMA),
    "words": (["1", "1", "3"], SCHEMA),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_pixels_of_invalid_shape(service: RunningService, name: str) -> None:
    """The shape is checked before memory is allocated for it."""
    shape, expected = RAW[name]
    image = {"data": "AAAA", "format": "raw", "shape": shape}
    assert outcome(post(service.url, request_of("x", image=image))) == expected


def test_invalid_images_of_many(service: RunningService) -> None:
    """The problem names the invalid items, ten at most, and the whole request is rejected."""
    good, bad = encoded(sample_image()), encoded(b"no image")
    items = [{"prompt": "x", "image": bad if index % 3 == 1 else good} for index in range(40)]
    response = post(service.url, json.dumps({"items": items}).encode())
    assert outcome(response) == NOT_ONE
    assert [error["index"] for error in response.json()["errors"]] == list(range(1, 30, 3))
