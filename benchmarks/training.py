"""Speed of the trainer: sampling against diffusers' pipeline, parts of an iteration, waiting, memory.

    python -m benchmarks.training --output benchmarks/results    # the miniature on this CPU: about 4 minutes
    python -m benchmarks.training --repeats 3 --iterations 1     # a quick check
    python -m benchmarks.training --full --config configs/karlo.yaml    # random weights, CUDA, bfloat16

On two or more cores the trainer is bound to the first core and its own reward service to the last, one
thread each, so that they do not compete for a processor. Times are medians, with their range.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from diffusers import UnCLIPPipeline
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import trainer.rl.sampler
import trainer.rl.train
from benchmarks.common.fullsize import measure_full
from benchmarks.common.results import Log, Report, Rows, exit_with_error, machine, positive, visible_arguments
from reward_service.settings import DEFAULT_CONFIG
from trainer.config import Sharing, TrainerConfig, load_trainer_config
from trainer.data.splits import read_splits
from trainer.experiments.workers import SERVICE_STOP_TIMEOUT_S, stop, wait_for_address
from trainer.rl.policy import DecoderPolicy
from trainer.rl.rewards import ServiceScorer
from trainer.rl.rollout import DropCount, collect_rollout, group_keys
from trainer.rl.sampler import NOTHING_SHARED, ImageSampler
from trainer.rl.train import Callback, TrainingState, new_training_state, train_fold, update_policy
from trainer.runs.setup import load_sampler
from trainer.runtime.rng import ImageKey

GROUP = 8
SHARED_PRIOR = Sharing(prior="group", decoder_start="image", super_res="image")


@dataclass
class TrainingReport(Report):
    """Results of the trainer benchmark."""

    name = "training"
    titles: ClassVar = {
        "machine": "# Trainer benchmark\n",
        "sampler": "\n## Our sampler against `UnCLIPPipeline`\n\nThe same prompts and images, "
        "alternating in one run; each ratio is the median of the ratios of neighbours.\n",
        "parts": "\n## Parts of an iteration\n\nScoring runs in parallel to the others; `waiting` is "
        "the rest of it.\n",
        "waiting": "\n## Waiting for scores\n\nExposed: the trainer has nothing else to do.\n",
        "memory": "\n## Memory of the update\n\nMost bytes allocated at one time, beyond the weights.\n",
        "full": "\n## Karlo's own size, random weights\n\nThe peak is that of a matrix product.\n",
    }
    sampler: Rows = field(default_factory=list)
    parts: Rows = field(default_factory=list)
    waiting: Rows = field(default_factory=list)
    memory: Rows = field(default_factory=list)
    full: Rows = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = _options(arguments)
    if options.full and not torch.cuda.is_available():
        exit_with_error("training", "--full: torch finds no GPU; leave --full out")
    log: Log = partial(print, file=sys.stderr, flush=True)
    cores = sorted(os.sched_getaffinity(0))
    if not options.full:
        os.sched_setaffinity(0, cores[:1])
        torch.set_num_threads(1)
    device = torch.device("cuda" if options.full else "cpu")
    dtype = torch.bfloat16 if options.full else torch.float32
    command = shlex.join(
        ["python", "-m", "benchmarks.training", *visible_arguments(arguments or sys.argv[1:])]
    )
    report = TrainingReport(machine(device, dtype, None, command))
    if options.full:
        config = load_trainer_config(options.config, ["precision=bfloat16"])
        report.full = measure_full(config, "cuda", options.batches, options.repeats, log)
    else:
        measure(report, options, cores, log)
    print(report.json() if options.json else report.markdown())
    if options.output is not None:
        report.write(options.output)


def measure(report: TrainingReport, options: argparse.Namespace, cores: Sequence[int], log: Log) -> None:
    """Run all measurements on the miniature and fill the report."""
    config = load_trainer_config(options.config, ["threads=1", f"iterations={options.iterations}"])
    prompts = read_splits(config.prompts).train
    log("comparing our sampler with the pipeline")
    report.sampler = compare_samplers(config, prompts, options.repeats)
    log("starting a reward service")
    with service(options.config, cores[-1]) as url:
        connection = config.service.model_copy(update={"url": url, "ready_timeout_s": 300.0})
        with ServiceScorer.connect(connection) as scorer:
            log("measuring the parts of an iteration")
            report.parts, report.waiting = iterations(config, prompts, scorer)
            log("measuring memory")
            report.memory = [
                update_memory(config, prompts, scorer, checkpointing) for checkpointing in (False, True)
            ]


# Sampler ----------------------------------------------------------------------------------------------


def compare_samplers(config: TrainerConfig, prompts: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Compare the samplers on two groups of eight images, with the configured and with strong guidance."""
    rows = []
    for guidance in (config.sampling.decoder_guidance, 4.0):
        sampling = config.sampling.model_copy(
            update={"decoder_guidance": guidance, "prior_guidance": guidance}
        )
        keys = group_keys(prompts[:2], GROUP, seed=0, fold=0, iteration=0)
        seconds = alternating(_samplers(config.model_copy(update={"sampling": sampling}), keys), repeats)
        for name, times in seconds.items():
            ratios = [own / other for own, other in zip(times, seconds["UnCLIPPipeline"], strict=True)]
            rows.append(
                {
                    "what": name,
                    "guidance": guidance,
                    "images": len(keys),
                    "seconds": round(median(times), 3),
                    "from": round(min(times), 3),
                    "to": round(max(times), 3),
                    "ratio": round(median(ratios), 3),
                }
            )
    return rows


def _samplers(config: TrainerConfig, keys: Sequence[ImageKey]) -> dict[str, Callable[[], object]]:
    sampling = config.sampling
    sampler = load_sampler(config)
    pipeline = UnCLIPPipeline(**sampler._karlo.components())
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> object:
        return pipeline(
            [key.prompt for key in keys],
            prior_num_inference_steps=sampling.prior_steps,
            decoder_num_inference_steps=sampling.decoder_steps,
            super_res_num_inference_steps=sampling.super_res_steps,
            prior_guidance_scale=sampling.prior_guidance,
            decoder_guidance_scale=sampling.decoder_guidance,
            generator=[key.stream("decoder") for key in keys],
            output_type="np",
        )

    def ours(share: Sharing) -> object:
        # A new sampler has empty caches: it computes text and prior each time, as the pipeline does.
        return ImageSampler(sampler._karlo, sampler.policy, sampling).sample(keys, share)

    return {
        "UnCLIPPipeline": theirs,
        "ours": partial(ours, NOTHING_SHARED),
        "ours, one image embedding a group": partial(ours, SHARED_PRIOR),
    }


def alternating(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Run the functions in turn; return the seconds of each run, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, run in functions.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# Iteration --------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds spent in wrapped functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function with its time added to `seconds[name]`."""

        def timed(*inputs: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*inputs, **options)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


class LapCallback(Callback):
    """Keep the record of each iteration, and the stopwatch's times within it."""

    def __init__(self, watch: Stopwatch) -> None:
        self.records: list[dict[str, Any]] = []
        self.laps: list[dict[str, float]] = []
        self._watch = watch

    def on_iteration(self, training: TrainingState, record: dict[str, Any]) -> bool:  # noqa: ARG002 - interface
        """Append the record and the times, and reset the stopwatch."""
        self.records.append(dict(record))
        self.laps.append(dict(self._watch.seconds))
        self._watch.seconds.clear()
        return False


def iterations(
    config: TrainerConfig, prompts: Sequence[str], scorer: ServiceScorer
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train after one warm-up iteration; return the rows of the parts and of the waiting."""
    sampler = load_sampler(config)
    sampler.policy.add_lora(config.lora, seed=0)
    watch = Stopwatch()
    callback = LapCallback(watch)
    more = config.model_copy(update={"iterations": config.iterations + 1})
    with ExitStack() as stack:
        for owner, name, label in (
            (trainer.rl.sampler, "encode_text", "text"),
            (trainer.rl.sampler, "sample_prior", "prior"),
            (trainer.rl.sampler, "super_resolve", "super-resolution"),
            (trainer.rl.train, "optimizer_step", "optimizer"),
            (DecoderPolicy, "sample", "decoder"),
            (DecoderPolicy, "replay", "replay, forward"),
            (Tensor, "backward", "replay, backward"),
            (ServiceScorer, "score", "encoding, sending and scoring (in parallel)"),
        ):
            stack.enter_context(patch.object(owner, name, watch.wrap(label, getattr(owner, name))))
        train_fold(sampler, scorer, prompts, more, callback=callback)
    laps, records = callback.laps[1:], callback.records[1:]
    names = list(dict.fromkeys(name for lap in laps for name in lap))
    times = {name: [lap.get(name, 0.0) for lap in laps] for name in names}
    times["waiting"] = [float(record["exposed_wait_s"]) for record in records]
    whole = [float(record["seconds"]) for record in records]
    parallel = "encoding, sending and scoring (in parallel)"
    times["everything else"] = [
        total - sum(values[i] for name, values in times.items() if name != parallel)
        for i, total in enumerate(whole)
    ]
    times["an iteration"] = whole
    parts = [
        {
            "part": name,
            "seconds": round(median(values), 4),
            "from": round(min(values), 4),
            "to": round(max(values), 4),
            "share": f"{median(values) / median(whole):.1%}",
        }
        for name, values in times.items()
    ]
    shares = [wait / total for wait, total in zip(times["waiting"], whole, strict=True)]
    waiting = [
        {
            "iterations": len(whole),
            "exposed waiting": f"{median(shares):.2%}",
            "from": f"{min(shares):.2%}",
            "to": f"{max(shares):.2%}",
        }
    ]
    return parts, waiting


def update_memory(
    config: TrainerConfig, prompts: Sequence[str], scorer: ServiceScorer, checkpointing: bool
) -> dict[str, Any]:
    """Return the peak memory of one iteration's update, from the profiler's allocations."""
    update = config.update.model_copy(update={"gradient_checkpointing": checkpointing})
    changed = config.model_copy(update={"update": update})
    sampler = load_sampler(changed)
    sampler.policy.add_lora(config.lora, seed=0)
    training = new_training_state(sampler.policy, changed, len(scorer.evaluators))
    rollout_config = config.rollout
    keys = group_keys(
        prompts[: rollout_config.prompts_per_iteration],
        rollout_config.images_per_prompt,
        seed=0,
        fold=0,
        iteration=0,
    )
    rollout = collect_rollout(
        sampler, scorer, keys, rollout_config, config.sampling.micro_batch, DropCount(0.05)
    )
    start = time.perf_counter()
    update_policy(training, rollout, scorer.evaluators, changed, fold=0, iteration=0)
    seconds = time.perf_counter() - start
    run_update = partial(update_policy, training, rollout, scorer.evaluators, changed, fold=0, iteration=1)
    return {
        "gradient checkpointing": "on" if checkpointing else "off",
        "micro-batch": update.micro_batch,
        "peak, MB": round(allocated_peak(run_update) / 1e6, 1),
        "seconds": round(seconds, 2),
    }


def allocated_peak(run: Callable[[], object]) -> int:
    """Return the peak of bytes that `run` allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        run()
    events = record.profiler.kineto_results.events()
    held = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most = max(most, held)
    return most


@contextmanager
def service(config: Path, core: int) -> Iterator[str]:
    """Start a reward service on one core with one thread; yield its address."""
    command = [sys.executable, "-m", "reward_service", "serve", "--config", str(config), "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "service.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["taskset", "--cpu-list", str(core), *command, "threads=1"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        try:
            yield wait_for_address(process, log)
        finally:
            stop(process, SERVICE_STOP_TIMEOUT_S)


# Command line -----------------------------------------------------------------------------------------


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="configuration file (the miniature's)"
    )
    parser.add_argument("--repeats", type=positive, default=9, help="runs of each sampler (9)")
    parser.add_argument("--iterations", type=positive, default=5, help="measured training iterations (5)")
    parser.add_argument("--full", action="store_true", help="measure Karlo's published size on a CUDA device")
    parser.add_argument(
        "--batches", type=positive, nargs="+", default=[1, 4, 8, 16], help="batch sizes for --full (1 4 8 16)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--output", type=Path, help="folder for training-DEVICE.md and .json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
