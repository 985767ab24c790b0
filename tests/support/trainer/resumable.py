"""A run of seconds, and everything about it that must not depend on how often it was interrupted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.trainer.conftest import PROMPTS, SAMPLING, FakeScorer
from trainer.config import LORA_FILE, CheckpointsConfig, TrainerConfig
from trainer.data.splits import Split
from trainer.rl.rewards import Scorer
from trainer.runs.checkpoints import Checkpoints, decode
from trainer.runs.folder import METRICS_FILE, RunFolder
from trainer.runs.train import train_run

HELD_OUT = ("a held out one", "another held out one")


def short_config(folder: Path, karlo: Path, **changes: Any) -> TrainerConfig:
    """Four iterations that leave nothing out: average, schedule, weight decay, accumulation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("train", PROMPTS), ("validation", HELD_OUT)):
        (folder / f"{name}.txt").write_text("\n".join(lines))
    values = {
        "name": "short",
        "runs_dir": folder / "runs",
        "iterations": 4,
        "threads": 1,
        "karlo": {"path": karlo},
        "prompts": {"train": folder / "train.txt", "validation": folder / "validation.txt"},
        "sampling": SAMPLING.model_dump() | {"decoder_steps": 5, "micro_batch": 4},
        "lora": {"rank": 2, "alpha": 2, "ema_decay": 0.8},
        "objective": {"weights": {"red": 1.0, "dark": 0.5}},
        "rollout": {"prompts_per_iteration": 3, "images_per_prompt": 2, "share": {"prior": "prompt"}},
        "update": {"micro_batch": 4, "accumulate": 2, "schedule": "cosine", "weight_decay": 0.01},
        "evaluation": {
            "every": 2,
            "every_limit": 1,
            "images_per_prompt": 3,
            "micro_batch": 4,
            "resamples": 100,
        },
    }
    return TrainerConfig.model_validate(values | changes)


def train(config: TrainerConfig, run: RunFolder, scorer: Scorer | None = None) -> None:
    """Begin the run, or go on with it."""
    console = Console(quiet=True)
    train_run(config, Split(PROMPTS, HELD_OUT, (0, 1)), scorer or FakeScorer(), run, console)


def newest(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of the newest whole checkpoint."""
    stored = Checkpoints(run / "checkpoints", CheckpointsConfig()).latest()
    assert stored is not None
    return decode(stored)[0].tensors


def metrics(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what a clock says."""
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [_timeless(line) for line in lines]


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _timeless(value) if isinstance(value, dict) else value
        for key, value in line.items()
        if not _timing(key)
    }


def _timing(key: str) -> bool:
    return key in ("seconds", "exposed_wait_share") or key.endswith("_s")


def _bytes(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in sorted(tensors.items())}


def essence(run: Path) -> dict[str, object]:
    """Everything that two equal runs have in common, to the bit."""
    stored = Checkpoints(run / "checkpoints", CheckpointsConfig()).latest()
    assert stored is not None
    snapshot, _ = decode(stored)
    files = ("lora/README.md", "evaluation.json", "before_after.png")
    return {
        "done": snapshot.done,
        "learner": snapshot.training,
        "tensors": _bytes(snapshot.tensors),
        "metrics": metrics(run),
        # Not its bytes: safetensors writes the metadata in any order.
        "lora": _bytes(load_file(run / "lora" / LORA_FILE)),
        **{name: (run / name).read_bytes() for name in files},
    }
