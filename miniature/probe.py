"""Independent probe: a small CNN that reads an image's attributes.

It takes no part in scoring or training, and verifies that a gain in reward is a gain in the images.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from miniature import world
from miniature.fitting import Pool, fit
from miniature.world import Scenes

CONTENT = {
    "shape": len(world.SHAPES),
    "figure": len(world.COLOURS),
    "background": len(world.COLOURS),
    "size": len(world.SIZES),
    "texture": len(world.TEXTURES),
}
QUALITY = ("sharp", "vivid", "clean")


@dataclass(frozen=True)
class Reading:
    """Attributes that the probe reads in N images: content indices (N, 5) and quality in [0, 1], (N, 3)."""

    content: Tensor
    quality: Tensor

    def accuracy(self, content: Tensor) -> dict[str, float]:
        """Return the share of images that show each attribute as in `content` (N, 5)."""
        return dict(zip(CONTENT, (self.content == content).float().mean(0).tolist(), strict=True))


class Probe(nn.Module):
    """Convolutions to one vector, then a linear layer for every attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96)
        blocks: list[nn.Module] = []
        for a, b in pairwise(widths):
            blocks += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
            blocks += [nn.Conv2d(b, b, 3, 1, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(widths[-1] * 16, 128), nn.SiLU())
        self.head = nn.Linear(128, sum(CONTENT.values()) + len(QUALITY))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return logits of each content attribute, then quality (N, 3); images (N, 3, 32, 32) in [-1, 1]."""
        split = self.head(self.trunk(pixels)).split([*CONTENT.values(), len(QUALITY)], dim=1)
        return list(split)

    @torch.no_grad()
    def read(self, pixels: Tensor) -> Reading:
        """Read images (N, 3, 32, 32) in [-1, 1]."""
        *content, quality = self(pixels)
        return Reading(torch.stack([c.argmax(1) for c in content], 1), quality.sigmoid())


def quality_of(scenes: Scenes) -> Tensor:
    """Return sharpness, vividness and cleanness in [0, 1], (N, 3)."""
    return torch.stack([world.sharpness(scenes), world.vividness(scenes), world.cleanness(scenes)], 1)


def train_probe(pools: list[Pool], steps: int, rng: torch.Generator) -> Probe:
    """Train on images of the evaluators' and the generator's parts, without held-out scenes."""
    torch.manual_seed(rng.initial_seed())
    probe = Probe()

    def loss_of_batch() -> Tensor:
        pool = pools[int(torch.randint(len(pools), (1,), generator=rng))]
        scenes, pixels = pool.batch(torch.randint(len(pool.scenes), (192,), generator=rng))
        *content, quality = probe(pixels)
        loss = F.binary_cross_entropy_with_logits(quality, quality_of(scenes))
        for logits, truth in zip(content, scenes.content.T, strict=True):
            loss = loss + F.cross_entropy(logits, truth)
        return loss

    return fit("probe", probe, loss_of_batch, steps, lr=2e-3)


def save_probe(probe: Probe, path: Path) -> None:
    """Write the weights in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in probe.state_dict().items()}, path)


def load_probe(path: Path) -> Probe:
    """Read what `save_probe` wrote."""
    probe = Probe()
    probe.load_state_dict(load_file(path))
    return probe.eval()
