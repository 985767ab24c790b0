"""A CLIP tokenizer for the miniature world, written in the published checkpoints' own files.

Byte-level BPE with CLIP's vocabulary order: 256 bytes, the same 256 ending a word, the merges, the
two special tokens. Every word of the world is one token; other text becomes bytes.
"""

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from miniature import world

START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 24


def words() -> list[str]:
    """Return every word that a caption of the world can contain."""
    empty = dict.fromkeys(("size", "texture", "figure", "shape", "background"), "")
    sentences = " ".join(template.format(**empty) for template in world.TEMPLATES)
    glue = [*sentences.replace(",", " , ").split(), "an", "and", "of"]
    return sorted(
        {*glue, *world.SHAPES, *world.SIZES, *world.TEXTURES, *world.COLOURS, *world.QUALITY_WORDS} - {","}
    )


def merges() -> list[tuple[str, str]]:
    """Return BPE merges, most frequent pair first (ties by spelling), until every word is a single symbol."""
    spelt = {word: [*word[:-1], word[-1] + "</w>"] for word in words()}
    learned: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in spelt.values()):
        pairs = Counter(pair for s in spelt.values() for pair in pairwise(s))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learned.append(best)
        spelt = {word: _merged(symbols, best) for word, symbols in spelt.items()}
    return learned


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _byte_symbols() -> list[str]:
    """Return CLIP's printable symbols of the 256 byte values, in the order of its vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(moved))]


def vocabulary() -> dict[str, int]:
    """Return token ids by token, in CLIP's order."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges()), START, END]
    return {token: i for i, token in enumerate(tokens)}


def save_hf(folder: Path) -> None:
    """Write vocab.json, merges.txt and the two configurations of a transformers CLIPTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges())]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def save_open_clip(path: Path) -> None:
    """Write the merges as open_clip's SimpleTokenizer reads them: a header line, no newline at the end."""
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges())])
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime=0 keeps the file the same from build to build
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
