"""`make parity`'s own logic: its cases are what they say, and its verdict can be a failure."""

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


def test_the_cases_are_many_and_readable(tmp_path: Path) -> None:
    """At least twelve of each, every file decodable, and every mode among them that matters."""
    images = write_images(tmp_path)
    assert min(len(images), len(PROMPTS)) >= 12
    modes = set()
    for rgb in images:
        assert decode(rgb.path.read_bytes()).rgb.std() > 10
        with Image.open(rgb.path) as image:
            modes.add(image.mode)
    assert modes >= {"RGB", "RGBA", "LA", "P", "CMYK", "I;16", "1"}
    assert len(all_cases(images)) == len(images) * len(PROMPTS)
    assert {rgb for rgb, _ in diagonal(images)} == set(range(len(images)))


def test_harmless_spellings_are_what_neutralising_makes() -> None:
    """What the references are given instead of special tokens is what our tokenizers read."""
    for prompt in PROMPTS:
        assert neutralize_special_tokens(prompt.harmless) == prompt.harmless
    assert {prompt.name for prompt in PROMPTS} >= set(LONG)


@pytest.mark.parametrize(
    ("comparison", "word"),
    [
        (replace(PASSING, differences={(0, 0): 3e-7, (0, 1): 1.1e-6}), "differs by 1.1e-06"),
        (replace(PASSING, differences={(0, 0): 3e-7, (0, 1): float("nan")}), "differs by nan"),
        (replace(PASSING, spread=1e-7), "that proves nothing"),
        (replace(PASSING, mistakes=[Mistake("no antialias", 9e-6)]), "could go unnoticed"),
    ],
)
def test_what_does_not_prove_parity_is_a_fault(comparison: Comparison, word: str) -> None:
    """A difference beyond the tolerance, scores without spread, a mistake that would hide: each by name."""
    assert PASSING.faults == []
    (fault,) = comparison.faults
    assert word in fault


def test_the_table_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict, each fault and each case; a bar in a prompt does not break a row."""
    # The references themselves are installed only where make parity runs.
    monkeypatch.setattr(report, "_PACKAGES", ("torch",))
    failing = replace(PASSING, differences={(0, 12): 1.0})
    text = report.markdown([PASSING, failing], write_images(tmp_path), "make parity", 60.0)
    assert "FAILED" in text
    assert "differs by 1.0e+00" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `<") and "1e+00" in line]
    assert row.replace("\\|", "").count("|") == 4
