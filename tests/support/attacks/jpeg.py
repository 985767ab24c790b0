"""Hostile JPEG files, built from bytes: scans, markers and segments that cost much more than they weigh."""

from __future__ import annotations

import struct
from functools import cache

import numpy as np

SIDE_PX = 5000
START, END = b"\xff\xd8", b"\xff\xd9"
SOF_BASELINE, SOF_PROGRESSIVE, SOF_ARITHMETIC, SOF_ARITHMETIC_PROGRESSIVE = 0xC0, 0xC2, 0xC9, 0xCA
_DHT, _DQT, _DRI, _SOS = 0xC4, 0xDB, 0xDD, 0xDA
_LONGEST_RUN = 2**15 - 1


def segment(marker: int, content: bytes = b"") -> bytes:
    """Return a marker with its length and content."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def flat(side_px: int = 64, before_frame: bytes = b"", before_scan: bytes = b"", after: bytes = b"") -> bytes:
    """Return a grey baseline image of one colour, with bytes at a place of choice."""
    scan = _bits("00" * _blocks(side_px))
    start = START + before_frame + _tables() + _frame(SOF_BASELINE, side_px)
    return start + before_scan + _scan(0, 63) + scan + END + after


def run_scans(scans: int, side_px: int = SIDE_PX, kind: int = SOF_PROGRESSIVE) -> bytes:
    """Return a grey progressive image whose scans hold nothing but end-of-band runs.

    The decoder visits every block of the image in every scan.
    """
    parts = [START, _tables(), _frame(kind, side_px), _scan(0, 0), _bits("0" * _blocks(side_px))]
    return b"".join([*parts, (_scan(1, 63) + _runs(_blocks(side_px))) * scans, END])


def sequential_scans(scans: int, side_px: int = SIDE_PX) -> bytes:
    """Return a baseline image of three components whose first one is sent in every scan."""
    frame = segment(SOF_BASELINE, struct.pack(">BHHB9s", 8, side_px, side_px, 3, b"\1\x11\0\2\x11\0\3\x11\0"))
    others = [_scan(0, 63, component=number) + _bits("00" * _blocks(side_px)) for number in (2, 3)]
    first = _scan(0, 63) + _bits("00" * _blocks(side_px))
    return b"".join([START, _tables(), frame, first * scans, *others, END])


def refining_scans(scans: int, side_px: int = SIDE_PX) -> bytes:
    """Return a progressive image whose scans refine coefficients, one after the other, and change none."""
    blocks = _blocks(side_px)
    parts = [START, _tables(), _frame(SOF_PROGRESSIVE, side_px), _scan(0, 0, low=13), _bits("0" * blocks)]
    first = [_scan(index, index, low=13) + _runs(blocks) for index in range(1, 64)]
    rounds = (
        _scan(place % 63 + 1, place % 63 + 1, 13 - place // 63 % 13, 12 - place // 63 % 13)
        for place in range(scans)
    )
    return b"".join([*parts, *first, *(scan + _runs(blocks) for scan in rounds), END])


def refined_coefficients(rounds: int = 13, side_px: int = SIDE_PX) -> bytes:
    """Return a grey progressive image all of whose coefficients are there, and are refined bit by bit.

    A refining scan of end-of-band runs has one more bit for each coefficient.
    """
    blocks = _blocks(side_px)
    tables = segment(_DHT, b"\x10" + b"\1\1" + bytes(14) + b"\1\xe0")
    start = [START, _tables(), tables, _frame(SOF_PROGRESSIVE, side_px), _scan(0, 0), _bits("0" * blocks)]
    # Each coefficient: the code of "no zeros, one bit", and a bit for its sign. 63 x 2 bits a block.
    first = _scan(1, 63, low=rounds) + np.full(-(-blocks * 126 // 8), 0b01010101, np.uint8).tobytes()
    coded = []
    for length in _run_lengths(blocks):
        head = np.frombuffer(f"10{length - 2**14:014b}".encode(), np.uint8) - ord("0")
        coded += [head, np.zeros(63 * min(length, blocks), np.uint8)]
    bits = np.packbits(np.concatenate(coded)).tobytes().replace(b"\xff", b"\xff\0")
    scans = (_scan(1, 63, turn, turn - 1) + bits for turn in range(rounds, 0, -1))
    return b"".join([*start, first, *scans, END])


def scan_of(unit: bytes, size: int) -> bytes:
    """Return a small image whose only scan repeats some bytes up to a size in bytes."""
    return START + _tables() + _frame(SOF_BASELINE, 64) + _scan(0, 63) + unit * (size // len(unit)) + END


def arithmetic(kind: int = SOF_ARITHMETIC, scans: int = 1, side_px: int = SIDE_PX) -> bytes:
    """Return a grey image of arithmetic coding whose entropy-coded bytes are noise, which always decodes."""
    noise = np.random.default_rng(0).integers(0, 255, 20_000, np.uint8).tobytes()
    parts = [START, _tables(), _frame(kind, side_px)]
    if kind == SOF_ARITHMETIC:
        return b"".join([*parts, _scan(0, 63), noise, END])
    return b"".join([*parts, _scan(0, 0), noise, (_scan(1, 63) + noise[:2000]) * scans, END])


def restarts(side_px: int = SIDE_PX) -> bytes:
    """Return a baseline image with a restart marker after every block."""
    blocks = _blocks(side_px)
    turns = b"".join(b"\x3f\xff" + bytes([0xD0 + turn]) for turn in range(8))
    scan = (turns * (blocks // 8 + 1))[: 3 * blocks - 2]
    head = START + _tables() + segment(_DRI, b"\0\1") + _frame(SOF_BASELINE, side_px)
    return head + _scan(0, 63) + scan + END


def empty_segments(count: int, marker: int = 0xE2) -> bytes:
    """Return an image with this many empty segments before its frame."""
    return flat(before_frame=segment(marker) * count)


def hidden_size(segments: int) -> bytes:
    """Return a large image whose frame comes after so many comments."""
    return flat(SIDE_PX, before_frame=segment(0xFE, b"a") * segments)


def empty_segments_in_scan(count: int) -> bytes:
    """Return an image with this many empty comments between its two scans."""
    blocks = _blocks(64)
    scans = _scan(0, 0) + _bits("0" * blocks) + segment(0xFE) * count + _scan(1, 63) + _runs(blocks)
    return START + _tables() + _frame(SOF_PROGRESSIVE, 64) + scans + END


def fill_bytes(count: int, byte: bytes = b"\xff") -> bytes:
    """Return an image with fill bytes, or bytes that belong to no segment, before its frame."""
    return flat(before_frame=byte * count)


def table_segments(size: int) -> bytes:
    """Return an image with as many segments full of quantization tables as fit into a size in bytes."""
    return flat(before_frame=segment(_DQT, (b"\0" + b"\1" * 64) * 1008) * (size // 65_524))


def huffman_segments(count: int) -> bytes:
    """Return an image with this many Huffman tables before its scan."""
    return flat(before_scan=segment(_DHT, b"\0\1" + bytes(15) + b"\0") * count)


def photoshop_segments(size: int) -> bytes:
    """Return an image with as many segments full of empty Photoshop resources as fit into a size in bytes."""
    resources = b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5450
    return flat(before_frame=segment(0xED, resources) * (size // len(resources)))


def exif_pieces(count: int, piece: int) -> bytes:
    """Return an image whose EXIF data are in pieces, each of which a decoder may append to a copy."""
    return flat(before_frame=segment(0xE1, b"Exif\0\0" + bytes(piece)) * count)


def icc_pieces(count: int) -> bytes:
    """Return an image whose colour profile is in this many pieces."""
    return flat(before_frame=segment(0xE2, b"ICC_PROFILE\0\1\1") * count)


def multi_picture(images: int) -> bytes:
    """Return an image with an index of further images (MPO) that all lie at its own start."""
    version, number = (0xB000, 7, 4, b"0100"), (0xB001, 4, 1, struct.pack(">I", images))
    entries = (0xB002, 7, 16 * images, struct.pack(">I", 50))
    content = b"".join(struct.pack(">HHI4s", *entry) for entry in (version, number, entries))
    index = b"MPF\0MM\0\x2a\0\0\0\x08\0\3" + content + bytes(4) + bytes(16 * images)
    return flat(before_frame=segment(0xE2, index))


def trailing(size: int) -> bytes:
    """Return an image with end markers behind its end."""
    return flat(after=END * (size // 2))


def _tables() -> bytes:
    """Return tables in which one bit is a zero coefficient, an end of block or a longest run of blocks."""
    quantization = segment(_DQT, b"\0" + b"\1" * 64)
    dc = segment(_DHT, b"\0" + b"\1" + bytes(15) + b"\0")
    return quantization + dc + segment(_DHT, b"\x10" + b"\1\1" + bytes(14) + b"\0\xe0")


def _frame(kind: int, side_px: int) -> bytes:
    return segment(kind, struct.pack(">BHHBBBB", 8, side_px, side_px, 1, 1, 0x11, 0))


def _scan(first: int, last: int, high: int = 0, low: int = 0, component: int = 1) -> bytes:
    return segment(_SOS, struct.pack(">BBBBBB", 1, component, 0, first, last, high << 4 | low))


def _blocks(side_px: int) -> int:
    return (-(-side_px // 8)) ** 2


@cache
def _runs(blocks: int) -> bytes:
    """Return end-of-band runs over this many blocks."""
    return _bits("".join(f"10{length - 2**14:014b}" for length in _run_lengths(blocks)))


def _run_lengths(blocks: int) -> list[int]:
    """Return lengths of end-of-band runs over this many blocks; the end of the scan cuts the last one."""
    whole, rest = divmod(blocks, _LONGEST_RUN)
    return [_LONGEST_RUN] * whole + ([max(rest, 2**14)] if rest else [])


def _bits(bits: str) -> bytes:
    """Return entropy-coded bytes, padded with ones, with a zero after each 255."""
    padded = bits + "1" * (-len(bits) % 8)
    coded = np.packbits(np.frombuffer(padded.encode(), np.uint8) - ord("0")).tobytes()
    return coded.replace(b"\xff", b"\xff\0")
