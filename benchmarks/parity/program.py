"""Program of `make parity`: weights, our scores, the references' scores, the table."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import open_clip
from hpsv2.src import open_clip as bundled
from transformers.utils import logging as transformers_logging

from benchmarks.parity import report, weights
from benchmarks.parity.cases import ImageCase, write_images
from benchmarks.parity.comparison import Case, Comparison, all_cases, compare, diagonal, own_scores
from benchmarks.parity.references import Aesthetic, Hps, OpenAI, PickScore, TransformersClip
from reward_service.config import ServiceConfig

RESULT = Path(__file__).parents[1] / "results" / "parity.md"


def run() -> int:
    """Run every comparison, print and write the table.

    Returns:
        0 if every difference is within its tolerance and every known mistake would be noticed, else 1
    """
    parser = argparse.ArgumentParser(prog="parity", description="Compare with the references.")
    parser.add_argument("--quick", action="store_true", help="use 2-layer models only, and write no file")
    parser.add_argument("--folder", type=Path, help="folder for 4 GB of temporary random weights")
    options = parser.parse_args()
    _quiet()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        images = write_images(Path(folder) / "images")
        found = list(_comparisons(Path(folder), images, full=not options.quick))
        command = "make parity" + (" PARITY=--quick" if options.quick else "")
        text = report.markdown(found, images, command, time.monotonic() - start)
    print(text)
    if not options.quick:
        RESULT.write_text(text, encoding="utf-8")
    faults = [fault for comparison in found for fault in comparison.faults]
    for fault in faults:
        _log(fault)
    return 1 if faults else 0


def _comparisons(folder: Path, images: Sequence[ImageCase], *, full: bool) -> Iterator[Comparison]:
    yield from _of_size(folder, images, all_cases(images), 2)
    if full:
        yield from _of_size(folder, images, diagonal(images), None)


def _of_size(
    folder: Path, images: Sequence[ImageCase], cases: Sequence[Case], layers: int | None
) -> Iterator[Comparison]:
    weights_folder = folder / "weights"
    for compared in (_hpsv2, _pickscore, _openai):
        yield from compared(weights_folder, images, cases, layers)
        shutil.rmtree(weights_folder)


def _hpsv2(
    folder: Path, images: Sequence[ImageCase], cases: Sequence[Case], layers: int | None
) -> Iterator[Comparison]:
    config = weights.model_config("ViT-H-14", layers)
    architecture = "ViT-H-14" if layers is None else f"ViT-H-14-{layers}-layers"
    path = weights.write_open_clip(folder / "hps", weights.random_state(config, seed=1))
    if layers is not None:
        registered = folder / f"{architecture}.json"
        registered.write_text(json.dumps(config))
        open_clip.add_model_config(registered)
        bundled.factory.add_model_config(registered)
    tower = _tower("open_clip", path, architecture=architecture)
    own = own_scores(_config("hpsv2", tower), "hpsv2", images, cases)
    _log(f"hpsv2, {_size(layers)}: {len(own)} own scores computed; computing the reference's")
    labels = ("hpsv2", "hpsv2", f"ViT-H/14 {_size(layers)}")
    yield compare(labels, own, lambda: Hps(path, architecture), images)


def _pickscore(
    folder: Path, images: Sequence[ImageCase], cases: Sequence[Case], layers: int | None
) -> Iterator[Comparison]:
    config = weights.model_config("ViT-H-14", layers)
    weights_folder = folder / "pickscore"
    weights.write_huggingface(weights_folder, config, weights.random_state(config, seed=2))
    tower = _tower("huggingface", weights_folder / "model.safetensors")
    own = own_scores(_config("pickscore", tower), "pickscore", images, cases)
    _log(f"pickscore, {_size(layers)}: {len(own)} own scores computed; computing the reference's")
    labels = ("pickscore", "transformers", f"ViT-H/14 {_size(layers)}")
    yield compare(labels, own, lambda: PickScore(weights_folder), images)


def _openai(
    folder: Path, images: Sequence[ImageCase], cases: Sequence[Case], layers: int | None
) -> Iterator[Comparison]:
    model = f"ViT-L/14 {_size(layers)}"
    config = weights.model_config("ViT-L-14-quickgelu", layers)
    state = weights.random_state(config, seed=3, half=True)
    openai, weights_folder = weights.write_openai(folder / "openai", state), folder / "clip"
    weights.write_huggingface(weights_folder, config, state)
    head = weights.write_head(folder / "aesthetic", seed=4)
    tower = _tower("huggingface", weights_folder / "model.safetensors", text_cleaning="openai")
    own = own_scores(_config("clip", tower), "clip", images, cases)
    own_aesthetic = own_scores(
        _config("aesthetic", tower, head), "aesthetic", images, _one_prompt_each(cases)
    )
    _log(f"clip and aesthetic, {_size(layers)}: own scores computed; computing the references'")
    yield compare(("clip", "OpenAI clip", model), own, lambda: OpenAI(openai), images)
    yield compare(("clip", "transformers", model), own, lambda: TransformersClip(weights_folder), images)
    yield compare(("aesthetic", "LAION MLP", model), own_aesthetic, lambda: Aesthetic(openai, head), images)


def _one_prompt_each(cases: Sequence[Case]) -> list[Case]:
    """Return each image once, for an evaluator that reads no prompt."""
    return list({image: (image, prompt) for image, prompt in cases}.values())


def _tower(layout: str, path: Path, **more: str) -> dict[str, Any]:
    return {"layout": layout, "origin": {"folder": path.parent}, "weights": {"file": path.name}, **more}


def _config(kind: str, tower: dict[str, Any], head: Path | None = None) -> ServiceConfig:
    """Return the configuration of one evaluator over one tower, in fp32 on the CPU."""
    evaluator: dict[str, Any] = {"kind": kind, "tower": "tower"}
    if head is not None:
        evaluator["head"] = {"origin": {"folder": head.parent}, "weights": {"file": head.name}}
    section = {"towers": {"tower": tower}, "evaluators": {kind: evaluator}}
    device = {"calibration": "unused.json", "device": "cpu", "dtype": "float32"}
    return ServiceConfig.model_validate(section | device)


def _size(layers: int | None) -> str:
    return "full size" if layers is None else f"{layers} layers"


def _quiet() -> None:
    """Silence the references' own output."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def _log(line: str) -> None:
    print(f"parity: {line}", file=sys.stderr, flush=True)
