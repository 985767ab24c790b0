"""Drift of images: diversity within a prompt, colours, and their sentences."""

import json
import tracemalloc

import numpy as np
import pytest

from trainer.config import EvaluationConfig
from trainer.evaluation.comparison import Measurement
from trainer.evaluation.guard import Drift, appearance, diversity, downscale, measure_drift, srgb_to_lab

CONFIG = EvaluationConfig(resamples=500)


def measurement_of(images: np.ndarray) -> Measurement:
    """Return a measurement of images (P, G, H, W, 3)."""
    scores = np.zeros((*images.shape[:2], 1))
    return Measurement(tuple(f"p{i}" for i in range(len(images))), images.astype(np.uint8), scores, scores)


def noisy_images(prompts: int = 12, images: int = 4, size: int = 16, seed: int = 0) -> np.ndarray:
    """Return noisy images (P, G, H, W, 3) around a colour per prompt, each image a little different."""
    rng = np.random.default_rng(seed)
    prompt = rng.uniform(80, 170, (prompts, 1, 1, 1, 3))
    image = rng.normal(0, 12, (prompts, images, 1, 1, 3))
    return np.clip(prompt + image + rng.normal(0, 8, (prompts, images, size, size, 3)), 0, 255)


def drift_between(before: np.ndarray, after: np.ndarray) -> Drift:
    return measure_drift(measurement_of(before), measurement_of(after), CONFIG)


def test_drift_of_equal_images_is_zero() -> None:
    """No row moves, and there are no sentences."""
    drift = drift_between(noisy_images(), noisy_images())
    assert drift.diversity is not None
    assert {row.verdict for row in (drift.diversity, *drift.appearance)} == {"unclear"}
    assert drift.colour_shift == 0
    assert drift.sentences() == []


def test_drift_warns_of_a_collapse_to_one_image() -> None:
    """Every seed gives the same image: diversity 0, with a warning."""
    before = noisy_images()
    drift = drift_between(before, before[:, :1].repeat(4, axis=1))
    assert drift.diversity is not None
    assert drift.diversity.after == 0
    assert drift.diversity.verdict == "falls"
    assert "Warning: images of one prompt have become 100% more alike" in drift.sentences()[0]


def test_drift_gives_a_partial_collapse_in_percent() -> None:
    """Images half way towards the first one of their prompt are half as different."""
    before = noisy_images(size=32)
    drift = drift_between(before, (before + before[:, :1]) / 2)
    text = drift.sentences()[0]
    assert drift.diversity is not None
    relative = drift.diversity.after / drift.diversity.before
    assert 0.5 < relative < 0.95  # pairs with the first one shrink less than they would all together
    assert f"{1 - relative:.0%} more alike" in text


def test_diversity_is_the_mean_rms_difference_of_pairs() -> None:
    """Black and white are 1 apart; of three images with two equal it is 2/3."""
    black, white = np.zeros((4, 4, 3)), np.ones((4, 4, 3))
    assert diversity(np.stack([black, white])) == 1
    assert diversity(np.stack([black, black, white])) == pytest.approx(2 / 3)


def test_drift_of_single_images_has_null_diversity() -> None:
    """Diversity is undefined for one image per prompt; colours are still compared."""
    drift = drift_between(noisy_images(images=1), noisy_images(images=1) + 20)
    assert drift.diversity is None
    plain = json.loads(json.dumps(drift.to_dict(), allow_nan=False))
    assert plain["rows"]["diversity"] is None
    assert plain["rows"]["lightness"]["verdict"] == "rises"


def test_drift_reports_saturation_with_its_size() -> None:
    """Colours twice as far from grey."""
    before = noisy_images()
    grey = before.mean(axis=-1, keepdims=True)
    drift = drift_between(before, np.clip(grey + 2 * (before - grey), 0, 255))
    rows = {row.name: row for row in drift.appearance}
    assert rows["saturation"].verdict == "rises"
    assert f"Saturation {rows['saturation'].difference:+.2f} (" in " ".join(drift.sentences())


@pytest.mark.parametrize(
    ("shift", "word"),
    [((30, 30, 30), "lighter"), ((-30, -30, -30), "darker"), ((40, 0, 0), "redder"), ((0, 0, 40), "bluer")],
)
def test_drift_reports_a_colour_shift_with_its_direction(shift: tuple[int, ...], word: str) -> None:
    """The sentence has ΔE and the direction."""
    drift = drift_between(noisy_images(), np.clip(noisy_images() + np.array(shift), 0, 255))
    text = " ".join(drift.sentences())
    assert f"ΔE {drift.colour_shift:.1f}: " in text
    assert word in text


def test_drift_does_not_report_an_invisible_shift() -> None:
    """One grey level in every image is significant, but invisible: a row, no sentence."""
    drift = drift_between(np.round(noisy_images()), np.round(noisy_images()) + 1)
    assert drift.appearance[0].verdict == "rises"
    assert drift.sentences() == []


def test_srgb_to_lab_matches_reference_values() -> None:
    """CIELAB of the primaries, of white, black and middle grey under D65."""
    srgb = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0.4663, 0.4663, 0.4663]])
    expected = [
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [100, 0, 0],
        [0, 0, 0],
        [50, 0, 0],
    ]
    np.testing.assert_allclose(srgb_to_lab(srgb), expected, atol=0.15)


def test_appearance_is_a_mean_over_pixels() -> None:
    """Half black, half pure red: mean saturation 0.5, and the contrast between the two."""
    image = np.zeros((1, 2, 2, 3))
    image[0, 0, :, 0] = 1
    lightness, *_, saturation, contrast = appearance(image)
    assert saturation == 0.5
    assert lightness == contrast == pytest.approx(53.24 / 2, abs=0.1)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(8, 8, 8, 8), (64, 64, 64, 64), (256, 256, 64, 64), (100, 70, 50, 35), (300, 1, 60, 1), (1, 1, 1, 1)],
)
def test_downscale_yields_at_most_64_pixels(height: int, width: int, rows: int, columns: int) -> None:
    """For every shape; a flat image keeps its value."""
    small = downscale(np.full((2, height, width, 3), 51, np.uint8))
    assert small.shape == (2, rows, columns, 3)
    np.testing.assert_allclose(small, 0.2)


def test_measure_drift_needs_little_memory() -> None:
    """400 images of 256 pixels need less than an eighth of their own size in addition."""
    images = np.zeros((100, 4, 256, 256, 3), np.uint8)
    images[:, 1:, ::2] = 200
    both = measurement_of(images), measurement_of(images)
    tracemalloc.start()
    measure_drift(*both, CONFIG)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes / 8


def test_drift_resamples_prompts_of_a_group_together() -> None:
    """One group of near-duplicates that grows lighter is one observation."""
    before = noisy_images(prompts=24)
    after = before + np.where(np.arange(24) < 16, 25, 0)[:, None, None, None, None]
    groups = [0] * 16 + list(range(1, 9))
    alone = measure_drift(measurement_of(before), measurement_of(after), CONFIG).appearance[0]
    together = measure_drift(measurement_of(before), measurement_of(after), CONFIG, groups).appearance[0]
    assert (alone.verdict, together.verdict) == ("rises", "unclear")
