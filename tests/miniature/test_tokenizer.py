"""Tokenizers of the miniature: one token a word, the same ids in transformers and open_clip."""

from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from miniature import tokenizer, world
from miniature.world import Part


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_hf(folder)
    tokenizer.save_open_clip(folder / "bpe.txt.gz")
    return folder


def captions() -> list[str]:
    rng = torch.Generator().manual_seed(0)
    scenes = world.sample_scenes(200, Part.EVALUATORS, rng)
    return world.describe(scenes, rng, quality_share=0.3).text


def test_every_word_of_the_world_is_one_token(folder: Path) -> None:
    words = CLIPTokenizer.from_pretrained(folder)
    for text in captions():
        expected = len(text.replace(",", " ,").split()) + 2
        assert len(words(text).input_ids) == expected


def test_transformers_and_open_clip_give_the_same_ids(folder: Path) -> None:
    ours = CLIPTokenizer.from_pretrained(folder)
    theirs = SimpleTokenizer(bpe_path=str(folder / "bpe.txt.gz"), context_length=tokenizer.CONTEXT_LENGTH)
    for text in [*captions()[:50], "an unknown word: zebra!", "Ünïcode 123"]:
        ids = ours(text).input_ids
        assert theirs(text)[0, : len(ids)].tolist() == ids


def test_long_caption_keeps_its_end_of_text_token(folder: Path) -> None:
    words = CLIPTokenizer.from_pretrained(folder)
    ids = words("red circle " * 50, truncation=True, max_length=tokenizer.CONTEXT_LENGTH).input_ids
    assert len(ids) == tokenizer.CONTEXT_LENGTH
    assert ids[-1] == words.eos_token_id


def test_tokenizer_files_are_the_same_in_every_build(folder: Path, tmp_path: Path) -> None:
    tokenizer.save_hf(tmp_path)
    tokenizer.save_open_clip(tmp_path / "bpe.txt.gz")
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
