"""Wire form of one image: a file unchanged, everything else as lossless RGB pixels. No torch, no HTTP."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from reward_service.client.errors import InputError
from reward_service.images import ImageError, Pixels, detect_format, to_rgb
from reward_service.protocol import MAX_BODY_BYTES, Picture

#: A Pillow image, an array (H, W, 3) or tensor (3, H, W), uint8 or float in [0, 1], a path, or the bytes of
#: a PNG, JPEG or WebP file. Tensors are recognized by their methods: torch is not imported.
ImageLike = Any
#: Encoding of pixels on the wire. All three are lossless; the last two cost milliseconds per image and reduce
#: network traffic.
Encoding = Literal["raw", "png", "webp"]
Array = np.ndarray[Any, np.dtype[Any]]

_CHANNELS = 3
_MAX_WEBP_SIDE = 16383
_MAX_CAUSE_CHARS = 160
# PNG's default level takes three times as long for a few per cent; for lossless WebP, quality means effort.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
}


def check_encoding(encoding: str) -> None:
    """Raise an error for an unsupported encoding of pixels.

    Raises:
        InputError: it is not lossless, or not an encoding of the protocol
    """
    if encoding not in get_args(Encoding):
        raise InputError(f"encoding must be one of {', '.join(get_args(Encoding))}, which are lossless")


def encode_image(image: ImageLike, encoding: Encoding = "raw") -> Picture:
    """Return an image in its wire form: a file unchanged, everything else as lossless RGB.

    Raises:
        InputError: not an image that this client can send
    """
    if isinstance(image, (str, os.PathLike)):
        return _encode_path(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _encode_file(_copy(image), "these bytes")
    if isinstance(image, Image.Image):
        # Before the conversion, which needs memory in proportion.
        _check_size(image.height, image.width, encoding)
        pixels = _pillow_pixels(image)
    else:
        pixels = _array_pixels(image)
    _check_size(pixels.shape[0], pixels.shape[1], encoding)
    return _encode_pixels(pixels, encoding)


def _encode_path(path: str | os.PathLike[Any]) -> Picture:
    name = f"the {type(path).__name__}"
    try:
        name = os.fsdecode(path)
        data = Path(name).read_bytes()
    except (OSError, TypeError, ValueError) as error:  # a ValueError for a name with a null character
        raise InputError(f"{name} cannot be read ({_cause(error)}); check the path") from None
    return _encode_file(data, name)


def _copy(data: bytes | bytearray | memoryview) -> bytes:
    try:
        return bytes(data)
    except ValueError as error:  # a memory view that was released
        raise InputError(f"the bytes cannot be read ({_cause(error)}); give them as bytes") from None


def _encode_file(data: bytes, name: str) -> Picture:
    image_format = detect_format(data)
    if image_format is None:
        raise InputError(f"{name}: not a PNG, JPEG or WebP image; convert it to one of these")
    return Picture(data, image_format)  # type: ignore[arg-type]  # only formats of the protocol


def _encode_pixels(pixels: Pixels, encoding: Encoding) -> Picture:
    if encoding == "raw":
        # A view: the only copy is the one into the request's body.
        data = np.ascontiguousarray(pixels).data.cast("B")
        return Picture(data, "raw", (pixels.shape[0], pixels.shape[1], 3))  # type: ignore[arg-type]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, **_SAVE_OPTIONS[encoding])
    return Picture(file.getvalue(), encoding)


def _check_size(height: int, width: int, encoding: Encoding) -> None:
    if height * width == 0:
        raise InputError(f"the image has no pixels: {width}x{height}")
    if encoding == "raw" and height * width * _CHANNELS > MAX_BODY_BYTES:
        raise InputError(
            f"{width}x{height} pixels are {height * width * _CHANNELS / 2**20:.0f} MiB raw, more than the "
            f"{MAX_BODY_BYTES / 2**20:.0f} MiB of a request; shrink it, or use the client with encoding='png'"
        )
    if encoding == "webp" and max(height, width) > _MAX_WEBP_SIDE:
        raise InputError(f"{width}x{height} pixels: the limit of WebP is {_MAX_WEBP_SIDE} a side; shrink it")


def _pillow_pixels(image: Image.Image) -> Pixels:
    try:
        return to_rgb(image)
    except ImageError as error:
        raise InputError(str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow reads an opened file only now, and raises almost anything
        raise InputError(
            f"the Pillow image cannot be read ({_cause(error)}); open a complete file, or give its path"
        ) from error


def _array_pixels(image: Any) -> Pixels:
    """Return the uint8 pixels (H, W, 3) of an array or tensor."""
    is_tensor = hasattr(image, "detach") and hasattr(image, "cpu")
    array = _channels_last(_tensor_values(image)) if is_tensor else image
    if not isinstance(array, np.ndarray):
        raise InputError(f"a {type(image).__name__} is not a Pillow image, array, tensor, path or bytes")
    if array.ndim != _CHANNELS or array.shape[2] != _CHANNELS:
        raise InputError(f"an array must have shape (height, width, 3), not {tuple(array.shape)}")
    if array.size == 0:
        raise InputError(f"the image has no pixels: shape {tuple(array.shape)}")
    if np.ma.is_masked(array):
        raise InputError("masked pixels have no value; fill them")
    if np.issubdtype(array.dtype, np.floating):
        return _round_floats(np.asarray(array))
    if array.dtype != np.uint8:
        raise InputError(f"pixels must be uint8, or float in [0, 1], not {array.dtype}; convert them")
    return np.asarray(array)


def _tensor_values(tensor: Any) -> Array:
    """Return a tensor as an array; numpy has no bfloat16, and float64 holds every smaller float exactly."""
    try:
        local = tensor.detach().cpu()
        array: Array = local.double().numpy() if local.is_floating_point() else local.numpy()
    except MemoryError:
        raise
    except Exception as error:  # meta, sparse, quantized, nested: each has its own
        raise InputError(
            f"the tensor cannot be read ({_cause(error)}); give a dense tensor of uint8, or float in [0, 1]"
        ) from error
    return array


def _channels_last(array: Array) -> Array:
    """Return a tensor's (3, H, W) as (H, W, 3); a uint8 tensor may already be (H, W, 3)."""
    shape = tuple(array.shape)
    channels_first = array.ndim == _CHANNELS and shape[0] == _CHANNELS
    channels_last = array.ndim == _CHANNELS and shape[2] == _CHANNELS and array.dtype == np.uint8
    if channels_first and channels_last:
        raise InputError(f"shape {shape} may mean (3, height, width) or (height, width, 3); give an array")
    if not (channels_first or channels_last):
        raise InputError(f"a tensor must have shape (3, height, width), not {shape}")
    return array.transpose(1, 2, 0) if channels_first else array


def _round_floats(array: Array) -> Pixels:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):
        # In full, so that a value just outside is not shown as the limit.
        raise InputError(
            f"float pixels must be in [0, 1], not [{low!r}, {high!r}]; clamp them, or convert to uint8"
        )
    # In float64 the product is exact for every smaller float: it is rounded once, by rint.
    levels = np.multiply(array, 255.0, dtype=np.float64)
    return np.rint(levels, out=levels).astype(np.uint8)


def _cause(error: Exception) -> str:
    """Return an error's reason in one short line."""
    text = str(getattr(error, "strerror", None) or error)
    return " ".join(text.split())[:_MAX_CAUSE_CHARS] or type(error).__name__
