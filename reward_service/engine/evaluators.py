"""The four evaluators: raw scores from a tower's unit embeddings, all in float32.

=========  ===================================  =====================================
kind       formula                              reference
=========  ===================================  =====================================
aesthetic  w·e + b                              LAION improved-aesthetic-predictor v2
clip       e·t                                  OpenAI CLIP, cosine without scale
pickscore  exp(logit_scale) · e·t               PickScore v1
hpsv2      e·t                                  HPSv2 (v2.0, v2.1)
=========  ===================================  =====================================

e: unit embedding of the image, t: unit embedding of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from reward_service.config import EvaluatorKind
from reward_service.engine.clip import Tower
from reward_service.engine.preprocessing import Preprocessing
from reward_service.engine.types import ModelError
from reward_service.engine.weights import StateDict

FORMULAS: Mapping[EvaluatorKind, str] = {
    "aesthetic": "w·e + b",
    "clip": "cos(e, t)",
    "pickscore": "exp(logit_scale)·cos(e, t)",
    "hpsv2": "cos(e, t)",
}
_LAYER = re.compile(r"layers\.(\d+)\.(?:weight|bias)")


@dataclass(frozen=True)
class LinearHead:
    """Linear function of the embedding: `weight` float32 (D,), `bias`, and the hash of the head's file."""

    weight: Tensor
    bias: float
    sha256: str


@dataclass(frozen=True)
class Evaluator:
    """One evaluator; several may share a tower."""

    name: str
    kind: EvaluatorKind
    tower_name: str
    tower: Tower
    preprocessing: Preprocessing
    fingerprint: str
    head: LinearHead | None = None

    @property
    def reads_prompt(self) -> bool:
        """True if the score depends on the prompt."""
        return self.head is None

    def score(self, image: Tensor, text: Tensor | None) -> Tensor:
        """Return raw scores.

        Args:
            image: unit embeddings of the images, float32 (N, D)
            text: unit embeddings of the prompts, float32 (N, D); None only if no prompt is read

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


def reference_preprocessing(kind: EvaluatorKind, size_px: int) -> Preprocessing:
    """Return the preprocessing of the reference implementation of this kind."""
    if kind == "hpsv2":
        return Preprocessing("letterbox", size_px)
    return Preprocessing("crop", size_px, half_pixel="down" if kind == "pickscore" else "even")


def fold_linear_layers(state: StateDict, name: str) -> tuple[Tensor, float]:
    """Fold a chain of linear layers into one weight (D,) and one bias, computed in float64.

    Args:
        state: `layers.N.weight` (rows, columns) and `layers.N.bias` (rows,)
        name: name of the file, for error messages

    Raises:
        ModelError: not a chain of linear layers that ends in one number
    """
    (_, weight, bias), *later = _linear_layers(state, name)
    for number, next_weight, next_bias in later:
        if next_weight.shape[1] != len(weight):
            sizes = f"expected {len(weight)} columns, found {next_weight.shape[1]}"
            raise ModelError(f"{name}: layers.{number}.weight: {sizes}; name the file of an aesthetic head")
        weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    if len(weight) != 1:
        raise ModelError(f"{name}: expected a head that ends in 1 number, found {len(weight)}")
    return weight[0].float(), float(bias)


def _linear_layers(state: StateDict, name: str) -> list[tuple[int, Tensor, Tensor]]:
    """Return number, weight (rows, columns) and bias (rows,) of each layer in order, as float64."""
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
