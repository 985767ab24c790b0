"""uint8 RGB to a tower's input. Two ways, each exactly its reference's.

``crop`` (OpenAI CLIP, LAION aesthetic, PickScore): bicubic on uint8 pixels so that the shortest edge fits,
then the centre square. ``letterbox`` (HPSv2): bicubic with antialias on floats so that the longest edge fits,
then black around it, before normalising. A resize on floats differs from one on uint8 by up to 24 grey
levels, so neither may stand in for the other.
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

# The built-in map, or a thread pool's: Pillow and torch let other threads run meanwhile.
Map: TypeAlias = Callable[[Callable[[Pixels], Tensor], Sequence[Pixels]], Iterable[Tensor]]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """One way to prepare pictures; equal values share their pixels, and its text enters the fingerprint.

    ``half_pixel`` says where a centre crop with an odd surplus lies: torchvision (OpenAI's reference) rounds
    half to even, transformers (PickScore's) rounds down.
    """

    method: Literal["crop", "letterbox"]
    size_px: int
    half_pixel: Literal["even", "down"] = "even"
    antialias: Literal[True] = True
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD

    def __call__(self, pictures: Sequence[Pixels], each: Map = map) -> Tensor:
        """Prepare pictures of any sizes.

        :param each: what applies the preparation to every picture, in their order
        :returns: float32 of shape (N, 3, size_px, size_px) on the CPU
        """
        fit = self._crop if self.method == "crop" else self._letterbox
        unit = torch.stack(list(each(fit, pictures)))
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (unit - mean) / std

    def shared(self, pictures: Sequence[Pixels]) -> Preprocessing:
        """The value whose pixels equal this one's for these pictures, one for both ``half_pixel`` rules.

        They differ only where an odd surplus lies between an even and the next odd half: 3, 7, 11 ...
        """
        if self.method == "letterbox" or any(self._rules_differ(picture) for picture in pictures):
            return self
        return replace(self, half_pixel="even")

    def _rules_differ(self, picture: Pixels) -> bool:
        return any((edge - self.size_px) % 4 == 3 for edge in self._resized(picture))

    def _resized(self, picture: Pixels) -> tuple[int, int]:
        """(height, width) after the crop's resize; int(), not round(): the references cut to whole pixels."""
        height, width, _ = picture.shape
        short = min(height, width)
        return int(self.size_px * height / short), int(self.size_px * width / short)

    def _crop(self, picture: Pixels) -> Tensor:
        size, (new_height, new_width) = self.size_px, self._resized(picture)
        image = Image.fromarray(picture)
        if (new_width, new_height) != image.size:
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        top, left = self._offset(new_height - size), self._offset(new_width - size)
        return _unit(np.asarray(image)[top : top + size, left : left + size])

    def _offset(self, surplus_px: int) -> int:
        return round(surplus_px / 2) if self.half_pixel == "even" else surplus_px // 2

    def _letterbox(self, picture: Pixels) -> Tensor:
        """HPSv2's ResizeMaxSize: rounded sizes, the odd pixel of padding below and to the right."""
        unit, size = _unit(picture), self.size_px
        scale = size / max(picture.shape[:2])
        if scale != 1.0:
            # A very long picture must keep at least one row; the reference would fail.
            new = [max(1, round(edge * scale)) for edge in picture.shape[:2]]
            unit = F.interpolate(unit[None], new, mode="bicubic", align_corners=False, antialias=True)[0]
        pad_y, pad_x = size - unit.shape[1], size - unit.shape[2]
        return F.pad(unit, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))


def _unit(picture: Pixels) -> Tensor:
    """uint8 (H, W, 3) as float32 (3, H, W) in [0, 1]."""
    # A copy in any case: of one pixel it would be the caller's own array, which may be read-only.
    channels_first = np.array(picture.transpose(2, 0, 1), order="C")
    return torch.from_numpy(channels_first).to(torch.float32).div(255)
