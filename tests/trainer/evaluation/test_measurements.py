"""A measurement on disk: the same again, or a clear word."""

from pathlib import Path

import numpy as np
import pytest

from trainer.evaluation.comparison import Measurement
from trainer.runtime.errors import StorageError

PROMPTS = ("a red ring", "ein grüner Stern", "")


@pytest.fixture
def measurement() -> Measurement:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 2, 4, 6, 3), dtype=np.uint8)
    return Measurement(PROMPTS, images, rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 2, 4)))


def test_what_is_saved_is_loaded_to_the_bit(measurement: Measurement, tmp_path: Path) -> None:
    """Images and scores; the prompts are those it is asked for. Nothing else is left in the folder."""
    measurement.save(tmp_path / "base.npz")
    again = Measurement.load(tmp_path / "base.npz", list(PROMPTS))
    assert again.prompts == PROMPTS
    for ours, theirs in zip(measurement[1:], again[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["base.npz"]


def test_the_first_prompts_are_a_measurement_too(measurement: Measurement) -> None:
    """None means all."""
    first = measurement.first(2)
    assert first.prompts == PROMPTS[:2]
    assert [len(field) for field in first] == [2] * 4
    assert measurement.first(None).prompts == PROMPTS


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """One line with the path."""
    with pytest.raises(StorageError, match=r"tuned\.npz: no such file"):
        Measurement.load(tmp_path / "tuned.npz", PROMPTS)


def test_a_measurement_of_other_prompts_is_refused(measurement: Measurement, tmp_path: Path) -> None:
    """Its rows would be given to the wrong ones."""
    measurement.save(tmp_path / "base.npz")
    with pytest.raises(StorageError, match=r"base\.npz: measures 3 prompts, not these 2"):
        Measurement.load(tmp_path / "base.npz", PROMPTS[:2])


def contents(measurement: Measurement, tmp_path: Path) -> dict[str, bytes]:
    whole = measurement.encode()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "objects.npz", images=np.array([None]), raw=np.zeros(1), z=np.zeros(1))
    np.savez(tmp_path / "flat.npz", images=np.zeros(3), raw=np.zeros(3), z=np.zeros(3))
    np.savez(tmp_path / "scalar.npz", images=np.zeros(()), raw=np.zeros(()), z=np.zeros(()))
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    return (
        {"empty": b"", "text": b"hello", "cut": whole[:-30], "half": whole[: len(whole) // 2]}
        | files
        | {"flipped": bytes(flipped)}
    )


@pytest.mark.parametrize(
    "case",
    [
        "empty",
        "text",
        "cut",
        "half",
        "flipped",
        "array.npy",
        "other.npz",
        "objects.npz",
        "flat.npz",
        "scalar.npz",
    ],
)
def test_a_damaged_file_is_said_to_be_one(measurement: Measurement, tmp_path: Path, case: str) -> None:
    """Cut off, overwritten or something else altogether: one line with the remedy, and no pickle is read."""
    folder = tmp_path / "made"
    folder.mkdir()
    path = tmp_path / "base.npz"
    path.write_bytes(contents(measurement, folder)[case])
    with pytest.raises(
        StorageError, match=r"base\.npz: .*delete it and run the same command again"
    ) as caught:
        Measurement.load(path, PROMPTS)
    assert "\n" not in str(caught.value)
