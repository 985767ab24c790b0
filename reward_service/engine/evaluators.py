"""The four evaluators: what each makes of a tower's unit embeddings. All of it in float32.

=========  ===================================  =====================================
kind       formula                              reference
=========  ===================================  =====================================
aesthetic  w·e + b                              LAION improved-aesthetic-predictor v2
clip       e·t                                  OpenAI CLIP, cosine without scale
pickscore  exp(logit_scale) · e·t               PickScore v1
hpsv2      e·t                                  HPSv2 (v2.0, v2.1)
=========  ===================================  =====================================

e: unit embedding of the image, t: of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from reward_service.config import EvaluatorKind
from reward_service.engine.clip import Tower
from reward_service.engine.preprocessing import Preprocessing
from reward_service.engine.weights import ModelError, StateDict

FORMULAS: Mapping[EvaluatorKind, str] = {
    "aesthetic": "w·e + b",
    "clip": "cos(e, t)",
    "pickscore": "exp(logit_scale)·cos(e, t)",
    "hpsv2": "cos(e, t)",
}
_LAYER = re.compile(r"layers\.(\d+)\.(?:weight|bias)")


@dataclass(frozen=True)
class LinearHead:
    """A score linear in the embedding: `weight` float32 (D,), `bias`, and the hash of its file."""

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

        Args:
            image: unit embeddings of the images, float32 (N, D)
            text: unit embeddings of the prompts, float32 (N, D); None only where no prompt is read

        Returns:
            float32 (N,)
        """
        if self.head is not None:
            # Row by row: a matrix product would add in an order that depends on the number of rows.
            return (image * self.head.weight.to(image.device)).sum(dim=-1) + self.head.bias
        if text is None:
            raise ValueError(f"evaluator {self.name} needs prompts")
        cosine = (image * text).sum(dim=-1)
        return cosine * self.tower.logit_scale if self.kind == "pickscore" else cosine


def preprocessing_of(kind: EvaluatorKind, size_px: int) -> Preprocessing:
    """How the reference of this kind prepares its images."""
    if kind == "hpsv2":
        return Preprocessing("letterbox", size_px)
    return Preprocessing("crop", size_px, half_pixel="down" if kind == "pickscore" else "even")


def fold(state: StateDict, name: str) -> tuple[Tensor, float]:
    """Fold `layers.N.weight`, `layers.N.bias` into one w and b, in float64.

    Raises:
        ModelError: not a chain of linear layers that ends in one number
    """
    (_, weight, bias), *later = _layers(state, name)
    for number, next_weight, next_bias in later:
        if next_weight.shape[1] != len(weight):
            sizes = f"expected {len(weight)} columns, found {next_weight.shape[1]}"
            raise ModelError(f"{name}: layers.{number}.weight: {sizes}; this is no such head")
        weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    if len(weight) != 1:
        raise ModelError(f"{name}: expected a head that ends in 1 number, found {len(weight)}")
    return weight[0].float(), float(bias)


def _layers(state: StateDict, name: str) -> list[tuple[int, Tensor, Tensor]]:
    """Number, weight (rows, columns) and bias (rows,) of each layer, float64, in their order."""
    numbers = sorted({int(match[1]) for key in state if (match := _LAYER.fullmatch(key))})
    expected = {f"layers.{number}.{part}" for number in numbers for part in ("weight", "bias")}
    if wrong := sorted(expected ^ state.keys()):
        found = f"no {wrong[0]}" if wrong[0] in expected else wrong[0]
        raise ModelError(f"{name}: expected linear layers layers.N.weight and .bias, found {found}")
    if not numbers:
        raise ModelError(f"{name}: expected linear layers layers.N.weight and .bias, found no tensors")
    layers = [(n, state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()) for n in numbers]
    for number, weight, bias in layers:
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            shapes = f"weight {list(weight.shape)} and bias {list(bias.shape)}"
            raise ModelError(f"{name}: layers.{number}: expected a linear layer, found {shapes}")
    return layers
