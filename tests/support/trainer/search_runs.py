"""Search on the tiny Karlo that takes seconds, for tests of searches and of their interruption."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.trainer.conftest import SAMPLING, FakeScorer
from trainer.config import TrainerConfig
from trainer.experiments.experiment import Experiment
from trainer.experiments.search import search
from trainer.rl.rewards import Scorer

COLOURS = ("red", "blue", "green", "black")
THINGS = ("ring on a hill", "cross by the sea", "star over a town")
POOL = tuple(f"one {colour} {thing}" for colour in COLOURS for thing in THINGS)
TEST = ("a quiet harbour under a wide sky", "old trees along the river")
RATE = {"low": 1e-3, "high": 1e-1, "log": True}


def search_config(folder: Path, karlo: Path, **changes: Any) -> TrainerConfig:
    """Return a configuration of two folds, and three trials of two iterations besides the null trial."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n".join(POOL))
    (folder / "test.txt").write_text("\n".join(TEST))
    values = {
        "name": "tiny",
        "runs_dir": folder / "runs",
        "iterations": 9,
        "threads": 1,
        "karlo": {"path": karlo},
        "prompts": {"train": folder / "train.txt", "test": folder / "test.txt"},
        "sampling": SAMPLING.model_dump()
        | {"prior_steps": 2, "decoder_steps": 4, "decoder_guidance": 1.0, "prior_guidance": 1.0},
        "lora": {"rank": 2, "alpha": 2, "ema_decay": 0.0},
        "objective": {"weights": {"red": 1.0}},
        "rollout": {"prompts_per_iteration": 2, "images_per_prompt": 2},
        "evaluation": {"images_per_prompt": 2, "resamples": 50},
        "crossval": {"folds": 2},
        "logging": {"tensorboard": False},
    }
    defaults = {"trials": 3, "iterations": 2, "space": {"update.learning_rate": RATE}, "warmup_trials": 1}
    search = changes.pop("search", {})
    return TrainerConfig.model_validate(values | changes | {"search": defaults | search})


def run_search(
    config: TrainerConfig,
    scorer: Scorer | None = None,
    path: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Start or resume the search; return the content of search.json."""
    experiment = Experiment.open(config, path)
    try:
        search(experiment, config, scorer or FakeScorer(), console or Console(quiet=True))
    finally:
        results = read_results(experiment.path)
    return results


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of search.json."""
    return json.loads((path / "search.json").read_bytes())  # type: ignore[no-any-return]
