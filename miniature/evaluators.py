"""The evaluators' models: two CLIPs, the aesthetic head, and the two preference models.

As with the published four: aesthetic and alignment share one QuickGELU CLIP; PickScore and HPSv2 are
fine-tuned from a second one with GELU. All learn from the evaluators' part of the world only.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from miniature import tokenizer, world
from miniature.fitting import Pool, fit
from miniature.world import Captions, Part, Scenes

# CLIP's own channel statistics; kept so that preprocessing is the published one.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
EMBED = 96


def clip_config(activation: str, vision_width: int = 64) -> CLIPConfig:
    """Return a small CLIP's configuration; text width equals the projection, as unCLIP's prior expects."""
    vocabulary = len(tokenizer.vocabulary())
    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    text = {
        "hidden_size": EMBED,
        "intermediate_size": 4 * EMBED,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": tokenizer.CONTEXT_LENGTH,
        "projection_dim": EMBED,
        "hidden_act": activation,
        **special,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 4 * vision_width,
        "num_hidden_layers": 3,
        "num_attention_heads": vision_width // 32,
        "image_size": world.SIZE_PX,
        "patch_size": 4,
        "projection_dim": EMBED,
        "hidden_act": activation,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED)


def normalise(pixels: Tensor) -> Tensor:
    """Normalise images in [-1, 1] for a CLIP vision tower."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pixels * 0.5 + 0.5 - mean) / std


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Return (N, E) projections of images in [-1, 1], not normalise to length 1."""
    pooled = model.vision_model(pixel_values=normalise(pixels)).pooler_output
    projected: Tensor = model.visual_projection(pooled)
    return projected


def embed_texts(model: CLIPModel, words: CLIPTokenizer, text: list[str]) -> Tensor:
    """Return (N, E) projections of captions, not normalise to length 1."""
    ids = words(text, padding="longest", truncation=True, return_tensors="pt").input_ids
    projected: Tensor = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    return projected


def similarity(model: CLIPModel, words: CLIPTokenizer, text: list[str], pixels: Tensor) -> Tensor:
    """Return (N, M) exp(logit_scale) * cosine of captions and images."""
    texts = F.normalize(embed_texts(model, words, text), dim=-1)
    images = F.normalize(embed_images(model, pixels), dim=-1)
    logits: Tensor = model.logit_scale.exp().clamp(max=100.0) * texts @ images.T
    return logits


def contrastive_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Return the two-way cross-entropy; all true pairs of a row share the target. Both arguments: (N, N)."""
    rows = positives.float() / positives.sum(1, keepdim=True)
    columns = positives.float().T / positives.T.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns))


def train_clip(
    name: str, pool: Pool, words: CLIPTokenizer, config: CLIPConfig, steps: int, rng: torch.Generator
) -> CLIPModel:
    """Train a contrastive CLIP; a share of its captions states the quality, so that embeddings encode it."""
    torch.manual_seed(rng.initial_seed())
    model = CLIPModel(config)

    def loss_of_batch() -> Tensor:
        scenes, pixels = pool.batch(pool.hard_index(256, 10, rng))
        captions = world.describe(scenes, rng, quality_share=0.4)
        logits = similarity(model, words, captions.text, pixels)
        return contrastive_loss(logits, world.is_true_of(captions, scenes, scenes))

    return fit(name, model, loss_of_batch, steps, lr=1.5e-3)


def aesthetic_head() -> nn.Sequential:
    """Return five linear layers without activation, shaped and numbered as in LAION's linear MSE head."""
    widths = [EMBED, 64, 32, 16, 8, 1]
    layers: list[nn.Module] = [nn.Linear(a, b) for a, b in pairwise(widths)]
    for place in (1, 3, 5):  # dropout stands between LAION's layers, hence the numbers 0 2 4 6 7
        layers.insert(place, nn.Dropout(0.0))
    return nn.Sequential(*layers)


def train_aesthetic(clip: CLIPModel, pool: Pool, steps: int, rng: torch.Generator) -> nn.Sequential:
    """Regress the stated aesthetic on the shared CLIP's unit embedding; the tower stays as it is."""
    torch.manual_seed(rng.initial_seed())
    with torch.no_grad():
        parts = torch.arange(len(pool.scenes)).split(512)
        embeddings = torch.cat([F.normalize(embed_images(clip, pool.batch(i)[1]), dim=-1) for i in parts])
    target = world.aesthetic(pool.scenes)
    head = aesthetic_head()
    nn.init.constant_(head.get_parameter("7.bias"), float(target.mean()))

    def loss_of_batch() -> Tensor:
        index = torch.randint(len(target), (1024,), generator=rng)
        return F.mse_loss(head(embeddings[index])[:, 0], target[index])

    return fit("aesthetic head", head, loss_of_batch, steps, lr=3e-3)


def sample_alternatives(scenes: Scenes, part: Part, rng: torch.Generator) -> Scenes:
    """Return scenes to compare with: other quality and, in half the cases, one or two attributes changed.

    A change that would leave the part of the world is undone.
    """
    n = len(scenes)
    blur, fade, noise = world.sample_quality(n, rng)
    columns = {"blur_px": blur, "fade": fade, "noise": noise}
    changed = torch.rand(n, 5, generator=rng) < torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1])
    choices = {"shape": len(world.SHAPES), "figure": 11, "background": 11, "size": 2, "texture": 2}
    for i, (name, count) in enumerate(choices.items()):
        other = torch.randint(count, (n,), generator=rng)
        columns[name] = torch.where(changed[:, i], other, getattr(scenes, name))
    shape, figure, background = columns["shape"], columns["figure"], columns["background"]
    allowed = (figure != background) & world.is_in_part(shape, figure, background, part)
    for name in ("shape", "figure", "background"):
        columns[name] = torch.where(allowed, columns[name], getattr(scenes, name))
    return scenes.replace(**columns)


def utilities(kind: str, captions: Captions, scenes: Scenes, imaged: Scenes) -> Tensor:
    """Return the stated utility (N,) of each image for its own caption; `kind` is "pickscore" or "hpsv2"."""
    utility = {"pickscore": world.pick_utility, "hpsv2": world.hps_utility}[kind]
    truth = world.agreement(captions, scenes, imaged).diagonal()
    return utility(imaged, truth)


def train_preference(
    kind: str, base: CLIPModel, pool: Pool, words: CLIPTokenizer, steps: int, rng: torch.Generator
) -> CLIPModel:
    """Fine-tune on synthetic pairwise preferences, Bradley-Terry over the stated utility.

    A contrastive term preserves the alignment with captions.
    """

    def loss_of_batch() -> Tensor:
        index = pool.hard_index(96, 8, rng)
        scenes, pixels = pool.batch(index)
        other = sample_alternatives(scenes, Part.EVALUATORS, rng)
        other_pixels = world.draw(other, rng) * 2 - 1
        captions = world.describe(scenes, rng)
        logits = similarity(base, words, captions.text, torch.cat([pixels, other_pixels]))
        margin = logits.diagonal() - logits[:, len(scenes) :].diagonal()
        gap = utilities(kind, captions, scenes, scenes) - utilities(kind, captions, scenes, other)
        preference = F.binary_cross_entropy_with_logits(margin, torch.sigmoid(2 * gap))
        truth = world.is_true_of(captions, scenes, scenes)
        return preference + 0.3 * contrastive_loss(logits[:, : len(scenes)], truth)

    return fit(kind, base, loss_of_batch, steps, lr=4e-4)
