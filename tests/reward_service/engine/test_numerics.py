"""Numerics: the tolerances of docs/numerics.md, shared computation, and acceleration."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reward_service.config import Origin, ServiceConfig, load_config
from reward_service.engine.clip import (
    BucketedEncoder,
    Encode,
    accelerate_encoder,
    block_output_at,
    bucket_sizes,
    is_standard_block,
    shorten_last_block,
)
from reward_service.engine.engine import RewardEngine, deduplicate_images
from reward_service.engine.loading import build_engine
from reward_service.engine.types import ModelError, Pair
from reward_service.images import Pixels
from tests.reward_service.conftest import PROMPTS
from tests.support.service.checkpoints import CONTEXT, SIZE_PX, Checkpoints, hps_model_config

# docs/numerics.md states these two rows: largest change of a score, by evaluator.
FLOAT32 = {"aesthetic": 1e-5, "clip": 1e-6, "hpsv2": 1e-6, "pickscore": 1e-4}
BFLOAT16 = {"aesthetic": 0.1, "clip": 0.01, "hpsv2": 0.01, "pickscore": 1.0}
TOLERANCES = {"float32": FLOAT32, "bfloat16": BFLOAT16}
# Largest change of a unit embedding by the shortcut of the last block.
SHORTCUT = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

Models = tuple[str, RewardEngine]


def score_table(engine: RewardEngine, pairs: list[Pair], *, deterministic: bool = False) -> Tensor:
    """Return raw scores (pairs, evaluators by name), with every prompt embedded anew."""
    for evaluator in engine.evaluators.values():
        evaluator.tower.clear_text_cache()
    rows = engine.score(pairs, deterministic=deterministic)
    return torch.tensor([[row.raw[name] for name in sorted(row.raw)] for row in rows], dtype=torch.float64)


def assert_within(dtype: str, difference: Tensor, engine: RewardEngine) -> None:
    for name, largest in zip(sorted(engine.evaluators), difference.abs().amax(dim=0).tolist(), strict=True):
        assert largest <= TOLERANCES[dtype][name], name


def single_threaded_engine(kind: str, config: ServiceConfig, dtype: str) -> RewardEngine:
    base = config if kind == "small" else load_config()
    return build_engine(base.model_copy(update={"dtype": dtype, "device": "cpu", "threads": 1}))


@pytest.fixture(
    scope="module",
    params=[(kind, dtype) for kind in ("small", "miniature") for dtype in ("float32", "bfloat16")],
    ids="-".join,
)
def models(request: pytest.FixtureRequest, config: ServiceConfig) -> Models:
    kind, dtype = request.param
    return dtype, single_threaded_engine(kind, config, dtype)


@pytest.fixture(scope="module")
def many_pairs(images: list[Pixels]) -> list[Pair]:
    """64 different pairs with short prompts."""
    rng = np.random.default_rng(5)
    pairs = []
    for number in range(64):
        image = images[number % len(images)]
        noise = rng.integers(-60, 60, image.shape)
        pairs.append(Pair(f"{number} red circles", (image + noise).clip(0, 255).astype(np.uint8)))
    return pairs


# ------------------------------------------------------------------------------------------- tolerances


def test_batch_of_1_equals_batch_of_64(models: Models, many_pairs: list[Pair]) -> None:
    """A pair scores alone as it does among 63 others."""
    dtype, engine = models
    together = score_table(engine, many_pairs)
    alone = torch.cat([score_table(engine, [pair]) for pair in many_pairs])
    assert_within(dtype, alone - together, engine)
    for name, spread in zip(sorted(engine.evaluators), together.std(dim=0).tolist(), strict=True):
        assert spread > 100 * FLOAT32[name], name


def test_order_in_a_batch_does_not_matter(models: Models, many_pairs: list[Pair]) -> None:
    """Shuffled pairs keep their scores."""
    dtype, engine = models
    order = random.Random(1).sample(range(len(many_pairs)), len(many_pairs))
    shuffled = score_table(engine, [many_pairs[place] for place in order])
    assert_within(dtype, shuffled - score_table(engine, many_pairs)[order], engine)


def test_longer_prompts_in_the_batch_do_not_matter(models: Models, many_pairs: list[Pair]) -> None:
    """A prompt is padded to the longest of its batch, which changes only rounding."""
    dtype, engine = models
    longer = [Pair("and " * 60, many_pairs[0].image), Pair(PROMPTS[2], many_pairs[1].image)]
    difference = score_table(engine, [*many_pairs[:8], *longer])[:8] - score_table(engine, many_pairs[:8])
    assert_within(dtype, difference, engine)


@pytest.mark.parametrize("kind", ["small", "miniature"])
def test_bfloat16_trunk_stays_within_tolerance(
    kind: str, config: ServiceConfig, many_pairs: list[Pair]
) -> None:
    """Trunk in bfloat16 against float32; head and cosine in float32 in both."""
    rounded, exact = (single_threaded_engine(kind, config, dtype) for dtype in ("bfloat16", "float32"))
    assert_within("bfloat16", score_table(rounded, many_pairs) - score_table(exact, many_pairs), exact)


def test_bfloat16_scores_stay_distinct(config: ServiceConfig, many_pairs: list[Pair]) -> None:
    """A head or cosine in bfloat16 would leave a few levels; 64 pairs must keep 64 scores."""
    engine = build_engine(config.model_copy(update={"dtype": "bfloat16"}))
    for scores in score_table(engine, many_pairs).T:
        assert len(scores.unique()) == len(many_pairs)
        assert not torch.equal(scores, scores.bfloat16().double())


def test_deterministic_scores_are_bit_identical(models: Models, many_pairs: list[Pair]) -> None:
    """Alone, together, in another order, with other prompts: equal, not just close."""
    _, engine = models
    together = score_table(engine, many_pairs, deterministic=True)
    assert torch.equal(
        torch.cat([score_table(engine, [p], deterministic=True) for p in many_pairs]), together
    )
    assert torch.equal(score_table(engine, many_pairs[::-1], deterministic=True).flip(0), together)
    longer = [*many_pairs[:9], Pair("and " * 60, many_pairs[0].image)]
    assert torch.equal(score_table(engine, longer, deterministic=True)[:9], together[:9])


def test_deterministic_scores_stay_within_tolerance(models: Models, many_pairs: list[Pair]) -> None:
    """Deterministic mode changes rounding and nothing else."""
    dtype, engine = models
    assert_within(
        dtype, score_table(engine, many_pairs, deterministic=True) - score_table(engine, many_pairs), engine
    )


# ----------------------------------------------------------------------------------- the last block


def model_of(quick_gelu: bool, **vision: object) -> open_clip.CLIP:
    torch.manual_seed(11)
    config = {**hps_model_config(), "quick_gelu": quick_gelu}
    config["vision_cfg"] = {**config["vision_cfg"], **vision}  # type: ignore[dict-item]
    model = open_clip.CLIP(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_class_token_shortcut_equals_the_whole_block(quick_gelu: bool, dtype: torch.dtype) -> None:
    """Images: open_clip's full forward pass and ours return the same embedding."""
    model = model_of(quick_gelu).to(dtype)
    pixels = torch.randn(5, 3, SIZE_PX, SIZE_PX).to(dtype)
    whole = F.normalize(model.encode_image(pixels).float(), dim=-1)
    shorten_last_block(model.visual)
    found = F.normalize(model.encode_image(pixels).float(), dim=-1)
    assert (found - whole).abs().max() <= SHORTCUT[dtype]


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_end_token_shortcut_equals_the_whole_block(quick_gelu: bool, dtype: torch.dtype) -> None:
    """Prompts: one token of each row, under the causal mask."""
    block = model_of(quick_gelu).transformer.resblocks[-1].to(dtype)
    hidden, at = torch.randn(6, CONTEXT, 96).to(dtype), torch.tensor([0, 1, 5, 22, 23, 9])
    mask = torch.full((CONTEXT, CONTEXT), float("-inf"), dtype=dtype).triu(1)
    whole = F.normalize(block(hidden, attn_mask=mask)[torch.arange(6), at].float(), dim=-1)
    found = F.normalize(block_output_at(block, hidden, at, mask).float(), dim=-1)
    assert (found - whole).abs().max() <= SHORTCUT[dtype]


@pytest.mark.parametrize(
    "vision",
    [
        {"ls_init_value": 0.3},
        {"final_ln_after_pool": True},
        {"no_ln_pre": True},
        {"block_type": "custom"},
        {"qk_norm": True, "scale_fc": True},
        {"pool_type": "avg"},
        {"attentional_pool": True, "attn_pooler_heads": 4},
    ],
    ids=lambda vision: next(iter(vision)),
)
def test_other_architectures_keep_their_embeddings(vision: dict[str, object]) -> None:
    """If the shortcut would be wrong, the block is computed whole."""
    model = model_of(quick_gelu=False, **vision)
    pixels = torch.randn(3, 3, SIZE_PX, SIZE_PX)
    whole = F.normalize(model.encode_image(pixels), dim=-1)
    shorten_last_block(model.visual)
    assert (F.normalize(model.encode_image(pixels), dim=-1) - whole).abs().max() <= 1e-6


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"pool_type": "last"}, {"proj_bias": True}])
def test_unsupported_text_settings_are_refused(
    text: dict[str, object], checkpoints: Checkpoints, config: ServiceConfig, tmp_path: Path
) -> None:
    """Trimmed prompts and pooling at the end token would silently be wrong for them."""
    for file in checkpoints.hps.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed = hps_model_config()
    changed["text_cfg"] = {**changed["text_cfg"], **text}  # type: ignore[dict-item]
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": changed}))
    hps = config.towers["hps"].model_copy(update={"origin": Origin(folder=tmp_path)})
    with pytest.raises(ModelError, match=rf"text_cfg\.{next(iter(text))}"):
        build_engine(config.model_copy(update={"towers": {**config.towers, "hps": hps}}))


def test_last_block_computes_one_token_per_image(engine: RewardEngine, images: list[Pixels]) -> None:
    """The last MLP receives one token per row."""
    tower = engine.evaluators["clip"].tower
    last = tower.model.visual.transformer.resblocks[-1].block
    assert is_standard_block(last)
    shapes: list[tuple[int, ...]] = []
    hook = last.mlp.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    tower.embed_images(torch.zeros(3, 3, SIZE_PX, SIZE_PX))
    hook.remove()
    assert shapes == [(3, 64)]


# ------------------------------------------------------------------------------------------------ sharing


def test_every_forward_pass_runs_once(
    engine: RewardEngine, many_pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 pairs of one prompt: per tower one pass over 64 images and one text row, then no text at all."""
    towers = {each.tower_name: each.tower for each in engine.evaluators.values()}
    passes: list[tuple[str, str, int]] = []
    for name, tower in towers.items():
        tower.clear_text_cache()
        for kind in ("_encode", "_encode_texts"):
            original = getattr(tower, kind)

            def counted(rows: Tensor, *rest: Tensor, original=original, what=(name, kind)) -> Tensor:  # type: ignore[no-untyped-def]
                passes.append((*what, len(rows)))
                return original(rows, *rest)

            monkeypatch.setattr(tower, kind, counted)
    pairs = [Pair("a red square", pair.image) for pair in many_pairs]
    engine.score(pairs)
    images = [(name, "_encode", 64) for name in towers]
    assert sorted(passes) == sorted([*images, *((name, "_encode_texts", 1) for name in towers)])
    passes.clear()
    engine.score(pairs)
    assert sorted(passes) == sorted(images)


def test_image_of_many_prompts_is_embedded_once(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bytes are one image, in whichever request; every pair keeps its own score."""
    pairs = [Pair(prompt, image.copy()) for prompt in PROMPTS for image in images[:2]]
    alone = torch.cat([score_table(engine, [pair]) for pair in pairs])
    batch_sizes: list[int] = []
    tower = engine.evaluators["hpsv2"].tower
    original = tower._encode
    monkeypatch.setattr(tower, "_encode", lambda rows: batch_sizes.append(len(rows)) or original(rows))
    assert_within("float32", score_table(engine, pairs) - alone, engine)
    assert batch_sizes == [2]


def test_deduplication_compares_every_byte() -> None:
    """A changed pixel outside the sample, or another shape of the same bytes, is another image."""
    first = np.zeros((40, 30, 3), np.uint8)
    changed = first.copy()
    changed[7, 3, 1] = 1
    distinct, rows = deduplicate_images(
        [first, changed, first.reshape(30, 40, 3), changed.copy(), first.copy()]
    )
    for image, row in zip([first, changed, first.reshape(30, 40, 3), changed, first], rows, strict=True):
        assert np.array_equal(distinct[row], image)
    assert rows[:4] == [0, 1, 2, 1]


# ------------------------------------------------------------------------------------------ acceleration


def test_bucket_sizes_are_powers_of_two() -> None:
    """Few sizes, none more than twice the batch."""
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert bucket_sizes(65)[-1] == 128


def test_each_bucket_size_is_prepared_once_and_padding_dropped() -> None:
    """5, 7 and 8 rows share one pass; results are the rows' own, safe from the next replay."""
    prepared: list[int] = []
    buffer = torch.empty(8, 2)

    def prepare(encode: Encode, example: Tensor) -> Encode:
        prepared.append(len(example))
        return lambda rows: buffer[: len(rows)].copy_(encode(rows))

    encode = BucketedEncoder(lambda rows: rows * 2, prepare)
    first = encode(torch.full((5, 2), 3.0))
    encode(torch.zeros(7, 2))
    encode(torch.zeros(8, 2))
    encode(torch.zeros(1, 2))
    assert torch.equal(first, torch.full((5, 2), 6.0))
    assert prepared == [8, 1]


def test_graphs_are_refused_on_a_cpu(config: ServiceConfig) -> None:
    """In one line that names the field and the alternatives."""
    with pytest.raises(ModelError, match=r"service\.acceleration: graphs are for CUDA.*none or compile"):
        build_engine(config.model_copy(update={"acceleration": "graphs"}))


@pytest.mark.slow
# torch's compiler imports parts of torch that torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_tower_stays_within_tolerance(
    engine: RewardEngine, images: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch.compile in padded batches; loaded on one thread and used on another."""
    tower = engine.evaluators["clip"].tower
    pixels = torch.randn(3, 3, SIZE_PX, SIZE_PX)
    plain = tower.embed_images(pixels)
    monkeypatch.setattr(tower, "_encode", accelerate_encoder(tower._encode_images, "compile"))
    tower.embed_images(pixels)
    with ThreadPoolExecutor(1) as other:
        found = other.submit(tower.embed_images, pixels).result()
    assert (found - plain).abs().max() <= 1e-5


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("acceleration", ["none", "compile", "graphs"])
def test_gpu_scores_stay_within_tolerance(
    acceleration: str, config: ServiceConfig, engine: RewardEngine, many_pairs: list[Pair]
) -> None:
    """bfloat16 against the CPU's float32, deterministic to the bit, with every acceleration."""
    changes = {"device": "cuda", "dtype": "auto", "acceleration": acceleration}
    gpu = build_engine(config.model_copy(update=changes))
    assert gpu.dtype == torch.bfloat16
    with ThreadPoolExecutor(1) as scheduler:
        found = scheduler.submit(score_table, gpu, many_pairs).result()
    assert_within("bfloat16", found - score_table(engine, many_pairs), engine)
    fixed = score_table(gpu, many_pairs, deterministic=True)
    assert torch.equal(score_table(gpu, many_pairs[::-1], deterministic=True).flip(0), fixed)
    assert torch.equal(score_table(gpu, many_pairs[:5], deterministic=True), fixed[:5])
