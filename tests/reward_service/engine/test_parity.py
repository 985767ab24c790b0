"""Parity: each evaluator against an independent implementation of its reference, on the same weights."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import ftfy
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

from reward_service.engine.engine import RewardEngine
from reward_service.engine.preprocessing import OPENAI_MEAN, OPENAI_STD
from reward_service.engine.types import Pair
from reward_service.images import Pixels
from tests.reward_service.conftest import PROMPTS
from tests.support.service.checkpoints import CONTEXT, SIZE_PX, Checkpoints, head_module, hps_model_config


def scores(engine: RewardEngine, images: Sequence[Pixels], name: str) -> Tensor:
    pairs = [Pair(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]
    return torch.tensor([pair.raw[name] for pair in engine.score(pairs, [name])])


def transformers_embeddings(
    folder: Path, images: Sequence[Pixels], prompts: Sequence[str]
) -> tuple[CLIPModel, Tensor, Tensor]:
    """Return transformers' model, and its unit embeddings of images and prompts, computed one pair at a time.

    The checkpoints were published with the processor's Pillow backend; transformers 5 defaults to
    torchvision's, whose resize of uint8 tensors differs from it by up to 13 grey levels.
    """
    model = CLIPModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    image_vectors, text_vectors = [], []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = processor(images=Image.fromarray(image), return_tensors="pt")
        ids = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        )
        with torch.no_grad():
            image_vectors.append(model.get_image_features(**pixels).pooler_output[0])
            text_vectors.append(model.get_text_features(**ids).pooler_output[0])
    unit_images = F.normalize(torch.stack(image_vectors), dim=-1)
    return model, unit_images, F.normalize(torch.stack(text_vectors), dim=-1)


def torchvision_crop(image: Pixels) -> Tensor:
    """Preprocess an image with OpenAI's own transform."""
    transform = v2.Compose(
        [
            v2.Resize(SIZE_PX, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(SIZE_PX),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(OPENAI_MEAN, OPENAI_STD),
        ]
    )
    return transform(Image.fromarray(image))


def hps_letterbox(rgb: Pixels) -> Tensor:
    """Preprocess an image as HPSv2's ToTensor, ResizeMaxSize and Normalize do, with torchvision."""
    image = v2.functional.to_dtype(v2.functional.pil_to_tensor(Image.fromarray(rgb)), scale=True)
    height, width = image.shape[1:]
    scale = SIZE_PX / float(max(height, width))
    new = [round(height * scale), round(width * scale)]
    if scale != 1.0:
        image = v2.functional.resize(image, new, v2.InterpolationMode.BICUBIC, antialias=True)
    down, right = SIZE_PX - new[0], SIZE_PX - new[1]
    image = v2.functional.pad(image, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0.0)
    return v2.functional.normalize(image, list(OPENAI_MEAN), list(OPENAI_STD))


def openai_cleaned(prompt: str) -> str:
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).strip().split())


def test_pickscore_equals_its_reference(
    checkpoints: Checkpoints, engine: RewardEngine, images: list[Pixels]
) -> None:
    """exp(logit_scale) times the cosine of transformers' CLIPModel and its processor."""
    model, image_vectors, text_vectors = transformers_embeddings(checkpoints.pickscore, images, PROMPTS)
    expected = model.logit_scale.exp().item() * (image_vectors * text_vectors).sum(-1)
    assert expected.std() > 1.0
    torch.testing.assert_close(scores(engine, images, "pickscore"), expected, atol=1e-4, rtol=0)


def test_clip_equals_its_reference(
    checkpoints: Checkpoints, engine: RewardEngine, images: list[Pixels]
) -> None:
    """OpenAI's cleaning and crop, transformers' model; QuickGELU taken from the configuration."""
    model, _, text_vectors = transformers_embeddings(
        checkpoints.clip, images, [openai_cleaned(prompt) for prompt in PROMPTS]
    )
    pixels = torch.stack([torchvision_crop(image) for image in images])
    with torch.no_grad():
        image_vectors = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    expected = (image_vectors * text_vectors).sum(-1)
    torch.testing.assert_close(scores(engine, images, "clip"), expected, atol=1e-6, rtol=0)


def test_aesthetic_equals_its_reference(
    checkpoints: Checkpoints, engine: RewardEngine, images: list[Pixels]
) -> None:
    """LAION's five layers one after another on the unit embedding."""
    model = CLIPModel.from_pretrained(checkpoints.clip).eval()
    head = head_module().eval()
    state = torch.load(checkpoints.head, weights_only=True)
    head.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    pixels = torch.stack([torchvision_crop(image) for image in images])
    with torch.no_grad():
        expected = head(F.normalize(model.get_image_features(pixels).pooler_output, dim=-1))[:, 0]
    torch.testing.assert_close(scores(engine, images, "aesthetic"), expected, atol=1e-5, rtol=0)


def test_hpsv2_equals_its_reference(
    checkpoints: Checkpoints, engine: RewardEngine, images: list[Pixels]
) -> None:
    """open_clip's model, tokenizer and HPSv2's transform; the cosine without a scale."""
    model = open_clip.CLIP(**hps_model_config()).eval()
    model.load_state_dict(torch.load(checkpoints.hps / "HPS.pt", weights_only=True)["state_dict"])
    tokenizer = SimpleTokenizer(str(checkpoints.hps / "bpe.txt.gz"), context_length=CONTEXT)
    with torch.no_grad():
        pixels = torch.stack([hps_letterbox(image) for image in images])
        image_vectors = model.encode_image(pixels, normalize=True)
        text_vectors = model.encode_text(tokenizer(list(PROMPTS)), normalize=True)
    expected = (image_vectors * text_vectors).sum(-1)
    torch.testing.assert_close(scores(engine, images, "hpsv2"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mistake", ["activation", "antialias"])
def test_common_mistakes_exceed_the_tolerances(
    mistake: str, checkpoints: Checkpoints, engine: RewardEngine, images: list[Pixels]
) -> None:
    """GELU for QuickGELU, or a resize without antialias, moves an embedding by more than 1e-3."""
    if mistake == "activation":
        model = CLIPModel.from_pretrained(checkpoints.clip, text_config={"hidden_act": "gelu"}).eval()
        for block in model.vision_model.encoder.layers:
            block.mlp.activation_fn = torch.nn.GELU()
        pixels = torch.stack([torchvision_crop(image) for image in images])
        with torch.no_grad():
            found = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        own = engine.evaluators["clip"].tower.embed_images(pixels)
    else:
        unit = torch.from_numpy(images[2]).permute(2, 0, 1)[None].float() / 255
        aliased = F.interpolate(unit, (32, 14), mode="bicubic", antialias=False)
        padded = F.pad(aliased, (9, 9))
        tower, preprocessing = engine.evaluators["hpsv2"].tower, engine.evaluators["hpsv2"].preprocessing
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
        found, own = tower.embed_images((padded - mean) / std), tower.embed_images(preprocessing(images[2:3]))
    assert (found - own).abs().max() > 1e-3
