"""raw → z → unit: a fixed table makes the evaluators comparable. Never the request's own batch. No torch.

z = (raw − mean)/std        unit = Φ(z) = ½ erfc(−z/√2)        reward = Σ w·s / Σ w
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
from reward_service.settings import ConfigError, one_line

# Far beyond any score, and near enough for z to be finite.
_SMALLEST, _LARGEST = 1e-12, 1e12


class Scale(BaseModel):
    """Mean and standard deviation of an evaluator's raw scores; further keys of the file are its notes.

    `fingerprint`: of the evaluator whose scores they are of, None if the table doesn't say.
    """

    model_config = ConfigDict(frozen=True)

    mean: Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
    std: Annotated[float, Field(ge=_SMALLEST, le=_LARGEST, allow_inf_nan=False)]
    fingerprint: str | None = None

    @property
    def identity(self) -> str:
        """Hash of the two numbers."""
        return hashlib.sha256(json.dumps([self.mean, self.std]).encode()).hexdigest()[:16]

    def apply(self, raw: float) -> EvaluatorScore:
        """A raw score with its z and unit."""
        z = (raw - self.mean) / self.std
        return EvaluatorScore(raw, z, 0.5 * math.erfc(-z / math.sqrt(2.0)))


class Calibration(BaseModel):
    """A table of scales, where they come from, and whether they are provisional."""

    model_config = ConfigDict(frozen=True)

    provisional: bool
    provenance: str
    evaluators: dict[str, Scale]

    def provisional_for(self, name: str, fingerprint: str) -> bool:
        """Whether the scale of an evaluator is a stand-in: the table says so, or it is another variant's."""
        return self.provisional or self._foreign(name, fingerprint)

    def notice(self, fingerprints: Mapping[str, str]) -> str | None:
        """One line about scales made with another variant of their evaluator; None if there are none.

        They are used all the same: bfloat16 and float32 differ in fingerprint, but little in scale.
        """
        foreign = [name for name, fingerprint in fingerprints.items() if self._foreign(name, fingerprint)]
        if not foreign:
            return None
        return (
            f"the scale of {', '.join(foreign)} was made with other weights, preprocessing or dtype "
            "and counts as provisional; recalibrate with reward-service calibrate"
        )

    def _foreign(self, name: str, fingerprint: str) -> bool:
        return self.evaluators[name].fingerprint not in (None, fingerprint)


def load_calibration(path: Path, needed: Sequence[str]) -> Calibration:
    """Read a table that has a scale for every evaluator in `needed`.

    Raises:
        ConfigError: the file is missing, malformed or incomplete
    """
    try:
        table = Calibration.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); correct service.calibration") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {where}: {one_line(first['msg'])}") from None
    for name in needed:
        if name not in table.evaluators:
            raise ConfigError(f"{path}: no scale for evaluator {name}; add its mean and std")
    return table


def compose(
    scores: Mapping[str, EvaluatorScore], weights: Mapping[str, float], normalization: Normalization
) -> float:
    """The weighted mean of the normalized scores; an evaluator without a weight does not count."""
    counted = [(weights.get(name, 0.0), getattr(score, normalization)) for name, score in scores.items()]
    total = math.fsum(w for w, _ in counted)
    # Shares before products: a huge weight times a score would overflow, a tiny one vanish.
    return math.fsum(w / total * s for w, s in counted)
