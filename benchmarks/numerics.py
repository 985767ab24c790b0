"""Change of a score with its batch and with the trunk's precision, at full size.

    python benchmarks/numerics.py             # this CPU: 5 to 10 minutes, 12 GB
    python benchmarks/numerics.py --layers 2  # a quick check
    python benchmarks/numerics.py --device cuda --images 64

Source of the figures in docs/numerics.md. Weights are random, of the published sizes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.models import EVALUATORS, build
from benchmarks.common.results import table
from benchmarks.common.timing import pairs_of, workload
from benchmarks.parity.cases import scene
from reward_service.engine.engine import RewardEngine
from reward_service.engine.types import Pair

# Longer than every other prompt: with it in the batch, the others are computed at its length.
_LONG = Pair("a harbour at dawn with " + "seven small boats, " * 12, scene(256, 256, 999))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, default=8, help="pairs in a batch (8)")
    parser.add_argument(
        "--layers", type=int, help="layers of every transformer, for a quick check (as published)"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    pairs = pairs_of(workload(options.images, 1, 256))
    exact, rows = torch.empty(0), []
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            engine = build(Path(folder), options.layers, device, dtype, options.images + 1).engine
        together = scores(engine, pairs)
        name = str(dtype).removeprefix("torch.")
        rows += [
            {"trunk": name, "change": change, **_by_evaluator(difference)}
            for change, difference in _differences(engine, pairs, together)
        ]
        if dtype == torch.float32:
            exact = together
        else:
            rows.append({"trunk": name, "change": "float32 trunk", **_by_evaluator(together - exact)})
        del engine
    spread = {name: f"{value:.1e}" for name, value in zip(EVALUATORS, exact.std(dim=0).tolist(), strict=True)}
    print(table([*rows, {"trunk": "float32", "change": "(standard deviation between pairs)", **spread}]))


def scores(engine: RewardEngine, pairs: Sequence[Pair], *, deterministic: bool = False) -> Tensor:
    """Return raw scores, float64 (pairs, evaluators), with an empty prompt cache."""
    for evaluator in engine.evaluators.values():
        evaluator.tower.clear_text_cache()
    found = engine.score(pairs, deterministic=deterministic)
    return torch.tensor([[pair.raw[name] for name in EVALUATORS] for pair in found], dtype=torch.float64)


def _differences(engine: RewardEngine, pairs: list[Pair], together: Tensor) -> list[tuple[str, Tensor]]:
    order = random.Random(0).sample(range(len(pairs)), len(pairs))
    alone = torch.cat([scores(engine, [pair]) for pair in pairs])
    fixed = scores(engine, pairs, deterministic=True)
    return [
        ("alone", alone - together),
        ("another order", scores(engine, [pairs[place] for place in order]) - together[order]),
        ("a longer prompt in the batch", scores(engine, [*pairs, _LONG])[:-1] - together),
        ("deterministic: another order", scores(engine, pairs[::-1], deterministic=True).flip(0) - fixed),
        (
            "deterministic: the first half",
            scores(engine, pairs[: len(pairs) // 2], deterministic=True) - fixed[: len(pairs) // 2],
        ),
    ]


def _by_evaluator(difference: Tensor) -> dict[str, str]:
    largest = difference.abs().amax(dim=0).tolist()
    return {name: f"{value:.1e}" if value else "0" for name, value in zip(EVALUATORS, largest, strict=True)}


if __name__ == "__main__":
    main()
