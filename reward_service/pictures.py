"""Whatever a caller has for a picture, as it goes over the wire: lossless, and never changed. No torch."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from reward_service.failures import InputError
from reward_service.images import Pixels, flatten, sniff
from reward_service.protocol import MAX_BODY_BYTES, Picture

#: A Pillow picture, an array (H, W, 3) or tensor (3, H, W), uint8 or float in [0, 1], a path, or the bytes of
#: a PNG, JPEG or WebP file. Tensors are known by their methods: torch is not imported.
ImageLike = Any
#: How pixels travel. All three are lossless; the last two cost milliseconds a picture and save the network.
Encoding = Literal["raw", "png", "webp"]

_CHANNELS = 3
_LONGEST_WEBP_SIDE = 16383
# PNG's default level takes three times as long for a few per cent; WebP's quality is its effort here.
_SAVING: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1},
    "webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
}

Array = np.ndarray[Any, np.dtype[Any]]


def check_encoding(encoding: str) -> None:
    """Nothing if pixels can travel so.

    :raises InputError: they cannot
    """
    if encoding not in get_args(Encoding):
        raise InputError(f"encoding must be one of {', '.join(get_args(Encoding))}; the lossy ones are none")


def picture(image: ImageLike, encoding: Encoding = "raw") -> Picture:
    """One picture as it goes over the wire: files unchanged, everything else as lossless RGB.

    :raises InputError: not a picture this client can send
    """
    if isinstance(image, (str, os.PathLike)):
        return _file(Path(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _file_bytes(bytes(image), "these bytes")
    if isinstance(image, Image.Image):
        _check_size(image.height, image.width, encoding)
        return _sent(_opened(image), encoding)
    pixels = _pixels(image)
    _check_size(pixels.shape[0], pixels.shape[1], encoding)
    return _sent(pixels, encoding)


def _file(path: Path) -> Picture:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError for a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); check the path") from None
    return _file_bytes(data, str(path))


def _file_bytes(data: bytes, name: str) -> Picture:
    found = sniff(data)
    if found is None:
        raise InputError(f"{name}: not a PNG, JPEG or WebP picture; convert it to one of these")
    return Picture(data, found)  # type: ignore[arg-type]  # sniff names only formats of the protocol


def _opened(image: Image.Image) -> Pixels:
    try:
        return flatten(image)
    except (OSError, SyntaxError) as error:  # Pillow reads an opened file's pixels only now
        raise InputError(f"the picture cannot be read ({error}); open a whole file") from None


def _check_size(height: int, width: int, encoding: Encoding) -> None:
    if encoding == "raw" and height * width * _CHANNELS > MAX_BODY_BYTES:
        raise InputError(
            f"{width}x{height} pixels are {height * width * _CHANNELS / 2**20:.0f} MiB raw, more than the "
            f"{MAX_BODY_BYTES / 2**20:.0f} MiB of a request; shrink it, or use the client with encoding='png'"
        )
    if encoding == "webp" and max(height, width) > _LONGEST_WEBP_SIDE:
        raise InputError(f"{width}x{height} pixels: WebP ends at {_LONGEST_WEBP_SIDE} a side; shrink it")


def _sent(pixels: Pixels, encoding: Encoding) -> Picture:
    if encoding == "raw":
        # A view, to be copied but once, into the request's body.
        data = np.ascontiguousarray(pixels).data.cast("B")
        return Picture(data, "raw", (pixels.shape[0], pixels.shape[1], 3))  # type: ignore[arg-type]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, **_SAVING[encoding])
    return Picture(file.getvalue(), encoding)


def _pixels(image: Any) -> Pixels:
    """A uint8 (H, W, 3) array of an array or tensor."""
    is_tensor = hasattr(image, "detach") and hasattr(image, "cpu")
    array = _rows_first(_array_of(image)) if is_tensor else image
    if not isinstance(array, np.ndarray):
        raise InputError(f"a {type(image).__name__} is no Pillow picture, array, tensor, path or bytes")
    if array.ndim != _CHANNELS or array.shape[2] != _CHANNELS:
        raise InputError(f"an array must have shape (height, width, 3), not {tuple(array.shape)}")
    if array.size == 0:
        raise InputError(f"the picture has no pixels: shape {tuple(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        return _rounded(array)
    if array.dtype != np.uint8:
        raise InputError(f"pixels must be uint8, or float in [0, 1], not {array.dtype}; convert them")
    return array


def _array_of(tensor: Any) -> Array:
    """A tensor's values; numpy knows no bfloat16, and float64 holds every smaller float exactly."""
    tensor = tensor.detach().cpu()
    array: Array = tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
    return array


def _rows_first(array: Array) -> Array:
    """A tensor's (3, H, W) as (H, W, 3); a uint8 one may come as (H, W, 3) already."""
    shape = tuple(array.shape)
    channels_first = array.ndim == _CHANNELS and shape[0] == _CHANNELS
    channels_last = array.ndim == _CHANNELS and shape[2] == _CHANNELS and array.dtype == np.uint8
    if channels_first and channels_last:
        raise InputError(f"shape {shape} may mean (3, height, width) or (height, width, 3); give an array")
    if not (channels_first or channels_last):
        raise InputError(f"a tensor must have shape (3, height, width), not {shape}")
    return array.transpose(1, 2, 0) if channels_first else array


def _rounded(array: Array) -> Pixels:
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):
        raise InputError(
            f"float pixels must lie in [0, 1], not [{low:.4g}, {high:.4g}]; clamp them, or make them uint8"
        )
    # In float64 the product is exact for every smaller float: it is rounded once, by rint.
    levels = np.multiply(array, 255.0, dtype=np.float64)
    return np.rint(levels, out=levels).astype(np.uint8)
