"""Training run of a few seconds, and its content that must not depend on interruptions."""

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
    """Return a configuration of four iterations with average, schedule, weight decay and accumulation."""
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
    """Begin or resume a run and train it to its end."""
    console = Console(quiet=True)
    train_run(config, Split(PROMPTS, HELD_OUT, (0, 1)), scorer or FakeScorer(), run, console)


def newest_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the newest complete checkpoint."""
    stored = Checkpoints(run / "checkpoints", CheckpointsConfig()).latest()
    assert stored is not None
    return decode(stored)[0].tensors


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [_without_times(line) for line in lines]


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_times(value) if isinstance(value, dict) else value
        for key, value in line.items()
        if not _is_time(key)
    }


def _is_time(key: str) -> bool:
    return key in ("seconds", "exposed_wait_share") or key.endswith("_s")


def _bytes(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in sorted(tensors.items())}


def comparable_content(run: Path) -> dict[str, object]:
    """Return everything that must be equal in two equal runs, to the bit."""
    stored = Checkpoints(run / "checkpoints", CheckpointsConfig()).latest()
    assert stored is not None
    snapshot, _ = decode(stored)
    files = ("lora/README.md", "evaluation.json", "before_after.png")
    return {
        "done": snapshot.done,
        "training": snapshot.training,
        "tensors": _bytes(snapshot.tensors),
        "metrics": metrics(run),
        # Tensors, not bytes of the file: safetensors writes the metadata in any order.
        "lora": _bytes(load_file(run / "lora" / LORA_FILE)),
        **{name: (run / name).read_bytes() for name in files},
    }
