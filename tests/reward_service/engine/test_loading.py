"""Model loading: each weight is copied once to its final place, and never held in memory twice."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.loading import HPS, MIB, PICKSCORE, measure
from reward_service.config import Origin, TowerConfig, Weights
from reward_service.engine import weights as weights_module
from reward_service.engine.files import LocalFile
from reward_service.engine.loading import load_tower
from reward_service.engine.weights import Checkpoint, convert_state_dict
from tests.support.service.checkpoints import Checkpoints

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_holds_no_second_copy(tmp_path: Path) -> None:
    """Half a GB of weights, widened, narrowed or unchanged: at most a few tensors on top of the model.

    Reading a whole file first would show as 240 MB and more.
    """
    for row in measure(tmp_path, layers=2):
        assert row["model"] > 200 * MIB
        assert row["beyond"] < 150 * MIB, row
    assert [path for path in (tmp_path / HPS, tmp_path / PICKSCORE) if path.exists()] == []


def load_network(
    checkpoints: Checkpoints, layout: str, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Return the network of a loaded tower."""
    if layout == "huggingface":
        weights = Weights(file="model.safetensors")
        config = TowerConfig(layout="huggingface", origin=Origin(folder=checkpoints.clip), weights=weights)
    else:
        origin, weights = Origin(folder=checkpoints.hps), Weights(file="HPS.pt")
        config = TowerConfig(layout="open_clip", origin=origin, weights=weights, vocabulary="bpe.txt.gz")
    network: torch.nn.Module = load_tower(config, CPU, dtype).model
    return network


def loaded_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a network's weights; the tower wraps its last block."""
    return {key.replace(".block.", "."): tensor for key, tensor in network.state_dict().items()}


def stored_weights(checkpoints: Checkpoints, layout: str) -> dict[str, torch.Tensor]:
    """Return the file's weights, read by the plain API, under open_clip's names."""
    if layout == "huggingface":
        return convert_state_dict(load_file(checkpoints.clip / "model.safetensors"))
    state: dict[str, torch.Tensor] = torch.load(checkpoints.hps / "HPS.pt", weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("window", [0, 256 << 20], ids=["renewed at each tensor", "never renewed"])
@pytest.mark.parametrize("layout", ["huggingface", "open_clip"])
def test_every_weight_is_loaded(
    layout: str, window: int, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-identical in float32, however often the file is mapped anew."""
    monkeypatch.setattr(weights_module, "WINDOW_BYTES", window)
    found, expected = loaded_weights(load_network(checkpoints, layout)), stored_weights(checkpoints, layout)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_bfloat16_trunk_is_rounded_once(checkpoints: Checkpoints) -> None:
    """Directly from the file's precision; the logit scale is read before."""
    found, expected = (
        loaded_weights(load_network(checkpoints, "open_clip", torch.bfloat16)),
        stored_weights(checkpoints, "open_clip"),
    )
    assert all(torch.equal(found[key], expected[key].bfloat16()) for key in expected)
    config = TowerConfig(
        layout="huggingface",
        origin=Origin(folder=checkpoints.clip),
        weights=Weights(file="model.safetensors"),
    )
    exact = load_tower(config, CPU, torch.float32).logit_scale
    assert load_tower(config, CPU, torch.bfloat16).logit_scale == exact


def test_loaded_model_does_not_depend_on_its_file(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Overwriting the file later changes no weight."""
    shutil.copytree(checkpoints.hps, tmp_path / "hps")
    copy = Checkpoints(tmp_path, checkpoints.config)
    network = load_network(copy, "open_clip")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    path = copy.hps / "HPS.pt"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\0" * size)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_legacy_torch_files_are_read(tmp_path: Path) -> None:
    """torch's first format cannot be memory-mapped; it is read whole."""
    path = tmp_path / "old.pth"
    torch.save({"module.w": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    checkpoint = Checkpoint(LocalFile("old.pth", path, path.stat().st_size, ""))
    assert checkpoint.shapes == {"w": (3,)}
    assert checkpoint.tensor("w").tolist() == [0.0, 1.0, 2.0]
