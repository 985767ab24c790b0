"""What it means that a job of several processes ends where one does."""

from typing import Any

import pytest

from trainer.config import TrainerConfig, flat

WAIT_S = 120.0
# The order of additions and the sizes of matrices differ with the number of processes, so float32 rounds
# differently; Adam's first steps divide such differences by their own size where a gradient is almost zero.
TOLERANCE: Any = {"rtol": 1e-3, "atol": 2e-5}

CLOCKED = ("_s", "seconds", "per_second", "wait_share")  # endings of what the clock decides


def changed(config: TrainerConfig, **sections: dict[str, Any]) -> TrainerConfig:
    values = config.model_dump()
    for name, section in sections.items():
        values[name] = values[name] | section
    return TrainerConfig.model_validate(values | {"iterations": 2})


def assert_equal_records(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """All numbers of the iterations but those of the clock."""
    assert len(records) == len(expected)
    for record, other in zip(records, expected, strict=True):
        found, wanted = flat(record), flat(other)
        assert found.keys() == wanted.keys()
        numbers = [key for key in wanted if not key.endswith(CLOCKED)]
        for key in numbers:
            assert found[key] == pytest.approx(wanted[key], rel=2e-3, abs=1e-4), key
