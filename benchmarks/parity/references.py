"""References: their own code, called as published, one pair at a time, in fp32 on the CPU.

=========  =====================================================================================
hpsv2      `hpsv2.img_score.score` of the package hpsv2 1.2.0, untouched
pickscore  the model card's snippet, through transformers' processor and CLIPModel
clip       OpenAI's `clip.load`, its transform, tokenizer and model; also transformers' CLIPModel
aesthetic  improved-aesthetic-predictor's simple_inference.py over OpenAI's `clip.load`
=========  =====================================================================================

Each also offers its steps (pixels, token ids, embeddings), in which mistakes.py makes known mistakes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import packaging.version
import torch
from PIL import Image
from torch import Tensor, nn

FIRST_SPECIAL_ID = 49406


def stub_unused_imports() -> None:
    """Register empty modules for imports of the references that are never used here."""
    for name, contents in (
        ("turtle", {"forward": None}),  # imported by mistake in hpsv2; the real one needs tkinter
        ("clint", {}),  # progress bar of hpsv2's downloads
        ("clint.textui", {"progress": None}),
        ("pkg_resources", {"packaging": packaging}),  # removed from setuptools; clip compares torch's version
    ):
        module = ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module
    warnings.filterwarnings("ignore", category=FutureWarning)


class Reference(Protocol):
    """Interface of a reference."""

    #: Kind of the evaluator that this is the reference of.
    kind: str
    reads_prompt: bool

    def score(self, paths: Sequence[Path], prompt: str) -> list[float]:
        """Return the scores of image files with one prompt, as published."""
        ...

    def ids(self, prompt: str) -> list[int]:
        """Return the token ids without padding, as far as padding differs from the end token."""
        ...

    def pixels(self, image: Image.Image) -> Tensor:
        """Return an image as the model's input, float32 (3, 224, 224)."""
        ...

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Return the unit embedding of one preprocessed image, (D,)."""
        ...

    def embed_ids(self, ids: Sequence[int]) -> Tensor:
        """Return the unit embedding of one row of token ids, (D,)."""
        ...

    def combine(self, image: Tensor, text: Tensor) -> float:
        """Return the score of two unit embeddings."""
        ...

    def activations(self) -> list[nn.Module]:
        """Return the modules whose `gelu` or `activation_fn` is the activation function."""
        ...


class Hps:
    """Package hpsv2; it loads the weights from a file at each call."""

    kind, reads_prompt = "hpsv2", True

    def __init__(self, checkpoint: Path, architecture: str) -> None:
        from hpsv2 import img_score
        from hpsv2.src import open_clip as bundled

        self._checkpoint, self._package = checkpoint, img_score
        # As initialize_model, without the download of weights that score() replaces anyway.
        model, _, preprocess = bundled.create_model_and_transforms(
            architecture, precision="amp", device="cpu", light_augmentation=True, output_dict=True
        )
        img_score.model_dict.update(model=model, preprocess_val=preprocess)
        self._tokenize = bundled.get_tokenizer("ViT-H-14")

    def score(self, paths: Sequence[Path], prompt: str) -> list[float]:
        """See `Reference`."""
        found = self._package.score([str(path) for path in paths], prompt, cp=str(self._checkpoint))
        return [float(score) for score in found]

    def ids(self, prompt: str) -> list[int]:
        """See `Reference`."""
        return _without_zeros(self._tokenize([prompt])[0].tolist())

    def pixels(self, image: Image.Image) -> Tensor:
        """See `Reference`."""
        pixels: Tensor = self._package.model_dict["preprocess_val"](image)
        return pixels

    @torch.no_grad()
    def embed_image(self, pixels: Tensor) -> Tensor:
        """See `Reference`."""
        embedding: Tensor = self._package.model_dict["model"].encode_image(pixels[None], normalize=True)
        return embedding[0]

    @torch.no_grad()
    def embed_ids(self, ids: Sequence[int]) -> Tensor:
        """See `Reference`."""
        row = torch.tensor([[*ids, *[0] * (77 - len(ids))]])
        embedding: Tensor = self._package.model_dict["model"].encode_text(row, normalize=True)
        return embedding[0]

    def combine(self, image: Tensor, text: Tensor) -> float:
        """See `Reference`."""
        return float(image @ text)

    def activations(self) -> list[nn.Module]:
        """See `Reference`."""
        return _mlps(self._package.model_dict["model"])


class PickScore:
    """Snippet of PickScore's model card."""

    kind, reads_prompt = "pickscore", True

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPProcessor

        # The card used transformers 4, which resizes with Pillow; transformers 5 defaults to torchvision.
        self._processor = CLIPProcessor(
            AutoImageProcessor.from_pretrained(folder, backend="pil"), AutoTokenizer.from_pretrained(folder)
        )
        self._model = CLIPModel.from_pretrained(folder).eval()
        self._images: dict[Path, Tensor] = {}

    def score(self, paths: Sequence[Path], prompt: str) -> list[float]:
        """See `Reference`."""
        inputs = self._processor(
            text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        text = self._normalised(self._model.get_text_features, inputs)
        return [self.combine(self._image(path), text) for path in paths]

    def _image(self, path: Path) -> Tensor:
        if path not in self._images:
            with Image.open(path) as image:
                self._images[path] = self.embed_image(self.pixels(image))
        return self._images[path]

    @torch.no_grad()
    def _normalised(self, features: Callable[..., Any], inputs: Any) -> Tensor:
        # transformers 5 returns an output object; the snippet expects a tensor.
        embedding: Tensor = features(**inputs).pooler_output
        return _unit(embedding)

    def ids(self, prompt: str) -> list[int]:
        """See `Reference`."""
        return list(self._processor(text=prompt, truncation=True, max_length=77)["input_ids"])

    def pixels(self, image: Image.Image) -> Tensor:
        """See `Reference`."""
        pixels: Tensor = self._processor(images=[image], return_tensors="pt")["pixel_values"]
        return pixels[0]

    def embed_image(self, pixels: Tensor) -> Tensor:
        """See `Reference`."""
        return self._normalised(self._model.get_image_features, {"pixel_values": pixels[None]})

    def embed_ids(self, ids: Sequence[int]) -> Tensor:
        """See `Reference`."""
        return self._normalised(self._model.get_text_features, {"input_ids": torch.tensor([list(ids)])})

    def combine(self, image: Tensor, text: Tensor) -> float:
        """See `Reference`."""
        return float(self._model.logit_scale.exp()) * float(text @ image)

    def activations(self) -> list[nn.Module]:
        """See `Reference`."""
        return _layers(self._model)


class OpenAI:
    """OpenAI's package; the score is the cosine of its two embeddings."""

    kind, reads_prompt = "clip", True

    def __init__(self, checkpoint: Path) -> None:
        import clip

        self._tokenize = clip.tokenize
        self._model, self._transform = clip.load(str(checkpoint), device="cpu")
        self._images: dict[Path, Tensor] = {}

    def score(self, paths: Sequence[Path], prompt: str) -> list[float]:
        """See `Reference`."""
        text = self.embed_ids(self.ids(prompt))
        return [self.combine(self.image(path), text) for path in paths]

    def image(self, path: Path) -> Tensor:
        """Return the unit embedding of an image file, (D,)."""
        if path not in self._images:
            with Image.open(path) as image:
                self._images[path] = self.embed_image(self.pixels(image))
        return self._images[path]

    def ids(self, prompt: str) -> list[int]:
        """See `Reference`."""
        return _without_zeros(self._tokenize([prompt], truncate=True)[0].tolist())

    def pixels(self, image: Image.Image) -> Tensor:
        """See `Reference`."""
        pixels: Tensor = self._transform(image)
        return pixels

    @torch.no_grad()
    def embed_image(self, pixels: Tensor) -> Tensor:
        """See `Reference`."""
        embedding: Tensor = self._model.encode_image(pixels[None])
        return _unit(embedding)

    @torch.no_grad()
    def embed_ids(self, ids: Sequence[int]) -> Tensor:
        """See `Reference`."""
        embedding: Tensor = self._model.encode_text(torch.tensor([[*ids, *[0] * (77 - len(ids))]]))
        return _unit(embedding)

    def combine(self, image: Tensor, text: Tensor) -> float:
        """See `Reference`."""
        return float(image @ text)

    def activations(self) -> list[nn.Module]:
        """See `Reference`."""
        return _mlps(self._model)


class TransformersClip(OpenAI):
    """transformers' CLIPModel behind OpenAI's transform and tokenizer: a second check of its weights."""

    def __init__(self, folder: Path) -> None:
        import clip
        from transformers import CLIPModel

        self._tokenize, self._transform = clip.tokenize, clip.clip._transform(224)
        self._model = CLIPModel.from_pretrained(folder).eval()
        self._images = {}

    @torch.no_grad()
    def embed_image(self, pixels: Tensor) -> Tensor:
        """See `Reference`."""
        embedding: Tensor = self._model.get_image_features(pixel_values=pixels[None]).pooler_output
        return _unit(embedding)

    @torch.no_grad()
    def embed_ids(self, ids: Sequence[int]) -> Tensor:
        """See `Reference`."""
        embedding: Tensor = self._model.get_text_features(input_ids=torch.tensor([list(ids)])).pooler_output
        return _unit(embedding)

    def activations(self) -> list[nn.Module]:
        """See `Reference`."""
        return _layers(self._model)


class Aesthetic(OpenAI):
    """LAION's predictor: five layers, one after another, on OpenAI's embedding normalised by numpy."""

    kind, reads_prompt = "aesthetic", False

    def __init__(self, checkpoint: Path, head: Path) -> None:
        super().__init__(checkpoint)
        self._head = _Predictor(768)
        self._head.load_state_dict(torch.load(head, weights_only=True))
        self._head.eval()

    def score(self, paths: Sequence[Path], prompt: str) -> list[float]:
        """See `Reference`."""
        del prompt
        return [self.combine(self.image(path), torch.empty(0)) for path in paths]

    @torch.no_grad()
    def embed_image(self, pixels: Tensor) -> Tensor:
        """See `Reference`."""
        features = self._model.encode_image(pixels[None]).numpy()
        length = np.atleast_1d(np.linalg.norm(features, 2, -1))
        length[length == 0] = 1
        return torch.from_numpy(features / np.expand_dims(length, -1))[0]

    @torch.no_grad()
    def combine(self, image: Tensor, text: Tensor) -> float:
        """See `Reference`."""
        del text
        return float(self._head(image[None])[0, 0])


class _Predictor(nn.Module):
    """The class MLP of simple_inference.py."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Return scores (N, 1) of unit embeddings (N, D)."""
        scores: Tensor = self.layers(embedding)
        return scores


def _unit(embedding: Tensor) -> Tensor:
    """Return the row of (1, D) at length 1, as PickScore's snippet and OpenAI's model do."""
    unit: Tensor = embedding / embedding.norm(dim=-1, keepdim=True)
    return unit[0]


def _without_zeros(ids: list[int]) -> list[int]:
    end = max(index for index, token in enumerate(ids) if token)
    return ids[: end + 1]


def _mlps(model: Any) -> list[nn.Module]:
    return [block.mlp for tower in (model.visual, model) for block in tower.transformer.resblocks]


def _layers(model: Any) -> list[nn.Module]:
    return [layer.mlp for tower in (model.vision_model, model.text_model) for layer in tower.encoder.layers]
