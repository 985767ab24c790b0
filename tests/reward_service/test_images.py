"""Image decoding: every mode has one documented result, and everything else is refused."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reward_service.images import ImageError, decode

RED = (200, 30, 60)
IDS = (
    *("png", "jpeg", "webp", "palette", "grey", "cmyk", "bit", "clear", "opaque", "half"),
    *("grey-alpha", "deep", "icc", "apng", "film"),
)
SECOND_FRAME = [Image.new("RGB", (6, 4))]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def red(mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def top_left(data: bytes) -> tuple[int, ...]:
    rgb = decode(data).rgb
    assert rgb.dtype == np.uint8
    assert rgb.shape[2] == 3
    return tuple(int(value) for value in rgb[0, 0])


def translucent(alpha: int, mode: str = "RGBA") -> Image.Image:
    image = red("RGBA")
    image.putalpha(alpha)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        (saved(red(), "PNG"), RED, 0),
        (saved(red(), "JPEG", quality=95), RED, 4),
        (saved(red(), "WEBP", lossless=True), RED, 0),
        (saved(red("P"), "PNG"), RED, 30),
        (saved(red("L"), "PNG"), (84, 84, 84), 1),
        (saved(red("CMYK"), "JPEG", quality=95), RED, 6),
        (saved(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255), 0),
        (saved(translucent(0), "PNG"), (255, 255, 255), 0),
        (saved(translucent(255), "PNG"), RED, 0),
        (saved(translucent(128), "WEBP", lossless=True), (227, 142, 157), 1),
        (saved(Image.new("LA", (4, 4), (0, 0)), "PNG"), (255, 255, 255), 0),
        (saved(Image.fromarray(np.full((4, 4), 0x8040, np.uint16)), "PNG"), (128, 128, 128), 0),
        (saved(red(), "PNG", icc_profile=b"not a profile"), RED, 0),
        (saved(red(), "PNG", save_all=True, append_images=SECOND_FRAME), RED, 0),
        (saved(red(), "WEBP", lossless=True, save_all=True, append_images=SECOND_FRAME), RED, 0),
    ],
    ids=IDS,
)
def test_each_mode_has_its_documented_result(data: bytes, expected: tuple[int, ...], tolerance: int) -> None:
    """The table at the top of images.py, row by row."""
    assert top_left(data) == pytest.approx(expected, abs=tolerance)


def test_exif_orientation_is_applied() -> None:
    """A photograph taken with the camera on its side is decoded upright."""
    image = red(size=(6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode(saved(image, "JPEG", exif=exif)).rgb.shape == (6, 4, 3)


def test_broken_exif_is_ignored() -> None:
    """Only the orientation is lost."""
    assert decode(saved(red(), "JPEG", exif=b"Exif\x00\x00broken")).rgb.shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("data", "lossy"),
    [
        (saved(red(), "PNG"), False),
        (saved(red(), "JPEG"), True),
        (saved(red(), "WEBP"), True),
        (saved(red(), "WEBP", lossless=True), False),
        (saved(red(), "WEBP", lossless=True, icc_profile=b"x" * 7), False),
        (saved(red(), "WEBP", quality=50, icc_profile=b"VP8L"), True),
        (saved(red(), "WEBP", lossless=True, save_all=True, append_images=SECOND_FRAME), False),
    ],
)
def test_lossy_compression_is_detected(data: bytes, lossy: bool) -> None:
    """Also in WebP, whose two codecs share one container."""
    assert decode(data).lossy is lossy


def test_raw_pixels_are_unchanged() -> None:
    """Rows of RGB bytes, of exactly the size of the shape."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(decode(pixels.tobytes(), "raw", (2, 3, 3)).rgb, pixels)


PNG = saved(red(), "PNG")


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG with a huge size in its header."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return PNG[:8] + chunk + PNG[33:]


def webp_bomb() -> bytes:
    canvas = (16_000 - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((b"",), "not_an_image"),
        ((b"hello",), "not_an_image"),
        ((saved(red(), "GIF"),), "not_an_image"),
        ((saved(red(), "TIFF"),), "not_an_image"),
        ((b"%PDF-1.4",), "not_an_image"),
        ((PNG, "jpeg"), "not_an_image"),
        ((PNG[:40],), "not_an_image"),
        ((saved(red(), "JPEG")[:-60],), "not_an_image"),
        ((saved(red(), "WEBP")[:24],), "not_an_image"),
        ((PNG, "png", (4, 6, 3)), "bad_shape"),
        ((b"123", "raw"), "bad_shape"),
        ((b"123", "raw", (2, 2, 3)), "bad_shape"),
        ((bomb(5000, 4000),), "image_too_large"),
        ((bomb(13_000, 13_000),), "image_too_large"),
        ((bomb(60_000, 60_000),), "image_too_large"),
        ((webp_bomb(),), "image_too_large"),
        ((b"", "raw", (100_000, 100_000, 3)), "image_too_large"),
        ((bomb(1, 300),), "image_too_long"),
    ],
)
def test_invalid_images_are_refused(arguments: tuple[Any, ...], code: str) -> None:
    """With the problem code; from the header alone if the image is too large."""
    with pytest.raises(ImageError) as caught:
        decode(*arguments)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


VALID = [
    PNG,
    saved(red(), "JPEG"),
    saved(red(), "WEBP"),
    saved(red("P"), "PNG"),
    saved(red(), "WEBP", lossless=True),
]


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_bytes_are_decoded_or_refused(data: st.DataObject) -> None:
    """Bytes changed, cut or repeated anywhere: an image or an ImageError, nothing else."""
    mutated = bytearray(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(mutated)))
    try:
        rgb = decode(bytes(mutated[:cut] if data.draw(st.booleans()) else mutated), max_pixels=10_000).rgb
    except ImageError:
        return
    assert rgb.ndim == 3
    assert rgb.shape[0] * rgb.shape[1] <= 10_000
