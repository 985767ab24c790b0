"""Near-duplicates: similarity, exact pairs, removal by MinHash."""

import itertools
import random
from unittest import mock

import numpy as np
import pytest

from trainer.data import near_duplicates as module
from trainer.data.near_duplicates import (
    MATCHES,
    Features,
    NearDuplicates,
    band_keys,
    components,
    jaccard,
    near_duplicates,
    pair_similarity,
    remove_near_duplicates,
    words,
)

THRESHOLD = 0.77


def variations(count: int, seed: int = 0, ending: str = "", vocabulary: int = 5000) -> list[str]:
    """Return texts, each followed by versions of it with a few words replaced, removed or added."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        idea = [f"w{rng.randrange(vocabulary)}" for _ in range(rng.randint(6, 30))]
        texts.append(" ".join(idea) + ending)
        for _ in range(rng.randint(0, 2)):
            version = list(idea)
            for _ in range(rng.randint(1, 3)):
                place = rng.randrange(len(version))
                version[place : place + rng.randint(0, 1)] = [f"w{rng.randrange(vocabulary)}"]
            texts.append(" ".join(version) + ending)
    return list(dict.fromkeys(texts))


@pytest.mark.parametrize("n", [1, 5, 7, 12, 40])
def test_jaccard_of_an_appended_or_replaced_word_follows_the_formula(n: int) -> None:
    """2n / (2n + 4) with a word appended, (2n − 2) / (2n + 4) with one replaced, as documented."""
    text = [f"w{i}" for i in range(n)]
    assert jaccard(" ".join(text), " ".join([*text, "more"])) == pytest.approx(2 * n / (2 * n + 4))
    changed = [*text[: n // 2], "other", *text[n // 2 + 1 :]]
    assert jaccard(" ".join(text), " ".join(changed)) == pytest.approx((2 * n - 2) / (2 * n + 4))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("A cat, sitting!", "a  cat sitting"),
        ("Straße", "STRASSE"),
        ("a Ｆｕｌｌ width", "a full width"),
        ("!!!", "!!!"),
        ("it’s late", "it's late"),
    ],
)
def test_case_punctuation_and_width_do_not_change_similarity(first: str, second: str) -> None:
    """Such prompts count as the same."""
    assert jaccard(first, second) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a white diamond on a blue background", "a blue diamond on a white background"),
        ("a white diamond on a blue background", "a white diamond on a red background"),
        ("!!!", "???"),
        ("a 🐱", "a 🐶"),
        ("红色的猫", "蓝色的狗"),
        ("नमस्ते दुनिया", "नमस्ते भारत"),
    ],
)
def test_different_content_is_not_a_near_duplicate(first: str, second: str) -> None:
    """Word order, pictographs and words of any script count."""
    assert jaccard(first, second) < THRESHOLD


def test_words_split_any_script() -> None:
    """Scripts without spaces give characters, others keep their marks; at least one word is left."""
    assert words("Señor Müller's 2nd CAT-like") == ["señor", "müller", "s", "2nd", "cat", "like"]
    assert words("日本の cat") == ["日", "本", "の", "cat"]
    assert words("สวัสดี") == ["ส", "วั", "ส", "ดี"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("?!") == ["?", "!"]
    assert words("\u200b") == ["\u200b"]


@pytest.mark.parametrize("threshold", [0.3, 0.5, THRESHOLD, 0.9, 1.0])
def test_near_duplicates_agree_with_comparing_every_pair(threshold: float) -> None:
    """The pairs and similarities are exact: a leak check misses none."""
    rng = random.Random(1)
    texts = [" ".join(rng.choice("abcdefg") for _ in range(rng.randint(1, 9))) for _ in range(250)]
    texts = list(dict.fromkeys(texts + variations(20)))
    pairs = itertools.combinations(range(len(texts)), 2)
    expected = [(i, j, s) for i, j in pairs if (s := jaccard(texts[i], texts[j])) >= threshold]
    assert [tuple(pair) for pair in near_duplicates(texts, threshold)] == expected
    assert near_duplicates(texts[:1], threshold) == []


def test_near_duplicates_among_a_subset_are_those_of_the_subset() -> None:
    """Pairs found once for all texts give any subset's own pairs; a repeated text is a pair."""
    texts = variations(60)
    found = NearDuplicates(texts, THRESHOLD)
    for seed in range(5):
        subset = random.Random(seed).sample(texts, len(texts) // 2)
        assert found.among(subset) == near_duplicates(subset, THRESHOLD)
        repeated = [*subset, *subset[:7]]
        assert found.among(repeated) == near_duplicates(repeated, THRESHOLD)


def test_minhash_finds_nearly_all_candidates() -> None:
    """Of the pairs just above the threshold, more than 99 % share as many bands as candidates must."""
    texts = variations(6000)
    pairs = [pair for pair in near_duplicates(texts, THRESHOLD) if pair.similarity < 0.81]
    keys = band_keys(Features(texts))
    hits = [(keys[pair.first] == keys[pair.second]).sum() >= MATCHES for pair in pairs]
    assert len(pairs) > 500
    assert np.mean(hits) > 0.99


@pytest.mark.parametrize("ending", ["", ", trending on artstation highly detailed sharp focus 8 k"])
def test_removal_leaves_almost_no_near_duplicates(ending: str) -> None:
    """Every dropped text is a near-duplicate of an earlier kept one, and in its cluster."""
    texts = variations(2500, ending=ending)
    features = Features(texts)
    kept, cluster, complete = remove_near_duplicates(features, THRESHOLD)
    assert complete
    pairs = near_duplicates(texts, THRESHOLD)
    left = [pair for pair in pairs if kept[pair.first] and kept[pair.second]]
    assert len(left) <= 0.01 * len(pairs)
    dropped = {pair.second for pair in pairs if kept[pair.first]}
    assert set(np.flatnonzero(~kept)) <= dropped
    assert all(cluster[i] == cluster[j] for i, j, _ in pairs if kept[i] != kept[j])
    assert np.array_equal(remove_near_duplicates(features, THRESHOLD).kept, kept)


def test_removal_among_texts_of_the_same_phrases_is_bounded() -> None:
    """If all texts are a little similar, part of the pairs is not compared, and `complete` is False."""
    slots = [[f"{letter}{number}" for number in range(30)] for letter in "abcdef"]
    rng = random.Random(0)
    texts = [
        "a {} painting of a {} {} in the {} of {} trending on artstation 4k {}".format(
            *map(rng.choice, slots)
        )
        for _ in range(4000)
    ]
    compared = 0
    real = module.pair_similarity

    def counting(features: Features, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(first)
        return real(features, first, second)

    with mock.patch.object(module, "pair_similarity", counting):
        assert not remove_near_duplicates(Features(texts), THRESHOLD).complete
    assert compared < (module.COMPARISONS + 2) * len(texts)


def test_pair_similarity_agrees_with_jaccard() -> None:
    """Comparing many pairs at once, by hashes, gives the similarity of each."""
    texts = variations(50)
    rng = np.random.default_rng(0)
    first, second = rng.integers(len(texts), size=(2, 300))
    expected = [jaccard(texts[i], texts[j]) for i, j in zip(first, second, strict=True)]
    assert pair_similarity(Features(texts), first, second).tolist() == expected


def test_components_are_numbered_in_order_of_appearance() -> None:
    """The order and the direction of links do not matter."""
    assert components(6, [(5, 1), (3, 1), (2, 4)]).tolist() == [0, 1, 2, 1, 2, 1]
    assert components(3, []).tolist() == [0, 1, 2]
