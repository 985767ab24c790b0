"""Hostile WebP files, built from bytes: chunks and frames by the million, and pixels without any bits."""

from __future__ import annotations

import struct

SIDE_PX = 5000


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """Return a chunk, padded to an even length."""
    return struct.pack("<4sI", kind, len(content)) + content + bytes(len(content) % 2)


def file_of(*chunks: bytes) -> bytes:
    """Return a file of chunks."""
    return chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def pixels(side_px: int, transforms: bool = True) -> bytes:
    """Return the lossless chunk of a flat image whose pixels take no bits at all.

    Args:
        side_px: width and height
        transforms: have every pixel predicted from its neighbours, in the slowest mode, and its colours mixed
    """
    bits = _number(0x2F, 8) + _number(side_px - 1, 14) * 2 + "0" + "000"
    if transforms:
        bits += "1" + _number(0, 2) + _number(0, 3) + "0" + _codes(11)  # predictor: select
        bits += "1" + _number(1, 2) + _number(0, 3) + "0" + _codes(77)  # colours mixed
        bits += "1" + _number(2, 2)  # green subtracted
    bits += "0" + "0" + "0" + _codes(200)
    packed = int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")
    return chunk(b"VP8L", packed)


def flat(side_px: int = 64) -> bytes:
    """Return a lossless image of a few dozen bytes."""
    return file_of(pixels(side_px))


def empty_chunks(count: int, first: bool = True) -> bytes:
    """Return a small image with this many empty chunks before or behind its pixels."""
    parts = (chunk(b"abcd") * count, pixels(64))
    return file_of(_canvas(64, 0), *(parts if first else parts[::-1]))


def frames(count: int, side_px: int = SIDE_PX) -> bytes:
    """Return an animation of this many frames of 16 pixels on a canvas."""
    head = bytes(6) + _size(16) * 2 + bytes(4)
    frame = chunk(b"ANMF", head + pixels(16))
    return file_of(_canvas(side_px, 2), chunk(b"ANIM", bytes(6)), frame * count)


def subchunks(count: int) -> bytes:
    """Return an animation of one frame with this many empty chunks inside of it."""
    head = bytes(6) + _size(64) * 2 + bytes(4)
    frame = chunk(b"ANMF", head + pixels(64) + chunk(b"abcd") * count)
    return file_of(_canvas(64, 2), chunk(b"ANIM", bytes(6)), frame)


def _canvas(side_px: int, flags: int) -> bytes:
    return chunk(b"VP8X", bytes([flags, 0, 0, 0]) + _size(side_px) * 2)


def _size(side_px: int) -> bytes:
    return (side_px - 1).to_bytes(3, "little")


def _number(value: int, bits: int) -> str:
    """Return a number with its lowest bit first."""
    return f"{value:0{bits}b}"[::-1]


def _codes(green: int) -> str:
    """Return five prefix codes of a single symbol each; pixels in these codes take no bits."""
    return "".join("1" + "0" + "1" + _number(symbol, 8) for symbol in (green, 90, 170, 255)) + "1000"
