"""Speed of the four evaluators against the references' loops, bare forward passes and the hardware.

    python benchmarks/evaluators.py                       # this CPU, float32: 5 to 9 minutes, 12 GB
    python benchmarks/evaluators.py --layers 2 --images 2 # a quick check
    python benchmarks/evaluators.py --device cuda         # bfloat16; all batch sizes and accelerations

Weights are random and of the published sizes: ViT-L/14 with QuickGELU and LAION's head, two ViT-H/14. The
references compute with the same tensors on the same images, alternating with the engine in one run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.models import build
from benchmarks.common.results import Log, exit_with_error, machine, positive, visible_arguments
from benchmarks.common.timing import EvaluatorReport, measure

ACCELERATIONS = ("none", "compile", "graphs")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        exit_with_error("evaluators", "--device cuda: torch finds no GPU; use --device cpu")
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    accelerations = options.acceleration or (ACCELERATIONS if device.type == "cuda" else ("none",))
    if "graphs" in accelerations and device.type != "cuda":
        exit_with_error("evaluators", "--acceleration graphs: CUDA graphs need a GPU; use --device cuda")
    batches = options.batches or ((1, 2, 4, 8, 16, 32, 64) if device.type == "cuda" else ())
    log: Log = partial(print, file=sys.stderr, flush=True)
    log("building random models")
    with tempfile.TemporaryDirectory() as folder:
        models = build(Path(folder), options.layers, device, dtype, max([options.images, *batches]))
        command = shlex.join(
            ["python", "benchmarks/evaluators.py", *visible_arguments(arguments or sys.argv[1:])]
        )
        report = EvaluatorReport(machine(device, dtype, options.layers, command))
        measure(report, models, options, accelerations, batches, log)
    print(report.json() if options.json else report.markdown())
    if options.output is not None:
        report.write(options.output)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the trunks (CPU: float32; CUDA: bfloat16)"
    )
    parser.add_argument(
        "--images", type=positive, default=6, help="images in a run against the references (6)"
    )
    parser.add_argument("--size-px", type=positive, default=256, help="edge of the images (256, as of Karlo)")
    parser.add_argument("--per-prompt", type=positive, default=3, help="images of one prompt (3)")
    parser.add_argument(
        "--repeats",
        type=positive,
        default=3,
        help="runs of each function, alternating; the median counts (3)",
    )
    parser.add_argument(
        "--layers",
        type=positive,
        help="layers of every transformer, for a quick check (as published)",
    )
    parser.add_argument(
        "--batches",
        type=positive,
        nargs="+",
        help="batch sizes for throughput (CUDA: 1 2 4 ... 64; CPU: none)",
    )
    parser.add_argument(
        "--acceleration", choices=ACCELERATIONS, nargs="+", help="for throughput (CUDA: all three; CPU: none)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--output", type=Path, help="folder for evaluators-DEVICE.md and .json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
