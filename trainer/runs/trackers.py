"""Metric loggers: metrics.jsonl, TensorBoard, and Weights & Biases if configured.

A step is the number of iterations done: that of the first iteration is 1, and 0 is the base policy.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from trainer.config import ConfigError, TrainerConfig
from trainer.runs.folder import RunFolder
from trainer.runtime.errors import reason
from trainer.runtime.files import add_path_to_errors

TENSORBOARD, WANDB_ID = "tensorboard", "wandb.json"


class Tracker(Protocol):
    """Program that plots curves and shows images of a run."""

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by tag."""

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Log an image."""

    def close(self) -> None:
        """Write what is buffered."""


class RunLogger:
    """Logs a run to its folder and to every tracker; a context manager. By default it logs nothing."""

    def __init__(self, run: RunFolder | None = None, trackers: tuple[Tracker, ...] = ()) -> None:
        self._run = run
        self._trackers = trackers

    @classmethod
    def open(cls, config: TrainerConfig, run: RunFolder, done: int) -> Self:
        """Open the logger of a run after `done` iterations; what trackers have of later ones is discarded.

        Raises:
            ConfigError: Weights & Biases is configured, but not installed or not reachable.
        """
        trackers: list[Tracker] = []
        if config.logging.wandb:
            trackers.append(WeightsAndBiases(config, run))
        if config.logging.tensorboard:
            trackers.append(TensorBoard(run, done))
        return cls(run, tuple(trackers))

    def log_iteration(self, record: Mapping[str, Any]) -> None:
        """Log an iteration: a line of metrics.jsonl, and a point on the curve of each of its numbers."""
        if self._run is not None:
            self._run.log(record)
        training = {key: value for key, value in record.items() if key != "evaluation"}
        self.log_scalars(
            {"training": training, "evaluation": record.get("evaluation")}, record["iteration"] + 1
        )

    def log_scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Log numbers to the trackers only; nested names are joined by a slash."""
        numbers = dict(flat_numbers(values))
        for tracker in self._trackers:
            tracker.log_scalars(numbers, step)

    def log_grid(self, image: Image.Image, step: int) -> None:
        """Log a grid of images, and write it to grids/iteration-NNNNNN.png."""
        if self._run is not None:
            self._run.save_image(f"grids/iteration-{step:06d}.png", image)
        for tracker in self._trackers:
            tracker.log_image("grids", image, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.close()


class TensorBoard:
    """Event files in <run>/tensorboard."""

    def __init__(self, run: RunFolder, done: int) -> None:
        self._path = run.path / TENSORBOARD
        with add_path_to_errors(self._path):
            self._writer = SummaryWriter(str(self._path), purge_step=done + 1)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log_scalars`."""
        with add_path_to_errors(self._path):
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """See `Tracker.log_image`."""
        with add_path_to_errors(self._path):
            self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker.close`."""
        with add_path_to_errors(self._path):
            self._writer.close()


class WeightsAndBiases:
    """Run of Weights & Biases; a resumed run is the same run there."""

    def __init__(self, config: TrainerConfig, run: RunFolder) -> None:
        try:
            self._wandb: Any = import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                "trainer.logging.wandb: the package wandb is not installed; pip install wandb, "
                "or set logging.wandb=false"
            ) from error
        kept = run.read_json(WANDB_ID)
        if kept is None:
            kept = {"id": secrets.token_hex(4)}
            run.write_json(WANDB_ID, kept)
        try:
            self._run: Any = self._wandb.init(
                project=config.logging.wandb_project,
                name=run.path.name,
                id=kept["id"],
                resume="allow",
                dir=str(run.path),
                mode=config.logging.wandb_mode,
                config=json.loads(config.model_dump_json()),
            )
        except self._wandb.Error as error:
            raise ConfigError(
                f"trainer.logging.wandb: cannot start ({reason(error)}); log in with `wandb login`, "
                "or set logging.wandb_mode=offline"
            ) from error
        # The step of W&B itself must not decrease, as it does if a run resumes from an older checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log_scalars`."""
        self._run.log({**values, "step": step})

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """See `Tracker.log_image`."""
        self._run.log({tag: self._wandb.Image(image), "step": step})

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings with joined names; strings, nulls and booleans are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
