"""Command line of `reward-trainer`."""

from trainer.cli.main import app, main

__all__ = ["app", "main"]
