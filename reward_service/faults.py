"""What can be wrong with the device rather than with a pair. No torch, no web."""

from __future__ import annotations


class OutOfMemoryError(Exception):
    """The device had no room for a batch of this size; a smaller one may fit."""


class FatalDeviceError(Exception):
    """The device can't be trusted any more, whatever it is given: only a new process helps."""
