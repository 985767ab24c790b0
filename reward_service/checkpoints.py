"""Files of weights: found by origin, checked by hash, read without pickle. Errors are one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_service.config import Origin, Weights
from reward_service.settings import one_line

StateDict = dict[str, Tensor]
_SHOWN_KEYS = 3


class ModelError(Exception):
    """A model that cannot be used; the message is one line: the file, what is expected, what was found."""


def fetch(origin: Origin, name: str, sha256: str | None = None) -> Path:
    """The local path of one file of an origin, downloaded first if it has to be.

    :raises ModelError: it is not there, or cannot be downloaded
    """
    if origin.folder is not None:
        path = origin.folder / name
        if not path.is_file():
            raise ModelError(f"{path}: no such file; correct the origin, or fetch the model there")
        return path
    return _from_hub(origin, name) if origin.repo is not None else _from_web(origin, name, sha256)


def fetch_optional(origin: Origin, names: Iterable[str]) -> list[Path]:
    """The files among ``names`` that the origin has."""
    found = []
    for name in names:
        try:
            found.append(fetch(origin, name))
        except ModelError:
            continue
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    :raises ModelError: it is not one
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_weights(origin: Origin, weights: Weights) -> tuple[StateDict, str]:
    """A state dict and the sha256 of its file.

    :raises ModelError: missing, of another hash, or not a file of weights
    """
    pickled = not weights.file.endswith(".safetensors")
    if pickled and weights.sha256 is None and origin.folder is None:
        raise ModelError(
            f"{weights.file}: a pickled file from {origin} needs its sha256 in the configuration"
        )
    path = fetch(origin, weights.file, weights.sha256)
    digest = file_sha256(path)
    if weights.sha256 is not None and digest != weights.sha256:
        raise ModelError(f"{path}: expected sha256 {weights.sha256}, found {digest}; fetch the file again")
    return _read(path, pickled), digest


def file_sha256(path: Path) -> str:
    """The hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """One hex sha256 over the names and contents of several files."""
    lines = sorted(f"{path.name} {file_sha256(path)}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fill(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Give a module built on the meta device its weights, as float32.

    :raises ModelError: a key is missing or unknown, or a shape differs
    """
    expected = module.state_dict()
    _compare_keys(expected, state, name)
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            shapes = f"expected {list(expected[key].shape)}, found {list(tensor.shape)}"
            raise ModelError(f"{name}: {key}: {shapes}; this is another architecture's checkpoint")
    module.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)


def _compare_keys(expected: Mapping[str, Any], state: Mapping[str, Any], name: str) -> None:
    for verb, keys in (
        ("lacks", expected.keys() - state.keys()),
        ("has unknown", state.keys() - expected.keys()),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:_SHOWN_KEYS])
            more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
            raise ModelError(f"{name}: the checkpoint {verb} {shown}{more}; is it this architecture's?")


def _read(path: Path, pickled: bool) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        _unpickling_error(),
    ) as error:
        cause = one_line(error)[:120]
        raise ModelError(f"{path}: not a whole file of weights ({cause}); fetch it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{path}: expected a state dict of tensors; this is something else")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _unpickling_error() -> type[Exception]:
    # torch.load's refusal of anything but tensors; pickle itself is not used.
    from pickle import UnpicklingError

    return UnpicklingError


def _from_hub(origin: Origin, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(origin.repo), name, revision=origin.revision))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{origin}: {name} is neither cached nor downloadable; connect, or use a folder"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{origin}: {name} cannot be downloaded ({one_line(error)[:160]})") from None


def _from_web(origin: Origin, name: str, sha256: str | None) -> Path:
    if sha256 is None:
        raise ModelError(f"{origin}/{name}: a file from a web address needs its sha256 in the configuration")
    path = Path(torch.hub.get_dir()) / "reward_service" / sha256[:16] / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    from urllib.parse import quote

    try:
        torch.hub.download_url_to_file(f"{origin.url}/{quote(name)}", str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{origin}/{name} cannot be downloaded ({one_line(error)[:160]})") from None
    return path
