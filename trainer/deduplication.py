"""Near-duplicates among millions of prompts: MinHash finds candidates, Jaccard's similarity decides.

MinHash (Broder 1997) gives a text BANDS × ROWS numbers, each of which two texts share with a probability that
is their similarity s. They share all numbers of a band with p = s^ROWS, and are candidates if they share two:

    1 − (1 − p)^BANDS − BANDS p (1 − p)^(BANDS − 1)        0.995 at s = 0.77, 0.9999 at 0.85, 0.2 % at 0.35

Millions of prompts end in the same phrases, and where all numbers of a band stem from such a phrase,
thousands share it. Such a crowd says little: there, the next band must be one of the two. And where most
prompts are made of the same phrases, there would be so much to compare that only part of it is (`distinct`).

trainer.similarity finds all near-duplicates of some ten thousand prompts, without any chance.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.similarity import Features, components

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
        _similarity(features, first[start : start + PAIRS], second[start : start + PAIRS])
        for start in range(0, len(first), PAIRS)
    ]
    return np.concatenate([np.empty(0), *parts])


def _similarity(
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
