"""Engine, towers and text: what a score may and may not depend on."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward_service.config import Origin, ServiceConfig, TowerConfig, Weights
from reward_service.engine.engine import RewardEngine
from reward_service.engine.evaluators import fold
from reward_service.engine.loading import build_engine, load_tower
from reward_service.engine.preprocessing import (
    HuggingFaceTokenizer,
    OpenClipTokenizer,
    Preprocessing,
    neutralise,
)
from reward_service.engine.types import Pair, ScoringError
from reward_service.engine.weights import ModelError
from reward_service.images import Pixels
from tests.reward_service.conftest import PROMPTS
from tests.support.service.checkpoints import CONTEXT, Checkpoints

CPU = torch.device("cpu")
# fp32, ×100 logit included: what another order of additions may change.
TOLERANCE = 5e-5


def table(scores: list[dict[str, float]]) -> Tensor:
    return torch.tensor([[row[name] for name in sorted(row)] for row in scores])


def pairs_of(images: list[Pixels]) -> list[Pair]:
    return [Pair(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]


def test_scores_do_not_depend_on_the_batch(engine: RewardEngine, images: list[Pixels]) -> None:
    """One at a time, all at once or in another order: the same within the stated tolerance."""
    pairs = pairs_of(images)
    together = table([pair.raw for pair in engine.score(pairs)])
    alone = table([engine.score([pair])[0].raw for pair in pairs])
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    shuffled = table([pair.raw for pair in engine.score([pairs[index] for index in order])])
    torch.testing.assert_close(alone, together, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=TOLERANCE, rtol=0)
    assert together.std(dim=0).min() > 100 * TOLERANCE


def test_deterministic_scores_are_equal_bit_by_bit(engine: RewardEngine, images: list[Pixels]) -> None:
    """With one fixed shape for every forward pass, company and order change nothing at all."""
    pairs = pairs_of(images) * 3
    together = table([pair.raw for pair in engine.score(pairs, deterministic=True)])
    alone = table([engine.score([pair], deterministic=True)[0].raw for pair in pairs])
    backwards = table([pair.raw for pair in engine.score(pairs[::-1], deterministic=True)])
    assert torch.equal(alone, together)
    assert torch.equal(backwards.flip(0), together)


def test_small_batches_of_the_engine_change_nothing(
    engine: RewardEngine, config: ServiceConfig, images: list[Pixels]
) -> None:
    """The size of a forward pass is no part of a score."""
    small = RewardEngine(engine.evaluators, 2, CPU, torch.float32)
    torch.testing.assert_close(
        table([pair.raw for pair in small.score(pairs_of(images))]),
        table([pair.raw for pair in engine.score(pairs_of(images))]),
        atol=TOLERANCE,
        rtol=0,
    )


def test_the_shared_tower_and_pixels_run_once(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """aesthetic and clip share a tower, and on square images PickScore shares its pixels with them."""
    runs: list[str] = []
    made: list[Preprocessing] = []
    for evaluator in engine.evaluators.values():
        tower = evaluator.tower
        encode = tower._encode
        monkeypatch.setattr(
            tower,
            "_encode",
            lambda pixels, encode=encode, name=evaluator.tower_name: runs.append(name) or encode(pixels),
        )
    call = Preprocessing.__call__
    monkeypatch.setattr(Preprocessing, "__call__", lambda self, *args: made.append(self) or call(self, *args))
    engine.score([Pair("x", images[0]), Pair("y", images[5])])
    # Two wrappers lie on the clip tower, for it is the same object: its one run is told twice.
    assert sorted(runs) == ["clip", "clip", "hps", "pickscore"]
    assert len(made) == 2


def test_prepared_images_score_to_the_same_bit(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside unprepared ones; and what was prepared is not prepared again."""
    pairs = pairs_of(images)
    expected = [pair.raw for pair in engine.score(pairs)]
    prepared = engine.prepare(pairs)
    assert all(pair.inputs for pair in prepared)
    mixed = [prepared[row] if row % 2 else pairs[row] for row in range(len(pairs))]
    assert [pair.raw for pair in engine.score(mixed)] == expected
    assert [pair.raw for pair in engine.score(engine.prepare(pairs, ["hpsv2"]))] == expected

    made: list[int] = []
    call = Preprocessing.__call__
    monkeypatch.setattr(Preprocessing, "__call__", lambda self, *args: made.append(1) or call(self, *args))
    assert [pair.raw for pair in engine.score(prepared)] == expected
    assert not made


def test_an_image_that_cannot_be_prepared_is_told_when_it_is_scored(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its evaluator's name."""

    def fail(_: Preprocessing, image: Pixels) -> Tensor:
        raise ValueError(f"no good: {image.shape}")

    monkeypatch.setattr(Preprocessing, "_letterbox", fail)
    pairs = engine.prepare([Pair("x", images[0])])
    assert [way.method for way in pairs[0].inputs] == ["crop"]
    with pytest.raises(ScoringError, match="hpsv2"):
        engine.score(pairs)


def test_prompts_are_embedded_once(engine: RewardEngine, images: list[Pixels]) -> None:
    """Each distinct prompt goes through the tower once, and a known one not at all."""
    tower = engine.evaluators["clip"].tower
    seen: list[int] = []
    encode = tower._encode_texts
    tower._encode_texts = lambda ids, last: seen.append(len(ids)) or encode(ids, last)  # type: ignore[method-assign]
    try:
        first = tower.embed_texts(["new one", "new two", "new one"])
        again = tower.embed_texts(["new two", "new one"])
    finally:
        tower._encode_texts = encode  # type: ignore[method-assign]
    assert seen == [2]
    assert torch.equal(first.vectors[0], first.vectors[2])
    assert torch.equal(first.vectors[[1, 0]], again.vectors)


def test_the_text_cache_is_bounded(checkpoints: Checkpoints) -> None:
    """The least recently used prompt goes first; a cache smaller than a batch still gives every vector."""
    tower = load_tower(hps(checkpoints.hps), CPU, torch.float32, cache_entries=2)
    assert len(tower.embed_texts(["a", "b", "c", "a"]).vectors) == 4
    tower.embed_texts(["b"])
    tower.embed_texts(["d"])
    assert [prompt for prompt, _ in tower._cache] == ["b", "d"]


def test_long_prompts_keep_their_beginning_and_say_so(engine: RewardEngine, images: list[Pixels]) -> None:
    """Two captions that differ within the context score differently although both are cut."""
    tail = " and the circle" * 40
    scores = engine.score([Pair(start + tail, images[0]) for start in ("a red square", "th ci re an")])
    assert [pair.truncated_prompt for pair in scores] == [True, True]
    for name in ("clip", "pickscore", "hpsv2"):
        assert abs(scores[0].raw[name] - scores[1].raw[name]) > 10 * TOLERANCE
    assert scores[0].raw["aesthetic"] == pytest.approx(scores[1].raw["aesthetic"], abs=TOLERANCE)
    exact = engine.score([Pair("a red square", images[0])])[0]
    assert exact.truncated_prompt is False


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|startoftext|>", "<start_of_text>", "<END_OF_TEXT>"])
def test_special_tokens_in_a_prompt_are_words(
    special: str, checkpoints: Checkpoints, images: list[Pixels]
) -> None:
    """Written by a user, or as an HTML entity, they never become the token: one start, one end."""
    tokenizers = [
        HuggingFaceTokenizer(checkpoints.clip, CONTEXT, "openai"),
        HuggingFaceTokenizer(checkpoints.pickscore, CONTEXT),
        OpenClipTokenizer(checkpoints.hps / "bpe.txt.gz", CONTEXT),
    ]
    for tokenizer in tokenizers:
        start, *_, end = tokenizer("x").ids
        for written in (f"a {special} b", f"a {special.replace('<', '&lt;').replace('>', '&gt;')} b"):
            ids = tokenizer(written).ids
            assert (ids[0], ids[-1]) == (start, end)
            assert not {start, end} & set(ids[1:-1])


def test_other_text_is_left_to_the_tokenizer() -> None:
    """Only the special strings are touched."""
    for prompt in PROMPTS:
        assert neutralise(prompt) == prompt


def test_the_head_folds_into_one_product() -> None:
    """A chain of linear layers and its fold agree."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(7, 5), torch.nn.Linear(5, 1)]
    state = {
        f"layers.{2 * n}.{k}": v for n, layer in enumerate(layers) for k, v in layer.state_dict().items()
    }
    weight, bias = fold(state, "head")
    inputs = torch.randn(4, 7)
    torch.testing.assert_close(inputs @ weight + bias, layers[1](layers[0](inputs))[:, 0].detach())


def test_scores_that_are_no_numbers_are_errors(engine: RewardEngine, images: list[Pixels]) -> None:
    """A NaN is never answered, and never zero."""
    broken = dict(engine.evaluators)
    tower = broken["pickscore"].tower
    scale, tower.logit_scale = tower.logit_scale, float("nan")
    try:
        with pytest.raises(ScoringError, match="pickscore"):
            engine.score([Pair("x", images[0])])
    finally:
        tower.logit_scale = scale


def test_bfloat16_trunks_stay_near(config: ServiceConfig, engine: RewardEngine, images: list[Pixels]) -> None:
    """A bf16 trunk moves a cosine by at most 0.02 and has a fingerprint of its own."""
    rough = build_engine(config.model_copy(update={"dtype": "bfloat16"}))
    for name in ("clip", "hpsv2"):
        exact = torch.tensor([pair.raw[name] for pair in engine.score(pairs_of(images))])
        found = torch.tensor([pair.raw[name] for pair in rough.score(pairs_of(images))])
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


def refused(config: TowerConfig) -> str:
    with pytest.raises(ModelError) as caught:
        load_tower(config, CPU, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_wrong_hash_is_refused(checkpoints: Checkpoints) -> None:
    """Named with the file, the hash expected and the hash found."""
    assert "expected sha256 " + "0" * 64 in refused(hps(checkpoints.hps, sha256="0" * 64))


def test_a_missing_file_is_refused(checkpoints: Checkpoints) -> None:
    """Named with its path."""
    assert "nothing.pt: no such file" in refused(hps(checkpoints.hps, "nothing.pt"))


@pytest.mark.parametrize("device", ["gpu", "mps"])
def test_a_device_we_do_not_serve_is_refused(device: str, config: ServiceConfig) -> None:
    """With the ones to choose from, before anything is loaded."""
    with pytest.raises(ModelError, match="use auto, cpu or cuda"):
        build_engine(config.model_copy(update={"device": device}))


@pytest.mark.parametrize("name", ["HPS.pt", "model.safetensors"])
def test_a_truncated_file_is_refused(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Pickled or safetensors: not a whole file of weights."""
    source = checkpoints.hps if name.endswith("pt") else checkpoints.clip
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    config = hps(tmp_path) if name.endswith("pt") else clip(tmp_path)
    assert "not a whole file of weights" in refused(config)


def test_another_architecture_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A shape that does not fit, a key that is missing and one too many are each named."""
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
        assert words in refused(clip(tmp_path))


def test_a_pickle_that_is_more_than_tensors_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Nothing is executed on loading."""
    for file in checkpoints.hps.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"state_dict": {"x": print}}, tmp_path / "HPS.pt")
    assert "not a whole file of weights" in refused(hps(tmp_path))


def test_fingerprints_follow_what_makes_a_score(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Another weight or another vocabulary is another identity; the same files are the same."""
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


def test_half_precision_files_compute_in_float32(
    checkpoints: Checkpoints, tmp_path: Path, images: list[Pixels]
) -> None:
    """A checkpoint stored as fp16 is widened on loading."""
    for file in checkpoints.clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    half = {key: tensor.half() for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors")
    tower = load_tower(clip(tmp_path), CPU, torch.float32)
    assert tower.embed_texts(["a red square"]).vectors.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
