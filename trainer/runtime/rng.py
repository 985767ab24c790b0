"""Random streams: one per image and stage, so that the batch size never changes an image.

A stream is a CPU `torch.Generator` whose seed is a hash of what the image *is* (run seed, fold, iteration,
prompt, image, stage) and of nothing else. CPU generators give the same numbers whatever the device.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch

from trainer.config import Share

Stage = Literal["prior", "decoder_start", "decoder", "super_resolution"]


@dataclass(frozen=True)
class ImageKey:
    """Identity of one image. `iteration` is -1 for images that are not part of training."""

    seed: int
    fold: int
    iteration: int
    prompt: str
    image: int

    def seed_of(self, stage: Stage, share: Share = "image") -> int:
        """Seed of this image's stream for `stage`.

        `share="group"` leaves the image out (common random numbers for all images of a prompt in an
        iteration), `share="prompt"` leaves out the iteration as well (the same numbers in the whole run).
        """
        iteration = self.iteration if share != "prompt" else "any"
        image = self.image if share == "image" else "any"
        return stream_seed(self.seed, self.fold, iteration, self.prompt, image, stage)

    def stream(self, stage: Stage, share: Share = "image") -> torch.Generator:
        """A fresh generator at the start of this image's stream for `stage`."""
        return torch.Generator().manual_seed(self.seed_of(stage, share))


def stream_seed(*key: int | str) -> int:
    """63-bit seed of a key. Different keys give unrelated seeds, in any process on any machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
