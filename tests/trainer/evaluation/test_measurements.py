"""Measurements on disk: read back to the bit, or a clear error."""

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


def test_measurement_is_loaded_to_the_bit(measurement: Measurement, tmp_path: Path) -> None:
    """Images and scores, with the prompts that are passed; nothing else is left in the folder."""
    measurement.save(tmp_path / "base.npz")
    again = Measurement.load(tmp_path / "base.npz", list(PROMPTS))
    assert again.prompts == PROMPTS
    for saved, loaded in zip(measurement[1:], again[1:], strict=True):
        np.testing.assert_array_equal(saved, loaded)
        assert saved.dtype == loaded.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["base.npz"]


def test_first_returns_a_measurement_of_the_first_prompts(measurement: Measurement) -> None:
    """None means all."""
    first = measurement.first(2)
    assert first.prompts == PROMPTS[:2]
    assert [len(field) for field in first] == [2] * 4
    assert measurement.first(None).prompts == PROMPTS


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    """One line with the path."""
    with pytest.raises(StorageError, match=r"tuned\.npz: no such file"):
        Measurement.load(tmp_path / "tuned.npz", PROMPTS)


def test_load_refuses_another_number_of_prompts(measurement: Measurement, tmp_path: Path) -> None:
    """Its rows would be assigned to the wrong prompts."""
    measurement.save(tmp_path / "base.npz")
    with pytest.raises(StorageError, match=r"base\.npz: has 3 prompts, expected 2"):
        Measurement.load(tmp_path / "base.npz", PROMPTS[:2])


def damaged_files(measurement: Measurement, tmp_path: Path) -> dict[str, bytes]:
    whole = measurement.encode()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "objects.npz", pictures=np.array([None]), raw=np.zeros(1), z=np.zeros(1))
    np.savez(tmp_path / "flat.npz", pictures=np.zeros(3), raw=np.zeros(3), z=np.zeros(3))
    np.savez(tmp_path / "scalar.npz", pictures=np.zeros(()), raw=np.zeros(()), z=np.zeros(()))
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
def test_load_reports_a_damaged_file(measurement: Measurement, tmp_path: Path, case: str) -> None:
    """Truncated, overwritten or of another kind: one line with the remedy, and no pickle is read."""
    folder = tmp_path / "made"
    folder.mkdir()
    path = tmp_path / "base.npz"
    path.write_bytes(damaged_files(measurement, folder)[case])
    with pytest.raises(
        StorageError, match=r"base\.npz: .*delete it and run the same command again"
    ) as caught:
        Measurement.load(path, PROMPTS)
    assert "\n" not in str(caught.value)
