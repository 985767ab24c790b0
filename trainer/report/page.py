"""Content of a report page: its types, the prompts whose images are shown, and the templates.

All text is escaped, and a page fetches nothing: images are data URIs.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from trainer.evaluation.comparison import Measurement
from trainer.report.provenance import Provenance
from trainer.report.run_data import GainRow, counted, plain, shown, signed
from trainer.report.trials import SearchReport, value_text
from trainer.rl.rewards import Floats, Images, composite, weight_vector
from trainer.runtime.files import write_atomically

EACH = 4  # prompts of each kind
SHOWN = 4  # images per prompt and policy
LOSSLESS_PX, LARGEST_PX, QUALITY = 96, 256, 88  # longest side: kept lossless up to; reduced to

KINDS = (
    ("Best", "the largest gains of the composite"),
    ("Median", "changes around the median of the composite"),
    ("Worst", "the smallest gains, or largest losses, of the composite"),
)


class PromptScore(NamedTuple):
    """One evaluator's mean raw score of a prompt's images, before and after."""

    name: str
    before: float
    after: float


class Shot(NamedTuple):
    """One image as a data URI, with its composite."""

    uri: str
    composite: float
    pixelated: bool


class Case(NamedTuple):
    """Images of a prompt by base and tuned policy, from the same random streams."""

    number: int  # position among the validation prompts, from 1
    prompt: str
    before: tuple[Shot, ...]
    after: tuple[Shot, ...]
    composite: PromptScore
    scores: tuple[PromptScore, ...]

    @property
    def change(self) -> float:
        """Change of the composite."""
        return self.composite.after - self.composite.before


class Cases(NamedTuple):
    """Prompts that were chosen by one criterion."""

    title: str
    how: str
    cases: tuple[Case, ...]


def choose(change: Floats, each: int = EACH) -> list[tuple[str, str, list[int]]]:
    """Choose positions of the best, median and worst changes (P,), without repetition, and the first ones."""
    order = [int(place) for place in np.argsort(-change, kind="stable")]
    size = min(each, len(order) // 3)
    middle = (len(order) - size) // 2
    parts = (order[:size], order[middle : middle + size], order[len(order) - size :][::-1])
    chosen = [(title, how, part) for (title, how), part in zip(KINDS, parts, strict=True) if part]
    first = list(range(min(each, len(order))))
    return [*chosen, ("Not selected", "the first prompts of the file", first)]


def cases(
    base: Measurement, tuned: Measurement, evaluators: Sequence[str], weights: dict[str, float]
) -> list[Cases]:
    """Return chosen prompts with their images.

    Raises:
        ValueError: the arrays of base and tuned policy differ in shape
    """
    totals = composites(base, tuned, evaluators, weights)
    sound = np.flatnonzero(np.isfinite(totals[1] - totals[0]).all(axis=1))
    change = (totals[1] - totals[0]).mean(axis=1)[sound]
    return [
        Cases(
            title, how, tuple(_case(int(sound[place]), base, tuned, totals, evaluators) for place in places)
        )
        for title, how, places in choose(change)
    ]


def composites(
    base: Measurement, tuned: Measurement, evaluators: Sequence[str], weights: dict[str, float]
) -> tuple[Floats, Floats]:
    """Return the composites (P, G) of both policies.

    Raises:
        ValueError: the arrays differ in shape, or the evaluators are unknown
    """
    if base.z.shape != tuned.z.shape or base.images.shape != tuned.images.shape:
        raise ValueError("base and tuned policy were measured on different numbers of images")
    if base.z.shape[2] != len(evaluators) or not weight_vector(evaluators, weights).sum() > 0:
        raise ValueError("the evaluators of the scores are unknown")
    return composite(base.z, evaluators, weights), composite(tuned.z, evaluators, weights)


def _case(
    place: int,
    base: Measurement,
    tuned: Measurement,
    totals: tuple[Floats, Floats],
    evaluators: Sequence[str],
) -> Case:
    before, after = (shots(m, total, place) for m, total in zip((base, tuned), totals, strict=True))
    raw = [m.raw[place].mean(axis=0) for m in (base, tuned)]
    scores = (PromptScore(name, float(raw[0][k]), float(raw[1][k])) for k, name in enumerate(evaluators))
    means = [float(total[place].mean()) for total in totals]
    return Case(
        place + 1, base.prompts[place], before, after, PromptScore("composite", *means), tuple(scores)
    )


def shots(measured: Measurement, totals: Floats, place: int) -> tuple[Shot, ...]:
    """Return the first images of a prompt with their composites, from totals (P, G)."""
    pairs = zip(measured.images[place][:SHOWN], totals[place], strict=False)
    return tuple(_shot(image, float(total)) for image, total in pairs)


def _shot(image: Images, total: float) -> Shot:
    return Shot(data_uri(image), total, max(image.shape[:2]) <= LOSSLESS_PX)


def data_uri(image: Images) -> str:
    """Encode an image (H, W, 3) as a WebP data URI: small ones lossless, others reduced and compressed."""
    return image_uri(Image.fromarray(image), LARGEST_PX)


def image_uri(image: Image.Image, largest_px: int) -> str:
    """Encode a Pillow image as a WebP data URI, its longest side at most `largest_px`."""
    small = max(image.size) <= LOSSLESS_PX
    image = image.convert("RGB")
    image.thumbnail((largest_px, largest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=small, quality=100 if small else QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


T = TypeVar("T")


class Chart(NamedTuple):
    """Chart with its title."""

    title: str
    svg: Markup


class GainTable(NamedTuple):
    """Table of gains with intervals."""

    title: str
    note: str
    rows: Sequence[GainRow]


class FoldRow(NamedTuple):
    """GainRow of the fold table."""

    name: str
    prompts: int | None
    iterations: int | None
    best: int | None
    gain: GainRow | None
    rows: Sequence[GainRow]
    stopped: str
    guard: str


class GuardResult(NamedTuple):
    """Verdict of the reward-hacking guard on a run."""

    where: str
    tripped: bool
    sentence: str
    gain: GainRow | None
    note: str


@dataclass
class Report:
    """Content of the page."""

    name: str
    path: str
    kind: str  # "run" or "experiment"
    state: str
    headline: str
    tone: str  # "rises", "falls", "unclear", "warning", "none"
    sentences: list[str]
    facts: list[tuple[str, str]]
    notes: list[str]
    provenance: Provenance
    settings: dict[str, Any]
    confidence: float
    tables: list[GainTable] = field(default_factory=list)
    forest: list[Chart] = field(default_factory=list)
    folds: list[FoldRow] = field(default_factory=list)
    chosen: int | None = None
    tested: bool = False  # True once the test prompts have been measured
    search: SearchReport | None = None
    guards: list[GuardResult] = field(default_factory=list)
    drift: Sequence[GainRow] = ()
    drift_sentences: Sequence[str] = ()
    curves: list[Chart] = field(default_factory=list)
    curve_note: str = ""
    drift_curves: list[Chart] = field(default_factory=list)
    training: list[Chart] = field(default_factory=list)
    cases: list[Cases] = field(default_factory=list)
    grid: tuple[str, str] | None = None  # title, data URI
    lora: str = ""
    karlo: str = ""  # arguments of from_pretrained
    events: list[str] = field(default_factory=list)


def attempt(notes: list[str], what: str, add: Callable[..., T], *given: Any) -> T | None:
    """Call `add`; if the content of a file is unexpected, add a note and return None."""
    try:
        return add(*given)
    except (
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        OSError,
        MemoryError,
    ) as error:
        notes.append(f"The section on {what} is left out: the files have unexpected content ({error}).")
        return None


def write_page(target: Path, template: str, **given: object) -> None:
    """Render a template and write the page atomically."""
    text = environment().get_template(template).render(given)
    write_atomically(target, text.encode("utf-8", "replace"))


def environment() -> Environment:
    """Return the environment of this package's templates."""
    made = Environment(
        loader=PackageLoader("trainer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "signed": signed,
        "plain": plain,
        "shown": shown,
        "counted": counted,
        "value_text": value_text,
        "python": repr,
    }
    return made
