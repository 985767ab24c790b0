"""RewardEngine: independence of scores from the batch, caching, and refusal of unusable models."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward_service.config import Origin, ServiceConfig, TowerConfig, Weights
from reward_service.engine.engine import RewardEngine
from reward_service.engine.evaluators import fold_linear_layers
from reward_service.engine.loading import build_engine, load_tower
from reward_service.engine.preprocessing import Preprocessing
from reward_service.engine.tokenizer import (
    CachedTokenizer,
    HuggingFaceTokenizer,
    OpenClipTokenizer,
    Tokens,
    neutralize_special_tokens,
)
from reward_service.engine.types import ModelError, Pair, PromptError, ScoringError
from reward_service.images import Pixels
from tests.reward_service.conftest import PROMPTS
from tests.support.service.checkpoints import CONTEXT, Checkpoints

CPU = torch.device("cpu")
# Largest change by another order of additions, in float32 and after multiplication by a logit scale of 100.
TOLERANCE = 5e-5


def table(scores: list[dict[str, float]]) -> Tensor:
    return torch.tensor([[row[name] for name in sorted(row)] for row in scores])


def make_pairs(images: list[Pixels]) -> list[Pair]:
    return [Pair(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]


def test_scores_do_not_depend_on_batch_composition(engine: RewardEngine, images: list[Pixels]) -> None:
    """One pair at a time, all in one batch or in another order: equal within the stated tolerance."""
    pairs = make_pairs(images)
    together = table([pair.raw for pair in engine.score(pairs)])
    alone = table([engine.score([pair])[0].raw for pair in pairs])
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    shuffled = table([pair.raw for pair in engine.score([pairs[index] for index in order])])
    torch.testing.assert_close(alone, together, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=TOLERANCE, rtol=0)
    assert together.std(dim=0).min() > 100 * TOLERANCE


def test_deterministic_scores_are_bit_identical(engine: RewardEngine, images: list[Pixels]) -> None:
    """With one fixed shape for every forward pass, the other pairs and their order change no bit."""
    pairs = make_pairs(images) * 3
    together = table([pair.raw for pair in engine.score(pairs, deterministic=True)])
    alone = table([engine.score([pair], deterministic=True)[0].raw for pair in pairs])
    backwards = table([pair.raw for pair in engine.score(pairs[::-1], deterministic=True)])
    assert torch.equal(alone, together)
    assert torch.equal(backwards.flip(0), together)


def test_scores_do_not_depend_on_the_batch_size(
    engine: RewardEngine, config: ServiceConfig, images: list[Pixels]
) -> None:
    """The size of a forward pass does not affect a score."""
    small = RewardEngine(engine.evaluators, 2, CPU, torch.float32)
    torch.testing.assert_close(
        table([pair.raw for pair in small.score(make_pairs(images))]),
        table([pair.raw for pair in engine.score(make_pairs(images))]),
        atol=TOLERANCE,
        rtol=0,
    )


def test_shared_towers_and_pixels_are_computed_once(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """aesthetic and clip share a tower; on square images PickScore shares its pixels with them."""
    runs: list[str] = []
    calls: list[Preprocessing] = []
    for evaluator in engine.evaluators.values():
        tower = evaluator.tower
        encode = tower._encode
        monkeypatch.setattr(
            tower,
            "_encode",
            lambda pixels, encode=encode, name=evaluator.tower_name: runs.append(name) or encode(pixels),
        )
    call = Preprocessing.__call__
    monkeypatch.setattr(
        Preprocessing, "__call__", lambda self, *args: calls.append(self) or call(self, *args)
    )
    engine.score([Pair("x", images[0]), Pair("y", images[5])])
    # The clip tower is one object with two wrappers, so that its one run is recorded twice.
    assert sorted(runs) == ["clip", "clip", "hps", "pickscore"]
    assert len(calls) == 2


def test_prepared_images_have_bit_identical_scores(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a batch with unprepared ones; and prepared images are not preprocessed again."""
    pairs = make_pairs(images)
    expected = [pair.raw for pair in engine.score(pairs)]
    prepared = engine.prepare(pairs)
    assert all(pair.preprocessed for pair in prepared)
    mixed = [prepared[row] if row % 2 else pairs[row] for row in range(len(pairs))]
    assert [pair.raw for pair in engine.score(mixed)] == expected
    assert [pair.raw for pair in engine.score(engine.prepare(pairs, ["hpsv2"]))] == expected

    calls: list[int] = []
    call = Preprocessing.__call__
    monkeypatch.setattr(Preprocessing, "__call__", lambda self, *args: calls.append(1) or call(self, *args))
    assert [pair.raw for pair in engine.score(prepared)] == expected
    assert not calls


def test_preprocessing_error_is_raised_on_scoring(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prepare` ignores the error; `score` raises it with the evaluator's name."""

    def fail(_: Preprocessing, image: Pixels) -> Tensor:
        raise ValueError(f"unusable: {image.shape}")

    monkeypatch.setattr(Preprocessing, "_letterbox", fail)
    pairs = engine.prepare([Pair("x", images[0])])
    assert [method.method for method in pairs[0].preprocessed] == ["crop"]
    with pytest.raises(ScoringError, match="hpsv2"):
        engine.score(pairs)


def test_prompts_are_embedded_once(engine: RewardEngine, images: list[Pixels]) -> None:
    """Each distinct prompt goes through the tower once, and a cached one not at all."""
    tower = engine.evaluators["clip"].tower
    batch_sizes: list[int] = []
    encode = tower._encode_texts
    tower._encode_texts = lambda ids, last: batch_sizes.append(len(ids)) or encode(ids, last)  # type: ignore[method-assign]
    try:
        first = tower.embed_texts(["new one", "new two", "new one"])
        again = tower.embed_texts(["new two", "new one"])
    finally:
        tower._encode_texts = encode  # type: ignore[method-assign]
    assert batch_sizes == [2]
    assert torch.equal(first.vectors[0], first.vectors[2])
    assert torch.equal(first.vectors[[1, 0]], again.vectors)


def test_text_cache_is_bounded(checkpoints: Checkpoints) -> None:
    """The least recently used prompt is evicted; a batch larger than the cache still gets every vector."""
    tower = load_tower(hps(checkpoints.hps), CPU, torch.float32, cache_entries=2)
    assert len(tower.embed_texts(["a", "b", "c", "a"]).vectors) == 4
    tower.embed_texts(["b"])
    tower.embed_texts(["d"])
    assert [ids for ids, _ in tower._cache] == [tower.tokenizer(prompt).ids for prompt in ("b", "d")]


def test_tokenized_pairs_are_not_tokenized_again(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tokens came with them: `score` runs on the device's thread, which tokenizing must not hold."""
    pair = Pair("a red square", images[0])
    expected = engine.score([pair])
    tokenized = replace(pair, tokens=engine.tokenize(pair.prompt))
    assert set(tokenized.tokens) == {"clip", "pickscore", "hps"}
    assert set(engine.tokenize(pair.prompt, ["hpsv2", "aesthetic"])) == {"hps"}

    def fail(_: CachedTokenizer, prompt: str) -> Tokens:
        raise ValueError(f"not to be tokenized: {prompt}")

    monkeypatch.setattr(CachedTokenizer, "__call__", fail)
    assert engine.score([tokenized]) == expected
    with pytest.raises(PromptError, match=r"^the prompt cannot be tokenized \(ValueError\); send another$"):
        engine.score([tokenized, pair])
    with pytest.raises(PromptError):
        engine.tokenize("a")


def test_long_prompts_are_truncated_at_the_end(engine: RewardEngine, images: list[Pixels]) -> None:
    """Two captions that differ within the context score differently although both are truncated."""
    tail = " and the circle" * 40
    scores = engine.score([Pair(start + tail, images[0]) for start in ("a red square", "th ci re an")])
    assert [pair.truncated_prompt for pair in scores] == [True, True]
    for name in ("clip", "pickscore", "hpsv2"):
        assert abs(scores[0].raw[name] - scores[1].raw[name]) > 10 * TOLERANCE
    assert scores[0].raw["aesthetic"] == pytest.approx(scores[1].raw["aesthetic"], abs=TOLERANCE)
    exact = engine.score([Pair("a red square", images[0])])[0]
    assert exact.truncated_prompt is False


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|startoftext|>", "<start_of_text>", "<END_OF_TEXT>"])
def test_special_tokens_in_a_prompt_are_plain_text(
    special: str, checkpoints: Checkpoints, images: list[Pixels]
) -> None:
    """Spelled out or as HTML entities, they never become special tokens: one start, one end."""
    tokenizers = [
        HuggingFaceTokenizer(checkpoints.clip, CONTEXT, "openai"),
        HuggingFaceTokenizer(checkpoints.pickscore, CONTEXT),
        OpenClipTokenizer(checkpoints.hps / "bpe.txt.gz", CONTEXT),
    ]
    for tokenizer in tokenizers:
        start, *_, end = tokenizer("x").ids
        for prompt in (f"a {special} b", f"a {special.replace('<', '&lt;').replace('>', '&gt;')} b"):
            ids = tokenizer(prompt).ids
            assert (ids[0], ids[-1]) == (start, end)
            assert not {start, end} & set(ids[1:-1])


def test_neutralization_keeps_ordinary_prompts() -> None:
    """Only strings of special tokens are changed."""
    for prompt in PROMPTS:
        assert neutralize_special_tokens(prompt) == prompt


def test_folded_head_equals_its_layers() -> None:
    """A chain of linear layers and its fold return the same numbers."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)]
    state = {
        f"layers.{2 * n}.{k}": v for n, layer in enumerate(layers) for k, v in layer.state_dict().items()
    }
    weight, bias = fold_linear_layers(state, "head")
    inputs = torch.randn(4, 7)
    torch.testing.assert_close(inputs @ weight + bias, layers[1](layers[0](inputs))[:, 0].detach())


def test_nan_scores_raise(engine: RewardEngine, images: list[Pixels]) -> None:
    """A NaN is never returned, and never replaced by zero."""
    broken = dict(engine.evaluators)
    tower = broken["pickscore"].tower
    scale, tower.logit_scale = tower.logit_scale, float("nan")
    try:
        with pytest.raises(ScoringError, match="pickscore"):
            engine.score([Pair("x", images[0])])
    finally:
        tower.logit_scale = scale


def test_bfloat16_trunk_moves_cosines_little(
    config: ServiceConfig, engine: RewardEngine, images: list[Pixels]
) -> None:
    """A bfloat16 trunk moves a cosine by at most 0.02 and has a fingerprint of its own."""
    rough = build_engine(config.model_copy(update={"dtype": "bfloat16"}))
    for name in ("clip", "hpsv2"):
        exact = torch.tensor([pair.raw[name] for pair in engine.score(make_pairs(images))])
        found = torch.tensor([pair.raw[name] for pair in rough.score(make_pairs(images))])
        assert (exact - found).abs().max() < 0.02
        assert rough.evaluators[name].fingerprint != engine.evaluators[name].fingerprint


# ------------------------------------------------------------------------------------------ checkpoints


def hps(folder: Path, file: str = "HPS.pt", sha256: str | None = None) -> TowerConfig:
    weights = Weights(file=file, sha256=sha256)
    return TowerConfig(
        layout="open_clip", origin=Origin(folder=folder), weights=weights, vocabulary="bpe.txt.gz"
    )


def clip(folder: Path, file: str = "model.safetensors") -> TowerConfig:
    return TowerConfig(layout="huggingface", origin=Origin(folder=folder), weights=Weights(file=file))


def refusal_message(config: TowerConfig) -> str:
    with pytest.raises(ModelError) as caught:
        load_tower(config, CPU, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_wrong_hash_is_refused(checkpoints: Checkpoints) -> None:
    """The message names the file, the expected hash and the hash found."""
    assert "expected sha256 " + "0" * 64 in refusal_message(hps(checkpoints.hps, sha256="0" * 64))


def test_missing_file_is_refused(checkpoints: Checkpoints) -> None:
    """The message names the path."""
    assert "nothing.pt: no such file" in refusal_message(hps(checkpoints.hps, "nothing.pt"))


@pytest.mark.parametrize("device", ["gpu", "mps"])
def test_unsupported_device_is_refused(device: str, config: ServiceConfig) -> None:
    """The message lists the supported devices, before anything is loaded."""
    with pytest.raises(ModelError, match="use auto, cpu or cuda"):
        build_engine(config.model_copy(update={"device": device}))


@pytest.mark.parametrize("name", ["HPS.pt", "model.safetensors"])
def test_truncated_file_is_refused(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Pickled or safetensors: not a whole file of weights."""
    source = checkpoints.hps if name.endswith("pt") else checkpoints.clip
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    config = hps(tmp_path) if name.endswith("pt") else clip(tmp_path)
    assert "not a whole file of weights" in refusal_message(config)


def test_weights_of_another_architecture_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A shape that differs, a missing key and an unknown key are each named."""
    for file in checkpoints.clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    for change, words in (
        ({"visual_projection.weight": torch.zeros(96, 32)}, "visual.proj: expected [64, 96], found [32, 96]"),
        ({"logit_scale": None}, "lacks logit_scale"),
        ({"text_model.encoder.layers.0.self_attn.k_proj.bias": None}, "k_proj.bias"),
        ({"extra": torch.zeros(1)}, "has unknown extra"),
    ):
        changed = {key: tensor for key, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / "model.safetensors")
        assert words in refusal_message(clip(tmp_path))


def test_pickle_with_code_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Loading executes no code."""
    for file in checkpoints.hps.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"state_dict": {"x": print}}, tmp_path / "HPS.pt")
    assert "not a whole file of weights" in refusal_message(hps(tmp_path))


def test_fingerprint_depends_on_weights_and_vocabulary(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Other weights or another vocabulary change the tower's identity; the same files do not."""
    for file in checkpoints.hps.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def identity() -> str:
        return load_tower(hps(tmp_path), CPU, torch.float32).identity

    first = identity()
    assert identity() == first
    with gzip.open(tmp_path / "bpe.txt.gz", "rb") as packed:
        lines = packed.read().decode().split("\n")
    with gzip.open(tmp_path / "bpe.txt.gz", "wb") as packed:
        packed.write("\n".join([lines[0], "q r", *lines[2:]]).encode())
    assert identity() != first
    state = torch.load(tmp_path / "HPS.pt", weights_only=True)["state_dict"]
    state["logit_scale"] += 1e-3
    torch.save({"state_dict": state}, tmp_path / "HPS.pt")
    assert identity() != first


def test_float16_checkpoints_are_widened_to_float32(
    checkpoints: Checkpoints, tmp_path: Path, images: list[Pixels]
) -> None:
    """A checkpoint stored as float16 is widened on loading."""
    for file in checkpoints.clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    half = {key: tensor.half() for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    tower = load_tower(clip(tmp_path), CPU, torch.float32)
    assert tower.embed_texts(["a red square"]).vectors.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
