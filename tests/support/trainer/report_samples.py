"""Folders as runs and experiments leave them, made in a moment from random numbers and the real formats."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import TrainerConfig
from trainer.evaluation.comparison import Measurement, compare
from trainer.evaluation.guard import check_guard, measure_drift
from trainer.runs.folder import RunFolder

EVALUATORS = ("aesthetic", "clip", "hpsv2")
IDENTITY = {name: f"{name[0]}f00d/{name[0]}ca1" for name in EVALUATORS}

# What a prompt may be made of, to break a page.
HOSTILE = (
    "<script>document.title='owned'</script>",
    "\"><img src=x onerror=alert(1)> ' & {{ 7*7 }} {% raw %}",
    "שלום עולם \u202e evil \u202c مرحبا",
    "🦊🧑‍🚀 café ☃ \x07 $x^2$",
    "word " * 400,
    "W" * 2000,
)


def prompts_of(count: int, hostile: Sequence[str] = ()) -> tuple[str, ...]:
    return (*hostile, *(f"a red ring, number {i}" for i in range(count)))[:count]


def configured(runs: Path, **more: Any) -> TrainerConfig:
    values: dict[str, Any] = {
        "runs_dir": str(runs),
        "seed": 3,
        "iterations": 6,
        "karlo": {"path": str(runs / "karlo")},
        "prompts": {"train": str(runs / "train.txt"), "validation": str(runs / "validation.txt")},
        "objective": {"weights": {"aesthetic": 1.0, "clip": 2.0}},
        "guard": {"evaluator": "hpsv2"},
        "evaluation": {"every": 2, "images_per_prompt": 2, "resamples": 200},
    }
    return TrainerConfig.model_validate(values | more)


def measured(prompts: Sequence[str], gain: float, seed: int, size_px: int = 8) -> Measurement:
    """The same base for every gain; the guard gains half as much."""
    rng = np.random.default_rng(0)
    shape = (len(prompts), 2)
    base = rng.normal(size=(*shape, len(EVALUATORS)))
    images = rng.integers(0, 200, (*shape, size_px, size_px, 3), dtype=np.uint8)
    noise = np.random.default_rng(seed).normal(scale=0.2, size=base.shape) if gain else 0.0
    z = base + gain * np.array([1.0, 1.0, 0.5]) + noise
    lighter = np.clip(images + 40 * gain, 0, 255).astype(np.uint8)
    return Measurement(tuple(prompts), lighter, 5 + z * np.array([0.5, 0.1, 0.02]), z)


def make_run(
    path: Path,
    gain: float = 0.4,
    seed: int = 1,
    prompts: Sequence[str] = prompts_of(12),
    *,
    finished: bool = True,
    done: int | None = None,
    size_px: int = 8,
    **more: Any,
) -> Path:
    """A run folder; of one that is not finished, what is there on the way."""
    config = configured(path.parent, **more)
    path.mkdir(parents=True)
    run = RunFolder(path)
    run.write_config(config)
    run.write_json("scorer.json", IDENTITY)
    run.write_json("prompts.json", {"train": ["a blue cross", "two squares"], "validation": list(prompts)})
    base = measured(prompts, 0.0, 0, size_px)
    base.save(path / "base.npz")
    reached = config.iterations if done is None else done
    for iteration in range(reached):
        share = (iteration + 1) / config.iterations
        run.log(_record(config, base, measured(prompts, gain * share, seed, size_px), iteration))
    if finished:
        _finish(run, config, base, measured(prompts, gain, seed, size_px), reached)
    return path


def _record(config: TrainerConfig, base: Measurement, now: Measurement, iteration: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "iteration": iteration,
        "composite": 0.1 * iteration,
        "raw": dict.fromkeys(EVALUATORS, 1.0),
        "approx_kl": 0.01,
        "clip_fraction": 0.1,
        "grad_norm": 2.0,
        "grad_clip_fraction": 0.5,
        "lora_norm": 0.1 * (iteration + 1),
        "first_ratio": 1.0,
        "dropped_groups": int(iteration == 1),
        "zero_variance_groups": 0,
        "seconds": 2.0,
    }
    if (iteration + 1) % config.evaluation.every == 0:
        record |= examined(config, base, now, "evaluation")
    return record


def examined(
    config: TrainerConfig, base: Measurement, tuned: Measurement, key: str | None = None
) -> dict[str, Any]:
    """Content of evaluation.json; under `key` only the rows, as metrics.jsonl has them."""
    comparison = compare(base, tuned, EVALUATORS, config.composite_weights, config.evaluation)
    guard = check_guard(base, tuned, EVALUATORS, config, None, 4)
    watched = {"guard": guard.to_dict(), "drift": measure_drift(base, tuned, config.evaluation).to_dict()}
    return ({key: comparison.rows() | {"seconds": 1.0}} if key else comparison.to_dict()) | watched


def _finish(run: RunFolder, config: TrainerConfig, base: Measurement, tuned: Measurement, done: int) -> None:
    tuned.save(run.path / "tuned.npz")
    run.write_json("evaluation.json", examined(config, base, tuned) | {"ending": None})
    run.lora.mkdir()
    state = run.checkpoints / f"iteration-{done:06d}" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"versions": {"python": "3.11.9", "torch": "2.12.1"}}))
    run.write_json("finished.json", {"iterations": config.iterations, "reached": done, "done": done})


SPACE = {
    "update.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
    "lora.rank": {"choices": [4, 8, 16]},
    "objective.kl_to_base": {"low": 0.0, "high": 0.1},
}


def make_experiment(path: Path, trials: int = 12, folds: int = 3, **more: Any) -> Path:
    """An experiment's folder: folds, a search, the final fit, the test."""
    config = configured(path.parent, crossval={"folds": folds}, search={"space": SPACE}, **more)
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.write_config(config)
    folder.write_json("scorer.json", IDENTITY)
    for fold in range(folds):
        make_run(path / "folds" / str(fold), gain=0.3 + 0.05 * fold, seed=fold)
    make_run(path / "final", gain=0.35, seed=9)
    folder.write_json("crossval.json", crossval_of(path, folds))
    folder.write_json("search.json", search_of(trials))
    folder.write_text("test.json", (path / "final" / "evaluation.json").read_text())
    return path


def crossval_of(path: Path, folds: int) -> dict[str, Any]:
    rows = []
    for fold in range(folds):
        held = json.loads((path / "folds" / str(fold) / "evaluation.json").read_text())
        ending = {"by": "patience", "reason": "no improvement in 2 evaluations"} if fold == 1 else None
        watched = {key: held[key] for key in ("rows", "guard", "drift")}
        rows.append({"fold": fold, "prompts": 12, "iterations": 6, "best": 4, "stopped": ending} | watched)
    return {"folds": rows, "pooled": held, "chosen_iterations": 4}


def search_of(trials: int) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    found = [_trial(i, rng) for i in range(1, trials)]
    null = {"number": 0, "params": {}, "value": 0.0, "low": 0.0, "high": 0.0, "null": True}
    found.insert(0, null | {"state": "complete", "iterations": 0, "reason": None, "curve": []})
    values = {it["number"]: it["value"] for it in found if it["state"] == "complete"}
    best = max(values, key=values.__getitem__)
    gain = {"low": 0.2, "high": 0.5, "before": 0.0, "deviations": 0.3, "after": 0.3}
    return {
        "trials": found,
        "winner": {
            "number": best,
            "params": found[best]["params"],
            "selected": gain | {"difference": 0.4},
            "fresh": gain | {"difference": 0.3},
        },
        "sampler": "random",
        "pruner": "median",
        "study": "sample",
    }


def _trial(number: int, rng: np.random.Generator) -> dict[str, Any]:
    rate = float(10 ** rng.uniform(-5, -3))
    value = 0.1 * (np.log10(rate) + 5) + 0.05 * float(rng.normal())
    pruned, failed = number % 5 == 3, number == 7
    state = "failed" if failed else "pruned" if pruned else "complete"
    return {
        "number": number,
        "state": state,
        "params": {
            "update.learning_rate": rate,
            "lora.rank": int(rng.choice([4, 8, 16])),
            "objective.kl_to_base": float(rng.uniform(0, 0.1)),
        },
        "value": None if failed else value,
        "low": None if failed else value - 0.08,
        "high": None if failed else value + 0.08,
        "iterations": 2 if pruned else 6,
        "reason": "below the median after 2 iterations" if pruned else "out of memory" if failed else None,
        "null": False,
        "curve": [] if failed else [[step, value * step / 6] for step in ((2,) if pruned else (2, 4, 6))],
    }
