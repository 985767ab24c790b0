"""Images of odd sizes and modes, and awkward prompts."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

_ORIENTATION = 0x0112
_LONG = "a wide harbour at dawn with " + "seven small boats, " * 12
_OTHER_LONG = "a narrow alley at night with " + "three old lanterns, " * 12


@dataclass(frozen=True)
class Prompt:
    """Prompt; `harmless` spells special tokens so that a reference does not read them as tokens."""

    name: str
    text: str
    harmless: str = ""


@dataclass(frozen=True)
class ImageCase:
    """Image file; for `reason`, the named `references` get our flattened image in its place."""

    name: str
    path: Path
    reason: str = ""
    references: tuple[str, ...] = ()


PROMPTS = (
    Prompt("plain", "a red fox jumping over a mossy log"),
    Prompt("white space only", " "),
    Prompt("over 77 tokens", _LONG + "and a lighthouse"),
    Prompt("over 77, other start", _OTHER_LONG + "and a lighthouse"),
    Prompt("over 77, other end", _LONG + "and a thunderstorm"),
    Prompt("curly quotes", "“the baker’s ‘best’ loaf” — isn’t it…"),
    Prompt("HTML entities", "salt &amp; pepper, &lt;b&gt;bold&lt;/b&gt;, 5 &amp;gt; 3, caf&eacute; e&#x301;"),
    Prompt("ligatures, full width", "ﬁne ﬂowers, Ｆｕｌｌ ｗｉｄｔｈ, cafÃ© au lait"),
    Prompt("emoji", "an astronaut 👩‍🚀 on the 🌙, 🇫🇷 flag"),
    Prompt("CJK", "一只红色的狐狸, 夜の街, 서울의 봄"),
    Prompt("lines and tabs", "a cat\n\n\tand   a\u00a0dog\r\nin the rain\u2028"),
    Prompt("upper case, Greek", "A BLUE WHALE, ΟΔΟΣ ΑΒΓ, İSTANBUL, STRAẞE"),
    Prompt("<|endoftext|>", "a house <|endoftext|> on a hill", "a house <| endoftext |> on a hill"),
    Prompt(
        "<start_of_text>",
        "<start_of_text> a tree <END_OF_TEXT>by a lake",
        "< start_of_text > a tree < END_OF_TEXT >by a lake",
    ),
    Prompt(
        "special, as entities",
        "a sign: &lt;|endoftext|&gt; &lt;end_of_text&gt;<|STARTOFTEXT|>",
        "a sign: <| endoftext |> < end_of_text ><| STARTOFTEXT |>",
    ),
    Prompt("signs and numbers", "12,345.67% -- don't, we'll, they'd! 's ??? #@$ a_b_c"),
)
LONG = ("over 77 tokens", "over 77, other start", "over 77, other end")


def write_images(folder: Path) -> list[ImageCase]:
    """Write every image file into a folder and return the cases."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for seed, (name, kind, save, reason, references) in enumerate(_IMAGES):
        path = folder / f"{seed:02d}.{kind}"
        save(path, seed)
        cases.append(ImageCase(name, path, reason, references))
    return cases


def scene(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """Return a random image with the features of photographs: areas, edges and grain; uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    low = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    broad = np.asarray(low.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    rows, columns = np.mgrid[:height, :width]
    edges = 70 * np.sign(np.sin(columns / (3 + seed) + seed) * np.cos(rows / (5 + seed % 4)))
    grain = rng.normal(0, 25, (height, width, 3))
    image: NDArray[np.uint8] = (broad + edges[:, :, None] + grain).clip(0, 255).astype(np.uint8)
    return image


def _rgb(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(scene(width, height, seed))


def _alpha(width: int, height: int) -> Image.Image:
    """Return an alpha channel, transparent on the left and opaque on the right."""
    return Image.linear_gradient("L").rotate(90).resize((width, height))


def _saver(width: int, height: int, mode: str = "RGB", **options: Any) -> Callable[[Path, int], None]:
    def save(path: Path, seed: int) -> None:
        _rgb(width, height, seed).convert(mode).save(path, **options)

    return save


def _translucent(width: int, height: int, mode: str, **options: Any) -> Callable[[Path, int], None]:
    def save(path: Path, seed: int) -> None:
        image = _rgb(width, height, seed).convert("RGBA")
        image.putalpha(_alpha(width, height))
        image.convert(mode).save(path, **options)

    return save


def _palette_with_key(path: Path, seed: int) -> None:
    _rgb(97, 131, seed).quantize(16).save(path, transparency=3)


def _animated(width: int, height: int, **options: Any) -> Callable[[Path, int], None]:
    def save(path: Path, seed: int) -> None:
        later = [_rgb(width, height, seed + 50), _rgb(width, height, seed + 51)]
        _rgb(width, height, seed).save(path, save_all=True, append_images=later, duration=100, **options)

    return save


def _with_exif_rotation(path: Path, seed: int) -> None:
    image = _rgb(320, 213, seed)
    exif = image.getexif()
    exif[_ORIENTATION] = 6
    image.save(path, exif=exif, quality=92)


def _with_profile(path: Path, seed: int) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    _rgb(224, 227, seed).save(path, icc_profile=profile)


def _deep_grey(path: Path, seed: int) -> None:
    grey = scene(211, 160, seed)[:, :, 0].astype(np.uint16) * 257 - 19 * (seed % 2)
    Image.fromarray(grey).save(path)


def _deep_colour(path: Path, seed: int) -> None:
    """Write a PNG of 16 bits a channel, which Pillow reads but does not write."""
    width, height = 65, 43
    rows = (scene(width, height, seed).astype(">u2") * 256 + 77).reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows.astype(">u2"))
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


_ALL = ("hpsv2", "pickscore", "clip", "aesthetic")
_ALPHA = ("alpha is dropped, hidden colours show; RGBA crashes hpsv2", _ALL)
_FIRST = ("resized before it is converted to RGB: without interpolation, or as CMYK", ("clip", "aesthetic"))
_CLIPPED = ("16-bit grey is clipped to white", _ALL)
_IGNORED = ("EXIF rotation is ignored", _ALL)
_FILM = ("Pillow opens it as RGBA, opaque; hpsv2 crashes", ("hpsv2",))
_NONE: tuple[str, tuple[str, ...]] = ("", ())
_IMAGES: tuple[tuple[str, str, Callable[[Path, int], None], str, tuple[str, ...]], ...] = (
    ("JPEG, large, 1600x1200", "jpg", _saver(1600, 1200, quality=90), *_NONE),
    ("PNG, ICC profile, 224x227", "png", _with_profile, *_NONE),
    ("WebP, lossy, 235x224", "webp", _saver(235, 224, quality=80), *_NONE),
    ("PNG, palette, 448x462", "png", _saver(448, 462, "P"), *_FIRST),
    ("PNG, palette and colour key, 97x131", "png", _palette_with_key, *_ALPHA),
    ("PNG, grey and alpha, 131x97", "png", _translucent(131, 97, "LA"), *_ALPHA),
    ("WebP, RGBA, 300x200", "webp", _translucent(300, 200, "RGBA", lossless=True), *_ALPHA),
    ("JPEG, CMYK, 333x500", "jpg", _saver(333, 500, "CMYK", quality=92), *_FIRST),
    ("PNG, 16-bit grey, 211x160", "png", _deep_grey, *_CLIPPED),
    ("PNG, 16-bit RGB, 65x43", "png", _deep_colour, *_NONE),
    ("PNG, 1 bit, 225x301", "png", _saver(225, 301, "1"), *_FIRST),
    ("JPEG, EXIF rotation, 320x213", "jpg", _with_exif_rotation, *_IGNORED),
    ("WebP, animated, 128x96", "webp", _animated(128, 96, lossless=True), *_FILM),
    ("PNG, animated, 90x61", "png", _animated(90, 61), *_NONE),
    ("PNG, extreme, 1200x30", "png", _saver(1200, 30), *_NONE),
    ("PNG, tiny, 7x5", "png", _saver(7, 5), *_NONE),
)
