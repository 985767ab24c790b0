"""Token counter for Karlo's prompts without torch, and its vocabulary from a folder, the hub or open_clip."""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from reward_service.client import describe_failure
from trainer.config import ConfigError, ModelSource
from trainer.runtime.errors import reason

SPECIAL_TOKENS = 2  # a start and an end for every prompt
FILES = ("vocab.json", "merges.txt")

# CLIP's word pieces, as transformers' CLIPTokenizer splits them. No piece contains white space.
PIECES = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
END_OF_WORD = "</w>"


class TokenCounter:
    """Counts the tokens of normalized prompts (NFC, single spaces), start and end included.

    No token spans a space, so each word between spaces is tokenized once and its count is cached.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: A `tokenizers.Tokenizer`.
            name: Its name for data cards.
        """
        self.name = name
        self._tokenizer = tokenizer
        self._counts: dict[str, int] = {}

    @classmethod
    def read(cls, folder: Path) -> "TokenCounter":
        """Read a folder with vocab.json and merges.txt, or with tokenizer.json.

        Raises:
            ConfigError: The folder has neither.
        """
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        whole = folder / "tokenizer.json"
        try:
            if whole.is_file():
                return cls(Tokenizer.from_file(str(whole)), folder.name)
            for file in FILES:
                (folder / file).open("rb").close()
            return cls(_clip_tokenizer(*BPE.read_file(*(str(folder / file) for file in FILES))), folder.name)
        except Exception as error:
            raise ConfigError(
                f"{folder}: not a CLIP tokenizer ({reason(error)}); "
                "name a folder with vocab.json and merges.txt, such as Karlo's tokenizer/"
            ) from error

    @classmethod
    def of_karlo(cls, source: ModelSource) -> "TokenCounter":
        """Read the tokenizer of a configured Karlo, from its folder or from the hub.

        Raises:
            ConfigError: There is none.
        """
        if source.path is not None:
            return cls.read(source.path / "tokenizer")
        files = [fetch(str(source.repo), f"tokenizer/{name}", source.revision) for name in FILES]
        counter = cls.read(files[0].path.parent)
        counter.name = f"{source.repo}@{files[0].revision}"
        return counter

    @classmethod
    def of_open_clip(cls) -> "TokenCounter | None":
        """Read CLIP's vocabulary, which is Karlo's too, from open_clip; None if that is not installed."""
        spec = find_spec("open_clip")
        folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
        for folder in folders:
            path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
            if path.is_file():
                return cls(_clip_tokenizer(*_read_openai_vocabulary(path)), "CLIP's vocabulary, of open_clip")
        return None

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a normalized prompt."""
        counts = self._counts
        total = SPECIAL_TOKENS
        for word in prompt.split(" "):
            tokens = counts.get(word)
            if tokens is None:
                tokens = counts[word] = len(self._tokenizer.encode(word, add_special_tokens=False))
            total += tokens
        return total


def _clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
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


def _read_openai_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of OpenAI's file: a title, then 48,894 merges; CLIP ignores the rest."""
    from tokenizers.pre_tokenizers import ByteLevel

    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49_152 - 256 - 2 + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + END_OF_WORD for letter in letters), *map("".join, merges), "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges


# ---------------------------------------------------------------------------------------------- hub


class HubFile(NamedTuple):
    """A file of a hub repository in the local cache, and its commit."""

    path: Path
    revision: str


def fetch(repo: str, name: str, revision: str | None, kind: str = "model", remedy: str = "") -> HubFile:
    """Download one file from the Hugging Face hub, or find it in the local cache.

    Args:
        repo: The repository.
        name: Path of the file in it.
        revision: Commit, tag or branch; None: main.
        kind: Type of the repository: `model` or `dataset`.
        remedy: Advice in the error message for a user without the hub.

    Raises:
        ConfigError: The file is neither in the cache nor can it be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(hf_hub_download(repo, name, revision=revision, repo_type=kind))
    except (OSError, ValueError, ImportError, HfHubHTTPError, httpx.HTTPError) as error:
        cause = describe_failure(constants.ENDPOINT, error)
        raise ConfigError(
            f"{repo}: cannot download {name} at revision {revision or 'main'} from the hub ({cause}); "
            f"{remedy or 'check name and connection, or name a local folder'}"
        ) from error
    # <cache>/<repository>/snapshots/<commit>/<name>
    return HubFile(path, path.parents[name.count("/")].name)
