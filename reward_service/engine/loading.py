"""Model loading: from the configuration to a reward engine, for both published checkpoint layouts.

A plan is the configuration with its files located and hashed, before any network is built. The engine is
built from plans, and `reward-service evaluators` prints them. An evaluator's fingerprint is the hash of
everything that determines its scores: formula, weights, architecture, preprocessing with its antialias,
tokenizer, dtype and head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from reward_service.config import EvaluatorConfig, ServiceConfig, TowerConfig
from reward_service.engine.clip import Tower
from reward_service.engine.engine import RewardEngine
from reward_service.engine.evaluators import (
    FORMULAS,
    Evaluator,
    LinearHead,
    fold_linear_layers,
    reference_preprocessing,
)
from reward_service.engine.files import LocalFile, ModelFiles, ProgressCallback, no_progress, read_json
from reward_service.engine.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing
from reward_service.engine.tokenizer import HuggingFaceTokenizer, OpenClipTokenizer, Tokenizer
from reward_service.engine.types import ModelError
from reward_service.engine.weights import (
    Checkpoint,
    WeightSource,
    check_weights,
    convert_config,
    load_weights,
    sources_in_open_clip,
    sources_in_transformers,
)
from reward_service.settings import one_line

# The only way in which a tower computes text embeddings; open_clip supports others.
_TEXT_SETTINGS = {
    "no_causal_mask": False,
    "embed_cls": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
}
_TOKENIZER_FILES = ("vocab.json", "merges.txt")
_DEFAULT_CONTEXT_LENGTH, _DEFAULT_SIZE_PX = 77, 224


@dataclass(frozen=True)
class TowerPlan:
    """One tower to load.

    Attributes:
        config: its section of the configuration
        architecture: open_clip's model configuration
        weights: the checkpoint
        config_files: the file of the architecture, if there is one
        vocabulary_files: the tokenizer's files
        tokenizer_description: layout, hash, cleaning and context length of the tokenizer; hashed, so its
            wording is fixed
    """

    config: TowerConfig
    architecture: dict[str, Any]
    weights: LocalFile
    config_files: tuple[LocalFile, ...]
    vocabulary_files: tuple[LocalFile, ...]
    tokenizer_description: str

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt."""
        return int(self.architecture["text_cfg"].get("context_length", _DEFAULT_CONTEXT_LENGTH))

    @property
    def size_px(self) -> int:
        """Edge of the square input image."""
        size = self.architecture["vision_cfg"].get("image_size", _DEFAULT_SIZE_PX)
        return int(size if isinstance(size, int) else size[0])

    @property
    def identity(self) -> str:
        """Hash of weights, architecture and tokenizer."""
        architecture = json.dumps(self.architecture, sort_keys=True)
        return _hash_of(self.weights.sha256, architecture, self.tokenizer_description)

    @property
    def files(self) -> tuple[LocalFile, ...]:
        """All files that it needs."""
        return (self.weights, *self.config_files, *self.vocabulary_files)


@dataclass(frozen=True)
class EvaluatorPlan:
    """One evaluator to load: its tower, and how a score is computed from the tower's embeddings."""

    name: str
    config: EvaluatorConfig
    tower: TowerPlan
    preprocessing: Preprocessing
    dtype: torch.dtype
    head: LocalFile | None

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines its scores; 16 hex digits."""
        parts = (
            FORMULAS[self.config.kind],
            self.tower.identity,
            repr(self.preprocessing),
            str(self.dtype),
            self.head.sha256 if self.head else "",
        )
        return _hash_of(*parts)[:16]

    @property
    def files(self) -> tuple[LocalFile, ...]:
        """All files that it needs."""
        return self.tower.files + ((self.head,) if self.head else ())


def build_engine(config: ServiceConfig, progress: ProgressCallback = no_progress) -> RewardEngine:
    """Load every enabled evaluator into an engine.

    All files are checked before the first is loaded. The towers are loaded one after another, each weight
    directly to its final device and dtype: besides the models the host needs only some hundred megabytes, see
    `reward_service.engine.weights`.

    Args:
        config: the configuration of the service
        progress: receives progress reports of long work

    Raises:
        ModelError: a model cannot be used; the message is one line
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, dtype = resolve_device(config)
    if config.acceleration == "graphs" and device.type != "cuda":
        raise ModelError("service.acceleration: graphs are for CUDA, the device is cpu; use none or compile")
    plans = plan_evaluators(config, ModelFiles(progress), config.enabled)
    heads = check_models(plans)
    towers: dict[str, Tower] = {}
    for plan in plans.values():
        name = plan.config.tower
        if name not in towers:
            towers[name] = build_tower(plan.tower, device, dtype, config.text_cache_entries, progress)
            towers[name].accelerate(config.acceleration, config.batch_pairs)
    evaluators = {
        name: _build_evaluator(plan, towers[plan.config.tower], heads[name]) for name, plan in plans.items()
    }
    return RewardEngine(evaluators, config.batch_pairs, device, dtype)


def plan_evaluators(
    config: ServiceConfig, files: ModelFiles, names: Iterable[str]
) -> dict[str, EvaluatorPlan]:
    """Return plans of the named evaluators; their files are located and verified.

    Raises:
        ModelError: a model cannot be used; the message is one line
    """
    _, dtype = resolve_device(config)
    towers: dict[str, TowerPlan] = {}
    plans = {}
    for name in names:
        evaluator = config.evaluators[name]
        if evaluator.tower not in towers:
            towers[evaluator.tower] = plan_tower(config.towers[evaluator.tower], files)
        tower, head = towers[evaluator.tower], evaluator.head
        preprocessing = reference_preprocessing(evaluator.kind, tower.size_px)
        head_file = files.get(head.origin, head.weights.file, head.weights.sha256) if head else None
        plans[name] = EvaluatorPlan(name, evaluator, tower, preprocessing, dtype, head_file)
    return plans


def plan_tower(config: TowerConfig, files: ModelFiles) -> TowerPlan:
    """Return the plan of one tower; its files are located and verified, the small ones first.

    Raises:
        ModelError: the model cannot be used; the message is one line
    """
    architecture, config_files = _read_architecture(config, files)
    vocabulary_files = _vocabulary_files(config, files)
    description = _describe_tokenizer(config, architecture, vocabulary_files)
    pickled = not config.weights.file.endswith(".safetensors")
    if pickled and config.weights.sha256 is None and config.origin.folder is None:
        remedy = "a pickled file needs its sha256 in the configuration"
        raise ModelError(f"{config.origin}/{config.weights.file}: {remedy}")
    weights = files.get(config.origin, config.weights.file, config.weights.sha256)
    return TowerPlan(config, architecture, weights, config_files, vocabulary_files, description)


def resolve_device(config: ServiceConfig) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of the trunks; `auto` is bfloat16 on a GPU, else float32 on the CPU.

    Raises:
        ModelError: the device is not available
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"service.device: unknown device {name!r}; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"service.device: {name} is configured, but torch finds no GPU; use auto or cpu")
    if config.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, torch.float32 if config.dtype == "float32" else torch.bfloat16


def check_models(plans: Mapping[str, EvaluatorPlan]) -> dict[str, LinearHead | None]:
    """Verify that every model can be loaded; of the weights only the headers are read.

    Returns:
        the heads by evaluator; they are small

    Raises:
        ModelError: a model cannot be used; the message is one line
    """
    for tower in {plan.config.tower: plan.tower for plan in plans.values()}.values():
        _build_tokenizer(tower)
        _match_weights(tower)
    return {name: _planned_head(plan) for name, plan in plans.items()}


def load_tower(
    config: TowerConfig, device: torch.device, dtype: torch.dtype, cache_entries: int = 4096
) -> Tower:
    """Load one tower from its published layout.

    Raises:
        ModelError: the model cannot be used; the message is one line
    """
    return build_tower(plan_tower(config, ModelFiles()), device, dtype, cache_entries)


def build_tower(
    plan: TowerPlan,
    device: torch.device,
    dtype: torch.dtype,
    cache_entries: int,
    progress: ProgressCallback = no_progress,
) -> Tower:
    """Build a planned tower and load its weights.

    Raises:
        ModelError: the weights are broken, or another architecture's
    """
    tokenizer = _build_tokenizer(plan)
    model, checkpoint, sources = _match_weights(plan)
    # The tower reads the logit scale before it rounds the trunk.
    load_weights(model, checkpoint, sources, device, dtype, float32=("logit_scale",), progress=progress)
    return Tower(model, tokenizer, plan.identity, device, dtype, cache_entries)


def load_head(file: LocalFile) -> LinearHead:
    """Load LAION's head: five linear layers with only dropout between them, folded into one.

    Raises:
        ModelError: the file is not such a head
    """
    weight, bias = fold_linear_layers(Checkpoint(file).state_dict(), file.source)
    return LinearHead(weight, bias, file.sha256)


def _build_evaluator(plan: EvaluatorPlan, tower: Tower, head: LinearHead | None) -> Evaluator:
    config = plan.config
    return Evaluator(plan.name, config.kind, config.tower, tower, plan.preprocessing, plan.fingerprint, head)


def _planned_head(plan: EvaluatorPlan) -> LinearHead | None:
    if plan.head is None:
        return None
    head = load_head(plan.head)
    if len(head.weight) != (expected := plan.tower.architecture["embed_dim"]):
        sizes = f"expected a head for {expected} numbers, found one for {len(head.weight)}"
        raise ModelError(f"{plan.head.source}: {sizes}; give evaluator {plan.name} the tower of its head")
    return head


def _read_architecture(
    config: TowerConfig, files: ModelFiles
) -> tuple[dict[str, Any], tuple[LocalFile, ...]]:
    """Return open_clip's model configuration and the files that it was read from."""
    if config.layout == "huggingface":
        file = files.get(config.origin, "config.json")
        return convert_config(file.path), (file,)
    if config.architecture is not None:
        known = open_clip.get_model_config(config.architecture)
        return _check_architecture(known, config.architecture), ()
    file = files.get(config.origin, "open_clip_config.json")
    content = read_json(file.path)
    _check_normalization(content.get("preprocess_cfg", {}), str(file.path))
    return _check_architecture(content.get("model_cfg"), str(file.path)), (file,)


def _check_architecture(architecture: Any, name: str) -> dict[str, Any]:
    if not isinstance(architecture, dict) or not {"text_cfg", "vision_cfg"} <= architecture.keys():
        raise ModelError(f"{name}: not an architecture that open_clip knows; see open_clip.list_models()")
    if "hf_model_name" in architecture["text_cfg"] or "timm_model_name" in architecture["vision_cfg"]:
        raise ModelError(f"{name}: only CLIP's own vision and text transformers can be a tower")
    text = {**_TEXT_SETTINGS, **architecture["text_cfg"]}
    if changed := [key for key, value in _TEXT_SETTINGS.items() if text[key] != value]:
        only = f"only {_TEXT_SETTINGS[changed[0]]!r} is supported"
        raise ModelError(f"{name}: text_cfg.{changed[0]}: {only}; use a causal text transformer")
    return architecture


def _check_normalization(found: dict[str, Any], name: str) -> None:
    expected = {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)}
    for key, values in expected.items():
        if key in found and list(found[key]) != values:
            raise ModelError(f"{name}: preprocess_cfg.{key}: expected {values}, found {found[key]}")


def _vocabulary_files(config: TowerConfig, files: ModelFiles) -> tuple[LocalFile, ...]:
    if config.layout == "huggingface":
        origin = config.tokenizer or config.origin
        return tuple(files.get(origin, name) for name in _TOKENIZER_FILES)
    if config.vocabulary is not None:
        return (files.get(config.origin, config.vocabulary),)
    packaged = Path(open_clip.tokenizer.default_bpe())
    return (files.local(packaged, f"open_clip/{packaged.name}"),)


def _describe_tokenizer(
    config: TowerConfig, architecture: dict[str, Any], vocabulary_files: tuple[LocalFile, ...]
) -> str:
    context_length = architecture["text_cfg"].get("context_length", _DEFAULT_CONTEXT_LENGTH)
    cleaning = "open_clip" if config.layout == "open_clip" else config.text_cleaning
    content = _hash_of(*(file.sha256 for file in vocabulary_files))[:12]
    return f"{config.layout} BPE {content}, cleaning {cleaning}, {context_length} tokens"


def _build_tokenizer(plan: TowerPlan) -> Tokenizer:
    path = plan.vocabulary_files[0].path
    try:
        if plan.config.layout == "open_clip":
            return OpenClipTokenizer(path, plan.context_length)
        found, expected = len(read_json(path)), plan.architecture["text_cfg"]["vocab_size"]
        if found > expected:
            counts = f"expected {expected} words, found {found}"
            raise ModelError(f"{path}: {counts}; name the model's own tokenizer")
        return HuggingFaceTokenizer(path.parent, plan.context_length, plan.config.text_cleaning)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exception
        raise ModelError(f"{path}: not a tokenizer's vocabulary ({one_line(error)[:160]})") from None


def _match_weights(plan: TowerPlan) -> tuple[open_clip.CLIP, Checkpoint, dict[str, WeightSource]]:
    """Return an empty network, the checkpoint that fits it, and the source of each weight."""
    checkpoint = Checkpoint(plan.weights)
    model = _empty_network(plan.architecture, plan.weights.source)
    find_sources = sources_in_transformers if plan.config.layout == "huggingface" else sources_in_open_clip
    sources = find_sources(checkpoint.shapes)
    check_weights(model, checkpoint, sources)
    return model, checkpoint, sources


def _empty_network(architecture: dict[str, Any], source: str) -> open_clip.CLIP:
    """Build the network on the meta device: nothing is allocated or initialized, the file has the weights."""
    try:
        with torch.device("meta"):
            model = open_clip.CLIP(**architecture)
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        cause = one_line(error)[:160]
        raise ModelError(f"{source}: open_clip cannot build this architecture ({cause})") from None
    # The only buffer that no checkpoint holds; the tower has a causal mask of its own.
    model.attn_mask = None
    return model


def _hash_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
