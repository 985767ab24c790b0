"""How alike two prompts are, and which of many are near-duplicates.

A prompt is the set of its words and of its pairs of neighbouring words, its ends counting as words; the
similarity of two prompts is Jaccard's of these sets, |A ∩ B| / |A ∪ B|. With n different words,

    one word appended or dropped    2n / (2n + 4)
    one word exchanged              (2n − 2) / (2n + 4)
    two words change places         (2n − 3) / (2n + 5)

so that a threshold of 0.77 takes a prompt with a word more for the same from 7 words on, with another word
from 12, and with two in each other's place from 15. docs/prompts.md shows examples and measurements.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy import sparse

# scipy is imported where it is used: the command line starts without what only the trainer's extra brings.

ASCII_WORD = re.compile(r"[a-z0-9]+")
SCRIPTS_WITHOUT_SPACES = frozenset(
    [
        "CJK",
        "HIRAGANA",
        "KATAKANA",
        "BOPOMOFO",
        "THAI",
        "LAO",
        "KHMER",
        "MYANMAR",
        "TIBETAN",
        "YI",
        "JAVANESE",
    ]
)
SYMBOLS = "So"  # pictographs mean something; + and $ seldom do
BLOCK = 4096  # rows whose candidates are looked for at once
CANDIDATES = 65536  # pairs that are verified at once


class Pair(NamedTuple):
    """Two near-duplicates, by their places in the sequence (first < second)."""

    first: int
    second: int
    similarity: float


def words(text: str) -> list[str]:
    """Case-folded words without punctuation, in order; at least one where there is anything to see.

    A character of a script without spaces is a word, and so is a pictograph. Only where nothing else is left
    do punctuation and signs count.
    """
    if text.isascii():
        found = ASCII_WORD.findall(text.lower())
    else:
        found = _words_of_any_script(unicodedata.normalize("NFKC", text.casefold()))
    return found or [character for character in text if not character.isspace()]


def _words_of_any_script(text: str) -> list[str]:
    kinds = [_kind(character) for character in text]
    found: list[str] = []
    joined = False  # whether the next letter goes on with the last word
    for character, kind in zip(text, kinds, strict=True):
        if kind == "mark" and found:
            found[-1] += character if joined or found[-1] else ""
        elif kind == "letter" and joined:
            found[-1] += character
        elif kind in ("letter", "alone"):
            found.append(character)
            joined = kind == "letter"
        else:
            joined = False
    return found


@lru_cache(maxsize=65536)
def _kind(character: str) -> str:
    """letter (of a word), alone (a word of its own), mark (belongs to what is before it) or other."""
    category = unicodedata.category(character)
    if category[0] == "M":
        return "mark"
    if category[0] not in "LN":
        return "alone" if category == SYMBOLS else "other"
    script = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    return "alone" if script in SCRIPTS_WITHOUT_SPACES else "letter"


# --------------------------------------------------------------------------------------------- sets


class Features:
    """The features of many texts, in some five bytes a word.

    A text is kept as the numbers of its words, in the order in which words first came, between ENDs.
    """

    END = 1

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._number: dict[str, int] = {}
        self._line = array("I", [self.END])
        self._starts = array("q", [0])
        for text in texts:
            self.add(words(text))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, found: Sequence[str]) -> None:
        """The next text, as its words."""
        number = self._number
        self._line.extend([number.setdefault(word, len(number) + 2) for word in found])
        self._line.append(self.END)
        self._starts.append(len(self._line) - 1)

    def of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Features of some texts, repetitions included, and the place in `rows` of the text of each, (F,).

        A word is its number, below 2³²; a pair has its first word's number in the upper 32 bits and its
        second's in the lower, so no two features are the same.
        """
        line = np.frombuffer(self._line, dtype=np.uint32)
        starts = np.frombuffer(self._starts, dtype=np.int64)
        begins, counts = starts[rows], starts[rows + 1] - starts[rows]
        owners = np.repeat(np.arange(len(rows)), counts)
        place = np.arange(len(owners)) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        ends = line[place + 1].astype(np.uint64)
        pairs = (line[place].astype(np.uint64) << np.uint64(32)) | ends
        both = np.stack([pairs, ends], axis=1).reshape(-1)  # each pair, then the word that ends it
        kept = both != self.END
        return both[kept], np.repeat(owners, 2)[kept]


def jaccard(first: str, second: str) -> float:
    """Similarity of two prompts, from 0 to 1."""
    codes, owners = Features([first, second]).of(np.arange(2))
    one, two = set(codes[owners == 0].tolist()), set(codes[owners == 1].tolist())
    return len(one & two) / len(one | two)


def near_duplicates(texts: Sequence[str], threshold: float) -> list[Pair]:
    """Every pair of texts at least as similar as the threshold: exact, for up to some 100,000 texts.

    Of two such sets, each has ⌈threshold · size⌉ features or more in common with the other. So they have one
    among the rarest size − ⌈threshold · size⌉ + 1 of both (Chaudhuri et al. 2006, prefix filter): only
    texts that share a rare feature are compared.
    """
    from scipy import sparse

    if len(texts) < 2:
        return []
    sets = _incidence(texts)
    sizes = np.diff(sets.indptr)
    rare = _prefixes(sets, sizes - np.ceil(threshold * sizes - 1e-9).astype(sizes.dtype) + 1)
    found: list[Pair] = []
    for start in range(0, len(texts), BLOCK):
        candidates = sparse.triu(rare[start : start + BLOCK] @ rare.T, k=start + 1).tocoo()
        first, second = candidates.row + start, candidates.col
        similarity = _similarity(sets, sizes, first, second)
        alike = similarity >= threshold
        found += map(Pair, first[alike].tolist(), second[alike].tolist(), similarity[alike].tolist())
    return sorted(found)


def _incidence(texts: Sequence[str]) -> "sparse.csr_array":
    """(N, F) 1 where a text has a feature; columns in order of rarity."""
    from scipy import sparse

    codes, owners = Features(texts).of(np.arange(len(texts)))
    features, columns = np.unique(codes, return_inverse=True)
    shape = (len(texts), len(features))
    sets = sparse.coo_array((np.ones(len(codes), dtype=np.int32), (owners, columns)), shape=shape).tocsr()
    by_rarity = np.argsort(np.bincount(sets.indices, minlength=len(features)), kind="stable")
    rank = np.empty_like(by_rarity)
    rank[by_rarity] = np.arange(len(features))
    ones = np.ones(sets.nnz, dtype=np.int32)
    sets = sparse.csr_array((ones, rank[sets.indices], sets.indptr), shape=shape)
    sets.sort_indices()
    return sets


def _prefixes(sets: "sparse.csr_array", lengths: NDArray[np.int64]) -> "sparse.csr_array":
    """The first so many columns of each row."""
    from scipy import sparse

    sizes = np.diff(sets.indptr)
    place = np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], sizes)
    kept = place < np.repeat(lengths, sizes)
    starts = np.concatenate([[0], np.cumsum(np.minimum(lengths, sizes))])
    return sparse.csr_array((sets.data[kept], sets.indices[kept], starts), shape=sets.shape)


def _similarity(
    sets: "sparse.csr_array", sizes: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Jaccard's of rows `first` and `second`, a value for each."""
    found = np.empty(len(first))
    for start in range(0, len(first), CANDIDATES):
        one, two = first[start : start + CANDIDATES], second[start : start + CANDIDATES]
        common = sets[one].multiply(sets[two]).sum(axis=1)
        found[start : start + CANDIDATES] = common / (sizes[one] + sizes[two] - common)
    return found


def components(count: int, links: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """(count,) which of the connected parts each of `count` things is in, numbered in order of appearance."""
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    graph = sparse.coo_array((np.ones(len(ends), dtype=np.int8), (ends[:, 0], ends[:, 1])), (count, count))
    labels = connected_components(graph.tocsr(), directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
