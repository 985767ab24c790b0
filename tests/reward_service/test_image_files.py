"""Bounds on the structure of image files, and what a file without metadata keeps."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from reward_service.image_files import bare_exif, bare_file, detect_format, stated_size
from reward_service.images import ImageError, decode, to_rgb

SIZE = (37, 23)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def photo(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(Image.fromarray(pixels[..., 0]))
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x010E], found[0x0112], found[0x011A] = "a description", orientation, 72.0
    return found.tobytes()


def text(zipped: bool, **values: str) -> PngInfo:
    info = PngInfo()
    for key, value in values.items():
        info.add_text(key.replace("_", " "), value, zip=zipped)
    return info


def raw_profile(orientation: int) -> str:
    digits = exif(orientation).hex()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    return "\n".join(["", "exif", f"{len(digits) // 2:8}", *lines, ""])


PNG, JPEG, WEBP = (saved(photo(), kind) for kind in ("PNG", "JPEG", "WEBP"))
AFTER_IHDR, BEFORE_IEND = 33, -12


def in_png(extra: bytes, data: bytes = PNG, at: int = AFTER_IHDR) -> bytes:
    return data[:at] + extra + data[at:]


def in_jpeg(extra: bytes, at: int = 2) -> bytes:
    return JPEG[:at] + extra + JPEG[at:]


def riff(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def part(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


VP8X = part(b"VP8X", bytes(4) + b"".join((side - 1).to_bytes(3, "little") for side in SIZE))


# The same pixels ----------------------------------------------------------------------------------------


def original(data: bytes) -> Any:
    """Return what Pillow makes of the whole file, by the policies of this project."""
    with Image.open(io.BytesIO(data)) as image:
        return to_rgb(image)


def same() -> dict[str, bytes]:
    """Return files of many encoders and modes, with metadata."""
    files = {}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        options = {"exif": exif(6), "icc_profile": PROFILE, "pnginfo": text(True, a="b" * 9999)}
        files[f"PNG {mode}"] = saved(photo(mode), "PNG", **options)
    for zipped, value in itertools.product((False, True), (1, 3, 8)):
        note = text(zipped, Raw_profile_type_exif=raw_profile(value))
        files[f"PNG profile {value} {zipped}"] = saved(photo(), "PNG", pnginfo=note)
    for mode, progressive, restart in itertools.product(("L", "RGB", "CMYK"), (False, True), (0, 1)):
        options = {"exif": exif(5), "icc_profile": PROFILE * 300, "comment": "c"}
        options |= {"progressive": progressive, "restart_marker_blocks": restart}
        files[f"JPEG {mode} {progressive} {restart}"] = saved(photo(mode), "JPEG", **options)
    for mode, lossless in itertools.product(("L", "LA", "P", "RGB", "RGBA"), (False, True)):
        options = {"exif": exif(7), "icc_profile": PROFILE, "xmp": b"<x/>", "lossless": lossless}
        files[f"WebP {mode} {lossless}"] = saved(photo(mode), "WEBP", **options)
    for kind, mode in (("PNG", "RGBA"), ("MPO", "RGB"), ("WEBP", "RGBA")):
        options = {"save_all": True, "append_images": [photo(mode)] * 3}
        files[f"several {kind}"] = saved(photo(mode), kind, **options)
    return files | {
        "eXIf behind the pixels": in_png(chunk(b"eXIf", exif(6)[6:]), at=BEFORE_IEND),
        "empty IDATs": in_png(chunk(b"IDAT") * 100),
        "something behind the end": JPEG + b"\xff" * 99,
        "fill bytes": in_jpeg(b"\xff" * 99),
        "junk between segments": in_jpeg(b"\0\xff\0\xff\xd3abc", at=20),
    }


SAME = same()


@pytest.mark.parametrize("name", SAME)
def test_metadata_changes_no_pixel(name: str) -> None:
    """Whatever encoder and mode; the EXIF orientation is applied as before."""
    np.testing.assert_array_equal(decode(SAME[name]).rgb, original(SAME[name]))


def png_in_chunks(size: int) -> bytes:
    """Return a PNG whose pixels are in chunks of a size in bytes."""
    pixels = np.asarray(photo(size=(900, 900)))
    rows = np.hstack([np.zeros((900, 1), np.uint8), pixels.reshape(900, -1)])
    stream = zlib.compress(rows.tobytes(), 0)
    chunks = [chunk(b"IDAT", stream[at : at + size]) for at in range(0, len(stream), size)]
    header = saved(photo(size=(900, 900)), "PNG")[:AFTER_IHDR]
    return header + b"".join(chunks) + chunk(b"IEND")


@pytest.mark.parametrize("size", [8192, 600])
def test_many_small_chunks_of_pixels_are_allowed(size: int) -> None:
    """Thousands of them, if they carry bytes: encoders write 8 kB at a time, or less."""
    np.testing.assert_array_equal(decode(png_in_chunks(size)).rgb, np.asarray(photo(size=(900, 900))))


# Ancillary data -------------------------------------------------------------------------------------------

HUGE = zlib.compress(bytes(3 * 2**20))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"a\0\0" + HUGE),
        chunk(b"iTXt", b"a\0\1\0\0\0" + HUGE),
        chunk(b"tEXt", b"a\0" + bytes(70 * 2**20)),
        chunk(b"iCCP", b"a\0\0" + HUGE),
        chunk(b"zTXt", b"a\0\7unknown method"),
        chunk(b"iCCP", b"a\0\7unknown method"),
        chunk(b"gAMA", b"1"),
        chunk(b"cHRM", b"1"),
        chunk(b"sRGB"),
        chunk(b"pHYs", b"1"),
        chunk(b"acTL", b"1"),
        chunk(b"fcTL", b"1"),
        chunk(b"tEXt", b"transparency\0x"),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + HUGE),
        chunk(b"tEXt", b"Raw profile type exif\0" + b"\n" * 2**20),
        chunk(b"tIME", b"wrong checksum")[:-1] + b"?",
    ],
)
@pytest.mark.parametrize("at", [AFTER_IHDR, BEFORE_IEND])
def test_ancillary_png_chunks_make_no_image_corrupt(extra: bytes, at: int) -> None:
    """Text and profiles beyond Pillow's limits, or broken ones: the image is whole."""
    np.testing.assert_array_equal(decode(in_png(extra, at=at)).rgb, np.asarray(photo()))


def segment(marker: int, body: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


@pytest.mark.parametrize(
    "extra",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"MPF\0II*\0broken"),
        segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
        segment(0xEE, b"Adobe"),
        segment(0xE1, b"Exif\0\0broken"),
    ],
)
def test_broken_jpeg_metadata_makes_no_image_corrupt(extra: bytes) -> None:
    """Pillow reads it although no pixel depends on it."""
    np.testing.assert_array_equal(decode(in_jpeg(extra)).rgb, decode(JPEG).rgb)


# Too complex ----------------------------------------------------------------------------------------------


def progressive(scans: int, size: tuple[int, int] = SIZE) -> bytes:
    data = saved(Image.new("L", size, 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


COMPLEX: dict[str, Callable[[], bytes]] = {
    "scans": lambda: progressive(100),
    "scans of a large image": lambda: progressive(20, (5000, 5000)),
    "PNG chunks": lambda: in_png(chunk(b"abCd") * 20_000),
    "PNG chunks behind the pixels": lambda: in_png(chunk(b"abCd") * 20_000, at=BEFORE_IEND),
    "empty IDATs": lambda: in_png(chunk(b"IDAT") * 20_000),
    "palettes": lambda: in_png(chunk(b"PLTE", bytes(3)) * 20_000),
    "segments": lambda: in_jpeg(segment(0xE2) * 20_000),
    "comments": lambda: in_jpeg(segment(0xFE) * 20_000),
    "JFIF headers": lambda: in_jpeg(segment(0xE0, b"JFIF\0" + bytes(9)) * 20_000),
    "quantization tables": lambda: in_jpeg(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 2),
    "WebP chunks": lambda: riff(VP8X, part(b"abcd") * 20_000, WEBP[12:]),
    "chunks of a WebP frame": lambda: riff(VP8X, part(b"ANMF", bytes(16) + part(b"abcd") * 20_000)),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_files_of_too_many_parts_are_refused(name: str) -> None:
    """Before they are decoded; the message names the cause and the remedy."""
    with pytest.raises(ImageError, match=r"too many|more than .* scans") as caught:
        decode(COMPLEX[name](), max_pixels=25_000_000)
    assert caught.value.code == "image_too_complex"
    assert str(caught.value).endswith("re-encode the image")


def test_fill_bytes_cost_nothing() -> None:
    """Millions of fill bytes between segments, and within a scan, reach no decoder."""
    for at in (2, -2):
        assert len(bare_file(in_jpeg(b"\xff" * 2_000_000, at=at), "jpeg").data) < len(JPEG) + 2


def test_second_header_is_refused() -> None:
    """The size of the first one decides how the image is treated."""
    header = PNG[8:AFTER_IHDR]
    with pytest.raises(ImageError, match="corrupt"):
        decode(in_png(header))


def test_long_text_of_exif_data_still_has_its_orientation() -> None:
    """Only its start is read: the orientation is there, and megabytes of maker notes cost nothing."""
    long = raw_profile(6) + "\n".join(["00" * 36] * 100_000) + "\n"
    packed = b"Raw profile type exif\0\0" + zlib.compress(long.encode())
    found = decode(in_png(struct.pack(">I", len(packed)) + b"zTXt" + packed + bytes(4)))
    assert found.rgb.shape[:2] == SIZE


def test_unsupported_jpeg_is_named() -> None:
    """Twelve bits a sample are neither truncated nor corrupt."""
    at = JPEG.index(b"\xff\xc0") + 4
    with pytest.raises(ImageError, match="12 bits a sample"):
        decode(JPEG[:at] + b"\x0c" + JPEG[at + 1 :])


def test_lack_of_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file is not called truncated."""

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", no_memory)
    with pytest.raises(ImageError, match="memory") as caught:
        decode(PNG)
    assert caught.value.code == "image_too_complex"


# EXIF and sizes -------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_orientation_is_found_as_by_pillow(data: st.DataObject) -> None:
    """In EXIF data with bytes changed anywhere."""
    changed = bytearray(exif(data.draw(st.integers(1, 8))))
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(6, len(changed) - 1))] = data.draw(st.integers(0, 255))

    def orientation(found: bytes) -> Any:
        read = Image.Exif()
        try:
            read.load(found)
            return read.get(0x0112)
        except Exception:  # noqa: BLE001 - Pillow raises almost anything on broken data
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        assert orientation(bare_exif(bytes(changed))) == orientation(bytes(changed))


def test_overlapping_exif_values_are_not_read() -> None:
    """Ten thousand entries of the same large value."""
    entry = struct.pack(">HHII", 0x8000, 1, 2**20, 8)
    data = b"MM\0*\0\0\0\x08" + struct.pack(">H", 10_000) + entry * 10_000 + bytes(2**20)
    assert bare_exif(data) == b""


@pytest.mark.parametrize("data", [PNG, JPEG, WEBP, saved(photo("RGBA"), "WEBP", exif=exif(6))])
def test_stated_size(data: bytes) -> None:
    """Known at once, in each format."""
    assert stated_size(data) == SIZE


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_stated_size_of_any_bytes(data: st.DataObject) -> None:
    """A size or None, whatever the bytes are."""
    whole = data.draw(st.sampled_from([PNG, JPEG, WEBP]))
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    stated_size(bytes(changed))
    if found := detect_format(bytes(changed)):
        try:
            bare_file(bytes(changed), found)
        except ImageError:
            return
