"""Logic of `make parity`: its cases, its verdict and its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.parity import report
from benchmarks.parity.cases import LONG, PROMPTS, write_images
from benchmarks.parity.comparison import Comparison, all_cases, diagonal
from benchmarks.parity.mistakes import Mistake
from reward_service.engine.tokenizer import neutralize_special_tokens
from reward_service.images import decode

PASSING = Comparison("clip", "a reference", "a model", {(0, 0): 3e-7}, 0.02, [Mistake("bf16 head", 1e-4)])


def test_cases_cover_images_modes_and_prompts(tmp_path: Path) -> None:
    """At least twelve of each, every file decodable, and every relevant Pillow mode."""
    images = write_images(tmp_path)
    assert min(len(images), len(PROMPTS)) >= 12
    modes = set()
    for image_case in images:
        assert decode(image_case.path.read_bytes()).rgb.std() > 10
        with Image.open(image_case.path) as image:
            modes.add(image.mode)
    assert modes >= {"RGB", "RGBA", "LA", "P", "CMYK", "I;16", "1"}
    assert len(all_cases(images)) == len(images) * len(PROMPTS)
    assert {index for index, _ in diagonal(images)} == set(range(len(images)))


def test_harmless_spellings_equal_the_neutralized_prompts() -> None:
    """The references get the same text in place of special tokens as our tokenizers."""
    for prompt in PROMPTS:
        assert neutralize_special_tokens(prompt.harmless) == prompt.harmless
    assert {prompt.name for prompt in PROMPTS} >= set(LONG)


@pytest.mark.parametrize(
    ("comparison", "word"),
    [
        (replace(PASSING, differences={(0, 0): 3e-7, (0, 1): 1.1e-6}), "differs by 1.1e-06"),
        (replace(PASSING, differences={(0, 0): 3e-7, (0, 1): float("nan")}), "differs by nan"),
        (replace(PASSING, spread=1e-7), "too small to prove parity"),
        (replace(PASSING, mistakes=[Mistake("no antialias", 9e-6)]), "might go unnoticed"),
    ],
)
def test_comparison_that_does_not_prove_parity_has_a_fault(comparison: Comparison, word: str) -> None:
    """A difference beyond the tolerance, scores without spread, or a mistake with a small effect."""
    assert PASSING.faults == []
    (fault,) = comparison.faults
    assert word in fault


def test_table_lists_verdict_faults_and_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vertical bar in a prompt does not break its row."""
    # The references are installed only in the environment of `make parity`.
    monkeypatch.setattr(report, "_PACKAGES", ("torch",))
    failing = replace(PASSING, differences={(0, 12): 1.0})
    text = report.markdown([PASSING, failing], write_images(tmp_path), "make parity", 60.0)
    assert "FAILED" in text
    assert "differs by 1.0e+00" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `<") and "1e+00" in line]
    assert row.replace("\\|", "").count("|") == 4
