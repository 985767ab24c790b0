"""Comparison of a job of several processes with a job of one: tolerances and records."""

from typing import Any

import pytest

from trainer.config import TrainerConfig, flatten

WAIT_S = 120.0
# The order of additions and the sizes of matrices differ with the number of processes, so float32 rounds
# differently; Adam's first steps divide such differences by their own size where a gradient is almost zero.
TOLERANCE: Any = {"rtol": 1e-3, "atol": 2e-5}

TIMING_SUFFIXES = ("_s", "seconds", "per_second", "wait_share")  # of keys whose values are measured times


def with_sections(config: TrainerConfig, **sections: dict[str, Any]) -> TrainerConfig:
    """Return the configuration with settings of some sections changed, for two iterations."""
    values = config.model_dump()
    for name, section in sections.items():
        values[name] = values[name] | section
    return TrainerConfig.model_validate(values | {"iterations": 2})


def assert_equal_records(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Assert that all numbers of the iterations agree, except measured times."""
    assert len(records) == len(expected)
    for record, other in zip(records, expected, strict=True):
        found, reference = flatten(record), flatten(other)
        assert found.keys() == reference.keys()
        for key in reference:
            if not key.endswith(TIMING_SUFFIXES):
                assert found[key] == pytest.approx(reference[key], rel=2e-3, abs=1e-4), key
