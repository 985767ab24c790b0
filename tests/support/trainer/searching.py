"""A search of seconds on the tiny Karlo, and what of it must not depend on how often it was interrupted.

`python -m tests.support.trainer.searching CONFIG RUN DELAY_S` works at it as the command does, by a
judge inside.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.trainer.conftest import SAMPLING, FakeScorer
from trainer.config import TrainerConfig, load_trainer_config
from trainer.experiments.experiment import Experiment
from trainer.experiments.search import search
from trainer.rl.rewards import Images, Scorer, Scores

COLOURS = ("red", "blue", "green", "black")
THINGS = ("ring on a hill", "cross by the sea", "star over a town")
POOL = tuple(f"one {colour} {thing}" for colour in COLOURS for thing in THINGS)
TEST = ("a quiet harbour under a wide sky", "old trees along the river")
RATE = {"low": 1e-3, "high": 1e-1, "log": True}


def search_config(folder: Path, karlo: Path, **changes: Any) -> TrainerConfig:
    """Two folds, three trials and the null, two iterations each."""
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
    rules = {"trials": 3, "iterations": 2, "space": {"update.learning_rate": RATE}, "warmup_trials": 1}
    own = changes.pop("search", {})
    return TrainerConfig.model_validate(values | changes | {"search": rules | own})


def searched(
    config: TrainerConfig,
    scorer: Scorer | None = None,
    path: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Begin the search, or go on with it; what search.json says then."""
    experiment = Experiment.open(config, path)
    try:
        search(experiment, config, scorer or FakeScorer(), console or Console(quiet=True))
    finally:
        found = found_in(experiment.path)
    return found


def found_in(path: Path) -> dict[str, Any]:
    """What search.json says."""
    return json.loads((path / "search.json").read_bytes())  # type: ignore[no-any-return]


class SlowScorer(FakeScorer):
    """Takes its time, so that there is a moment to kill in."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        self._delay_s = delay_s

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        time.sleep(self._delay_s)
        return super().score(prompts, images)


if __name__ == "__main__":
    file, run, delay = sys.argv[1:]
    searched(load_trainer_config(Path(file)), SlowScorer(float(delay)), Path(run))
