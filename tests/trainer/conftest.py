"""Fixtures: a tiny random Karlo, built once per session and loaded by the real loader, and a fake scorer."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel
from diffusers.schedulers import UnCLIPScheduler
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from trainer.config import LoraSettings, ModelSource, SamplingConfig, TrainerConfig
from trainer.rl.karlo import Karlo, load_karlo
from trainer.rl.policy import DecoderPolicy
from trainer.rl.rewards import Images, Scores
from trainer.rl.sampler import ImageSampler

WIDTH = 32  # of text and image embeddings, and of the decoder's context
TOKENS = 8

PROMPTS = ("a red ring", "a blue cross", "two green squares", "a small star")


def build_karlo(folder: Path, size_px: int = 8) -> None:
    """Write a random Karlo, smaller than the miniature, in the layout of the published one."""
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = folder / "vocab.json"
    folder.mkdir(exist_ok=True)
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(
        folder,
        model_max_length=TOKENS,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
    )
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    components: dict[str, Any] = {
        "text_encoder": CLIPTextModelWithProjection(text),
        "tokenizer": tokenizer,
        "text_proj": UnCLIPTextProjModel(
            clip_embeddings_dim=WIDTH, time_embed_dim=64, cross_attention_dim=WIDTH
        ),
        "prior": PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            embedding_dim=WIDTH,
            num_embeddings=TOKENS,
        ),
        "decoder": _decoder(size_px),
        "super_res_first": _super_resolution(2 * size_px),
        "super_res_last": _super_resolution(2 * size_px),
        "prior_scheduler": UnCLIPScheduler(clip_sample_range=5.0, prediction_type="sample"),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(),
    }
    for name, component in components.items():
        component.save_pretrained(folder / name)


def _decoder(size_px: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size_px,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=16,
        class_embed_type="identity",
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )


def _super_resolution(size_px: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=size_px,
        in_channels=6,
        out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        resnet_time_scale_shift="scale_shift",
    )


@pytest.fixture(scope="session")
def karlo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random Karlo."""
    folder = tmp_path_factory.mktemp("karlo")
    build_karlo(folder)
    return folder


@pytest.fixture
def karlo(karlo_folder: Path) -> Karlo:
    """New copy of the tiny Karlo; tests may add adapters to its decoder."""
    return load_karlo(ModelSource(path=karlo_folder))


SAMPLING = SamplingConfig(
    prior_steps=3, prior_guidance=2.0, decoder_steps=6, decoder_guidance=2.0, super_res_steps=2, micro_batch=8
)


def make_policy(karlo: Karlo, sampling: SamplingConfig = SAMPLING, *, lora: bool = False) -> DecoderPolicy:
    """Return a policy with the tiny decoder; with `lora`, an adapter whose output is not zero."""
    policy = DecoderPolicy(
        karlo.decoder,
        karlo.decoder_scheduler,
        steps=sampling.decoder_steps,
        guidance=sampling.decoder_guidance,
    )
    if lora:
        policy.add_lora(LoraSettings(rank=2, alpha=2), seed=0)
        generator = torch.Generator().manual_seed(1)
        for weight in policy.lora.values():
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return policy


@pytest.fixture
def sampler(karlo: Karlo) -> ImageSampler:
    """Image sampler with the tiny Karlo, without adapter."""
    return ImageSampler(karlo, make_policy(karlo), SAMPLING)


@pytest.fixture
def trainer_config(karlo_folder: Path, tmp_path: Path) -> TrainerConfig:
    """Configuration with the tiny Karlo that trains on evaluator "red" only."""
    (tmp_path / "train.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "validation.txt").write_text("a held out one\nanother held out one\n")
    return TrainerConfig.model_validate(
        {
            "runs_dir": tmp_path / "runs",
            "karlo": {"path": karlo_folder},
            "prompts": {"train": tmp_path / "train.txt", "validation": tmp_path / "validation.txt"},
            "sampling": SAMPLING.model_dump(),
            "objective": {"weights": {"red": 1.0}},
            "rollout": {"prompts_per_iteration": 2, "images_per_prompt": 4},
        }
    )


class FakeScorer:
    """Scorer with evaluator "red", which prefers red images, and "dark", which prefers dark ones.

    `fault` is called before each response and may raise an error.
    """

    evaluators = ("dark", "red")
    identity: Mapping[str, str] = {"dark": "d/1", "red": "r/1"}

    def __init__(self, fault: Callable[[Sequence[str]], None] = len) -> None:  # type: ignore[assignment]
        self._fault = fault
        self.calls = 0

    def score(self, prompts: Sequence[str], images: Images) -> Scores:
        self.calls += 1
        self._fault(prompts)
        mean = images.astype(np.float64).mean(axis=(1, 2)) / 255
        raw = np.stack([-mean.mean(axis=1), mean[:, 0] - mean[:, 1:].mean(axis=1)], axis=1)
        return Scores(raw, 10 * raw)


@pytest.fixture(scope="session")
def fitted_karlo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Karlo that is fitted to images of one colour, so that training can improve it."""
    from tests.support.trainer.fitted_karlo import build_fitted_karlo

    folder = tmp_path_factory.mktemp("fitted_karlo")
    build_fitted_karlo(folder)
    return folder
