"""The canary: one fixed pair whose scores are known, so that a reward service that computes wrongly is found out.

The image is larger than any tower's input and full of fine lines, so that another way of resizing shows.
A file of golden scores holds them by device type and fingerprint; weights, preprocessing, tokenizer and dtype
are in the fingerprint, so a score of the same fingerprint has to come out again. No torch.
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
from reward_service.settings import ConfigError, one_line

_HEIGHT_PX, _WIDTH_PX = 420, 512
_PROMPT = "a red circle and a blue square on a striped wall, seen from afar"

#: Largest distance from a golden score that another machine's order of additions accounts for, in raw units,
#: on a CPU: in float32 ten times the tolerances of docs/numerics.md, in bfloat16 at most those themselves.
TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "float32": {"aesthetic": 1e-4, "clip": 1e-5, "hpsv2": 1e-5, "pickscore": 1e-3},
    "bfloat16": {"aesthetic": 0.1, "clip": 5e-3, "hpsv2": 5e-3, "pickscore": 0.5},
}
# Some GPUs compute the first layer's convolution in TF32, and others don't.
_FLOAT32_ELSEWHERE = 10.0


class Golden(BaseModel):
    """A known score; `evaluator` is for people who read the file."""

    model_config = ConfigDict(frozen=True)

    evaluator: str
    raw: Annotated[float, Field(allow_inf_nan=False)]


class GoldenScores(BaseModel):
    """A file of golden scores: of which pair, and device type → fingerprint → score."""

    model_config = ConfigDict(frozen=True)

    pair: str
    scores: dict[str, dict[str, Golden]]

    def of(self, device: str, fingerprint: str) -> float | None:
        """The score of an evaluator on a device type; None if it isn't known."""
        golden = self.scores.get(device, {}).get(fingerprint)
        return golden.raw if golden else None


@dataclass(frozen=True)
class Expected:
    """What an evaluator has to score the canary pair, give or take; `golden` if a file says so."""

    raw: float
    tolerance: float
    golden: bool

    def mismatch(self, evaluator: str, raw: float) -> str | None:
        """One line if a score isn't this one."""
        if abs(raw - self.raw) <= self.tolerance:  # false for a NaN
            return None
        origin = "its golden score" if self.golden else "its score at the start"
        return (
            f"evaluator {evaluator} scores the canary pair {raw:.6g}, expected {origin} "
            f"{self.raw:.6g} within {self.tolerance:g}"
        )


def canary_pair() -> Pair:
    """The fixed pair, made of whole numbers only: the same bytes everywhere."""
    y, x = np.mgrid[:_HEIGHT_PX, :_WIDTH_PX]
    # A moiré, stripes of three and five pixels, a disc and a square.
    red, green, blue = (x * y // 7) % 256, (x // 3 + y // 5) % 2 * 190 + 30, (x * 255) // _WIDTH_PX
    disc = (x - 170) ** 2 + (y - 210) ** 2 < 110**2
    square = (abs(x - 380) < 80) & (abs(y - 200) < 80)
    image = np.stack([red, green, blue], axis=2).astype(np.uint8)
    image[disc] = image[disc] // 4 + np.array([180, 10, 10], np.uint8)
    image[square] = image[square] // 4 + np.array([10, 20, 180], np.uint8)
    return Pair(_PROMPT, image)


def identity(pair: Pair) -> str:
    """Hash of prompt and pixels."""
    return hashlib.sha256(pair.prompt.encode() + b"\0" + pair.image.tobytes()).hexdigest()[:16]


def load_golden(path: Path) -> GoldenScores:
    """Read a file of golden scores.

    Raises:
        ConfigError: it is missing, malformed, or of another canary pair
    """
    remedy = "write it anew with reward-service canary --write"
    try:
        golden = GoldenScores.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {where}: {one_line(first['msg'])}; {remedy}") from None
    if golden.pair != identity(canary_pair()):
        raise ConfigError(f"{path}: the golden scores are of another canary pair; {remedy}")
    return golden


def merged(old: GoldenScores | None, device: str, scores: Iterable[tuple[str, Golden]]) -> GoldenScores:
    """Golden scores with those of one device type added, by fingerprint; the others are kept."""
    kept = dict(old.scores) if old else {}
    kept[device] = {**kept.get(device, {}), **dict(scores)}
    return GoldenScores(pair=identity(canary_pair()), scores=kept)


def dumps(golden: GoldenScores) -> str:
    """As the text of a file."""
    return json.dumps(golden.model_dump(), indent=2, sort_keys=True) + "\n"


def tolerance(kind: str, dtype: str, device: str) -> float:
    """What a score of an evaluator of this kind may be off by.

    Args:
        device: type of the device, such as cpu or cuda
    """
    widened = dtype == "float32" and device != "cpu"
    return TOLERANCES[dtype].get(kind, math.inf) * (_FLOAT32_ELSEWHERE if widened else 1.0)
