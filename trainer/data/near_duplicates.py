"""How alike two prompts are, and which of many are near-duplicates.

A prompt is the set of its words and of its pairs of neighbouring words, its ends counting as words; the
similarity of two prompts is Jaccard's of these sets, |A ∩ B| / |A ∪ B|. With n different words,

    one word appended or dropped    2n / (2n + 4)
    one word exchanged              (2n − 2) / (2n + 4)
    two words change places         (2n − 3) / (2n + 5)

so that a threshold of 0.77 takes a prompt with a word more for the same from 7 words on, with another word
from 12, and with two in each other's place from 15. docs/prompts.md shows examples and measurements.

Near-duplicates among millions of prompts: MinHash finds candidates, Jaccard's similarity decides.

MinHash (Broder 1997) gives a text BANDS × ROWS numbers, each of which two texts share with a probability that
is their similarity s. They share all numbers of a band with p = s^ROWS, and are candidates if they share two:

    1 − (1 − p)^BANDS − BANDS p (1 − p)^(BANDS − 1)        0.995 at s = 0.77, 0.9999 at 0.85, 0.2 % at 0.35

Millions of prompts end in the same phrases, and where all numbers of a band stem from such a phrase,
thousands share it. Such a crowd says little: there, the next band must be one of the two. And where most
prompts are made of the same phrases, there would be so much to compare that only part of it is (`distinct`).

`near_duplicates` finds all near-duplicates of some ten thousand prompts, without any chance.
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
from collections.abc import Iterator
from itertools import chain

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
        similarity = _set_similarity(sets, sizes, first, second)
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


def _set_similarity(
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


BANDS, ROWS = 32, 6
SEED = 20_231
CROWD = 30  # texts that share a band
MAX_ROUNDS = 100  # in a bucket: more texts that share a band and yet differ are not compared
CHUNK = 20_000  # texts whose signatures are made at once
MATCHES = 2  # bands that candidates share
CHECKS, VERIFIED = 40, 4  # pairs looked at, and of those compared, for each text; at most
PORTION = 8  # a band may take one in so many of what is left of either
PAIRS = 60_000  # pairs that are verified at once; fits 16 bits
HASH_BITS = 48  # of a feature, while sets of two texts are compared: what is left of 64


class Distinct(NamedTuple):
    """Which texts are kept, (N,) bool, and the cluster of near-duplicates each is in, (N,)."""

    kept: NDArray[np.bool_]
    cluster: NDArray[np.int64]
    complete: bool  # whether all candidates were compared


def distinct(features: Features, threshold: float) -> Distinct:
    """Keep a text unless it is a near-duplicate of one before it that is kept.

    Kept texts that have a near-duplicate in common are one cluster, and it is of the cluster too. The work
    is bounded: a band that has taken its portion of it is left, its largest crowds unfinished; `complete` is
    false then.
    """
    keys = band_keys(features)
    kept = np.ones(len(features), dtype=np.bool_)
    complete = True
    left = np.array([CHECKS, VERIFIED]) * len(features)
    cluster = np.arange(len(features))
    links = [np.empty((0, 2), dtype=np.int64)]
    for band in range(BANDS):
        taken = np.zeros(2)
        for leaders, others in _rounds(_parted(keys[:, band], keys[:, (band + 1) % BANDS]), kept):
            if (taken > left / PORTION).any():
                complete = False
                break
            looked_at = len(others)
            # Of a dropped text all that is asked is which kept ones it joins: once is enough.
            new = kept[others] | (cluster[others] != cluster[leaders])
            leaders, others = leaders[new], others[new]
            close = (keys[leaders] == keys[others]).sum(axis=1) >= MATCHES
            leaders, others = leaders[close], others[close]
            taken += looked_at, len(others)
            alike = similarity(features, leaders, others) >= threshold
            leaders, others = leaders[alike], others[alike]
            links.append(np.stack([leaders, others], axis=1))
            kept[others] = False
        left = left - taken
        cluster = components(len(features), np.concatenate(links))
    return Distinct(kept, cluster, complete)


def _parted(keys: NDArray[np.uint32], following: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Keys in which a crowd is parted by the following band."""
    _, bucket, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    return (bucket.astype(np.uint64) << np.uint64(32)) | np.where(sizes[bucket] > CROWD, following, 0)


def _rounds(
    keys: NDArray[np.uint64], kept: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of a text that is kept and another one with the same key.

    In each round, the first in each bucket that is kept still meets all others of it, and leaves the bucket.
    """
    order = np.argsort(keys, kind="stable")
    _, bucket, sizes = np.unique(keys[order], return_inverse=True, return_counts=True)
    several = sizes[bucket] > 1
    members, bucket = order[several], bucket[several]
    for _ in range(MAX_ROUNDS):
        able = np.flatnonzero(kept[members])
        buckets, first = np.unique(bucket[able], return_index=True)
        leader_of = np.full(len(sizes), -1)
        leader_of[buckets] = members[able[first]]
        leader = leader_of[bucket]
        rest = (leader >= 0) & (leader != members)
        members, bucket = members[rest], bucket[rest]
        if not len(members):
            return
        yield leader[rest], members


def band_keys(features: Features) -> NDArray[np.uint32]:
    """(N, BANDS) a number for each band of a text's MinHash signature, the same for the same band."""
    from rensa import RMinHash

    weights = np.random.default_rng(SEED).integers(2**63, size=ROWS, dtype=np.uint64) * 2 + 1
    keys = np.empty((len(features), BANDS), dtype=np.uint32)
    for start in range(0, len(features), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(features)))
        codes, owners = features.of(rows)
        starts = np.searchsorted(owners, np.arange(len(rows) + 1)).astype(np.uint64)
        signed = RMinHash.digest_matrix_from_flat_token_hashes(mixed(codes), starts, BANDS * ROWS, SEED)
        flat = np.fromiter(chain.from_iterable(signed.to_rows()), np.uint64, len(rows) * BANDS * ROWS)
        keys[rows] = (flat.reshape(-1, BANDS, ROWS) * weights).sum(axis=2) >> np.uint64(32)
    return keys


def similarity(
    features: Features, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Jaccard's of texts `first` and `second`, a value for each."""
    parts = [
        _pair_similarity(features, first[start : start + PAIRS], second[start : start + PAIRS])
        for start in range(0, len(first), PAIRS)
    ]
    return np.concatenate([np.empty(0), *parts])


def _pair_similarity(
    features: Features, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float64]:
    one, two = _keyed(features, first), _keyed(features, second)
    both = np.sort(np.concatenate([one, two]))
    shared = both[1:][both[1:] == both[:-1]]
    sizes, common = (
        np.bincount((keyed >> np.uint64(HASH_BITS)).astype(np.int64), minlength=len(first))
        for keyed in (both, shared)
    )
    return common / (sizes - common)


def _keyed(features: Features, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The set of features of each text: its place above, a hash of the feature below; sorted, each once."""
    codes, owners = features.of(rows)
    keyed = (owners.astype(np.uint64) << np.uint64(HASH_BITS)) | (mixed(codes) >> np.uint64(64 - HASH_BITS))
    keyed.sort()  # np.unique takes ten times as long
    return keyed[np.concatenate([[True], keyed[1:] != keyed[:-1]])] if len(keyed) else keyed


def mixed(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A different, evenly spread number for each (the finalizer of splitmix64, Steele et al. 2014)."""
    codes = (codes ^ (codes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    codes = (codes ^ (codes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return codes ^ (codes >> np.uint64(31))
