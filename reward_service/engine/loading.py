"""Configuration to a loaded engine: the one place where models are loaded, from either published layout.

What a configuration amounts to, before any network is built: files, architectures, fingerprints.

The engine is built from these plans and `reward-service evaluators` prints them, so that both say the same.
An evaluator's fingerprint is the hash of whatever decides its scores: formula, weights, architecture,
preprocessing with its antialias, tokenizer, dtype and head.
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
from reward_service.engine.evaluators import FORMULAS, Evaluator, LinearHead, fold, preprocessing_of
from reward_service.engine.files import Files, LocalFile, Note, silent
from reward_service.engine.preprocessing import (
    OPENAI_MEAN,
    OPENAI_STD,
    HuggingFaceTokenizer,
    OpenClipTokenizer,
    Preprocessing,
    Tokenizer,
)
from reward_service.engine.weights import (
    Checkpoint,
    ModelError,
    Part,
    check,
    fill,
    open_clip_config,
    open_clip_parts,
    own_parts,
    read_json,
)
from reward_service.settings import one_line

# The one way in which a tower reads its text transformer; open_clip knows others.
_READ_TEXT = {
    "no_causal_mask": False,
    "embed_cls": False,
    "pool_type": "argmax",
    "proj_type": "linear",
    "proj_bias": False,
}
_TOKENIZER_FILES = ("vocab.json", "merges.txt")
_CONTEXT, _SIZE_PX = 77, 224


@dataclass(frozen=True)
class TowerPlan:
    """One tower: its architecture in open_clip's words, and the files it is made from.

    `settings` holds the architecture's file where there is one; `tokenizer` says the tokenizer in words.
    """

    config: TowerConfig
    architecture: dict[str, Any]
    weights: LocalFile
    settings: tuple[LocalFile, ...]
    vocabulary: tuple[LocalFile, ...]
    tokenizer: str

    @property
    def context(self) -> int:
        """Most tokens of a prompt."""
        return int(self.architecture["text_cfg"].get("context_length", _CONTEXT))

    @property
    def size_px(self) -> int:
        """Edge of the square image that it reads."""
        size = self.architecture["vision_cfg"].get("image_size", _SIZE_PX)
        return int(size if isinstance(size, int) else size[0])

    @property
    def identity(self) -> str:
        """Hash of weights, architecture and tokenizer."""
        return _hash_of(self.weights.sha256, json.dumps(self.architecture, sort_keys=True), self.tokenizer)

    @property
    def files(self) -> tuple[LocalFile, ...]:
        """Every file it needs."""
        return (self.weights, *self.settings, *self.vocabulary)


@dataclass(frozen=True)
class EvaluatorPlan:
    """One evaluator: the tower it looks through and what makes a score of an embedding."""

    name: str
    config: EvaluatorConfig
    tower: TowerPlan
    preprocessing: Preprocessing
    dtype: torch.dtype
    head: LocalFile | None

    @property
    def fingerprint(self) -> str:
        """Hash of whatever decides its scores; 16 hex digits."""
        head = self.head.sha256 if self.head else ""
        parts = (
            FORMULAS[self.config.kind],
            self.tower.identity,
            repr(self.preprocessing),
            str(self.dtype),
            head,
        )
        return _hash_of(*parts)[:16]

    @property
    def files(self) -> tuple[LocalFile, ...]:
        """Every file it needs."""
        return self.tower.files + ((self.head,) if self.head else ())


def plan_evaluators(config: ServiceConfig, files: Files, names: Iterable[str]) -> dict[str, EvaluatorPlan]:
    """Plans of the named evaluators; their files are fetched and checked.

    Raises:
        ModelError: in one line, whatever keeps a model from being used
    """
    _, dtype = placement(config)
    towers: dict[str, TowerPlan] = {}
    plans = {}
    for name in names:
        evaluator = config.evaluators[name]
        if evaluator.tower not in towers:
            towers[evaluator.tower] = plan_tower(config.towers[evaluator.tower], files)
        tower, head = towers[evaluator.tower], evaluator.head
        preprocessing = preprocessing_of(evaluator.kind, tower.size_px)
        head_file = files.get(head.origin, head.weights.file, head.weights.sha256) if head else None
        plans[name] = EvaluatorPlan(name, evaluator, tower, preprocessing, dtype, head_file)
    return plans


def plan_tower(config: TowerConfig, files: Files) -> TowerPlan:
    """The plan of one tower; its files are fetched and checked, the small ones first.

    Raises:
        ModelError: in one line, whatever keeps the model from being used
    """
    architecture, settings = _architecture(config, files)
    vocabulary = _vocabulary(config, files)
    words = _tokenizer_words(config, architecture, vocabulary)
    pickled = not config.weights.file.endswith(".safetensors")
    if pickled and config.weights.sha256 is None and config.origin.folder is None:
        pinned = "a pickled file needs its sha256 in the configuration"
        raise ModelError(f"{config.origin}/{config.weights.file}: {pinned}")
    weights = files.get(config.origin, config.weights.file, config.weights.sha256)
    return TowerPlan(config, architecture, weights, settings, vocabulary, words)


def placement(config: ServiceConfig) -> tuple[torch.device, torch.dtype]:
    """Where the trunks compute and in which dtype: bfloat16 on a GPU and float32 on a CPU, if not told.

    Raises:
        ModelError: the device is not there
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"service.device: {name!r} is no device here; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"service.device: {name} asked for, but torch sees no GPU; use auto or cpu")
    if config.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, torch.float32 if config.dtype == "float32" else torch.bfloat16


def _architecture(config: TowerConfig, files: Files) -> tuple[dict[str, Any], tuple[LocalFile, ...]]:
    if config.layout == "huggingface":
        file = files.get(config.origin, "config.json")
        return open_clip_config(file.path), (file,)
    if config.architecture is not None:
        return _checked(open_clip.get_model_config(config.architecture), config.architecture), ()
    file = files.get(config.origin, "open_clip_config.json")
    found = read_json(file.path)
    _check_normalisation(found.get("preprocess_cfg", {}), str(file.path))
    return _checked(found.get("model_cfg"), str(file.path)), (file,)


def _checked(architecture: Any, name: str) -> dict[str, Any]:
    if not isinstance(architecture, dict) or not {"text_cfg", "vision_cfg"} <= architecture.keys():
        raise ModelError(f"{name}: not an architecture that open_clip knows; see open_clip.list_models()")
    if "hf_model_name" in architecture["text_cfg"] or "timm_model_name" in architecture["vision_cfg"]:
        raise ModelError(f"{name}: only CLIP's own vision and text transformers can be a tower")
    text = {**_READ_TEXT, **architecture["text_cfg"]}
    if changed := [key for key, value in _READ_TEXT.items() if text[key] != value]:
        raise ModelError(f"{name}: text_cfg.{changed[0]}: a tower reads causal text, at its end token only")
    return architecture


def _check_normalisation(found: dict[str, Any], name: str) -> None:
    expected = {"mean": list(OPENAI_MEAN), "std": list(OPENAI_STD)}
    for key, values in expected.items():
        if key in found and list(found[key]) != values:
            raise ModelError(f"{name}: preprocess_cfg.{key}: expected {values}, found {found[key]}")


def _vocabulary(config: TowerConfig, files: Files) -> tuple[LocalFile, ...]:
    if config.layout == "huggingface":
        origin = config.tokenizer or config.origin
        return tuple(files.get(origin, name) for name in _TOKENIZER_FILES)
    if config.vocabulary is not None:
        return (files.get(config.origin, config.vocabulary),)
    own = Path(open_clip.tokenizer.default_bpe())
    return (files.local(own, f"open_clip/{own.name}"),)


def _tokenizer_words(
    config: TowerConfig, architecture: dict[str, Any], vocabulary: tuple[LocalFile, ...]
) -> str:
    context = architecture["text_cfg"].get("context_length", _CONTEXT)
    cleaning = "open_clip" if config.layout == "open_clip" else config.text_cleaning
    content = _hash_of(*(file.sha256 for file in vocabulary))[:12]
    return f"{config.layout} BPE {content}, cleaning {cleaning}, {context} tokens"


def _hash_of(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def build_engine(config: ServiceConfig, progress: Note = silent) -> RewardEngine:
    """Load every enabled evaluator: the one place where that happens.

    Each file is checked before any is loaded. The towers are loaded one after another, each weight straight
    to its device and dtype: besides the models the host holds no more than some hundred megabytes, see
    `reward_service.engine.weights`.

    Args:
        progress: told in words how far long work has come

    Raises:
        ModelError: in one line, whatever keeps a model from being used
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, dtype = placement(config)
    if config.acceleration == "graphs" and device.type != "cuda":
        raise ModelError("service.acceleration: graphs are for CUDA, the device is cpu; use none or compile")
    plans = plan_evaluators(config, Files(progress), config.enabled)
    heads = check_models(plans)
    towers: dict[str, Tower] = {}
    for plan in plans.values():
        name = plan.config.tower
        if name not in towers:
            towers[name] = build_tower(plan.tower, device, dtype, config.text_cache_entries, progress)
            towers[name].accelerate(config.acceleration, config.batch_pairs)
    evaluators = {
        name: _evaluator(plan, towers[plan.config.tower], heads[name]) for name, plan in plans.items()
    }
    return RewardEngine(evaluators, config.batch_pairs, device, dtype)


def check_models(plans: Mapping[str, EvaluatorPlan]) -> dict[str, LinearHead | None]:
    """See that each model can be loaded; of the weights only the headers are read.

    Returns:
        the heads, which are small

    Raises:
        ModelError: in one line, whatever keeps a model from being used
    """
    for tower in {plan.config.tower: plan.tower for plan in plans.values()}.values():
        _tokenizer(tower)
        _matched(tower)
    return {name: _head(plan) for name, plan in plans.items()}


def load_tower(
    config: TowerConfig, device: torch.device, dtype: torch.dtype, cache_entries: int = 4096
) -> Tower:
    """Load one tower from its published layout.

    Raises:
        ModelError: in one line, whatever keeps the model from being used
    """
    return build_tower(plan_tower(config, Files()), device, dtype, cache_entries)


def build_tower(
    plan: TowerPlan, device: torch.device, dtype: torch.dtype, cache_entries: int, note: Note = silent
) -> Tower:
    """Build a planned tower and fill it.

    Raises:
        ModelError: the weights are broken, or another architecture's
    """
    tokenizer = _tokenizer(plan)
    model, checkpoint, parts = _matched(plan)
    # The tower reads the scale before it rounds the trunk.
    fill(model, checkpoint, parts, device, dtype, float32=("logit_scale",), note=note)
    return Tower(model, tokenizer, plan.identity, device, dtype, cache_entries)


def _evaluator(plan: EvaluatorPlan, tower: Tower, head: LinearHead | None) -> Evaluator:
    config = plan.config
    return Evaluator(plan.name, config.kind, config.tower, tower, plan.preprocessing, plan.fingerprint, head)


def load_head(file: LocalFile) -> LinearHead:
    """LAION's head: five linear layers with nothing but dropout between them, folded into one.

    Raises:
        ModelError: the file is not such a head
    """
    weight, bias = fold(Checkpoint(file).state_dict(), file.source)
    return LinearHead(weight, bias, file.sha256)


def _head(plan: EvaluatorPlan) -> LinearHead | None:
    if plan.head is None:
        return None
    head = load_head(plan.head)
    if len(head.weight) != (expected := plan.tower.architecture["embed_dim"]):
        sizes = f"expected a head for {expected} numbers, found one for {len(head.weight)}"
        raise ModelError(f"{plan.head.source}: {sizes}; give evaluator {plan.name} the tower of its head")
    return head


def _tokenizer(plan: TowerPlan) -> Tokenizer:
    path = plan.vocabulary[0].path
    try:
        if plan.config.layout == "open_clip":
            return OpenClipTokenizer(path, plan.context)
        found, known = len(read_json(path)), plan.architecture["text_cfg"]["vocab_size"]
        if found > known:
            raise ModelError(f"{path}: expected {known} words, found {found}; name the model's own tokenizer")
        return HuggingFaceTokenizer(path.parent, plan.context, plan.config.text_cleaning)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - the tokenizers' library raises plain Exception
        raise ModelError(f"{path}: not a tokenizer's vocabulary ({one_line(error)[:160]})") from None


def _matched(plan: TowerPlan) -> tuple[open_clip.CLIP, Checkpoint, dict[str, Part]]:
    """An empty network, the checkpoint that fits it, and what of the one goes where in the other."""
    checkpoint = Checkpoint(plan.weights)
    model = _empty(plan.architecture, plan.weights.source)
    parts = (open_clip_parts if plan.config.layout == "huggingface" else own_parts)(checkpoint.shapes)
    check(model, checkpoint, parts)
    return model, checkpoint, parts


def _empty(architecture: dict[str, Any], source: str) -> open_clip.CLIP:
    """The network on the meta device: nothing is allocated or drawn, the weights come from the file."""
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
    # The one buffer that no checkpoint fills; the tower has a causal mask of its own.
    model.attn_mask = None
    return model
