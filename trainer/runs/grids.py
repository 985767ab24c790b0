"""Grids of images: the same prompts and random streams, before and after training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from trainer.config import TrainerConfig
from trainer.evaluation.comparison import Measurement
from trainer.rl.rewards import Images
from trainer.runs.folder import RunFolder
from trainer.runs.setup import load_sampler
from trainer.runtime.rng import ImageKey

MIN_TILE_PX = 96  # small images are enlarged by a whole factor to about this
GAP_PX = 4
CAPTION_PX = 14
BETWEEN_PX = 24


def grid(prompts: Sequence[str], images: Images, columns: int) -> Image.Image:
    """Return a sheet of images (P, G, H, W, 3): a captioned row of `columns` images per prompt."""
    return _stack([_row(prompt, [row[:columns]]) for prompt, row in zip(prompts, images, strict=True)])


def before_and_after(prompts: Sequence[str], before: Images, after: Images, columns: int) -> Image.Image:
    """Return a sheet with a captioned row per prompt: `columns` images before, then the same ones after.

    Args:
        prompts: P captions.
        before: (P, G, H, W, 3) images.
        after: (P, G, H, W, 3) images from the same random streams.
        columns: Images of each prompt that are shown.
    """
    rows = [
        _row(prompt, [old[:columns], new[:columns]])
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    width = (rows[0].width - BETWEEN_PX) // 2
    heading = Image.new("RGB", (rows[0].width, CAPTION_PX + GAP_PX), "white")
    draw = ImageDraw.Draw(heading)
    draw.text((GAP_PX, GAP_PX), "before", fill="black")
    draw.text((width + BETWEEN_PX, GAP_PX), "after", fill="black")
    return _stack([heading, *rows])


def enlarge(image: Images) -> Image.Image:
    """Return an image (H, W, 3), enlarged by a whole factor if it is small, so that pixels stay sharp."""
    factor = max(1, MIN_TILE_PX // image.shape[1])
    return Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def _row(prompt: str, blocks: Sequence[Images]) -> Image.Image:
    tiles = [[enlarge(image) for image in block] for block in blocks]
    side = tiles[0][0].width + GAP_PX
    width = sum(len(block) for block in tiles) * side + GAP_PX + (len(blocks) - 1) * BETWEEN_PX
    row = Image.new("RGB", (width, CAPTION_PX + GAP_PX + tiles[0][0].height + GAP_PX), "white")
    ImageDraw.Draw(row).text((GAP_PX, GAP_PX // 2), _printable(prompt), fill="black")
    x = GAP_PX
    for block in tiles:
        for tile in block:
            row.paste(tile, (x, CAPTION_PX + GAP_PX))
            x += side
        x += BETWEEN_PX
    return row


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    tops = np.cumsum([0] + [row.height for row in rows[:-1]])
    for row, top in zip(rows, tops, strict=True):
        sheet.paste(row, (0, int(top)))
    return sheet


def _printable(prompt: str) -> str:
    """Replace letters beyond Latin-1, which Pillow's built-in font may lack, by question marks."""
    return prompt.encode("latin-1", "replace").decode("latin-1")


def generate_run(
    config: TrainerConfig, lora: Path | None, prompts: Sequence[str], count: int, out: Path
) -> Path:
    """Generate `count` images of each prompt, with a LoRA if given, and save them as one PNG grid."""
    sampler = load_sampler(config)
    if lora is not None:
        sampler.policy.load_lora(lora)
    keys = [ImageKey(config.seed, 0, -1, prompt, image) for prompt in prompts for image in range(count)]
    size = config.sampling.micro_batch
    batches = [sampler.sample(keys[start : start + size]).images for start in range(0, len(keys), size)]
    images = np.concatenate(batches)
    sheet = grid(prompts, images.reshape(len(prompts), count, *images.shape[1:]), columns=count)
    return RunFolder(out.parent).save_image(out.name, sheet)


def save_grids(run: RunFolder, before: Measurement, after: Measurement, config: TrainerConfig) -> None:
    """Write the grids of a run: before.png, after.png and before_after.png."""
    rows, columns = config.evaluation.grid_prompts, config.evaluation.grid_images
    prompts, old, new = before.prompts[:rows], before.images[:rows], after.images[:rows]
    run.save_image("before.png", grid(prompts, old, columns))
    run.save_image("after.png", grid(prompts, new, columns))
    run.save_image("before_after.png", comparison_grid(before, after, config))


def comparison_grid(before: Measurement, after: Measurement, config: TrainerConfig) -> Image.Image:
    """Return the grid of the first prompts of both measurements, side by side."""
    rows, columns = config.evaluation.grid_prompts, config.evaluation.grid_images
    return before_and_after(before.prompts[:rows], before.images[:rows], after.images[:rows], columns)
