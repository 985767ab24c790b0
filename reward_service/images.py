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
other metadata      ignored; it is removed before decoding (`image_files`)
==================  ===========================================================================
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reward_service.image_files import (
    BareFile,
    bare_exif,
    bare_file,
    corrupt,
    exif_of_raw_profile,
    too_complex,
    webp_size,
)
from reward_service.image_files import ImageError as ImageError
from reward_service.image_files import detect_format as detect_format

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
    if found == "webp":
        # Pillow allocates WebP's canvas on opening, so its size is read from the header first.
        _check_size(*webp_size(data), max_pixels)
    bare = bare_file(data, found)
    return DecodedImage(_decode_file(bare, found, max_pixels, reserve), bare.lossy)


def to_rgb(image: Image.Image) -> Pixels:
    """Convert an opened Pillow image to RGB by the policies of this module.

    Returns:
        uint8 array of shape (height, width, 3)

    Raises:
        ImageError: the mode is F or I, whose values have no fixed range, so that black and white are unknown
    """
    if image.mode in ("F", "I"):
        cause = f"a Pillow image of mode {image.mode} has no fixed range of values"
        raise ImageError("not_an_image", f"{cause}; scale it to 0 to 255 and convert it to mode L")
    _fix_colour_key(image)
    image = _apply_orientation(image)
    if image.mode.startswith("I;16"):
        image = _high_byte(image)
    elif image.mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
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


def _decode_file(bare: BareFile, found: str, max_pixels: int, reserve: Callable[[int], None]) -> Pixels:
    try:
        with Image.open(io.BytesIO(bare.data), formats=[_PILLOW_NAMES[found]]) as image:
            _check_size(*image.size, max_pixels)
            try:
                reserve(_CHANNELS * image.size[0] * image.size[1])
            except Exception as error:  # noqa: BLE001 - not an error of the image, so it must not become one
                refusal = error
            else:
                if bare.exif:
                    image.info["exif"] = bare.exif
                return to_rgb(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("image_too_large", "the image has too many pixels; shrink it") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise almost any exception on malicious bytes
        raise _decoder_error(error, bare, found) from None
    raise refusal


def _decoder_error(error: Exception, bare: BareFile, found: str) -> ImageError:
    """Return the refusal of a file that Pillow failed to decode."""
    if isinstance(error, MemoryError) or "memory" in str(error):
        return too_complex("decoding the image needs more memory than there is; shrink it")
    if bare.unsupported:
        message = f"the {found} image has {bare.unsupported}, which is not supported; re-encode it"
        return ImageError("not_an_image", message)
    return corrupt(found)


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; ignore broken EXIF data."""
    image.load()
    try:
        transpose = _TRANSPOSES.get(_orientation(image.info))
    except Exception:  # noqa: BLE001 - the EXIF reader raises almost any exception on malicious bytes
        return image
    # Pillow's exif_transpose would rewrite the EXIF data, and fails on unusual ones.
    return image if transpose is None else image.transpose(transpose)


def _orientation(info: Mapping[str | tuple[int, int], Any]) -> Any:
    """Return the orientation in the EXIF data of a Pillow image; Pillow would also use that of XMP."""
    data = info.get("exif")
    if data is None:
        data = exif_of_raw_profile(info.get("Raw profile type exif", ""))
    exif = Image.Exif()
    exif.load(bare_exif(data))
    return exif.get(_ORIENTATION)
