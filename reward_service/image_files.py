"""Image files reduced to what their pixels depend on: bounds on their structure before a decoder reads them.

Metadata (text, colour profiles, thumbnails, further images of an animation) changes no pixel, but costs a
decoder time and memory, and can make it fail. `bare_file` returns a copy without it that decodes to the same
pixels, and refuses files of so many parts that reading them would take seconds. Its work is proportional to
the size of the file.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_PREFIX = b"Exif\0\0"
_RAW_PROFILE = b"Raw profile type exif"
_ORIENTATION = 0x0112

# A file may have this many chunks or segments, and one more for each so many bytes. Encoders write parts of
# kilobytes, and animations some thousand frames.
_PARTS, _BYTES_PER_PART = 10_000, 512
# Progressive encoders write at most about 12 scans; each costs a pass over all pixels.
_SCANS, _FEWEST_SCANS, _SCANNED_PIXELS = 100, 20, 500_000_000
# Four tables take 520 bytes, and Pillow reads tables slowly.
_MAX_TABLE_BYTES = 2**16
_MAX_TEXT_BYTES = 2**20
_REENCODE = "re-encode the image"


class ImageError(ValueError):
    """A refused image; `code` is the problem code, the message is cause and remedy."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class BareFile:
    """File without metadata.

    Attributes:
        data: the file; it decodes to the same pixels as the original, but for the orientation
        exif: the EXIF data of the original
        lossy: whether its compression is lossy
        unsupported: rarely supported feature of the file, which explains a failure of the decoder; or empty
    """

    data: bytes
    exif: bytes | None = None
    lossy: bool = False
    unsupported: str = ""


def detect_format(data: bytes) -> str | None:
    """Return `png`, `jpeg` or `webp` by the first bytes; None for other formats."""
    if data.startswith(_PNG_SIGNATURE):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def bare_file(data: bytes, found: str) -> BareFile:
    """Return a file without metadata.

    Args:
        data: the file
        found: its format, as `detect_format` returns it

    Raises:
        ImageError: if the file is truncated, corrupt or too complex
    """
    return {"png": _bare_png, "jpeg": _bare_jpeg, "webp": _bare_webp}[found](data)


def stated_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) in pixels as stated near the start of a file, without verifying them.

    Returns:
        the size, or None if it is not found at once
    """
    try:
        return {"png": _png_size, "jpeg": _jpeg_size, "webp": webp_size}[detect_format(data) or ""](data)
    except (KeyError, struct.error, ImageError):
        return None


def corrupt(found: str) -> ImageError:
    """Return the error of a file that ends too early or makes no sense."""
    return ImageError("not_an_image", f"the {found} image is truncated or corrupt; send it whole")


def too_complex(cause: str) -> ImageError:
    """Return the error of a file that would take too long to decode, or too much memory."""
    return ImageError("image_too_complex", f"{cause}; {_REENCODE}")


def _check_parts(count: int, data: bytes, kind: str) -> None:
    if count > _PARTS + len(data) // _BYTES_PER_PART:
        raise too_complex(f"the image has too many {kind} for its {len(data)} bytes")


# PNG ----------------------------------------------------------------------------------------------------


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _bare_png(data: bytes) -> BareFile:
    before: list[bytes] = []
    pixels: list[bytes | memoryview] = []
    after: list[bytes] = []
    exif = profile = None
    first = b""
    for kind, start, end in _png_chunks(data):
        if kind == b"IHDR" and first:
            raise corrupt("png")  # Pillow would obey the last one
        first = first or kind
        if kind == b"IDAT":
            pixels.append(memoryview(data)[start:end])
        elif kind == b"tRNS" or (kind in (b"IHDR", b"PLTE") and not pixels):
            (after if pixels else before).append(data[start - 8 : end + 4])
        elif kind == b"eXIf":
            exif = data[start:end]
        elif kind == b"tEXt" and data.startswith(b"exif\0", start):
            exif = data[start + 5 : end]
        elif kind in _TEXTS and data.startswith(_RAW_PROFILE + b"\0", start):
            profile = kind, data[start + len(_RAW_PROFILE) + 1 : end]
    if exif is None and profile is not None:
        exif = _exif_of_text(*profile)
    # Pillow does not verify the checksum of the pixels; zlib's own is in them.
    whole = [_chunk_header(sum(map(len, pixels)), b"IDAT"), *pixels, bytes(4)]
    bare = b"".join((_PNG_SIGNATURE, *before, *whole, *after, _chunk_header(0, b"IEND"), bytes(4)))
    return BareFile(bare, exif, unsupported="Apple's PNG variant CgBI" if first == b"CgBI" else "")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of each chunk's body before IEND."""
    position, count = 8, 0
    while position + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return
        count += 1
        _check_parts(count, data, "chunks")
        yield kind, position + 8, position + 8 + size
        position += 12 + size
    raise corrupt("png")


def _chunk_header(size: int, kind: bytes) -> bytes:
    return struct.pack(">I4s", size, kind)


_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


def _exif_of_text(kind: bytes, value: bytes) -> bytes | None:
    """Return the EXIF data of a text chunk as ImageMagick writes it: three lines, then hexadecimal digits.

    Args:
        kind: of the chunk
        value: body of the chunk behind the keyword; of a long one only the start is read
    """
    compressed = kind == b"zTXt" or (kind == b"iTXt" and value[:1] != b"\0")
    if kind == b"zTXt":
        value = value[1:]
    elif kind == b"iTXt":
        value = (value[2:].split(b"\0", 2) + [b""] * 2)[2]
    try:
        start = value[:_MAX_TEXT_BYTES]
        text = zlib.decompressobj().decompress(start, _MAX_TEXT_BYTES) if compressed else start
        whole = text if len(text) < _MAX_TEXT_BYTES else text.rpartition(b"\n")[0]
        return exif_of_raw_profile(whole.decode("latin-1"))
    except (zlib.error, ValueError):
        return None


def exif_of_raw_profile(text: str) -> bytes:
    """Return the EXIF data of a text "Raw profile type exif".

    Raises:
        ValueError: if it is not one
    """
    lines = text.split("\n", 3)
    return bytes.fromhex(lines[3].replace("\n", "")) if len(lines) > 3 else b""


# JPEG ---------------------------------------------------------------------------------------------------

_SOI, _EOI, _SOS, _DQT, _DAC, _COM = 0xD8, 0xD9, 0xDA, 0xDB, 0xCC, 0xFE
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, _DAC}
_COMMON_FRAMES = (0xC0, 0xC1, 0xC2)
# The next marker outside of a scan: fill bytes, junk and stray restart markers are skipped, as decoders do.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_END_OF_SCAN = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
# A header without its identification, or too short for a decoder, has no meaning.
_MEANINGFUL = {_APP0: (b"JFIF\0", 14), _APP14: (b"Adobe", 12)}


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the size in the first frame header, if it is among the first hundred segments."""
    position = 2
    for _ in range(100):
        marker, size = struct.unpack_from(">xBH", data, position)
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
        position += 2 + size
    return None


@dataclass
class _Frame:
    """Frame header of a JPEG: everything that is known about its pixels before the first scan."""

    marker: int
    precision: int
    height: int
    width: int
    components: int

    @property
    def max_scans(self) -> int:
        pixels = max(1, self.height * self.width)
        return max(_FEWEST_SCANS, min(_SCANS, _SCANNED_PIXELS // pixels))

    @property
    def unsupported(self) -> str:
        if self.precision != 8:
            return f"{self.precision} bits a sample"
        if self.marker not in _COMMON_FRAMES:
            return "a JPEG process other than baseline and progressive"
        return "" if self.components in (1, 3, 4) else f"{self.components} components"


def _bare_jpeg(data: bytes) -> BareFile:
    kept = [b"\xff\xd8"]
    exif: list[bytes] = []
    frame: _Frame | None = None
    count = scans = table_bytes = 0
    position = 2
    while True:
        marker, start, end = _next_segment(data, position)
        segment, position = data[start:end], end
        count += 1
        _check_parts(count, data, "segments")
        if marker == _EOI and frame and scans:
            kept.append(segment)
            return BareFile(b"".join(kept), b"".join(exif) or None, True, frame.unsupported)
        if marker == _APP1 and segment.startswith(_EXIF_PREFIX, 4) and not scans:
            exif.append(segment[10:])
        if marker == _DQT:
            table_bytes += len(segment)
            if table_bytes > _MAX_TABLE_BYTES:
                raise too_complex("the image has too many quantization tables")
        if marker in _FRAMES:
            frame = _frame(segment, frame)
        if _is_metadata(marker, segment):
            continue
        kept.append(segment)
        if marker == _SOS:
            scans += 1
            if frame is None:
                raise corrupt("jpeg")
            if scans > frame.max_scans:
                raise too_complex(f"the progressive image has more than {frame.max_scans} scans")
            position = _end_of_scan(data, end)
            kept.append(_without_fill(data[end:position]))


def _next_segment(data: bytes, position: int) -> tuple[int, int, int]:
    """Return marker, start and end of the next segment; the start is that of its marker."""
    found = _MARKER.search(data, position)
    if found is None:
        raise corrupt("jpeg")
    marker, start = found[1][0], found.start()
    if marker == _EOI:
        return marker, start, start + 2
    if marker < 0xC0 or marker == _SOI or start + 4 > len(data):
        raise corrupt("jpeg")
    size = int.from_bytes(data[start + 2 : start + 4], "big")
    end = start + 2 + max(size, 2)
    if end > len(data):
        raise corrupt("jpeg")
    return marker, start, end


def _frame(segment: bytes, previous: _Frame | None) -> _Frame:
    if previous is not None or len(segment) < 10:
        raise corrupt("jpeg")
    return _Frame(segment[1], *struct.unpack_from(">BHHB", segment, 4))


def _is_metadata(marker: int, segment: bytes) -> bool:
    if marker in _MEANINGFUL:
        identification, size = _MEANINGFUL[marker]
        return not segment.startswith(identification, 4) or len(segment) < 4 + size
    return marker == _COM or _APP0 <= marker < 0xF0


def _end_of_scan(data: bytes, position: int) -> int:
    found = _END_OF_SCAN.search(data, position)
    if found is None:
        raise corrupt("jpeg")
    return found.start()


def _without_fill(scan: bytes) -> bytes:
    """Remove fill bytes from a scan's data; a decoder that gets its input in blocks is slow on many."""
    while b"\xff\xff" in scan:
        scan = scan.replace(b"\xff\xff", b"\xff")
    return scan


# WebP (RFC 9649) ----------------------------------------------------------------------------------------

_EXIF_FLAG = 8
_FRAME_HEADER_BYTES = 16
_WEBP_PIXELS = (b"VP8 ", b"VP8L")


def webp_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the first chunk of a WebP file (RFC 9649, section 2).

    Raises:
        ImageError: if the file is too short
    """
    kind, body = data[12:16], data[20:30]
    if len(body) == 10 and kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if len(body) == 10 and kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if len(body) >= 5 and kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise corrupt("webp")


def _bare_webp(data: bytes) -> BareFile:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise corrupt("webp")
    extended = data[12:16] == b"VP8X"
    kept: dict[bytes, bytes] = {}
    exif = None
    for kind, start, stop in _webp_chunks(data, 12, end):
        if kind == b"ANMF":
            frame = _bare_webp_frame(data, start, stop) if kind not in kept else b""
            kept.setdefault(kind, _webp_chunk(kind, frame))
        elif kind in (b"VP8X", b"ANIM", b"ALPH", *_WEBP_PIXELS):
            kept.setdefault(kind, _padded(data[start - 8 : stop + 1], stop - start))
        elif kind == b"EXIF" and exif is None and data[20] & _EXIF_FLAG:
            exif = data[start:stop]
        if not extended:
            break
    body = b"WEBP" + b"".join(kept.values())
    lossless = b"VP8L" in kept or kept.get(b"ANMF", b"")[_FRAME_HEADER_BYTES + 8 :].startswith(b"VP8L")
    return BareFile(b"RIFF" + len(body).to_bytes(4, "little") + body, exif, lossy=not lossless)


def _bare_webp_frame(data: bytes, start: int, stop: int) -> bytes:
    """Return an animation's frame: its header, and the chunks that hold its pixels."""
    kept: dict[bytes, bytes] = {}
    for kind, first, end in _webp_chunks(data, start + _FRAME_HEADER_BYTES, stop):
        if kind in (b"ALPH", *_WEBP_PIXELS):
            kept.setdefault(kind, _padded(data[first - 8 : end + 1], end - first))
    return data[start : start + _FRAME_HEADER_BYTES] + b"".join(kept.values())


def _webp_chunks(data: bytes, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the body of each chunk between two positions."""
    count = 0
    while position + 8 <= end:
        kind, size = struct.unpack_from("<4sI", data, position)
        count += 1
        _check_parts(count, data, "chunks")
        stop = position + 8 + size
        if stop > end:
            raise corrupt("webp")
        yield kind, position + 8, stop
        position = stop + size % 2


def _webp_chunk(kind: bytes, body: bytes) -> bytes:
    return _padded(kind + len(body).to_bytes(4, "little") + body, len(body))


def _padded(chunk: bytes, size: int) -> bytes:
    """Return a chunk with its body of `size` bytes and, if that is odd, one more."""
    return chunk[: 8 + size + size % 2].ljust(8 + size + size % 2, b"\0")


# EXIF ---------------------------------------------------------------------------------------------------

_ENTRY_BYTES, _INLINE_BYTES, _MAX_VALUE_BYTES = 12, 4, 8
# Bytes of one value, by the type of an entry; Pillow skips other types.
_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}


def bare_exif(exif: bytes) -> bytes:
    """Return EXIF data with the entry of the orientation alone; empty if Pillow would find none.

    Pillow would read all values of the data, with a check of each: seconds for a malicious file.
    """
    tiff = exif.removeprefix(_EXIF_PREFIX).removeprefix(_EXIF_PREFIX)
    order = ">" if tiff[:2] == b"MM" else "<"
    if len(tiff) < 10:
        return b""
    position = struct.unpack_from(order + "I", tiff, 4)[0] + 2
    if position > len(tiff):
        return b""
    count = struct.unpack_from(order + "H", tiff, position - 2)[0]
    seen, total = set(), 0
    for start in range(position, min(position + count * _ENTRY_BYTES, len(tiff) - 11), _ENTRY_BYTES):
        tag, kind, number, place = struct.unpack_from(order + "HHII", tiff, start)
        size = number * _UNITS.get(kind, 0)
        if size == 0 or tag in seen:
            continue
        if size > _INLINE_BYTES:
            total += size
            if total > len(tiff):
                continue
            if place + size > len(tiff):
                break
        if tag == _ORIENTATION:
            entry, value = tiff[start : start + _ENTRY_BYTES], b""
            if size > _INLINE_BYTES:
                entry, value = entry[:8] + struct.pack(order + "I", 26), tiff[place : place + size]
            return (
                tiff[:4] + struct.pack(order + "IH", 8, 1) + entry + bytes(4) + value
                if size <= _MAX_VALUE_BYTES
                else b""
            )
        seen.add(tag)
    return b""
