"""Training callback that keeps the records of all iterations."""

from typing import Any

from trainer.rl.replay import Record
from trainer.rl.train import Callback, TrainingState


class RecordingCallback(Callback):
    """Keep each iteration's record, in the main process."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def on_iteration(self, training: TrainingState, record: Record) -> bool:
        """Append the record; never end the fold."""
        if training.processes.main:
            self.records.append(record)
        return False
