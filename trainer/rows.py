"""Rows of gains as files hold them, and what they mean in words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.remains import mapping, number

COMPOSITE = "composite"
ARROWS = {"rises": "▲", "falls": "▼", "unclear": "●"}
ENDS = ("low", "high")


@dataclass(frozen=True)
class Row:
    """One evaluator's gain, or the composite's; None where the file has no finite number."""

    name: str
    before: float | None
    after: float | None
    difference: float | None
    low: float | None
    high: float | None
    deviations: float | None

    @property
    def verdict(self) -> str:
        """ "rises", "falls" or "unclear": which side of 0 the interval lies on."""
        if self.low is not None and self.low > 0:
            return "rises"
        return "falls" if self.high is not None and self.high < 0 else "unclear"

    @property
    def arrow(self) -> str:
        """The verdict as a sign."""
        return ARROWS[self.verdict]

    @property
    def digits(self) -> int:
        """Decimals that are worth reading."""
        return 3 if self.name == COMPOSITE else 4

    @property
    def interval(self) -> str:
        """Both ends in words of figures."""
        return interval(self.low, self.high, self.digits)

    def in_deviations(self) -> "Row | None":
        """The same in calibrated deviations (z), of which raw scores are multiples."""
        if self.name == COMPOSITE:
            return self
        if not self.difference or self.deviations is None:
            return None
        scale = self.deviations / self.difference
        low, high = (None if end is None else end * scale for end in (self.low, self.high))
        return Row(self.name, None, None, self.deviations, low, high, self.deviations)


def row(name: str, values: object) -> Row | None:
    """The row that a file holds; None where it has no difference."""
    found = mapping(values)
    fields = ("before", "after", "difference", "low", "high", "deviations")
    numbers = {key: number(found.get(key)) for key in fields}
    return None if numbers["difference"] is None else Row(name, **numbers)


def rows(values: object) -> tuple[Row, ...]:
    """Rows by their names, evaluators first and the composite last."""
    found = [it for name, held in mapping(values).items() if (it := row(str(name), held)) is not None]
    return tuple(sorted(found, key=lambda it: it.name == COMPOSITE))


def composite_of(several: Iterable[Row]) -> Row | None:
    """The composite among rows."""
    return next((it for it in several if it.name == COMPOSITE), None)


# --------------------------------------------------------------------------------------------- words


def signed(value: float | None, digits: int = 3) -> str:
    """With its sign, a true minus; a dash for no number."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "+")


def plain(value: float | None, digits: int = 4) -> str:
    """Without a plus."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """Both ends; says so where there is none."""
    if low is None or high is None:
        return "no interval"
    return f"{signed(low, digits)} to {signed(high, digits)}"


def shown(value: object) -> str:
    """A setting's value, short."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not a number"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "none"
    return str(value)


def duration(seconds: float) -> str:
    """As a person says it."""
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{hours:g} h"


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def ended(value: object) -> str:
    """Why a fold ended before its last iteration; empty where it did not."""
    if isinstance(value, Mapping):
        return ": ".join(str(value[key]) for key in ("by", "reason") if value.get(key))
    return str(value) if value else ""


def others(several: Sequence[Row]) -> list[str]:
    """What the evaluators beside the composite did: who rises, who falls, who neither."""
    said = []
    for verdict, words in (("rises", "Rising"), ("falls", "Falling"), ("unclear", "Not clear")):
        names = [it.name for it in several if it.verdict == verdict and it.name != COMPOSITE]
        if names:
            said.append(f"{words}: {', '.join(names)}.")
    return said


def gain_sentence(gain: Row, where: str, confidence: float) -> str:
    """What became of the composite, in one sentence that claims no more than the interval does."""
    bounds = f"{confidence:.0%} interval {gain.interval}"
    change = f"{signed(gain.difference)}\u00a0σ"
    if gain.low is None or gain.high is None:
        return f"The composite changed by {change} {where}; of so few prompts there is no interval."
    if gain.verdict == "unclear":
        said = f"the composite changed by {change} {where} ({bounds}, which includes 0)"
        return f"Nothing improved for certain: {said}."
    word = "rose" if gain.verdict == "rises" else "fell"
    size = f"{abs(gain.difference or 0):.3f}\u00a0σ"
    return f"The composite {word} by {size} {where} ({bounds})."
