"""The four evaluators: what each makes of a tower's unit embeddings. All of it in float32.

=========  ===================================  =====================================
kind       formula                              reference
=========  ===================================  =====================================
aesthetic  w·e + b                              LAION improved-aesthetic-predictor v2
clip       e·t                                  OpenAI CLIP, cosine without scale
pickscore  exp(logit_scale) · e·t               PickScore v1
hpsv2      e·t                                  HPSv2 (v2.0, v2.1)
=========  ===================================  =====================================

e: unit embedding of the picture, t: of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reward_service.checkpoints import ModelError, StateDict, read_weights
from reward_service.config import EvaluatorConfig, EvaluatorKind, HeadConfig
from reward_service.preprocess import Preprocessing
from reward_service.towers import Tower

FORMULAS: Mapping[EvaluatorKind, str] = {
    "aesthetic": "w·e + b",
    "clip": "cos(e, t)",
    "pickscore": "exp(logit_scale)·cos(e, t)",
    "hpsv2": "cos(e, t)",
}


@dataclass(frozen=True)
class LinearHead:
    """A score linear in the embedding: ``weight`` float32 (D,), ``bias``, and the hash of its file."""

    weight: Tensor
    bias: float
    identity: str


@dataclass(frozen=True)
class Evaluator:
    """One evaluator over a tower that it may share."""

    name: str
    kind: EvaluatorKind
    tower_name: str
    tower: Tower
    preprocessing: Preprocessing
    fingerprint: str
    head: LinearHead | None = None

    @property
    def reads_prompt(self) -> bool:
        """Whether the prompt matters to the score."""
        return self.head is None

    def score(self, image: Tensor, text: Tensor | None) -> Tensor:
        """Raw scores.

        :param image: unit embeddings of the pictures, float32 (N, D)
        :param text: unit embeddings of the prompts, float32 (N, D); None only where no prompt is read
        :returns: float32 (N,)
        """
        if self.head is not None:
            # Row by row: a matrix product would add in an order that depends on the number of rows.
            return (image * self.head.weight.to(image.device)).sum(dim=-1) + self.head.bias
        if text is None:
            raise ValueError(f"evaluator {self.name} needs prompts")
        cosine = (image * text).sum(dim=-1)
        return cosine * self.tower.logit_scale if self.kind == "pickscore" else cosine


def load_evaluator(name: str, config: EvaluatorConfig, tower: Tower, dtype: torch.dtype) -> Evaluator:
    """An evaluator over a loaded tower.

    :raises ModelError: its head cannot be used
    """
    head = load_head(config.head) if config.head is not None else None
    if head is not None and len(head.weight) != tower.embedding_size:
        sizes = f"reads {len(head.weight)} numbers, tower {config.tower} gives {tower.embedding_size}"
        raise ModelError(f"evaluator {name}: its head {sizes}; give it the tower it was trained on")
    preprocessing = preprocessing_of(config.kind, tower.size_px)
    parts = [
        FORMULAS[config.kind],
        tower.identity,
        repr(preprocessing),
        str(dtype),
        head.identity if head else "",
    ]
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return Evaluator(name, config.kind, config.tower, tower, preprocessing, fingerprint, head)


def preprocessing_of(kind: EvaluatorKind, size_px: int) -> Preprocessing:
    """How the reference of this kind prepares its pictures."""
    if kind == "hpsv2":
        return Preprocessing("letterbox", size_px)
    return Preprocessing("crop", size_px, half_pixel="down" if kind == "pickscore" else "even")


def load_head(config: HeadConfig) -> LinearHead:
    """LAION's head: five linear layers with nothing but dropout between them, folded into one.

    :raises ModelError: the file is not such a head
    """
    state, identity = read_weights(config.origin, config.weights)
    name = f"{config.origin}/{config.weights.file}"
    weight, bias = fold(state, name)
    return LinearHead(weight, bias, identity)


def fold(state: StateDict, name: str) -> tuple[Tensor, float]:
    """Fold ``layers.N.weight``, ``layers.N.bias`` into one w and b, in float64.

    :raises ModelError: not a chain of linear layers that ends in one number
    """
    numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.")})
    try:
        layers = [(state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()) for n in numbers]
        weight, bias = layers[0]
        for next_weight, next_bias in layers[1:]:
            weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    except (KeyError, IndexError, RuntimeError):
        raise ModelError(
            f"{name}: expected linear layers layers.N.weight and .bias; this is no such head"
        ) from None
    if weight.shape[0] != 1:
        raise ModelError(f"{name}: expected a head that ends in 1 number, found {weight.shape[0]}")
    return weight[0].float(), float(bias)
