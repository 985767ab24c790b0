"""Training of every model of the miniature: a pool of drawn scenes and one optimisation loop."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import trange

from miniature import world
from miniature.world import Part, Scenes

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Pool:
    """Scenes drawn once. pixels: (N, 3, 32, 32) uint8."""

    scenes: Scenes
    pixels: Tensor

    @staticmethod
    def drawn(n: int, part: Part, rng: torch.Generator) -> "Pool":
        """Draw n scenes of one part of the world."""
        scenes = world.sample_scenes(n, part, rng)
        starts = trange(0, n, 1000, desc=f"drawing {part.value}")
        chunks = [world.draw(scenes[start : start + 1000], rng) for start in starts]
        return Pool(scenes, (torch.cat(chunks) * 255).to(torch.uint8))

    def batch(self, index: Tensor) -> tuple[Scenes, Tensor]:
        """Return the chosen scenes and their images (B, 3, 32, 32) in [-1, 1]."""
        return self.scenes[index], self.pixels[index].float() / 127.5 - 1

    def hard_index(self, n: int, colour_pairs: int, rng: torch.Generator) -> Tensor:
        """Return n positions, half of them of a few colourings, to make shape, size and texture matter."""
        easy = torch.randint(len(self.scenes), (n - n // 2,), generator=rng)
        pair = self.scenes.figure * len(world.COLOURS) + self.scenes.background
        kinds = pair.unique()
        chosen = kinds[torch.randperm(len(kinds), generator=rng)[:colour_pairs]]
        places = torch.isin(pair, chosen).nonzero()[:, 0]
        return torch.cat([easy, places[torch.randint(len(places), (n // 2,), generator=rng)]])


def fit(
    name: str,
    model: M,
    loss_of_batch: Callable[[], Tensor],
    steps: int,
    lr: float,
    ema_decay: float = 0.0,
    parameters: Iterable[nn.Parameter] | None = None,
) -> M:
    """Minimise the loss with AdamW, warm-up and cosine decay; return the (averaged) model in eval mode.

    `ema_decay` > 0 returns an exponential moving average of the weights instead of the last ones.
    """
    model.train()
    trained = [p for p in (parameters or model.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup), lr * 0.02),
        ],
        [warmup],
    )
    average = deepcopy(model) if ema_decay else model
    for step in (bar := trange(steps, desc=name, mininterval=5.0)):
        loss = loss_of_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if ema_decay:
            _average(average, model, min(ema_decay, (1 + step) / (10 + step)))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return average.eval()


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
