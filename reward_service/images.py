"""Image decoding: untrusted bytes to uint8 RGB. Pillow and numpy only, so that the client can use it too.

Every kind of input has one defined result; docs/images.md has the reasons, and what the reference scorers do:

==================  ===========================================================================
formats             PNG, JPEG, WebP and raw uint8 RGB; anything else, or a truncated file, is refused
size, aspect        read from the header and checked before anything is decoded
EXIF orientation    applied
alpha, transparency composited on white; pixels equal to the colour key (tRNS) are transparent
greyscale, 1 bit    the grey value in all three channels
palette             looked up
CMYK, YCCK          converted by Pillow (Adobe's inverted JPEGs included)
16 bits a channel   the high byte
animation           the first frame
ICC profile, gamma  ignored, as the reference scorers do
==================  ===========================================================================
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # height x width x 3, RGB

MAX_PIXELS = 4_000_000
MAX_ASPECT = 100
_PILLOW_NAMES = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_CHANNELS = 3
_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_KEYS = ("exif", "Raw profile type exif")


class ImageError(ValueError):
    """A refused image; `code` is the problem code, the message is cause and remedy."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class DecodedImage:
    """Pixels, and whether the encoded image had lossy compression."""

    rgb: Pixels
    lossy: bool


def decode(
    data: bytes,
    declared_format: str | None = None,
    shape: Sequence[int] | None = None,
    max_pixels: int = MAX_PIXELS,
    reserve: Callable[[int], None] = lambda _: None,
) -> DecodedImage:
    """Decode one image of an allowed format.

    Args:
        data: an encoded file, or the rows of a raw image
        declared_format: `png`, `jpeg`, `webp`, `raw`, or None to detect it by the first bytes
        shape: (height, width, 3) in pixels, for `raw` only
        max_pixels: maximum height x width
        reserve: called with the size of the decoded image in bytes before decoding; its exceptions propagate

    Raises:
        ImageError: not a valid image, or too large
    """
    if declared_format == "raw":
        reserve(len(data))
        return DecodedImage(_decode_raw(data, shape, max_pixels), lossy=False)
    if shape is not None:
        raise ImageError("bad_shape", "shape is for format raw only; omit it for an encoded file")
    found = detect_format(data)
    if found is None:
        raise ImageError("not_an_image", "the bytes are not a PNG, JPEG or WebP image; send one of these")
    if declared_format not in (None, found):
        message = f"declared as {declared_format}, but the bytes are {found}; correct it"
        raise ImageError("not_an_image", message)
    return DecodedImage(_decode_file(data, found, max_pixels, reserve), lossy=_is_lossy(data, found))


def detect_format(data: bytes) -> str | None:
    """Return `png`, `jpeg` or `webp` by the first bytes; None for other formats."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def to_rgb(image: Image.Image) -> Pixels:
    """Convert an opened Pillow image to RGB by the policies of this module.

    Returns:
        uint8 array of shape (height, width, 3)
    """
    _fix_colour_key(image)
    image = _apply_orientation(image)
    if image.mode.startswith("I"):
        image = _high_byte(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _fix_colour_key(image: Image.Image) -> None:
    """Convert a PNG's colour key (tRNS) from the file's units to those of Pillow's pixels.

    Pillow keeps only the high bytes of 16-bit colours, so that only these can be compared.
    """
    key = image.info.get("transparency")
    # The pixel layout of the file; Pillow drops it on loading.
    tiles = getattr(image, "tile", None)
    raw_mode = str(tiles[0].args) if tiles else ""
    if raw_mode in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2 ** int(raw_mode[2]) - 1)
    elif raw_mode == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(channel >> 8 for channel in key)


def _high_byte(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to L, or to LA if it has a colour key; Pillow's own conversion clips it at 255."""
    grey = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
    high = (grey >> 8).astype(np.uint8)
    if (key := image.info.get("transparency")) is None:
        return Image.fromarray(high)
    opaque = np.where(grey == key, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([high, opaque], axis=2))


def _decode_raw(data: bytes, shape: Sequence[int] | None, max_pixels: int) -> Pixels:
    if shape is None:
        raise ImageError("bad_shape", "format raw needs shape [height, width, 3]")
    height, width, channels = shape
    _check_size(width, height, max_pixels)
    if len(data) != height * width * channels:
        expected = f"{height}x{width}x{channels} bytes"
        raise ImageError("bad_shape", f"the shape requires {expected}, but the image has {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(height, width, channels)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError("not_an_image", f"the image is {width}x{height} pixels; expected at least 1x1")
    if width * height > max_pixels:
        limit = f"{max_pixels / 1e6:g} megapixels"
        raise ImageError("image_too_large", f"{width}x{height} pixels exceed the limit of {limit}; shrink it")
    if max(width, height) > MAX_ASPECT * min(width, height):
        # The crop's resize would enlarge a 1 x 4,000,000 image to 200 gigapixels.
        message = f"{width}x{height} pixels exceed the aspect ratio of {MAX_ASPECT}:1; crop it"
        raise ImageError("image_too_long", message)


def _decode_file(data: bytes, found: str, max_pixels: int, reserve: Callable[[int], None]) -> Pixels:
    if found == "webp":
        # Pillow allocates WebP's canvas on opening, so its size is read from the header first.
        _check_size(*_webp_size(data), max_pixels)
    if found == "png" and not _has_png_end(data):
        # Pillow accepts a PNG that has every pixel; the other two decoders verify the end of the file.
        raise _corrupt(found)
    try:
        with Image.open(io.BytesIO(data), formats=[_PILLOW_NAMES[found]]) as image:
            _check_size(*image.size, max_pixels)
            try:
                reserve(_CHANNELS * image.size[0] * image.size[1])
            except Exception as error:  # noqa: BLE001 - not an error of the image, so it must not become one
                refusal = error
            else:
                return to_rgb(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("image_too_large", "the image has too many pixels; shrink it") from None
    except Exception:  # noqa: BLE001 - Pillow's decoders raise almost any exception on malicious bytes
        raise _corrupt(found) from None
    raise refusal


def _corrupt(found: str) -> ImageError:
    return ImageError("not_an_image", f"the {found} image is truncated or corrupt; send it whole")


def _has_png_end(data: bytes) -> bool:
    """Return True if a PNG's chunks end with IEND."""
    position = 8
    while position + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND":
            return True
        position += 12 + int(size)
    return False


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the first chunk of a WebP file (RFC 9649, section 2)."""
    kind, body = data[12:16], data[20:30]
    if len(body) == 10 and kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if len(body) == 10 and kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if len(body) >= 5 and kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise _corrupt("webp")


def _is_lossy(data: bytes, found: str) -> bool:
    return found == "jpeg" or (found == "webp" and not _is_lossless_webp(data))


def _is_lossless_webp(data: bytes) -> bool:
    """Return True if the first image chunk of a WebP file is VP8L."""
    # The chunks are traversed: a search for the bytes could match inside another chunk.
    position = 12
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        if kind in (b"VP8L", b"VP8 "):
            return bool(kind == b"VP8L")
        # An animation frame (ANMF) contains its chunks after a header of 16 bytes.
        position += 8 + (16 if kind == b"ANMF" else size + size % 2)
    return False


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; ignore broken EXIF data."""
    image.load()
    # An image with only the EXIF data: without an orientation in them, Pillow would use that of XMP.
    bare = Image.new("1", (1, 1))
    bare.info = {name: image.info[name] for name in _EXIF_KEYS if name in image.info}
    try:
        transpose = _TRANSPOSES.get(bare.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - the EXIF reader raises almost any exception on malicious bytes
        return image
    # Pillow's exif_transpose would rewrite the EXIF data, and fails on unusual ones.
    return image if transpose is None else image.transpose(transpose)
