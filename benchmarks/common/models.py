"""Random full-size models in memory: our engine, and the references over the same tensors.

The reference loops are those that the publications show. Each takes groups of a prompt and its images, and
returns one score for each image, in order.

==========  ===========================================================================================
aesthetic   LAION's simple_inference.py: an image at a time, five linear layers on the unit embedding
clip        OpenAI's README: a pair at a time, cosine
pickscore   the model card's calc_probs: a prompt with all of its images, transformers' CLIPModel
hpsv2       hpsv2.img_score.score: a pair at a time. It also reloads its 2 GB checkpoint at every
            call, which is left out here
==========  ===========================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms.v2 import functional
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel, CLIPTokenizer

from benchmarks.parity.weights import (
    LOGIT_SCALE,
    huggingface_config,
    huggingface_names,
    model_config,
    random_state,
    write_head,
    write_tokenizer,
)
from reward_service.engine.clip import Tower
from reward_service.engine.engine import RewardEngine
from reward_service.engine.evaluators import (
    Evaluator,
    LinearHead,
    fold_linear_layers,
    reference_preprocessing,
)
from reward_service.engine.tokenizer import HuggingFaceTokenizer, OpenClipTokenizer, Tokenizer

Transform: TypeAlias = Callable[[Image.Image], Tensor]
SIZE_PX = 224


@dataclass(frozen=True)
class Group:
    """One prompt and its images."""

    prompt: str
    images: list[Image.Image]


Loop: TypeAlias = Callable[[Sequence[Group]], list[float]]


def clip_transform() -> Transform:
    """Return OpenAI's preprocessing."""
    steps = [
        transforms.Resize(SIZE_PX, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(SIZE_PX),
        transforms.ToTensor(),
        transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
    ]
    transform: Transform = transforms.Compose(steps)
    return transform


def hps_transform(image: Image.Image) -> Tensor:
    """Preprocess as HPSv2 does: to float, longest edge to 224, black padding, normalised; (3, 224, 224)."""
    tensor = functional.to_dtype(functional.pil_to_tensor(image), scale=True)
    scale = SIZE_PX / float(max(image.size))
    new = [round(edge * scale) for edge in tensor.shape[1:]]
    if scale != 1.0:
        tensor = functional.resize(tensor, new, functional.InterpolationMode.BICUBIC, antialias=True)
    down, right = SIZE_PX - new[0], SIZE_PX - new[1]
    around = [right // 2, down // 2, right - right // 2, down - down // 2]
    padded = functional.pad(tensor, around, fill=0.0)
    normalised: Tensor = functional.normalize(
        padded, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)
    )
    return normalised


def aesthetic_loop(clip: Any, head: nn.Module, device: torch.device, dtype: torch.dtype) -> Loop:
    """Return the loop of LAION's script: the embedding through numpy, the head in float32."""
    transform = clip_transform()

    def score(image: Image.Image) -> float:
        features = clip.encode_image(transform(image)[None].to(device, dtype))
        embedding = features.float().cpu().numpy()
        embedding /= np.linalg.norm(embedding, 2, -1, keepdims=True)
        return float(head(torch.from_numpy(embedding)))

    return lambda groups: [score(image) for group in groups for image in group.images]


def clip_loop(clip: Any, device: torch.device, dtype: torch.dtype) -> Loop:
    """Return the loop of OpenAI's README, a pair at a time."""
    transform, tokenizer = clip_transform(), SimpleTokenizer()

    def score(prompt: str, image: Image.Image) -> float:
        rgb = clip.encode_image(transform(image)[None].to(device, dtype)).float()
        text = clip.encode_text(tokenizer([prompt]).to(device)).float()
        rgb = rgb / rgb.norm(dim=-1, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        return float(rgb @ text.T)

    return lambda groups: [score(group.prompt, image) for group in groups for image in group.images]


def pickscore_loop(model: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Loop:
    """Return the loop of the model card's snippet without its softmax, with the published Pillow processor.

    Args:
        folder: tokenizer and processor files
    """
    processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}

    def score(group: Group) -> list[float]:
        pixels = processor(images=group.images, return_tensors="pt")["pixel_values"].to(device, dtype)
        words = tokenizer(group.prompt, **options).to(device)
        images = model.get_image_features(pixel_values=pixels).pooler_output.float()
        texts = model.get_text_features(**words).pooler_output.float()
        images = images / images.norm(dim=-1, keepdim=True)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        scores: list[float] = (model.logit_scale.exp() * (texts @ images.T)[0]).tolist()
        return scores

    return lambda groups: [value for group in groups for value in score(group)]


def hps_loop(clip: Any, device: torch.device, dtype: torch.dtype) -> Loop:
    """Return hpsv2.img_score's inner loop: model(image, prompt), the diagonal of their product."""
    tokenizer = SimpleTokenizer()

    def score(prompt: str, image: Image.Image) -> float:
        rgb = hps_transform(image)[None].to(device, dtype)
        images, texts, _ = clip(rgb, tokenizer([prompt]).to(device))
        return float(torch.diagonal(images.float() @ texts.float().T))

    return lambda groups: [score(group.prompt, image) for group in groups for image in group.images]


def open_clip_model(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Return open_clip's model over these tensors, not copied."""
    with torch.device("meta"):
        model: Any = open_clip.CLIP(**config)
    model.load_state_dict(state, assign=True)
    weight = state["text_projection"]
    context = config["text_cfg"].get("context_length", 77)
    infinite = torch.full((context, context), float("-inf"), dtype=weight.dtype, device=weight.device)
    model.attn_mask = infinite.triu(1)
    return model.eval().requires_grad_(False)


def transformers_model(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Return transformers' CLIPModel over these tensors, not copied, under its own names."""
    # In half precision the published scale of 100 would be rounded, and every score with it.
    state["logit_scale"] = torch.tensor(LOGIT_SCALE, device=state["logit_scale"].device)
    with torch.device("meta"):
        model: Any = CLIPModel(CLIPConfig(**config))
    model.load_state_dict(state, assign=True)
    for half in (model.text_model, model.vision_model):
        count = half.embeddings.position_embedding.num_embeddings
        half.embeddings.position_ids = torch.arange(count, device=state["logit_scale"].device)[None]
    return model.eval().requires_grad_(False)


def head_module(state: dict[str, Tensor]) -> nn.Module:
    """Return LAION's five linear layers with dropout between them, under its own numbers: 0, 2, 4, 6, 7."""
    layers: list[nn.Module] = []
    for number in (0, 2, 4, 6, 7):
        outputs, inputs = state[f"layers.{number}.weight"].shape
        while len(layers) < number:
            layers.append(nn.Dropout(0.2))
        layers.append(nn.Linear(inputs, outputs))
    head = nn.Sequential(*layers).eval().requires_grad_(False)
    head.load_state_dict({key.removeprefix("layers."): tensor for key, tensor in state.items()})
    return head


ARCHITECTURES = {"clip": "ViT-L-14-quickgelu", "pickscore": "ViT-H-14", "hps": "ViT-H-14"}
EVALUATORS = {"aesthetic": "clip", "clip": "clip", "pickscore": "pickscore", "hpsv2": "hps"}


@dataclass(frozen=True)
class Models:
    """Models to compare; `bare` holds open_clip's unchanged models by tower."""

    engine: RewardEngine
    loops: dict[str, Loop]
    bare: dict[str, Any]
    configs: dict[str, dict[str, Any]]

    @property
    def towers(self) -> dict[str, Tower]:
        """The towers by name, each once."""
        return {each.tower_name: each.tower for each in self.engine.evaluators.values()}


def build(folder: Path, layers: int | None, device: torch.device, dtype: torch.dtype, batch: int) -> Models:
    """Build the models.

    Args:
        folder: folder for a few small files: tokenizer and head
        layers: number of layers of every transformer; None for the published numbers
        device: device of the towers
        dtype: dtype of the towers
        batch: largest batch, in pairs
    """
    head, tokenizers = _small_files(folder)
    configs = {name: model_config(architecture, layers) for name, architecture in ARCHITECTURES.items()}
    towers, bare = {}, {}
    for seed, (name, config) in enumerate(configs.items()):
        model = open_clip_model(config, random_state(config, seed))
        towers[name] = Tower(model, tokenizers[name], name, device, dtype, cache_entries=4096)
        bare[name] = open_clip_model(config, _tensors(model))
    engine = RewardEngine(_evaluators(towers, head), batch, device, dtype)
    return Models(engine, _loops(bare, head, configs["pickscore"], folder, device, dtype), bare, configs)


def random_engine(
    folder: Path,
    towers: Sequence[str],
    layers: int | None,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
) -> RewardEngine:
    """Build the engine with the evaluators of `towers`.

    The other parameters are those of `build`.
    """
    head, tokenizers = _small_files(folder)
    made = {}
    for seed, name in enumerate(towers):
        config = model_config(ARCHITECTURES[name], layers)
        model = open_clip_model(config, random_state(config, seed))
        made[name] = Tower(model, tokenizers[name], name, device, dtype, cache_entries=4096)
    return RewardEngine(_evaluators(made, head), batch, device, dtype)


def _small_files(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tokenizer]]:
    """Return the head's state dict, and the tokenizers by tower."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    write_tokenizer(folder)
    head = torch.load(write_head(folder, seed=0), weights_only=True)
    tokenizers: dict[str, Tokenizer] = {
        "clip": OpenClipTokenizer(Path(default_bpe()), 77),
        "pickscore": HuggingFaceTokenizer(folder, 77),
        "hps": OpenClipTokenizer(Path(default_bpe()), 77),
    }
    return head, tokenizers


def _tensors(model: open_clip.CLIP) -> dict[str, Tensor]:
    """Return a tower's state dict under open_clip's own names; the tower has wrapped the last block."""
    return {key.replace(".block.", "."): tensor for key, tensor in model.state_dict().items()}


def _evaluators(towers: dict[str, Tower], head: dict[str, Tensor]) -> dict[str, Evaluator]:
    weight, bias = fold_linear_layers(head, "head")
    evaluators: dict[str, Evaluator] = {}
    for kind, name in EVALUATORS.items():
        if name not in towers:
            continue
        linear = LinearHead(weight, bias, "head") if kind == "aesthetic" else None
        preprocessing = reference_preprocessing(kind, towers[name].size_px)  # type: ignore[arg-type]  # the four kinds
        evaluators[kind] = Evaluator(kind, kind, name, towers[name], preprocessing, "random", linear)  # type: ignore[arg-type]
    return evaluators


def _loops(
    bare: dict[str, Any],
    head: dict[str, Tensor],
    pickscore: dict[str, Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Loop]:
    state = {key: tensor.detach() for key, tensor in bare["pickscore"].state_dict().items()}
    model = transformers_model(huggingface_config(pickscore), huggingface_names(pickscore, state))
    return {
        "aesthetic": aesthetic_loop(bare["clip"], head_module(head), device, dtype),
        "clip": clip_loop(bare["clip"], device, dtype),
        "pickscore": pickscore_loop(model, folder, device, dtype),
        "hpsv2": hps_loop(bare["hps"], device, dtype),
    }
