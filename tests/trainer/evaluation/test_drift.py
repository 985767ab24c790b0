"""What images show: diversity within a prompt, colours, and what is said of them."""

import json
import tracemalloc

import numpy as np
import pytest

from trainer.config import EvaluationConfig
from trainer.evaluation.comparison import Measurement
from trainer.evaluation.guard import Drift, diversity, lab, looks, measure_drift, reduced

CONFIG = EvaluationConfig(resamples=500)


def shown(images: np.ndarray) -> Measurement:
    """A measurement of images (P, G, H, W, 3)."""
    scores = np.zeros((*images.shape[:2], 1))
    return Measurement(tuple(f"p{i}" for i in range(len(images))), images.astype(np.uint8), scores, scores)


def drawn(prompts: int = 12, images: int = 4, size: int = 16, seed: int = 0) -> np.ndarray:
    """Noisy images of a colour for each prompt, each image a little different from the others."""
    rng = np.random.default_rng(seed)
    prompt = rng.uniform(80, 170, (prompts, 1, 1, 1, 3))
    image = rng.normal(0, 12, (prompts, images, 1, 1, 3))
    return np.clip(prompt + image + rng.normal(0, 8, (prompts, images, size, size, 3)), 0, 255)


def drifted(before: np.ndarray, after: np.ndarray) -> Drift:
    return measure_drift(shown(before), shown(after), CONFIG)


def test_images_that_stay_show_nothing() -> None:
    """No row moves and nothing is said."""
    drift = drifted(drawn(), drawn())
    assert drift.diversity is not None
    assert {row.verdict for row in (drift.diversity, *drift.looks)} == {"unclear"}
    assert drift.colour_shift == 0
    assert drift.sentences() == []


def test_a_collapse_to_one_image_has_no_diversity() -> None:
    """Every seed draws the same: diversity 0, and people read it."""
    before = drawn()
    drift = drifted(before, before[:, :1].repeat(4, axis=1))
    assert drift.diversity is not None
    assert drift.diversity.after == 0
    assert drift.diversity.verdict == "falls"
    assert "Warning: images of one prompt have become 100% more alike" in drift.sentences()[0]


def test_a_partial_collapse_is_given_in_percent() -> None:
    """Images half way towards the first one of their prompt are half as different."""
    before = drawn(size=32)
    drift = drifted(before, (before + before[:, :1]) / 2)
    said = drift.sentences()[0]
    assert drift.diversity is not None
    relative = drift.diversity.after / drift.diversity.before
    assert 0.5 < relative < 0.95  # pairs with the first one shrink less than they would all together
    assert f"{1 - relative:.0%} more alike" in said


def test_diversity_is_the_pairs_rms_difference() -> None:
    """Black and white are 1 apart; three images of which two are alike make 2/3."""
    black, white = np.zeros((4, 4, 3)), np.ones((4, 4, 3))
    assert diversity(np.stack([black, white])) == 1
    assert diversity(np.stack([black, black, white])) == pytest.approx(2 / 3)


def test_of_single_images_diversity_is_null() -> None:
    """Nothing is known of it, and nothing is said; the colours still are."""
    drift = drifted(drawn(images=1), drawn(images=1) + 20)
    assert drift.diversity is None
    plain = json.loads(json.dumps(drift.to_dict(), allow_nan=False))
    assert plain["rows"]["diversity"] is None
    assert plain["rows"]["lightness"]["verdict"] == "rises"


def test_more_saturation_is_said_with_its_size() -> None:
    """Colours twice as far from grey."""
    before = drawn()
    grey = before.mean(axis=-1, keepdims=True)
    drift = drifted(before, np.clip(grey + 2 * (before - grey), 0, 255))
    rows = {row.name: row for row in drift.looks}
    assert rows["saturation"].verdict == "rises"
    assert f"Saturation {rows['saturation'].difference:+.2f} (" in " ".join(drift.sentences())


@pytest.mark.parametrize(
    ("shift", "word"),
    [((30, 30, 30), "lighter"), ((-30, -30, -30), "darker"), ((40, 0, 0), "redder"), ((0, 0, 40), "bluer")],
)
def test_a_shift_of_colour_is_said_with_its_direction(shift: tuple[int, ...], word: str) -> None:
    """ΔE and where it goes."""
    drift = drifted(drawn(), np.clip(drawn() + np.array(shift), 0, 255))
    said = " ".join(drift.sentences())
    assert f"ΔE {drift.colour_shift:.1f}: " in said
    assert word in said


def test_a_shift_that_nobody_sees_is_a_number_only() -> None:
    """One grey level in every image is significant and invisible."""
    drift = drifted(np.round(drawn()), np.round(drawn()) + 1)
    assert drift.looks[0].verdict == "rises"
    assert drift.sentences() == []


def test_colours_are_the_textbook_s() -> None:
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
    np.testing.assert_allclose(lab(srgb), expected, atol=0.15)


def test_looks_are_means_over_pixels() -> None:
    """Half black, half pure red: mean saturation a half, and the contrast between the two."""
    image = np.zeros((1, 2, 2, 3))
    image[0, 0, :, 0] = 1
    lightness, *_, saturation, contrast = looks(image)
    assert saturation == 0.5
    assert lightness == contrast == pytest.approx(53.24 / 2, abs=0.1)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(8, 8, 8, 8), (64, 64, 64, 64), (256, 256, 64, 64), (100, 70, 50, 35), (300, 1, 60, 1), (1, 1, 1, 1)],
)
def test_images_are_reduced_to_at_most_64_pixels(height: int, width: int, rows: int, columns: int) -> None:
    """Whatever their shape; a flat image keeps its value."""
    small = reduced(np.full((2, height, width, 3), 51, np.uint8))
    assert small.shape == (2, rows, columns, 3)
    np.testing.assert_allclose(small, 0.2)


def test_400_images_of_256_pixels_take_little_memory() -> None:
    """What is computed beside the images themselves stays below an eighth of them."""
    images = np.zeros((100, 4, 256, 256, 3), np.uint8)
    images[:, 1:, ::2] = 200
    both = shown(images), shown(images)
    tracemalloc.start()
    measure_drift(*both, CONFIG)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes / 8


def test_prompts_of_a_group_are_resampled_together() -> None:
    """One group of near-duplicates that grows lighter is one observation."""
    before = drawn(prompts=24)
    after = before + np.where(np.arange(24) < 16, 25, 0)[:, None, None, None, None]
    groups = [0] * 16 + list(range(1, 9))
    alone = measure_drift(shown(before), shown(after), CONFIG).looks[0]
    together = measure_drift(shown(before), shown(after), CONFIG, groups).looks[0]
    assert (alone.verdict, together.verdict) == ("rises", "unclear")
