"""How many of Karlo's tokens a prompt takes, counted without torch.

Single files of the Hugging Face hub.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from trainer.config import ConfigError, ModelSource
from trainer.runtime.errors import reason


class Fetched(NamedTuple):
    """A file in the local cache, and the commit that it is of."""

    path: Path
    revision: str


def fetch(repo: str, name: str, revision: str | None, kind: str = "model", instead: str = "") -> Fetched:
    """Download one file, or find it in the cache. Raises ConfigError in one line where neither can be done.

    `instead` says what a user can do without the hub.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(hf_hub_download(repo, name, revision=revision, repo_type=kind))
    except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError) as error:
        raise ConfigError(
            f"{repo}: cannot fetch {name} at revision {revision or 'main'} from the hub ({reason(error)}); "
            f"{instead or 'check name and connection, or name a local folder'}"
        ) from error
    # <cache>/<repository>/snapshots/<commit>/<name>
    return Fetched(path, path.parents[name.count("/")].name)


ENDS = 2  # every prompt is put between a start and an end
FILES = ("vocab.json", "merges.txt")

# CLIP's own splitting, as transformers' CLIPTokenizer has it. No piece holds white space.
PIECES = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
END_OF_WORD = "</w>"


class TokenCounter:
    """Counts the tokens of cleaned prompts (NFC, single spaces), start and end included.

    As no token reaches across a space, what stands between spaces is counted once and remembered.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.name = name  # for the card
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    @classmethod
    def read(cls, folder: Path) -> "TokenCounter":
        """From a folder with vocab.json and merges.txt, or tokenizer.json. Raises ConfigError."""
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        whole = folder / "tokenizer.json"
        try:
            if whole.is_file():
                return cls(Tokenizer.from_file(str(whole)), folder.name)
            for file in FILES:
                (folder / file).open("rb").close()
            return cls(_clip(*BPE.read_file(*(str(folder / file) for file in FILES))), folder.name)
        except Exception as error:
            raise ConfigError(
                f"{folder}: no CLIP tokenizer ({reason(error)}); "
                "name a folder with vocab.json and merges.txt, such as Karlo's tokenizer/"
            ) from error

    @classmethod
    def of_karlo(cls, source: ModelSource) -> "TokenCounter":
        """Of a configured Karlo, in its folder or on the hub. Raises ConfigError."""
        if source.path is not None:
            return cls.read(source.path / "tokenizer")
        files = [fetch(str(source.repo), f"tokenizer/{name}", source.revision) for name in FILES]
        counter = cls.read(files[0].path.parent)
        counter.name = f"{source.repo}@{files[0].revision}"
        return counter

    @classmethod
    def of_open_clip(cls) -> "TokenCounter | None":
        """CLIP's own vocabulary, which Karlo's is, where open_clip is installed."""
        found = find_spec("open_clip")
        folders = found.submodule_search_locations if found and found.submodule_search_locations else []
        for folder in folders:
            path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
            if path.is_file():
                return cls(_clip(*_published(path)), "CLIP's vocabulary, of open_clip")
        return None

    def count(self, prompt: str) -> int:
        """Tokens of a cleaned prompt."""
        known = self._known
        total = ENDS
        for word in prompt.split(" "):
            tokens = known.get(word)
            if tokens is None:
                tokens = known[word] = len(self._tokenizer.encode(word, add_special_tokens=False))
            total += tokens
        return total


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            unk_token="<|endoftext|>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _published(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of OpenAI's file: 48,894 merges after a line of title; the rest is not used."""
    from tokenizers.pre_tokenizers import ByteLevel

    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49_152 - 256 - 2 + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges), "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges
