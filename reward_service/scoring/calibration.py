"""Score calibration: a fixed table makes raw scores of different evaluators comparable.

    z = (raw − mean)/std        unit = Φ(z) = ½ erfc(−z/√2)        reward = Σ w·s / Σ w

Mean and standard deviation never come from the request's own batch. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reward_service.protocol import EvaluatorScore, Normalization
from reward_service.runtime.text_files import unique_keys
from reward_service.settings import ConfigError, one_line

# Far beyond any score, and small enough for z to be finite.
_SMALLEST, _LARGEST = 1e-12, 1e12


class Scale(BaseModel):
    """Mean and standard deviation of an evaluator's raw scores; other keys of the file are ignored.

    `fingerprint` is that of the evaluator that was measured; None if the table does not name it.
    """

    model_config = ConfigDict(frozen=True)

    mean: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
    std: Annotated[float, Field(ge=_SMALLEST, le=_LARGEST, allow_inf_nan=False)]
    fingerprint: str | None = None

    @property
    def identity(self) -> str:
        """Hash of mean and standard deviation."""
        return hashlib.sha256(json.dumps([self.mean, self.std]).encode()).hexdigest()[:16]

    def apply(self, raw: float) -> EvaluatorScore:
        """Return a raw score with its z and unit values."""
        z = (raw - self.mean) / self.std
        return EvaluatorScore(raw, z, 0.5 * math.erfc(-z / math.sqrt(2.0)))


class Calibration(BaseModel):
    """Table of scales, with their provenance and whether they are provisional."""

    model_config = ConfigDict(frozen=True)

    provisional: bool
    provenance: str
    evaluators: dict[str, Scale]

    def is_provisional(self, name: str, fingerprint: str) -> bool:
        """Return whether the table is provisional or the scale is of another variant of the evaluator."""
        return self.provisional or self._is_other_variant(name, fingerprint)

    def variant_warning(self, fingerprints: Mapping[str, str]) -> str | None:
        """Return one line about scales of other variants of their evaluators; None if there are none.

        Such scales are still used: bfloat16 and float32 differ in fingerprint, but little in scale.
        """
        others = [
            name for name, fingerprint in fingerprints.items() if self._is_other_variant(name, fingerprint)
        ]
        if not others:
            return None
        return (
            f"the scale of {', '.join(others)} was measured with other weights, preprocessing or dtype "
            "and counts as provisional; recalibrate with reward-service calibrate"
        )

    def _is_other_variant(self, name: str, fingerprint: str) -> bool:
        return self.evaluators[name].fingerprint not in (None, fingerprint)


def load_calibration(path: Path, needed: Sequence[str]) -> Calibration:
    """Read a table that has a scale for every evaluator in `needed`.

    Raises:
        ConfigError: the file is missing, malformed or incomplete
    """
    try:
        content = path.read_bytes()
        table = Calibration.model_validate_json(content)
        json.loads(content, object_pairs_hook=unique_keys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); correct service.calibration") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {location}: {one_line(first['msg'])}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {one_line(error)}") from None
    for name in needed:
        if name not in table.evaluators:
            raise ConfigError(f"{path}: no scale for evaluator {name}; add its mean and std")
    return table


def compute_reward(
    scores: Mapping[str, EvaluatorScore], weights: Mapping[str, float], normalization: Normalization
) -> float:
    """Return the weighted mean of the normalized scores; an evaluator without a weight has weight 0."""
    counted = [(weights.get(name, 0.0), getattr(score, normalization)) for name, score in scores.items()]
    total = math.fsum(w for w, _ in counted)
    # Divide before multiplying: a huge weight times a score would overflow, a tiny one underflow.
    return math.fsum(w / total * s for w, s in counted)
