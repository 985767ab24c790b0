"""Hostile PNG files, built from bytes: chunks by the million, rows that cost much more than they weigh."""

from __future__ import annotations

import struct
import zlib
from functools import cache

SIDE_PX = 5000
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, RGBA = 0, 2, 3, 6
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, RGBA: 4}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """Return a chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def flat(
    side_px: int = 64,
    colour: int = RGB,
    depth: int = 8,
    *,
    row_filter: int = 0,
    interlaced: bool = False,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """Return an image of one colour, with chunks before or behind its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side_px, side_px, depth, colour, 0, 0, interlaced))
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == PALETTE else b""
    pixels = chunk(b"IDAT", _rows(side_px, _CHANNELS[colour] * depth, row_filter, interlaced))
    return SIGNATURE + header + palette + before + pixels + after + chunk(b"IEND")


@cache
def _rows(side_px: int, bits: int, row_filter: int, interlaced: bool) -> bytes:
    """Return the compressed rows of zeros of an image."""
    packer = zlib.compressobj(1)
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    parts = []
    for left, top, across, down in passes:
        width, height = -(-(side_px - left) // across), -(-(side_px - top) // down)
        row = bytes([row_filter]) + bytes(-(-width * bits // 8))
        parts += [packer.compress(row * 100) for _ in range(height // 100)]
        parts.append(packer.compress(row * (height % 100)))
    return b"".join([*parts, packer.flush()])


def misstated(side_px: int = SIDE_PX) -> bytes:
    """Return a large image whose first header says that it is small."""
    small, large = flat(64), flat(side_px)
    return small[:33] + large[8:]


def elongated(width: int, height: int) -> bytes:
    """Return a flat image that is not a square, of one bit for each pixel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, GREY, 0, 0, 0))
    rows = zlib.compress((b"\0" + bytes(-(-width // 8))) * height, 1)
    return SIGNATURE + header + chunk(b"IDAT", rows) + chunk(b"IEND")


def empty_blocks(size: int) -> bytes:
    """Return a small image whose compressed stream begins with empty blocks that have codes of their own."""
    pixels = zlib.compress((b"\0" + bytes(3 * 64)) * 64)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, RGB, 0, 0, 0))
    stream = pixels[:2] + _empty_blocks(size) + pixels[2:]
    return SIGNATURE + header + chunk(b"IDAT", stream) + chunk(b"IEND")


def _empty_blocks(size: int) -> bytes:
    """Return deflate blocks of 90 bits, with codes in which only the end of the block has a symbol.

    RFC 1951, section 3.2.7.
    """
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    lengths = "".join("100" if symbol in (1, 18) else "000" for symbol in order)
    zeros_138, zeros_118 = "1" + "1111111", "1" + f"{118 - 11:07b}"[::-1]
    block = "0" + "01" + "00000" + "00000" + "0111" + lengths + zeros_138 + zeros_118 + "0" + "0" + "0"
    bits = block * 4  # a whole number of bytes
    blocks = int(bits[::-1], 2).to_bytes(len(bits) // 8, "little")
    return blocks * (size // len(blocks))


def split_pixels(side_px: int, size: int) -> bytes:
    """Return a flat image whose pixels are in chunks of a size in bytes, followed by empty ones."""
    rows = _rows(side_px, 24, 0, False)
    pieces = [chunk(b"IDAT", rows[at : at + size]) for at in range(0, len(rows), size)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side_px, side_px, 8, RGB, 0, 0, 0))
    return SIGNATURE + header + b"".join(pieces) + chunk(b"IEND")


def empty_pixels(count: int) -> bytes:
    """Return an image with this many empty IDAT chunks before its pixels."""
    return flat(before=chunk(b"IDAT") * count)


def too_many_pixels(size: int) -> bytes:
    """Return a small image whose pixels' stream goes on for a thousand times a size in bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, RGB, 0, 0, 0))
    block = zeros(2**26)
    # Blocks of zeros without their last one: the stream has no end.
    body = block[:2] + block[2:-6] * (size // len(block))
    return SIGNATURE + header + chunk(b"IDAT", body) + chunk(b"IEND")


@cache
def zeros(size: int) -> bytes:
    """Return a compressed stream of zeros."""
    packer = zlib.compressobj(9)
    part = bytes(2**20)
    return b"".join([*(packer.compress(part) for _ in range(size // 2**20)), packer.flush()])


def texts(count: int, size: int, kind: bytes = b"zTXt") -> bytes:
    """Return a small image with compressed texts of zeros, each of a size in bytes."""
    start = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    return flat(before=chunk(kind, start + zeros(size)) * count)


def exif_tags(count: int = 65_535) -> bytes:
    """Return a small image whose EXIF data are a directory of tags that point beyond its end."""
    tags = b"".join(struct.pack(">HHII", tag, 2, 2**30 + tag, 0) for tag in range(count))
    return flat(before=chunk(b"eXIf", b"MM\0\x2a\0\0\0\x08" + struct.pack(">H", count) + tags + bytes(4)))


def exif_text(size: int) -> bytes:
    """Return a small image with EXIF data as a text of hexadecimal digits, line by line."""
    content = b"\nexif\n     999\n" + b"00\n" * (size // 3)
    return flat(before=chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(content)))


def exif_text_of_empty_blocks(size: int) -> bytes:
    """Return a small image with EXIF data as a compressed text of nothing but empty blocks."""
    content = b"Raw profile type exif\0\0" + zlib.compress(b"")[:2] + _empty_blocks(size) + b"\3\0"
    return flat(before=chunk(b"zTXt", content))


def frames(count: int) -> bytes:
    """Return a small animation (APNG) of this many frames."""
    control = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 64, 64, 0, 0, 1, 1, 0, 0))
    return flat(before=chunk(b"acTL", struct.pack(">II", count, 0)) + control, after=control * count)
