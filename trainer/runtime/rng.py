"""Random streams, one per image and stage: the batch size never changes an image.

A stream is a CPU `torch.Generator` whose seed is a hash of the image's identity (run seed, fold, iteration,
prompt, image, stage) and of nothing else. CPU generators give the same numbers on every device.
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
        """Return the seed of this image's stream for `stage`.

        `share="group"` leaves the image out of the hash (common random numbers for all images of a prompt in
        an iteration), `share="prompt"` the iteration as well (the same numbers in the whole run).
        """
        iteration = self.iteration if share != "prompt" else "any"
        image = self.image if share == "image" else "any"
        return stream_seed(self.seed, self.fold, iteration, self.prompt, image, stage)

    def stream(self, stage: Stage, share: Share = "image") -> torch.Generator:
        """Return a new generator at the start of this image's stream for `stage`."""
        return torch.Generator().manual_seed(self.seed_of(stage, share))


def stream_seed(*key: int | str) -> int:
    """Return the 63-bit seed of a key: a hash, the same in any process on any machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
