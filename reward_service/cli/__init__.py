"""Command line of `reward-service`."""

from reward_service.cli.main import app, main

__all__ = ["app", "main"]
