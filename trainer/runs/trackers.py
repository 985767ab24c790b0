"""Who hears of a run while it goes on: metrics.jsonl, TensorBoard, and Weights & Biases where asked for.

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


class Listener(Protocol):
    """Somebody who draws curves."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by tag."""

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """An image."""

    def close(self) -> None:
        """Write what is left."""


class Journal:
    """Tells the run folder and every listener; without a run folder, nobody. A context manager."""

    def __init__(self, run: RunFolder | None = None, listeners: tuple[Listener, ...] = ()) -> None:
        self._run = run
        self._listeners = listeners

    @classmethod
    def open(cls, config: TrainerConfig, run: RunFolder, done: int) -> Self:
        """The journal of a run that goes on after `done` iterations; what was said of later ones is void.

        Raises ConfigError where Weights & Biases cannot be had.
        """
        listeners: list[Listener] = []
        if config.logging.wandb:
            listeners.append(WeightsAndBiases(config, run))
        if config.logging.tensorboard:
            listeners.append(TensorBoard(run, done))
        return cls(run, tuple(listeners))

    def record(self, record: Mapping[str, Any]) -> None:
        """One iteration: a line of metrics.jsonl, and a curve for each of its numbers."""
        if self._run is not None:
            self._run.log(record)
        training = {key: value for key, value in record.items() if key != "evaluation"}
        self.scalars({"training": training, "evaluation": record.get("evaluation")}, record["iteration"] + 1)

    def scalars(self, values: Mapping[str, Any], step: int) -> None:
        """Curves alone; nested names are joined by a slash."""
        numbers = dict(flat_numbers(values))
        for listener in self._listeners:
            listener.scalars(numbers, step)

    def grid(self, image: Image.Image, step: int) -> None:
        """A grid of images, kept as grids/iteration-NNNNNN.png."""
        if self._run is not None:
            self._run.save_image(f"grids/iteration-{step:06d}.png", image)
        for listener in self._listeners:
            listener.image("grids", image, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.close()


class TensorBoard:
    """Events in <run>/tensorboard."""

    def __init__(self, run: RunFolder, done: int) -> None:
        self._path = run.path / TENSORBOARD
        with add_path_to_errors(self._path):
            self._writer = SummaryWriter(str(self._path), purge_step=done + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Listener.scalars`."""
        with add_path_to_errors(self._path):
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """See `Listener.image`."""
        with add_path_to_errors(self._path):
            self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """See `Listener.close`."""
        with add_path_to_errors(self._path):
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; one that goes on is the same run there."""

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
                f"trainer.logging.wandb: cannot begin ({reason(error)}); log in with `wandb login`, "
                "or set logging.wandb_mode=offline"
            ) from error
        # Its own step may not go back, as it must where a run goes on from an older checkpoint.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Listener.scalars`."""
        self._run.log({**values, "step": step})

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """See `Listener.image`."""
        self._run.log({tag: self._wandb.Image(image), "step": step})

    def close(self) -> None:
        """See `Listener.close`."""
        self._run.finish()


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested mappings by their joined names; words, nulls and truth values are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)
