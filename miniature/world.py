"""A procedurally drawn world of coloured shapes with captions.

A scene has content (shape, figure colour, background colour, size, texture) and quality
(blur, fading, noise). Content decides whether a caption is true, quality whether the
image is good. All attributes are columns of equal length N, so that a few tensor operations draw thousands
of scenes.

The 660 combinations of shape, figure and background are divided into three disjoint parts by a
fixed hash: one for training the evaluators, one for training the generator, and a held-out one for all
measurements.
"""

from dataclasses import dataclass, fields
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped")
PALETTE = {
    "red": (0.89, 0.10, 0.11),
    "orange": (0.98, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.16),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.52, 0.16, 0.70),
    "pink": (0.98, 0.50, 0.75),
    "white": (0.98, 0.98, 0.98),
    "grey": (0.50, 0.50, 0.50),
    "black": (0.04, 0.04, 0.04),
}
COLOURS = tuple(PALETTE)
QUALITY_WORDS = ("sharp", "blurry", "vivid", "faded", "clean", "noisy")
SIZE_PX = 32
MAX_BLUR_PX, MAX_FADE, MAX_NOISE = 2.2, 0.65, 0.15
RADIUS_PX = (8.0, 12.0)
STRIPE_PERIOD_PX = 5.0
FADED_GREY = 0.6


class Part(Enum):
    """Disjoint sets of (shape, figure, background), by the models that learn from them."""

    EVALUATORS = "evaluators"
    GENERATOR = "generator"
    HELD_OUT = "held out"


@dataclass(frozen=True)
class Scenes:
    """N scenes as columns of shape (N,): content as indices, quality as floats."""

    shape: Tensor
    figure: Tensor
    background: Tensor
    size: Tensor
    texture: Tensor
    blur_px: Tensor
    fade: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Tensor | slice) -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def replace(self, **columns: Tensor) -> "Scenes":
        """Return the same scenes with some columns changed."""
        return Scenes(**({f.name: getattr(self, f.name) for f in fields(self)} | columns))

    @property
    def content(self) -> Tensor:
        """(N, 5) integer attributes that a caption may state."""
        return torch.stack([self.shape, self.figure, self.background, self.size, self.texture], 1)


@dataclass(frozen=True)
class Captions:
    """N captions: the words, what content each states, (N, 5) bool, and its quality word, (N,), or -1."""

    text: list[str]
    stated: Tensor
    quality: Tensor


def combinations(part: Part) -> Tensor:
    """Return (M, 3) shape, figure, background of one part of the world."""
    sizes = (len(SHAPES), len(COLOURS), len(COLOURS))
    rows = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    shape, figure, background = rows.T
    return rows[(figure != background) & is_in_part(shape, figure, background, part)]


def is_in_part(shape: Tensor, figure: Tensor, background: Tensor, part: Part) -> Tensor:
    """Return (N,) whether combinations are in a part; parts have shapes and colours about equally often."""
    place = (3 * shape + 5 * figure + 2 * background + figure * background) % 7
    if part is Part.HELD_OUT:
        return place == 0
    return (place > 0) & (place % 2 == (1 if part is Part.EVALUATORS else 0))


def sample_scenes(n: int, part: Part, rng: torch.Generator, colour_pairs: int | None = None) -> Scenes:
    """Draw n scenes of one part; `colour_pairs` restricts them to so many colourings (hard negatives)."""
    rows = combinations(part)
    if colour_pairs is not None:
        pair = rows[:, 1] * len(COLOURS) + rows[:, 2]
        kinds = pair.unique()
        kept = kinds[torch.randperm(len(kinds), generator=rng)[:colour_pairs]]
        rows = rows[torch.isin(pair, kept)]
    chosen = rows[torch.randint(len(rows), (n,), generator=rng)]
    blur, fade, noise = sample_quality(n, rng)
    size, texture = torch.randint(2, (2, n), generator=rng)
    return Scenes(chosen[:, 0], chosen[:, 1], chosen[:, 2], size, texture, blur, fade, noise)


def sample_quality(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return blur in pixels, fading in [0, MAX_FADE] and noise (standard deviation; 0 in half of them)."""
    blur, fade, noise, has_noise = torch.rand(4, n, generator=rng)
    return blur * MAX_BLUR_PX, fade * MAX_FADE, noise * MAX_NOISE * (has_noise < 0.5)


def perfect(scenes: Scenes) -> Scenes:
    """Return the same content without blur, fading or noise."""
    zero = torch.zeros(len(scenes))
    return scenes.replace(blur_px=zero, fade=zero, noise=zero)


def draw(scenes: Scenes, rng: torch.Generator, size_px: int = SIZE_PX) -> Tensor:
    """Return images (N, 3, size, size) in [0, 1], rounded to the 256 levels of a file.

    Other sizes are averages of the 32-pixel images, so that the targets of the decoder (16 pixels) and of
    the super-resolution (32 pixels) show the same.
    """
    colours = torch.tensor(list(PALETTE.values()))
    jitter = 0.04 * torch.randn(2, len(scenes), 3, generator=rng)
    figure = colours[scenes.figure] + jitter[0]
    background = colours[scenes.background] + jitter[1]
    cover = _coverage(scenes, rng)[:, None]
    paint = figure[..., None, None] * (1 - 0.65 * _stripes(scenes)[:, None])
    paint = paint + background[..., None, None] * 0.65 * _stripes(scenes)[:, None]
    image = cover * paint + (1 - cover) * background[..., None, None]
    image = _blurred(image.clamp(0, 1), scenes.blur_px)
    fade = scenes.fade[:, None, None, None]
    image = image * (1 - fade) + FADED_GREY * fade
    image = image + scenes.noise[:, None, None, None] * torch.randn(image.shape, generator=rng)
    image = (image.clamp(0, 1) * 255).round() / 255
    return image if size_px == SIZE_PX else F.adaptive_avg_pool2d(image, size_px)


def _grid() -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIZE_PX) + 0.5 - SIZE_PX / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def _stripes(scenes: Scenes) -> Tensor:
    """Return (N, H, W) in [0, 1]: transparency of the figure at its stripes."""
    y, _ = _grid()
    wave = (torch.sin(2 * torch.pi * y / STRIPE_PERIOD_PX) * 2 + 0.5).clamp(0, 1)
    return wave * scenes.texture[:, None, None]


def _coverage(scenes: Scenes, rng: torch.Generator) -> Tensor:
    """Return (N, H, W) antialiased coverage of the figure, from signed distances in pixels."""
    y, x = _grid()
    shift = 1.5 * (2 * torch.rand(2, len(scenes), 1, 1, generator=rng) - 1)
    angle = 0.15 * (2 * torch.rand(len(scenes), 1, 1, generator=rng) - 1)
    x0, y0 = x - shift[0], y - shift[1]
    u = x0 * angle.cos() + y0 * angle.sin()
    v = y0 * angle.cos() - x0 * angle.sin()
    stretch = 0.92 + 0.16 * torch.rand(len(scenes), 1, 1, generator=rng)
    radius = torch.tensor(RADIUS_PX)[scenes.size][:, None, None] * stretch
    distances = torch.stack(_signed_distances(u, v, radius))
    chosen = scenes.shape[None, :, None, None].expand(1, *u.shape)
    return (0.5 - distances.gather(0, chosen)[0]).clamp(0, 1)


def _signed_distances(u: Tensor, v: Tensor, r: Tensor) -> list[Tensor]:
    """Return the signed distance to each shape of SHAPES, negative inside, in that order."""
    circle = (u * u + v * v).sqrt() - r
    square = torch.maximum(u.abs(), v.abs()) - 0.86 * r
    slope = 3**0.5 / 2
    triangle = torch.maximum(v - 0.62 * r, slope * u.abs() - 0.5 * v - 0.56 * r)
    arm = 0.34 * r
    bar = torch.maximum(u.abs() - r, v.abs() - arm)
    post = torch.maximum(v.abs() - r, u.abs() - arm)
    cross = torch.minimum(bar, post)
    ring = (circle + 0.22 * r).abs() - 0.22 * r
    diamond = (u.abs() + v.abs() - 1.2 * r) / 2**0.5
    return [circle, square, triangle, cross, ring, diamond]


def _blurred(image: Tensor, blur_px: Tensor) -> Tensor:
    """Return images after a Gaussian blur of a standard deviation per image, edges repeated."""
    n, c, h, w = image.shape
    taps = torch.arange(-6, 7, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / blur_px.clamp(min=0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)
    flat = F.pad(image.reshape(1, n * c, h, w), (6, 6, 6, 6), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * c)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * c)
    return flat.reshape(n, c, h, w)


# Captions -----------------------------------------------------------------------------------------

TEMPLATES = (
    "a {size}{texture}{figure} {shape} on {background}",
    "a {size}{texture}{figure} {shape} on a {background} background",
    "a picture of a {size}{texture}{figure} {shape} over {background}",
    "{size}{texture}{figure} {shape}, {background} background",
)
ARTICLE = {"a orange": "an orange"}


def describe(
    scenes: Scenes,
    rng: torch.Generator,
    drop: float = 0.4,
    quality_share: float = 0.0,
) -> Captions:
    """Return true captions, without size or texture with probability `drop`, some with a quality word."""
    n = len(scenes)
    keep = torch.rand(n, 2, generator=rng) >= drop
    which = torch.randint(len(TEMPLATES), (n,), generator=rng)
    aspect = torch.randint(3, (n,), generator=rng)
    quality = quality_words(scenes).gather(1, aspect[:, None])[:, 0]
    quality = torch.where(torch.rand(n, generator=rng) < quality_share, quality, -1)
    rows = zip(scenes.content.tolist(), keep.tolist(), which.tolist(), quality.tolist(), strict=True)
    always = torch.ones(n, 3, dtype=torch.bool)
    return Captions([_sentence(*row) for row in rows], torch.cat([always, keep], 1), quality)


def _sentence(content: list[int], keep: list[bool], template: int, quality: int) -> str:
    shape, figure, background, size, texture = content
    sentence = TEMPLATES[template].format(
        size=f"{SIZES[size]} " if keep[0] else "",
        texture=f"{TEXTURES[texture]} " if keep[1] else "",
        figure=COLOURS[figure],
        shape=SHAPES[shape],
        background=COLOURS[background],
    )
    ending = f", {QUALITY_WORDS[quality]}" if quality >= 0 else ""
    return sentence.replace("a orange", "an orange") + ending


def quality_words(scenes: Scenes) -> Tensor:
    """Return (N, 3) for blur, fading and noise: the index in QUALITY_WORDS of the true word."""
    bad = torch.stack([1 - sharpness(scenes), 1 - vividness(scenes), 1 - cleanness(scenes)], 1) > 0.5
    return bad + 2 * torch.arange(3)


def agreement(captions: Captions, caption_of: Scenes, imaged: Scenes) -> Tensor:
    """Return (N, M) share of the attributes stated by caption i (written for scene i) that image j shows."""
    same = caption_of.content[:, None] == imaged.content[None]
    stated = captions.stated[:, None].float()
    return (same * stated).sum(-1) / stated.sum(-1)


def is_true_of(captions: Captions, caption_of: Scenes, imaged: Scenes) -> Tensor:
    """Return (N, M) whether caption i, written for scene i, is true of image j, also its quality word."""
    content = agreement(captions, caption_of, imaged) > 0.999
    quality = (captions.quality[:, None, None] == quality_words(imaged)[None]).any(-1)
    return content & (quality | (captions.quality < 0)[:, None])


# Quality -------------------------------------------------------------------------------------


def harmony(figure: Tensor, background: Tensor) -> Tensor:
    """Return the stated colour harmony in [0, 1]: the RGB distance of figure and background."""
    colours = torch.tensor(list(PALETTE.values()))
    distance: Tensor = torch.linalg.vector_norm(colours[figure] - colours[background], dim=-1)
    return distance / 3**0.5


def sharpness(scenes: Scenes) -> Tensor:
    """Return (N,) 1 without blur, 0 at the most blur."""
    return 1 - scenes.blur_px / MAX_BLUR_PX


def vividness(scenes: Scenes) -> Tensor:
    """Return (N,) 1 without fading, 0 at the most fading."""
    return 1 - scenes.fade / MAX_FADE


def cleanness(scenes: Scenes) -> Tensor:
    """Return (N,) 1 without noise, 0 at the most noise."""
    return 1 - scenes.noise / MAX_NOISE


def aesthetic(scenes: Scenes) -> Tensor:
    """Return the world's stated aesthetic, (N,) on a scale of 1 to 10; it does not depend on captions."""
    return 1 + 9 * (
        0.30 * sharpness(scenes)
        + 0.30 * vividness(scenes)
        + 0.15 * cleanness(scenes)
        + 0.25 * harmony(scenes.figure, scenes.background)
    )


def pick_utility(scenes: Scenes, truth: Tensor) -> Tensor:
    """Return the utility of the miniature's PickScore: a true caption (truth in [0, 1]), then sharpness."""
    return 6 * truth + 2.0 * sharpness(scenes) + 0.5 * vividness(scenes) + 0.8 * cleanness(scenes)


def hps_utility(scenes: Scenes, truth: Tensor) -> Tensor:
    """Return the utility of the miniature's HPSv2: a true caption, then vivid and harmonious colours."""
    colour = vividness(scenes) * (1 + harmony(scenes.figure, scenes.background))
    return 6 * truth + 0.5 * sharpness(scenes) + 1.6 * colour
