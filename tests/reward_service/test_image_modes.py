"""Image modes, row by row of docs/images.md: files with known pixels, most of them written byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from reward_service.client.encoding import encode_image
from reward_service.images import ImageError, decode, to_rgb

WHITE = [255, 255, 255]
# Four different corners, so that every rotation and reflection is visible.
CORNERS = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [90, 90, 90]]], np.uint8)
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
KINDS = {"grey": 0, "rgb": 2, "palette": 3, "grey-alpha": 4, "rgba": 6}
PALETTE = bytes([9, 8, 7, 200, 100, 50])


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(kind: str, depth: int, row: bytes, **chunks: bytes) -> bytes:
    """Return a PNG of 4 x 2 pixels with equal rows; further chunks by name, before the pixels."""
    header = struct.pack(">IIBBBBB", 4, 2, depth, KINDS[kind], 0, 0, 0)
    extra = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    body = zlib.compress((b"\0" + row) * 2)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def interlaced(pixels: NDArray[np.uint8]) -> bytes:
    height, width, _ = pixels.shape
    parts = [pixels[top::down, left::right] for left, top, right, down in ADAM7]
    body = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def key(*channels: int) -> bytes:
    return struct.pack(f">{len(channels)}H", *channels)


def words(*values: int) -> bytes:
    """Return four equal pixels of 16-bit channels."""
    return struct.pack(f">{len(values)}H", *values) * 4


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def first_two(data: bytes) -> list[list[int]]:
    return decode(data).rgb[0, :2].tolist()


def grey(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png("grey", 1, b"\x50"), grey(0, 255)),
        (png("grey", 2, b"\x1b"), grey(0, 85)),
        (png("grey", 4, b"\x0f\x5a"), grey(0, 255)),
        (png("grey", 8, bytes([77, 78, 0, 0])), grey(77, 78)),
        (png("grey", 16, words(0x80FF)), grey(0x80, 0x80)),
        (png("rgb", 8, bytes([1, 2, 3]) * 4), [[1, 2, 3], [1, 2, 3]]),
        (png("rgb", 16, words(0x01FF, 0x02FF, 0x03FF)), [[1, 2, 3], [1, 2, 3]]),
        (png("palette", 1, b"\x50", PLTE=PALETTE), [[9, 8, 7], [200, 100, 50]]),
        (png("palette", 8, bytes([1, 0, 0, 0]), PLTE=PALETTE), [[200, 100, 50], [9, 8, 7]]),
        (png("palette", 8, bytes([1, 9, 0, 0]), PLTE=PALETTE), [[200, 100, 50], [0, 0, 0]]),
    ],
)
def test_opaque_pngs_of_every_depth(data: bytes, expected: list[list[int]]) -> None:
    """Fewer than 8 bits are spread over 0 to 255, of 16 the high byte is kept, palettes are looked up."""
    assert first_two(data) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png("grey-alpha", 8, bytes([77, 128, 77, 255]) * 2), grey(166, 77)),
        (png("grey-alpha", 16, words(0x4DFF, 0x80FF)), grey(166, 166)),
        (png("rgba", 8, bytes([10, 20, 30, 128, 10, 20, 30, 0]) * 2), [[132, 137, 142], WHITE]),
        (png("rgba", 16, words(0x0AFF, 0x14FF, 0x1EFF, 0x80FF)), [[132, 137, 142]] * 2),
        (
            png("palette", 8, bytes([1, 0, 0, 0]), PLTE=PALETTE, tRNS=bytes([255, 128])),
            [[227, 177, 152], [9, 8, 7]],
        ),
        (png("palette", 8, bytes([1, 0, 0, 0]), PLTE=PALETTE, tRNS=b"\xff\0"), [WHITE, [9, 8, 7]]),
        (png("grey", 1, b"\x50", tRNS=key(0)), grey(255, 255)),
        (png("grey", 1, b"\xaf", tRNS=key(1)), grey(255, 0)),
        (png("grey", 2, b"\x18", tRNS=key(1)), grey(0, 255)),
        (png("grey", 4, b"\x05\x5a", tRNS=key(5)), grey(0, 255)),
        (png("grey", 8, bytes([77, 78, 0, 0]), tRNS=key(77)), grey(255, 78)),
        (png("grey", 16, words(0x8040), tRNS=key(0x8040)), grey(255, 255)),
        (png("grey", 16, words(0x8040), tRNS=key(0x8041)), grey(128, 128)),
        (png("rgb", 8, bytes([1, 2, 3, 1, 2, 4]) * 2, tRNS=key(1, 2, 3)), [WHITE, [1, 2, 4]]),
        (png("rgb", 16, words(0x0110, 0x0220, 0x0330), tRNS=key(0x0110, 0x0220, 0x0330)), [WHITE] * 2),
        (png("rgb", 16, words(0x0110, 0x0220, 0x0330), tRNS=key(0x0210, 0x0220, 0x0330)), [[1, 2, 3]] * 2),
    ],
)
def test_transparency_is_white(data: bytes, expected: list[list[int]]) -> None:
    """By alpha channel, by palette entry, or by the colour key, in units of the file's depth."""
    assert first_two(data) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    """All eight, in each format, as the EXIF standard numbers them."""
    upright = np.kron(CORNERS, np.ones((16, 16, 1), np.uint8))[:, :24]
    # The pixels as a camera stores them, so that the image is displayed upright.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    found = decode(saved(image, kind, exif=exif, **options)).rgb
    np.testing.assert_allclose(found, upright, atol=4)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_only_exif_orientation_is_applied(kind: str) -> None:
    """The orientation in XMP is ignored, as viewers do; an unusual EXIF entry does not hide EXIF's."""
    image = Image.new("RGB", (40, 20), "red")
    if kind == "PNG":
        note = PngInfo()
        note.add_itxt("XML:com.adobe.xmp", XMP.decode())
        flat = saved(image, kind, pnginfo=note)
    else:
        flat = saved(image, kind, xmp=XMP)
    assert b"tiff:Orientation" in flat
    assert decode(flat).rgb.shape == (20, 40, 3)

    # Orientation 6; XResolution of type UNDEFINED, which Pillow reads but cannot write again.
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 282, 7, 4, b"odd!")
    odd = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    assert decode(saved(image, kind, exif=odd)).rgb.shape == (40, 20, 3)


def test_colour_key_survives_rotation() -> None:
    """16-bit grey, keyed and rotated: the three policies do not interfere."""
    exif = Image.Exif()
    exif[0x0112] = 6
    row = struct.pack(">4H", 0x8040, 0x1000, 0x2000, 0x3000)
    found = decode(png("grey", 16, row, tRNS=key(0x8040), eXIf=exif.tobytes()[6:])).rgb
    assert found.shape == (4, 2, 3)
    assert found[:, 0, 0].tolist() == [255, 0x10, 0x20, 0x30]


def test_interlacing_does_not_change_pixels() -> None:
    """Adam7 decodes to the same pixels as consecutive rows."""
    pixels = np.random.default_rng(1).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(interlaced(pixels)).rgb, pixels)


def test_progressive_jpeg_equals_baseline() -> None:
    """More scans, but the same coefficients."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    baseline, progressive = (decode(saved(image, "JPEG", progressive=way)).rgb for way in (False, True))
    np.testing.assert_array_equal(baseline, progressive)


def test_ycck_jpeg_is_converted_through_cmyk() -> None:
    """Adobe's transform 2 means YCC and black; read as plain CMYK, this neutral grey would be blue."""
    luma, black = 60, 40
    image = Image.new("CMYK", (16, 16), (255 - luma, 127, 127, black))
    data = saved(image, "JPEG", quality=100)
    marker = data.index(b"Adobe") + 11
    assert data[marker] == 0
    found = decode(data[:marker] + b"\2" + data[marker + 1 :]).rgb[8, 8]
    expected = (255 - luma) * (255 - black) / 255
    np.testing.assert_allclose(found, [expected] * 3, atol=3)


def test_icc_profile_is_ignored() -> None:
    """A real profile, of a colour space far from sRGB."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    image = Image.fromarray(CORNERS)
    np.testing.assert_array_equal(decode(saved(image, "PNG", icc_profile=profile)).rgb, CORNERS)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_first_of_several_images_is_decoded(kind: str) -> None:
    """Animated PNG and WebP, and the JPEG with further images that phones write."""
    image, later = Image.new("RGB", (16, 16), (200, 30, 60)), Image.new("RGB", (16, 16))
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    data = saved(image, kind, save_all=True, append_images=[later], **options)
    np.testing.assert_allclose(decode(data).rgb[8, 8], (200, 30, 60), atol=2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused(kind: str) -> None:
    """Truncated anywhere, also if all pixels are there and only the file's end is missing."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    data = saved(image, kind)
    decode(data)
    for length in {*range(0, len(data), max(1, len(data) // 40)), *range(len(data) - 24, len(data))}:
        with pytest.raises(ImageError) as caught:
            decode(data[:length])
        assert caught.value.code == "not_an_image"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO", "PPM", "TGA", "JPEG2000"])
def test_other_formats_are_refused(kind: str) -> None:
    """All other formats that Pillow can open; the message names the allowed ones."""
    with pytest.raises(ImageError, match="not a PNG, JPEG or WebP image; send one of these"):
        decode(saved(Image.fromarray(np.kron(CORNERS, np.ones((8, 8, 1), np.uint8))), kind))


def test_pillow_images_of_the_client_have_the_same_result() -> None:
    """The client converts an opened Pillow image exactly as the service decodes its file."""
    for data in (
        png("grey", 4, b"\x05\x5a", tRNS=key(5)),
        png("grey", 16, words(0x8040), tRNS=key(0x8040)),
    ):
        with Image.open(io.BytesIO(data)) as image:
            sent = encode_image(image)
        assert np.frombuffer(sent.data, np.uint8).reshape(sent.shape).tolist() == decode(data).rgb.tolist()


def pillow(mode: str, *channels: int) -> Image.Image:
    return Image.new(mode, (2, 1), channels if len(channels) > 1 else channels[0])


def palette_with_alpha() -> Image.Image:
    image = Image.new("PA", (2, 1), (1, 128))
    image.putpalette(PALETTE)
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (pillow("1", 1), [255, 255, 255]),
        (pillow("L", 77), [77, 77, 77]),
        (pillow("RGB", 1, 2, 3), [1, 2, 3]),
        (pillow("RGBX", 1, 2, 3, 4), [1, 2, 3]),
        (pillow("CMYK", 255, 0, 0, 0), [0, 255, 255]),
        (pillow("YCbCr", 100, 128, 128), [100, 100, 100]),
        (pillow("HSV", 0, 255, 200), [200, 0, 0]),
        (pillow("LAB", 128, 128, 128), [119, 119, 119]),
        (pillow("LA", 0, 51), [204, 204, 204]),
        (pillow("La", 0, 51), [204, 204, 204]),
        (pillow("La", 51, 51), [255, 255, 255]),
        (pillow("RGBA", 255, 0, 0, 51), [255, 204, 204]),
        (pillow("RGBa", 51, 0, 0, 51), [255, 204, 204]),
        (palette_with_alpha(), [227, 177, 152]),
        (Image.fromarray(np.full((1, 2), 0x80FF, np.uint16)), [128, 128, 128]),
        (Image.fromarray(np.full((1, 2), 0x80FF, ">u2")), [128, 128, 128]),
        (pillow("I;16L", 0x80FF), [128, 128, 128]),
        (pillow("I;16N", 0x80FF), [128, 128, 128]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_pillow_mode_has_one_result(image: Image.Image, expected: list[int]) -> None:
    """Also the modes that no file of the three formats has: the client converts images of other sources."""
    np.testing.assert_allclose(to_rgb(image)[0, 1], expected, atol=1)


@pytest.mark.parametrize("pixels", [np.full((1, 2), 200, np.int32), np.full((1, 2), 0.5, np.float32)])
def test_modes_without_a_range_are_refused(pixels: NDArray[np.generic]) -> None:
    """Modes I and F do not say which value is white; their images were scored as black or white ones."""
    with pytest.raises(ImageError, match="no fixed range of values; scale it to 0 to 255"):
        to_rgb(Image.fromarray(pixels))
