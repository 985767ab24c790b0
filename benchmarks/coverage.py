"""Coverage of a comparison's interval, on simulated experiments without an effect.

    python -m benchmarks.coverage [--experiments 1000]

Each experiment is two measurements, compared as after a training run
(`trainer.evaluation.comparison.compare`): prompts have effects of mean 0; groups of prompts are of unequal
size and share none or half of their variance. A 95 % interval should miss 0 in 5 of 100 experiments.
In brackets: the percentile bootstrap over groups.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

import numpy as np

from trainer.config import EvaluationConfig
from trainer.evaluation.comparison import Measurement, compare
from trainer.evaluation.intervals import Floats

CLUSTERS = (5, 8, 12, 20, 50, 100)
LARGEST = 20  # prompts of a group, from 1
CONFIG = EvaluationConfig(resamples=1000)

EffectSampler = Callable[[np.random.Generator, int], Floats]

EFFECTS: Mapping[str, EffectSampler] = {
    "normal": lambda rng, count: rng.normal(size=count),
    "heavy tails (Student's t, 3 df)": lambda rng, count: rng.standard_t(3, count),
    "skewed (lognormal, σ = 0.5)": lambda rng, count: rng.lognormal(0, 0.5, count) - np.exp(0.125),
    "very skewed (lognormal, σ = 1)": lambda rng, count: rng.lognormal(0, 1, count) - np.exp(0.5),
}


class Grouping(NamedTuple):
    """Correlation of prompts within a group."""

    unequal: bool  # 1 to LARGEST prompts a group; otherwise one
    shared: float  # share of the effects' variance that the prompts of a group have in common


GROUPINGS = {
    "each prompt its own": Grouping(False, 0.0),
    "1 to 20 prompts a group": Grouping(True, 0.0),
    "the same, half the variance shared": Grouping(True, 0.5),
}


def experiment(
    rng: np.random.Generator, sample_effects: EffectSampler, grouping: Grouping, clusters: int
) -> tuple[Measurement, Measurement, list[int]]:
    """Return base and tuned measurements of a null experiment, two images a prompt, and prompt groups."""
    sizes = rng.integers(1, LARGEST + 1, clusters) if grouping.unequal else np.ones(clusters, int)
    groups = np.repeat(np.arange(clusters), sizes)
    own, common = sample_effects(rng, len(groups)), sample_effects(rng, clusters)[groups]
    effects = np.sqrt(1 - grouping.shared) * own + np.sqrt(grouping.shared) * common
    before = rng.normal(size=(len(groups), 2, 1))
    return as_measurement(before), as_measurement(before + effects[:, None, None]), groups.tolist()


def as_measurement(z: Floats) -> Measurement:
    """Return a measurement of scores (P, G, K) with placeholder images."""
    prompts, images, _ = z.shape
    pixels = np.zeros((prompts, images, 1, 1, 3), dtype=np.uint8)
    return Measurement(tuple(f"prompt {i}" for i in range(prompts)), pixels, z, z)


def miss_rates(
    sample_effects: EffectSampler, grouping: Grouping, clusters: int, experiments: int, seed: int
) -> tuple[float, float]:
    """Return the shares of null experiments whose interval misses 0: ours, and the bootstrap's."""
    rng = np.random.default_rng(seed)
    missed = np.zeros(2)
    for _ in range(experiments):
        base, tuned, groups = experiment(rng, sample_effects, grouping, clusters)
        found = compare(base, tuned, ("evaluator",), {"evaluator": 1.0}, CONFIG, groups).composite
        missed[0] += found.verdict != "unclear"
        low, high = percentile((tuned.z - base.z).mean(axis=(1, 2)), groups)
        missed[1] += not low <= 0 <= high
    ours, plain = missed / experiments
    return float(ours), float(plain)


def percentile(values: Floats, groups: list[int]) -> Floats:
    """Return the ends of the plain percentile bootstrap's interval, (2,)."""
    totals, sizes = np.bincount(groups, values), np.bincount(groups)
    rng = np.random.default_rng(CONFIG.seed)
    sampled = rng.integers(len(totals), size=(CONFIG.resamples, len(totals)))
    means = totals[sampled].sum(axis=1) / sizes[sampled].sum(axis=1)
    tail = (1 - CONFIG.confidence) / 2
    ends: Floats = np.quantile(means, [tail, 1 - tail])
    return ends


def rows(experiments: int) -> Iterator[str]:
    """Return the Markdown table, line by line."""
    yield "| effects of prompts | groups | " + " | ".join(map(str, CLUSTERS)) + " |"
    yield "|---|---|" + "---|" * len(CLUSTERS)
    for row, (effect, grouping) in enumerate(product(EFFECTS, GROUPINGS)):
        found = [
            miss_rates(EFFECTS[effect], GROUPINGS[grouping], count, experiments, seed=1000 * row + count)
            for count in CLUSTERS
        ]
        cells = (f"{100 * ours:.1f} ({100 * plain:.1f})" for ours, plain in found)
        yield f"| {effect} | {grouping} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table of miss rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=1000, help="experiments of each cell (1000)")
    for line in rows(parser.parse_args().experiments):
        print(line, flush=True)


if __name__ == "__main__":
    main()
