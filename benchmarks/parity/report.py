"""Table of the comparison: printed, and written as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version

from benchmarks.parity.cases import PROMPTS, ImageCase
from benchmarks.parity.comparison import MARGIN, TOLERANCES, Comparison

_PACKAGES = (
    *("torch", "torchvision", "transformers", "open_clip_torch", "pillow", "ftfy", "regex"),
    *("hpsv2", "clip-anytorch"),
)


def markdown(found: Sequence[Comparison], images: Sequence[ImageCase], command: str, seconds: float) -> str:
    """Return the results of all comparisons as Markdown."""
    faults = [fault for comparison in found for fault in comparison.faults]
    verdict = (
        "Every difference is within its tolerance, and every mistake would be noticed."
        if not faults
        else "FAILED"
    )
    parts = [
        "# Our scores against the references' own code",
        f"`{command}`: {seconds / 60:.1f} minutes on {_machine()}. {verdict}",
        *(f"- {fault}" for fault in faults),
        _ABOUT,
        "## Largest differences",
        _summary(found),
        "## Effects of known mistakes",
        f"Made on purpose on the reference's side; each must exceed the tolerance {MARGIN:g}-fold.",
        _mistakes(found),
        "## By image: largest difference over its prompts",
        _by_case(found, [image.name for image in images], 0),
        "## By prompt: largest difference over its images",
        _by_case([one for one in found if one.kind != "aesthetic"], [prompt.name for prompt in PROMPTS], 1),
        "## Cases with another input for a reference",
        _other_inputs(images),
        "## Versions",
        ", ".join(f"{name} {version(name)}" for name in _PACKAGES) + f"; Python {platform.python_version()}.",
    ]
    return "\n\n".join(parts) + "\n"


_ABOUT = """\
Our engine loads files in the published layouts with our own loaders; each reference loads the same random
weights with its own code and opens the image files itself. All in fp32 on the CPU. hpsv2 is
`hpsv2.img_score.score` of hpsv2 1.2.0; pickscore is the model card's snippet; clip is OpenAI's `clip.load`,
transform and tokenizer (and transformers' `CLIPModel` behind them); aesthetic is simple_inference.py's
five-layer MLP on OpenAI's embedding. Units are those of the raw score: a cosine, the ×100 logit, LAION's
1 to 10."""


def _summary(found: Sequence[Comparison]) -> str:
    rows = [
        (
            one.kind,
            one.reference,
            one.model,
            str(len(one.differences)),
            f"{one.worst:.1e}",
            f"{TOLERANCES[one.kind]:.0e}",
            f"{one.spread:.2g}",
        )
        for one in found
    ]
    head = (
        "evaluator",
        "reference",
        "model",
        "pairs",
        "largest difference",
        "tolerance",
        "spread (σ)",
    )
    return _table(head, rows)


def _mistakes(found: Sequence[Comparison]) -> str:
    names = list(dict.fromkeys(mistake.name for one in found for mistake in one.mistakes))
    rows = []
    for one in found:
        made = {mistake.name: f"{mistake.difference:.1e}" for mistake in one.mistakes}
        rows.append((f"{_label(one)}, {one.model}", *(made.get(name, "") for name in names)))
    return _table(("", *names), rows)


def _by_case(found: Sequence[Comparison], names: Sequence[str], part: int) -> str:
    rows = []
    for number, name in enumerate(names):
        cells = []
        for one in found:
            worst = [difference for case, difference in one.differences.items() if case[part] == number]
            cells.append(f"{max(worst):.0e}" if worst else "")
        rows.append((f"`{name}`" if name.startswith("<") else name, *cells))
    return _table(("", *(f"{_label(one)}, {one.model}" for one in found)), rows)


def _other_inputs(images: Sequence[ImageCase]) -> str:
    rows = [
        (image.name, image.reason, "all" if len(image.references) > 3 else ", ".join(image.references))
        for image in images
        if image.references
    ]
    rows += [
        (f"`{prompt.text}`", f"special tokens are injected; given `{prompt.harmless}`", "those that inject")
        for prompt in PROMPTS
        if prompt.harmless
    ]
    introduction = (
        "Our policy differs on purpose (docs/images.md): the reference got our flattened pixels as a PNG, or "
        "the prompt with its special tokens set apart."
    )
    return f"{introduction}\n\n" + _table(("case", "reason", "references"), rows)


def _label(one: Comparison) -> str:
    return f"{one.kind} / {one.reference}"


def _machine() -> str:
    import torch

    return f"{torch.get_num_threads()} threads of {platform.machine()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in escaped)
