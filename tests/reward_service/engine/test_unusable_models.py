"""Unusable models: every command prints one line that names the file, and exits with code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from reward_service.cli.main import main
from tests.support.service.checkpoints import HEAD_SIZES, Checkpoints, head_module

CLIP, HPS, HEAD = "clip/model.safetensors", "hps/HPS.pt", "aesthetic/head.pth"
BreakModels = Callable[[Path], None]


def truncate(file: str, share: float = 0.5) -> BreakModels:
    """Keep only the first part of a file."""

    def break_models(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return break_models


def write(file: str, text: str) -> BreakModels:
    return lambda folder: (folder / file).write_text(text) and None


def change_clip(**changes: torch.Tensor | None) -> BreakModels:
    """Replace tensors of the clip tower, or remove them; `__` stands for a dot."""

    def break_models(folder: Path) -> None:
        state: dict[str, Any] = load_file(folder / CLIP)
        state |= {key.replace("__", "."): tensor for key, tensor in changes.items()}
        save_file({key: tensor for key, tensor in state.items() if tensor is not None}, folder / CLIP)

    return break_models


def change_config(**changes: object) -> BreakModels:
    def break_models(folder: Path) -> None:
        path = folder / "clip" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return break_models


def widen_hps(folder: Path) -> None:
    """Double the width, as with a ViT-H's weights in place of a ViT-L's."""
    state = torch.load(folder / HPS, weights_only=True)["state_dict"]
    wider = {key: torch.cat([tensor] * 2, -1) if tensor.ndim else tensor for key, tensor in state.items()}
    torch.save({"state_dict": wider}, folder / HPS)


def deepen_hps(folder: Path) -> None:
    """Add a layer; all shapes still fit."""
    state = torch.load(folder / HPS, weights_only=True)["state_dict"]
    more = {key.replace("resblocks.1", "resblocks.2"): value for key, value in state.items()}
    torch.save({"state_dict": {**more, **state}}, folder / HPS)


def write_torchscript(folder: Path) -> None:
    """Write an archive such as OpenAI's own ViT-L-14.pt."""
    with warnings.catch_warnings(action="ignore"):  # newer torch deprecates writing them
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / HPS)


def narrow_head(folder: Path) -> None:
    sizes = (HEAD_SIZES[0] // 2, *HEAD_SIZES[1:])
    state = {
        f"layers.{key}": value[:, : sizes[0]] if key == "0.weight" else value
        for key, value in head_module().state_dict().items()
    }
    torch.save({key: value.clone() for key, value in state.items()}, folder / HEAD)


def change_head(**changes: torch.Tensor | None) -> BreakModels:
    """Replace tensors of the head, or remove them; `__` stands for a dot."""

    def break_models(folder: Path) -> None:
        state: dict[str, Any] = torch.load(folder / HEAD, weights_only=True)
        state |= {key.replace("__", "."): tensor for key, tensor in changes.items()}
        torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, folder / HEAD)

    return break_models


BROKEN_MODELS: dict[str, tuple[BreakModels, Sequence[str]]] = {
    "truncated safetensors": (truncate(CLIP), (CLIP, "not a whole file", "expected", "found")),
    "truncated header": (truncate(CLIP, 0.001), (CLIP, "not a whole file", "expected", "found")),
    "empty safetensors": (truncate(CLIP, 0), (CLIP, "expected a safetensors header, found 0")),
    "truncated pickle": (truncate(HPS), (HPS, "not a whole file", "expected", "found")),
    "empty pickle": (truncate(HPS, 0), (HPS, "not a whole file", "expected", "found 0")),
    "pickled code": (
        lambda folder: torch.save({"state_dict": {"x": print}}, folder / HPS),
        (HPS, "expected an archive of tensors, found"),
    ),
    "TorchScript": (write_torchscript, (HPS, "expected a state dict, found a TorchScript archive")),
    "not a state dict": (
        lambda folder: torch.save([1, 2], folder / HPS),
        (HPS, "expected a state dict of tensors, found"),
    ),
    "another width": (widen_hps, (HPS, "expected [", "found [", "another architecture")),
    "more layers": (deepen_hps, (HPS, "has unknown", "resblocks.2", "expected", "found")),
    "missing key": (change_clip(logit_scale=None), (CLIP, "lacks logit_scale: expected", "found")),
    "extra key": (change_clip(more=torch.zeros(1)), (CLIP, "has unknown more: expected", "found")),
    "missing part of a stack": (
        change_clip(text_model__encoder__layers__0__self_attn__q_proj__bias=None),
        (CLIP, "lacks text_model.encoder.layers.0.self_attn.q_proj.bias"),
    ),
    "broken JSON": (write("clip/config.json", "{"), ("clip/config.json", "not readable as JSON")),
    "JSON of another kind": (write("clip/config.json", "[]"), ("clip/config.json", "expected a JSON object")),
    "another model": (change_config(model_type="bert"), ("expected model_type clip, found bert",)),
    "nonsense in the JSON": (change_config(vision_config=7), ("clip/config.json", "not a CLIP model's")),
    "another activation": (
        change_config(vision_config={"hidden_act": "relu"}),
        ("clip/config.json", "hidden_act must be"),
    ),
    "broken vocabulary": (write("clip/vocab.json", "{"), ("clip/vocab.json", "not readable as JSON")),
    "foreign vocabulary": (
        write("clip/vocab.json", json.dumps({str(n): n for n in range(9999)})),
        ("clip/vocab.json", "expected", "words, found 9999"),
    ),
    "broken merges": (write("clip/merges.txt", "a b c d\n"), ("clip/vocab.json", "not a tokenizer's")),
    "foreign BPE file": (write("hps/bpe.txt.gz", "no gzip"), ("hps/bpe.txt.gz", "not a tokenizer's")),
    "narrow head": (narrow_head, (HEAD, "expected a head for 96 numbers, found one for 48")),
    "no head": (lambda folder: torch.save({"w": torch.zeros(1)}, folder / HEAD), (HEAD, "expected linear")),
    "empty head": (
        lambda folder: torch.save({}, folder / HEAD),
        (HEAD, "expected linear", "found no tensors"),
    ),
    "head without a bias": (
        change_head(layers__2__bias=None),
        (HEAD, "expected linear layers", "found no layers.2.bias"),
    ),
    "head without a layer": (
        change_head(layers__2__weight=None, layers__2__bias=None),
        (HEAD, "layers.4.weight: expected 64 columns, found 32"),
    ),
    "head with more": (change_head(more=torch.zeros(1)), (HEAD, "expected linear layers", "found more")),
    "head with named layers": (
        change_head(layers__a__weight=torch.zeros(1, 1)),
        (HEAD, "expected linear layers", "found layers.a.weight"),
    ),
    "head with one bias for all": (
        change_head(layers__2__bias=torch.zeros(1)),
        (HEAD, "layers.2: expected a linear layer, found weight [32, 64] and bias [1]"),
    ),
}


@pytest.fixture
def broken_folder(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A copy of the checkpoints to break, with an image."""
    shutil.copytree(checkpoints.folder, tmp_path / "models")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "models" / "picture.png")
    return tmp_path / "models"


def refusal_message(capsys: pytest.CaptureFixture[str], folder: Path, command: str, *more: str) -> str:
    """Return the command's line on stderr; verify exit code 2 and an empty stdout."""
    images = (str(folder / "picture.png"), "--prompt", "a red square") if command == "score" else ()
    with pytest.raises(SystemExit) as exited:
        main([command, *images, "--config", str(folder / "config.yaml"), *more])
    output = capsys.readouterr()
    assert exited.value.code == 2
    assert output.out == ""
    assert len(output.err.splitlines()) == 1, output.err
    return output.err


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_unusable_models_are_refused(
    name: str, broken_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that reads models prints the same line."""
    break_models, words = BROKEN_MODELS[name]
    break_models(broken_folder)
    messages = {
        refusal_message(capsys, broken_folder, command) for command in ("score", "evaluators", "download")
    }
    assert len(messages) == 1
    assert [word for word in words if word not in min(messages)] == []


@pytest.mark.parametrize("command", ["score", "evaluators", "download"])
def test_commands_refuse_a_wrong_hash(
    command: str, broken_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message has the expected hash and the one found, for a tower and for a head."""
    expected = "0" * 64
    for key, file in (
        ("towers.clip.weights", CLIP),
        ("towers.hps.weights", HPS),
        ("evaluators.aesthetic.head.weights", HEAD),
    ):
        message = refusal_message(capsys, broken_folder, command, "--set", f"{key}.sha256='{expected}'")
        assert f"{broken_folder / file}: expected sha256 {expected}, found " in message


def test_float16_is_refused(broken_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the two supported dtypes."""
    assert "use float32 or bfloat16" in refusal_message(
        capsys, broken_folder, "score", "--set", "dtype=float16"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truncated safetensors", "another width"])
def test_service_does_not_start_with_unusable_models(name: str, broken_folder: Path) -> None:
    """It exits by itself, with code 2 and the line."""
    break_models, words = BROKEN_MODELS[name]
    break_models(broken_folder)
    command = [
        sys.executable,
        "-m",
        "reward_service",
        "serve",
        "--config",
        str(broken_folder / "config.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [word for word in words if word not in done.stderr] == []
