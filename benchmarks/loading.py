"""Memory of loading beyond the loaded model, on checkpoints of the published sizes and layouts.

    python -m benchmarks.loading             # full size: 6 GB of disk, 6 GB of memory, a minute
    python -m benchmarks.loading --layers 2  # a quick check

Each load runs in a process of its own. `own` is the process's anonymous memory, sampled every millisecond;
`mapped` is the part of the file that is mapped into memory, which the kernel reclaims when needed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch

from reward_service.config import Origin, TowerConfig, Weights
from reward_service.engine.files import ModelFiles
from reward_service.engine.loading import build_tower, plan_tower

MIB = 1 << 20
HPS, PICKSCORE = "HPS_v2.1_compressed.pt", "model.safetensors"
_ARCHITECTURE = "ViT-H-14"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the checkpoints, load each as float32 and as bfloat16, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="number of layers of both transformers (as published)")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        return _step(*options.step)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.layers)
    print("| file | GB | dtype | model | peak own − model | peak mapped | peak resident | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in measured:
        sizes = (row[key] / 1e9 for key in ("model", "beyond", "mapped", "resident"))
        cells = [
            row["file"],
            f"{row['file_bytes'] / 1e9:.2f}",
            row["dtype"],
            *(f"{size:.2f}" for size in sizes),
        ]
        print(f"| {' | '.join(cells)} | {row['seconds']:.1f} |")
    return None


def measure(folder: Path, layers: int | None) -> list[dict[str, Any]]:
    """Write both checkpoints into a folder and measure their loading, each in a process of its own.

    Args:
        folder: folder for the checkpoints
        layers: layers of both transformers; None for the published number

    Returns:
        rows with sizes in bytes
    """
    rows = []
    for file in (HPS, PICKSCORE):
        _run("write", file, str(folder), str(layers or 0))
        rows += [json.loads(_run("load", file, str(folder), dtype)) for dtype in ("float32", "bfloat16")]
        (folder / file).unlink()
    return rows


def _run(*step: str) -> str:
    command = [sys.executable, "-m", "benchmarks.loading", "--step", *step]
    root = Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout


def _step(name: str, file: str, folder: str, option: str) -> None:
    if name == "load":
        print(json.dumps(_load(file, Path(folder), option)))
    elif file == HPS:
        _write_hps(Path(folder), int(option))
    else:
        _write_pickscore(Path(folder), int(option))


def _load(file: str, folder: Path, dtype: str) -> dict[str, Any]:
    if file == HPS:
        config = TowerConfig(layout="open_clip", origin=Origin(folder=folder), weights=Weights(file=file))
    else:
        config = TowerConfig(layout="huggingface", origin=Origin(folder=folder), weights=Weights(file=file))
    before = _own_bytes()
    plan = plan_tower(config, ModelFiles())
    with _Peak() as peak:
        start = time.perf_counter()
        tower = build_tower(plan, torch.device("cpu"), getattr(torch, dtype), 16)
        seconds = time.perf_counter() - start
    module: Any = tower.model
    model = sum(parameter.nbytes for parameter in module.parameters())
    return {
        "file": file,
        "file_bytes": plan.weights.size_bytes,
        "dtype": dtype,
        "model": model,
        "beyond": peak.own - before - model,
        "mapped": peak.mapped,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": seconds,
    }


class _Peak:
    """Peak memory of the process while the block runs: `own` and `mapped`, in bytes."""

    def __enter__(self) -> _Peak:
        self.own, self.mapped, self._done = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.own, self.mapped = max(self.own, _own_bytes()), max(self.mapped, _status_bytes("RssFile"))


def _own_bytes() -> int:
    return _status_bytes("RssAnon")


def _status_bytes(key: str) -> int:
    """Return a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _write_hps(folder: Path, layers: int) -> None:
    """Write a random HPSv2 checkpoint as published: half precision under open_clip's names."""
    architecture: Any = open_clip.get_model_config(_ARCHITECTURE)
    for half in ("vision_cfg", "text_cfg"):
        architecture[half]["layers"] = layers or architecture[half]["layers"]
    with torch.device("meta"):
        model = open_clip.CLIP(**architecture)
    state = {key: torch.full(tensor.shape, 0.01).half() for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / HPS)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}))


def _write_pickscore(folder: Path, layers: int) -> None:
    """Write a random PickScore checkpoint as published: float32, transformers' names, with a tokenizer."""
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "patch_size": 14}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    config: Any = CLIPConfig(
        vision_config={**vision, "num_hidden_layers": layers or 32, "hidden_act": "gelu"},
        text_config={**text, "num_hidden_layers": layers or 24, "hidden_act": "gelu"},
        projection_dim=1024,
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    state = {key: torch.full(tensor.shape, 0.01) for key, tensor in model.state_dict().items()}
    save_file(state, folder / PICKSCORE)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


if __name__ == "__main__":
    main()
