"""Canary: a fixed pair with known scores, which reveals a service that computes wrong scores.

The image is larger than the input of every vision tower and full of fine lines, so that a different way of
resizing changes the score. A file of golden scores holds one score per device type and fingerprint. The
fingerprint covers weights, preprocessing, tokenizer and dtype, so equal fingerprints must give equal scores.
This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reward_service.engine.types import Pair
from reward_service.runtime.text_files import unique_keys
from reward_service.settings import ConfigError, one_line

_HEIGHT_PX, _WIDTH_PX = 420, 512
_PROMPT = "a red circle and a blue square on a striped wall, seen from afar"

#: Largest difference from a golden score that another machine's order of additions can cause, in raw units,
#: on a CPU: in float32 ten times the tolerances of docs/numerics.md, in bfloat16 at most those tolerances.
TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "float32": {"aesthetic": 1e-4, "clip": 1e-5, "hpsv2": 1e-5, "pickscore": 1e-3},
    "bfloat16": {"aesthetic": 0.1, "clip": 5e-3, "hpsv2": 5e-3, "pickscore": 0.5},
}
# Some GPUs compute the convolution of the first layer in TF32, others do not.
_FLOAT32_OTHER_DEVICE_FACTOR = 10.0


class GoldenScore(BaseModel):
    """Known raw score; `evaluator` is for human readers of the file."""

    model_config = ConfigDict(frozen=True)

    evaluator: str
    raw: Annotated[float, Field(allow_inf_nan=False)]


class GoldenScores(BaseModel):
    """File of golden scores: hash of the pair, and device type → fingerprint → score."""

    model_config = ConfigDict(frozen=True)

    pair: str
    scores: dict[str, dict[str, GoldenScore]]

    def raw_score(self, device: str, fingerprint: str) -> float | None:
        """Return the golden score of an evaluator on a device type, or None if it has none."""
        golden = self.scores.get(device, {}).get(fingerprint)
        return golden.raw if golden else None


@dataclass(frozen=True)
class ExpectedScore:
    """Score that an evaluator must give the canary, within a tolerance; `golden` if it is from a file."""

    raw: float
    tolerance: float
    golden: bool

    def mismatch(self, evaluator: str, raw: float) -> str | None:
        """Return one line if a score differs by more than the tolerance."""
        if abs(raw - self.raw) <= self.tolerance:  # false for a NaN
            return None
        origin = "its golden score" if self.golden else "its score at the start"
        return (
            f"evaluator {evaluator} scores the canary pair {raw:.6g}, expected {origin} "
            f"{self.raw:.6g} within {self.tolerance:g}"
        )


def canary_pair() -> Pair:
    """Return the fixed pair, computed with integers only: the same bytes on every machine."""
    y, x = np.mgrid[:_HEIGHT_PX, :_WIDTH_PX]
    # A moiré, stripes of three and five pixels, a disc and a square.
    red, green, blue = (x * y // 7) % 256, (x // 3 + y // 5) % 2 * 190 + 30, (x * 255) // _WIDTH_PX
    disc = (x - 170) ** 2 + (y - 210) ** 2 < 110**2
    square = (abs(x - 380) < 80) & (abs(y - 200) < 80)
    image = np.stack([red, green, blue], axis=2).astype(np.uint8)
    image[disc] = image[disc] // 4 + np.array([180, 10, 10], np.uint8)
    image[square] = image[square] // 4 + np.array([10, 20, 180], np.uint8)
    return Pair(_PROMPT, image)


def pair_hash(pair: Pair) -> str:
    """Return the hash of prompt and pixels."""
    return hashlib.sha256(pair.prompt.encode() + b"\0" + pair.image.tobytes()).hexdigest()[:16]


def load_golden(path: Path) -> GoldenScores:
    """Read a file of golden scores.

    Raises:
        ConfigError: the file is missing, malformed, or for another canary pair
    """
    remedy = "rewrite it with reward-service canary --write"
    try:
        content = path.read_bytes()
        golden = GoldenScores.model_validate_json(content)
        json.loads(content, object_pairs_hook=unique_keys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {location}: {one_line(first['msg'])}; {remedy}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {one_line(error)}; {remedy}") from None
    if golden.pair != pair_hash(canary_pair()):
        raise ConfigError(f"{path}: the golden scores are for another canary pair; {remedy}")
    return golden


def merge_golden(
    old: GoldenScores | None, device: str, scores: Iterable[tuple[str, GoldenScore]]
) -> GoldenScores:
    """Return the golden scores with those of one device type added or replaced, by fingerprint."""
    kept = dict(old.scores) if old else {}
    kept[device] = {**kept.get(device, {}), **dict(scores)}
    return GoldenScores(pair=pair_hash(canary_pair()), scores=kept)


def serialize_golden(golden: GoldenScores) -> str:
    """Return the text of a file of golden scores."""
    return json.dumps(golden.model_dump(), indent=2, sort_keys=True) + "\n"


def tolerance(kind: str, dtype: str, device: str) -> float:
    """Return the largest accepted difference of a score, in raw units.

    Args:
        kind: of the evaluator
        dtype: of its trunk
        device: type of the device, such as cpu or cuda
    """
    widened = dtype == "float32" and device != "cpu"
    return TOLERANCES[dtype].get(kind, math.inf) * (_FLOAT32_OTHER_DEVICE_FACTOR if widened else 1.0)
