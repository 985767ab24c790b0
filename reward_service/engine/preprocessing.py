"""Image preprocessing: uint8 RGB to a tower's input, exactly as the reference implementations do it.

`crop` (OpenAI CLIP, LAION aesthetic, PickScore): bicubic resize of uint8 pixels so that the shortest edge
fits, then the centre square. `letterbox` (HPSv2): bicubic resize with antialias of floats so that the longest
edge fits, then black padding, before normalization. Resizing floats differs from resizing uint8 pixels by up
to 24 grey levels, so neither method can replace the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reward_service.images import Pixels

#: The built-in `map`, or that of a thread pool: Pillow and torch release the interpreter lock.
MapFunction: TypeAlias = Callable[[Callable[[Pixels], Tensor], Sequence[Pixels]], Iterable[Tensor]]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """One way to preprocess images. Its `repr` is part of the fingerprint: rename nothing here.

    Attributes:
        method: `crop` or `letterbox`
        size_px: edge of the square output
        half_pixel: rounding of the centre crop's offset if the surplus is odd: torchvision (OpenAI's
            reference) rounds half to even, transformers (PickScore's) rounds down
        antialias: whether downscaling is antialiased
        mean: per channel, subtracted from values in [0, 1]
        std: per channel, divides the difference
    """

    method: Literal["crop", "letterbox"]
    size_px: int
    half_pixel: Literal["even", "down"] = "even"
    antialias: Literal[True] = True
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD

    def __call__(self, images: Sequence[Pixels], map_function: MapFunction = map) -> Tensor:
        """Preprocess images of any sizes.

        Args:
            images: uint8 RGB, each (H, W, 3)
            map_function: applies a function to every image, in order

        Returns:
            float32 (N, 3, size_px, size_px) on the CPU
        """
        resize = self._crop if self.method == "crop" else self._letterbox
        unit = torch.stack(list(map_function(resize, images)))
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (unit - mean) / std

    def equivalent_for(self, images: Sequence[Pixels]) -> Preprocessing:
        """Return the preprocessing to share pixels by: one value for both `half_pixel` rules if they agree.

        The rules differ only for an odd surplus whose half lies just below an even number: 3, 7, 11 ...
        """
        if self.method == "letterbox" or any(self._rounding_matters(image) for image in images):
            return self
        return replace(self, half_pixel="even")

    def _rounding_matters(self, image: Pixels) -> bool:
        return any((edge - self.size_px) % 4 == 3 for edge in self._resized(image))

    def _resized(self, image: Pixels) -> tuple[int, int]:
        """Return (height, width) after the crop's resize."""
        height, width, _ = image.shape
        short = min(height, width)
        # int(), not round(): the references truncate to whole pixels.
        return int(self.size_px * height / short), int(self.size_px * width / short)

    def _crop(self, rgb: Pixels) -> Tensor:
        size, (new_height, new_width) = self.size_px, self._resized(rgb)
        image = Image.fromarray(rgb)
        if (new_width, new_height) != image.size:
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        top, left = self._offset(new_height - size), self._offset(new_width - size)
        return _to_unit_tensor(np.asarray(image)[top : top + size, left : left + size])

    def _offset(self, surplus_px: int) -> int:
        return round(surplus_px / 2) if self.half_pixel == "even" else surplus_px // 2

    def _letterbox(self, image: Pixels) -> Tensor:
        """Resize and pad as HPSv2's ResizeMaxSize: rounded sizes, odd padding at the bottom and right."""
        unit, size = _to_unit_tensor(image), self.size_px
        scale = size / max(image.shape[:2])
        if scale != 1.0:
            # A very long image must keep at least one row; the reference would fail.
            new = [max(1, round(edge * scale)) for edge in image.shape[:2]]
            unit = F.interpolate(unit[None], new, mode="bicubic", align_corners=False, antialias=True)[0]
        pad_y, pad_x = size - unit.shape[1], size - unit.shape[2]
        return F.pad(unit, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))


def _to_unit_tensor(image: Pixels) -> Tensor:
    """Return uint8 (H, W, 3) as float32 (3, H, W) in [0, 1]."""
    # Always a copy: for a single pixel it would be the input array itself, which may be read-only.
    channels_first = np.array(image.transpose(2, 0, 1), order="C")
    return torch.from_numpy(channels_first).to(torch.float32).div_(255)
