"""Near-duplicates among prompts: similarity, exact pairs, and removal from millions of prompts.

A prompt is the set of its words and of its pairs of neighbouring words; its start and end count as words in
pairs. The similarity of two prompts is the Jaccard index of their sets, |A ∩ B| / |A ∪ B|. For n distinct
words,

    one word appended or removed    2n / (2n + 4)
    one word replaced               (2n − 2) / (2n + 4)
    two words swapped               (2n − 3) / (2n + 5)

so with a threshold of 0.77 a prompt with one more word is a near-duplicate from 7 words on, one with a
replaced word from 12, and one with two swapped words from 15. docs/prompts.md has examples and measurements.

`near_duplicates` finds all pairs among up to some 100,000 prompts, exactly. `remove_near_duplicates` thins
millions of prompts: MinHash finds candidates, the Jaccard index decides.

MinHash (Broder 1997) gives a text BANDS × ROWS numbers. Two texts of similarity s share each number with
probability s, all numbers of a band with p = s^ROWS, and are candidates if they share two bands:

    1 − (1 − p)^BANDS − BANDS p (1 − p)^(BANDS − 1)        0.995 at s = 0.77, 0.9999 at 0.85, 0.2 % at 0.35

Millions of prompts end in the same phrases. If all numbers of a band come from such a phrase, thousands of
texts share the band, which means little: such a crowd counts only if the next band is shared too. If most
prompts consist of the same phrases, only part of the candidates is compared.
"""

import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    # At runtime scipy is imported by the functions that use it: the command line starts without the packages
    # of the trainer's extra.
    from scipy import sparse

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
PICTOGRAPHS = "So"  # Unicode category; other symbols, such as + and $, are punctuation here

# Exact pairs.
BLOCK = 4096  # texts whose candidates are searched at once
CANDIDATES = 65536  # pairs compared at once

# MinHash.
BANDS, ROWS = 32, 6
SEED = 20_231
CROWD = 30  # texts with the same band from which the next band must be the same too
MAX_ROUNDS = 100  # in a bucket: further texts that share a band and yet differ are not compared
CHUNK = 20_000  # texts whose signatures are computed at once
MATCHES = 2  # bands that candidates share
CHECKS, COMPARISONS = 40, 4  # most candidate pairs, and most compared pairs, for each text
PORTION = 8  # a band may use 1/PORTION of the remaining checks or comparisons
PAIRS = 60_000  # pairs compared at once; fits 16 bits
HASH_BITS = 48  # of a feature while sets of two texts are compared: the rest of 64


# --------------------------------------------------------------------------------------------- words


def words(text: str) -> list[str]:
    """Return the case-folded words without punctuation, in order; at least one unless the text is blank.

    A character of a script without spaces is a word, and so is a pictograph. If nothing else is left,
    punctuation marks are the words.
    """
    if text.isascii():
        found = ASCII_WORD.findall(text.lower())
    else:
        found = _words_of_any_script(unicodedata.normalize("NFKC", text.casefold()))
    return found or [character for character in text if not character.isspace()]


def _words_of_any_script(text: str) -> list[str]:
    kinds = [_kind(character) for character in text]
    found: list[str] = []
    joined = False  # True if the next letter continues the last word
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
    """Return letter (of a word), alone (a word of its own), mark (part of the character before) or other."""
    category = unicodedata.category(character)
    if category[0] == "M":
        return "mark"
    if category[0] not in "LN":
        return "alone" if category == PICTOGRAPHS else "other"
    script = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    return "alone" if script in SCRIPTS_WITHOUT_SPACES else "letter"


# ------------------------------------------------------------------------------------------ features


class Features:
    """The features (words and word pairs) of many texts, in about five bytes a word.

    A text is stored as the numbers of its words, between ENDs; words are numbered by first appearance.
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
        """Append a text, as its words."""
        number = self._number
        self._line.extend([number.setdefault(word, len(number) + 2) for word in found])
        self._line.append(self.END)
        self._starts.append(len(self._line) - 1)

    def of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the features of some texts, repetitions included, and their texts.

        Args:
            rows: (N,) numbers of the texts, in the order of `add`.

        Returns:
            (F,) codes of the features. A word's code is its number, below 2³²; a pair's has the first word's
            number in the upper 32 bits and the second's in the lower: different features differ.
            (F,) index in `rows` of the text of each feature.
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
    """Return the similarity of two prompts, from 0 to 1."""
    codes, owners = Features([first, second]).of(np.arange(2))
    one, two = set(codes[owners == 0].tolist()), set(codes[owners == 1].tolist())
    return len(one & two) / len(one | two)


# ------------------------------------------------------------------------------------------ exact pairs


class Pair(NamedTuple):
    """Two near-duplicates, by their indices in a sequence (first < second)."""

    first: int
    second: int
    similarity: float


class NearDuplicates:
    """The near-duplicates among a set of texts, found once for every use of these texts."""

    def __init__(self, texts: Iterable[str], threshold: float) -> None:
        """Find all pairs.

        Args:
            texts: The texts; repeated ones count once.
            threshold: Least similarity, above 0 and at most 1.
        """
        self.threshold = threshold
        self._texts = tuple(dict.fromkeys(texts))
        self._pairs = near_duplicates(self._texts, threshold)

    def among(self, texts: Sequence[str]) -> list[Pair]:
        """Return the pairs among some of the texts, by their indices there, sorted.

        A text that is there several times is its own near-duplicate.
        """
        indices: defaultdict[str, list[int]] = defaultdict(list)
        for i, text in enumerate(texts):
            indices[text].append(i)
        pairs = [
            Pair(min(i, j), max(i, j), pair.similarity)
            for pair in self._pairs
            for i in indices.get(self._texts[pair.first], ())
            for j in indices.get(self._texts[pair.second], ())
        ]
        pairs += [Pair(i, j, 1.0) for same in indices.values() for i, j in combinations(same, 2)]
        return sorted(pairs)


def near_duplicates(texts: Sequence[str], threshold: float) -> list[Pair]:
    """Return every pair of texts at least as similar as the threshold, sorted; for up to some 100,000 texts.

    Of two such sets, each has at least ⌈threshold · size⌉ features in common with the other. So they share
    one of the rarest size − ⌈threshold · size⌉ + 1 of both (Chaudhuri et al. 2006, prefix filter): only texts
    that share a rare feature are compared.
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
        similarity = _row_similarity(sets, sizes, first, second)
        close = similarity >= threshold
        found += map(Pair, first[close].tolist(), second[close].tolist(), similarity[close].tolist())
    return sorted(found)


def _incidence(texts: Sequence[str]) -> "sparse.csr_array":
    """Return (N, F) ones for the features of each text; columns ordered from the rarest feature."""
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
    """Return the first `lengths` (N,) entries of each row."""
    from scipy import sparse

    sizes = np.diff(sets.indptr)
    place = np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], sizes)
    kept = place < np.repeat(lengths, sizes)
    starts = np.concatenate([[0], np.cumsum(np.minimum(lengths, sizes))])
    return sparse.csr_array((sets.data[kept], sets.indices[kept], starts), shape=sets.shape)


def _row_similarity(
    sets: "sparse.csr_array", sizes: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the similarity of rows `first` and `second`, (P,)."""
    found = np.empty(len(first))
    for start in range(0, len(first), CANDIDATES):
        one, two = first[start : start + CANDIDATES], second[start : start + CANDIDATES]
        common = sets[one].multiply(sets[two]).sum(axis=1)
        found[start : start + CANDIDATES] = common / (sizes[one] + sizes[two] - common)
    return found


def components(count: int, links: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Return (count,) the connected component of each node, numbered in order of appearance."""
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    graph = sparse.coo_array((np.ones(len(ends), dtype=np.int8), (ends[:, 0], ends[:, 1])), (count, count))
    labels = connected_components(graph.tocsr(), directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


# ------------------------------------------------------------------------------------------- removal


class Deduplication(NamedTuple):
    """Result of `remove_near_duplicates` for N texts."""

    kept: NDArray[np.bool_]  # (N,)
    cluster: NDArray[np.int64]  # (N,) number of the cluster of near-duplicates that each text is in
    complete: bool  # False if only part of the candidates was compared


def remove_near_duplicates(features: Features, threshold: float) -> Deduplication:
    """Keep each text unless it is a near-duplicate of an earlier one that is kept.

    Kept texts with a common near-duplicate are one cluster, which includes that near-duplicate. The work is
    bounded: a band that has used its portion ends before its largest crowds do, and `complete` is False.
    """
    keys = band_keys(features)
    kept = np.ones(len(features), dtype=np.bool_)
    complete = True
    budget = np.array([CHECKS, COMPARISONS]) * len(features)
    cluster = np.arange(len(features))
    links = [np.empty((0, 2), dtype=np.int64)]
    for band in range(BANDS):
        used = np.zeros(2)
        for leaders, others in _rounds(_split_crowds(keys[:, band], keys[:, (band + 1) % BANDS]), kept):
            if (used > budget / PORTION).any():
                complete = False
                break
            checked = len(others)
            # A dropped text only joins the clusters of kept ones: one link to each cluster is enough.
            new = kept[others] | (cluster[others] != cluster[leaders])
            leaders, others = leaders[new], others[new]
            close = (keys[leaders] == keys[others]).sum(axis=1) >= MATCHES
            leaders, others = leaders[close], others[close]
            used += checked, len(others)
            similar = pair_similarity(features, leaders, others) >= threshold
            leaders, others = leaders[similar], others[similar]
            links.append(np.stack([leaders, others], axis=1))
            kept[others] = False
        budget = budget - used
        cluster = components(len(features), np.concatenate(links))
    return Deduplication(kept, cluster, complete)


def _split_crowds(keys: NDArray[np.uint32], following: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return keys of a band, (N,), in which crowds are split by the following band."""
    _, bucket, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    return (bucket.astype(np.uint64) << np.uint64(32)) | np.where(sizes[bucket] > CROWD, following, 0)


def _rounds(
    keys: NDArray[np.uint64], kept: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield pairs of a kept text and another one with the same key: (P,) leaders and (P,) others.

    In each round, the first kept text of each bucket is paired with all others of the bucket, and leaves it.
    """
    order = np.argsort(keys, kind="stable")
    _, bucket, sizes = np.unique(keys[order], return_inverse=True, return_counts=True)
    several = sizes[bucket] > 1
    members, bucket = order[several], bucket[several]
    for _ in range(MAX_ROUNDS):
        candidates = np.flatnonzero(kept[members])
        buckets, first = np.unique(bucket[candidates], return_index=True)
        leader_of = np.full(len(sizes), -1)
        leader_of[buckets] = members[candidates[first]]
        leader = leader_of[bucket]
        rest = (leader >= 0) & (leader != members)
        members, bucket = members[rest], bucket[rest]
        if not len(members):
            return
        yield leader[rest], members


def band_keys(features: Features) -> NDArray[np.uint32]:
    """Return (N, BANDS) a hash of each band of each text's MinHash signature."""
    from rensa import RMinHash

    weights = np.random.default_rng(SEED).integers(2**63, size=ROWS, dtype=np.uint64) * 2 + 1
    keys = np.empty((len(features), BANDS), dtype=np.uint32)
    for start in range(0, len(features), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(features)))
        codes, owners = features.of(rows)
        starts = np.searchsorted(owners, np.arange(len(rows) + 1)).astype(np.uint64)
        signed = RMinHash.digest_matrix_from_flat_token_hashes(_mix(codes), starts, BANDS * ROWS, SEED)
        flat = np.fromiter(chain.from_iterable(signed.to_rows()), np.uint64, len(rows) * BANDS * ROWS)
        keys[rows] = (flat.reshape(-1, BANDS, ROWS) * weights).sum(axis=2) >> np.uint64(32)
    return keys


def pair_similarity(
    features: Features, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the similarity of texts `first` and `second`, (P,)."""
    parts = [
        _chunk_similarity(features, first[start : start + PAIRS], second[start : start + PAIRS])
        for start in range(0, len(first), PAIRS)
    ]
    return np.concatenate([np.empty(0), *parts])


def _chunk_similarity(
    features: Features, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float64]:
    one, two = _sorted_sets(features, first), _sorted_sets(features, second)
    both = np.sort(np.concatenate([one, two]))
    shared = both[1:][both[1:] == both[:-1]]
    sizes, common = (
        np.bincount((keyed >> np.uint64(HASH_BITS)).astype(np.int64), minlength=len(first))
        for keyed in (both, shared)
    )
    return common / (sizes - common)


def _sorted_sets(features: Features, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the features of each text, distinct and sorted: index in `rows` and, below, a hash."""
    codes, owners = features.of(rows)
    keyed = (owners.astype(np.uint64) << np.uint64(HASH_BITS)) | (_mix(codes) >> np.uint64(64 - HASH_BITS))
    keyed.sort()  # np.unique takes ten times as long
    return keyed[np.concatenate([[True], keyed[1:] != keyed[:-1]])] if len(keyed) else keyed


def _mix(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a distinct, evenly spread number for each code (splitmix64's finalizer, Steele et al. 2014)."""
    codes = (codes ^ (codes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    codes = (codes ^ (codes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return codes ^ (codes >> np.uint64(31))
