"""Templates to pages: text is escaped wherever it comes from, and a page fetches nothing.

Images for a report: which prompts are shown, and their images as data URIs.

All that the report of a run or an experiment says.
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
from trainer.report.run_data import Row, counted, plain, shown, signed
from trainer.report.trials import Search, value_text
from trainer.rl.rewards import Floats, Images, composite, weight_vector
from trainer.runtime.files import write_atomically, write_synced

EACH = 4  # prompts of a kind
SHOWN = 4  # images of a prompt and policy
LOSSLESS_PX, LARGEST_PX, QUALITY = 96, 256, 88  # longest side up to which an image is kept as it is; at most

KINDS = (
    ("Best", "the largest gains of the composite"),
    ("Median", "those around the median change of the composite"),
    ("Worst", "the smallest gains, or largest losses, of the composite"),
)


class Score(NamedTuple):
    """One evaluator's mean raw score of a prompt's images, before and after."""

    name: str
    before: float
    after: float


class Shot(NamedTuple):
    """One image."""

    uri: str
    composite: float
    pixelated: bool


class Case(NamedTuple):
    """A prompt's images by base and tuned policy from the same random streams."""

    number: int  # the prompt's place among the validation prompts, from 1
    prompt: str
    before: tuple[Shot, ...]
    after: tuple[Shot, ...]
    composite: Score
    scores: tuple[Score, ...]

    @property
    def change(self) -> float:
        """Of the composite."""
        return self.composite.after - self.composite.before


class Cases(NamedTuple):
    """Prompts that were chosen in one way."""

    title: str
    how: str
    cases: tuple[Case, ...]


def choose(change: Floats, each: int = EACH) -> list[tuple[str, str, list[int]]]:
    """Places of the best, median and worst of changes (P,), none of them twice; then simply the first."""
    order = [int(place) for place in np.argsort(-change, kind="stable")]
    size = min(each, len(order) // 3)
    middle = (len(order) - size) // 2
    parts = (order[:size], order[middle : middle + size], order[len(order) - size :][::-1])
    chosen = [(title, how, part) for (title, how), part in zip(KINDS, parts, strict=True) if part]
    first = list(range(min(each, len(order))))
    return [*chosen, ("Not selected", "simply the first prompts of the file", first)]


def cases(
    base: Measurement, tuned: Measurement, evaluators: Sequence[str], weights: dict[str, float]
) -> list[Cases]:
    """Chosen prompts with their images. Raises ValueError where the arrays do not fit each other."""
    totals = judged(base, tuned, evaluators, weights)
    sound = np.flatnonzero(np.isfinite(totals[1] - totals[0]).all(axis=1))
    change = (totals[1] - totals[0]).mean(axis=1)[sound]
    return [
        Cases(
            title, how, tuple(_case(int(sound[place]), base, tuned, totals, evaluators) for place in places)
        )
        for title, how, places in choose(change)
    ]


def judged(
    base: Measurement, tuned: Measurement, evaluators: Sequence[str], weights: dict[str, float]
) -> tuple[Floats, Floats]:
    """Composites (P, G) of both. Raises ValueError where the arrays do not fit each other."""
    if base.z.shape != tuned.z.shape or base.images.shape != tuned.images.shape:
        raise ValueError("base and tuned policy were measured on different numbers of images")
    if base.z.shape[2] != len(evaluators) or not weight_vector(evaluators, weights).sum() > 0:
        raise ValueError("which evaluators the scores are of is not known")
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
    scores = (Score(name, float(raw[0][k]), float(raw[1][k])) for k, name in enumerate(evaluators))
    means = [float(total[place].mean()) for total in totals]
    return Case(place + 1, base.prompts[place], before, after, Score("composite", *means), tuple(scores))


def shots(measured: Measurement, totals: Floats, place: int) -> tuple[Shot, ...]:
    """The first images of the prompt at that place, with their composites of all (P, G)."""
    pairs = zip(measured.images[place][:SHOWN], totals[place], strict=False)
    return tuple(_shot(image, float(total)) for image, total in pairs)


def _shot(image: Images, total: float) -> Shot:
    return Shot(data_uri(image), total, max(image.shape[:2]) <= LOSSLESS_PX)


def data_uri(image: Images) -> str:
    """An image (H, W, 3) as WebP: small ones without loss, others at most LARGEST_PX long and compressed."""
    return image_uri(Image.fromarray(image), LARGEST_PX)


def image_uri(image: Image.Image, largest_px: int) -> str:
    """The same for an image, at most so many pixels long."""
    small = max(image.size) <= LOSSLESS_PX
    image = image.convert("RGB")
    image.thumbnail((largest_px, largest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=small, quality=100 if small else QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


T = TypeVar("T")


class Chart(NamedTuple):
    """A chart with what it shows."""

    title: str
    svg: Markup


class Table(NamedTuple):
    """Gains with intervals, and where they were measured."""

    title: str
    note: str
    rows: Sequence[Row]


class Fold(NamedTuple):
    """A line of the fold table."""

    name: str
    prompts: int | None
    iterations: int | None
    best: int | None
    gain: Row | None
    rows: Sequence[Row]
    stopped: str
    guard: str


class Guard(NamedTuple):
    """What the guard says of a run."""

    where: str
    tripped: bool
    sentence: str
    gain: Row | None
    note: str


@dataclass
class Report:
    """All that the page says."""

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
    tables: list[Table] = field(default_factory=list)
    forest: list[Chart] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    chosen: int | None = None
    tested: bool = False  # whether the test prompts have been looked at
    search: Search | None = None
    guards: list[Guard] = field(default_factory=list)
    drift: Sequence[Row] = ()
    drift_said: Sequence[str] = ()
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
    """What `add` returns; where a file's content is too odd for it, a note, and the other parts stand."""
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
        notes.append(f"The part on {what} is left out: what the files hold is not as expected ({error}).")
        return None


def write_page(target: Path, template: str, **given: object) -> None:
    """Fill a template and write the page, whole or not at all."""
    text = environment().get_template(template).render(given)
    write_atomically(target, lambda path: write_synced(path, text.encode("utf-8", "replace")))


def environment() -> Environment:
    """Of this package's templates."""
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
