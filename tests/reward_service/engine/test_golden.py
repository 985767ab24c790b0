"""The only published reference score: HPSv2 v2.0's own example, with the real weights.

It needs 2 GB of weights and an image, and is skipped without them:

    pip download --no-deps hpsv2==1.2.0    # a zip archive with the image: hpsv2/assets/demo_image.jpg
    reward-service download --config configs/karlo.yaml --all
    GOLDEN_IMAGE=.../demo_image.jpg pytest tests/reward_service/engine/test_golden.py

`GOLDEN_WEIGHTS` may name a folder with HPS_v2_compressed.pt instead of the hub's cache. `make parity`
leaves the image in its environment, which is searched too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reward_service.config import ServiceConfig, load_config
from reward_service.engine.files import ModelFiles
from reward_service.engine.loading import build_engine, plan_evaluators
from reward_service.engine.types import ModelError, Pair
from reward_service.images import decode

ROOT = Path(__file__).parents[3]
NAME, PROMPT, PUBLISHED = "hpsv20", "A cat with two horns on its head", 0.2876
PACKAGED = ".parity/lib/python3*/site-packages/hpsv2/assets/demo_image.jpg"


def demo_image() -> Path:
    """Return the path of the package's demonstration image; skip the test without it."""
    named = os.environ.get("GOLDEN_IMAGE")
    found = [Path(named)] if named else sorted(ROOT.glob(PACKAGED))
    if not found:
        pytest.skip("no image: set GOLDEN_IMAGE to hpsv2/assets/demo_image.jpg of PyPI's hpsv2==1.2.0")
    return found[0]


def config() -> ServiceConfig:
    """Return a configuration of HPSv2 v2.0 alone, on the CPU in float32; skip the test without weights."""
    off = [f"evaluators.{name}.enabled=false" for name in ("aesthetic", "clip", "pickscore", "hpsv2")]
    settings = [*off, f"evaluators.{NAME}.enabled=true", "device=cpu", "dtype=float32"]
    if folder := os.environ.get("GOLDEN_WEIGHTS"):
        settings.append(f"towers.{NAME}.origin={{folder: {Path(folder).absolute()}}}")
    loaded = load_config(ROOT / "configs" / "karlo.yaml", settings)
    try:
        plan_evaluators(loaded, ModelFiles(download=False), (NAME,))
    except ModelError as error:
        if os.environ.get("GOLDEN_WEIGHTS"):
            raise
        pytest.skip(f"no weights: run reward-service download --config configs/karlo.yaml --all ({error})")
    return loaded


@pytest.mark.slow
def test_hpsv2_published_score() -> None:
    """The score of `hpsv2.score`, to the four published digits."""
    path, loaded = demo_image(), config()
    pair = Pair(PROMPT, decode(path.read_bytes()).rgb)
    [scored] = build_engine(loaded).score([pair])
    assert scored.raw[NAME] == pytest.approx(PUBLISHED, abs=1e-4)
