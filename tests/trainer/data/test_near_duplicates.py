"""Near-duplicates: what is alike, and that none is missed."""

import itertools
import random
from unittest import mock

import numpy as np
import pytest

from trainer.data import near_duplicates as deduplication
from trainer.data.near_duplicates import (
    MATCHES,
    Features,
    band_keys,
    components,
    distinct,
    jaccard,
    near_duplicates,
    similarity,
    words,
)

THRESHOLD = 0.77


def variations(count: int, seed: int = 0, ending: str = "", vocabulary: int = 5000) -> list[str]:
    """Ideas, each followed by versions of it with a few words exchanged, dropped or added."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        idea = [f"w{draw.randrange(vocabulary)}" for _ in range(draw.randint(6, 30))]
        texts.append(" ".join(idea) + ending)
        for _ in range(draw.randint(0, 2)):
            version = list(idea)
            for _ in range(draw.randint(1, 3)):
                place = draw.randrange(len(version))
                version[place : place + draw.randint(0, 1)] = [f"w{draw.randrange(vocabulary)}"]
            texts.append(" ".join(version) + ending)
    return list(dict.fromkeys(texts))


@pytest.mark.parametrize("n", [1, 5, 7, 12, 40])
def test_a_word_more_or_another_follows_the_formula(n: int) -> None:
    """2n / (2n + 4) with a word appended, (2n − 2) / (2n + 4) with one exchanged, as documented."""
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
def test_case_punctuation_and_width_make_no_difference(first: str, second: str) -> None:
    """They are the same prompt."""
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
def test_another_content_is_another_prompt(first: str, second: str) -> None:
    """Word order, pictographs and any script count."""
    assert jaccard(first, second) < THRESHOLD


def test_words_of_any_script() -> None:
    """Scripts without spaces fall into characters, others keep their marks; something is always left."""
    assert words("Señor Müller's 2nd CAT-like") == ["señor", "müller", "s", "2nd", "cat", "like"]
    assert words("日本の cat") == ["日", "本", "の", "cat"]
    assert words("สวัสดี") == ["ส", "วั", "ส", "ดี"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("?!") == ["?", "!"]
    assert words("\u200b") == ["\u200b"]


@pytest.mark.parametrize("threshold", [0.3, 0.5, THRESHOLD, 0.9, 1.0])
def test_near_duplicates_are_found_exactly(threshold: float) -> None:
    """As many as comparing every pair finds, with the same similarities: a leak check misses none."""
    draw = random.Random(1)
    texts = [" ".join(draw.choice("abcdefg") for _ in range(draw.randint(1, 9))) for _ in range(250)]
    texts = list(dict.fromkeys(texts + variations(20)))
    pairs = itertools.combinations(range(len(texts)), 2)
    expected = [(i, j, s) for i, j in pairs if (s := jaccard(texts[i], texts[j])) >= threshold]
    assert [tuple(pair) for pair in near_duplicates(texts, threshold)] == expected
    assert near_duplicates(texts[:1], threshold) == []


def test_minhash_finds_nearly_all_candidates() -> None:
    """Of pairs just above the threshold, more than 99 % share as many bands as candidates must."""
    texts = variations(6000)
    pairs = [pair for pair in near_duplicates(texts, THRESHOLD) if pair.similarity < 0.81]
    keys = band_keys(Features(texts))
    hits = [(keys[pair.first] == keys[pair.second]).sum() >= MATCHES for pair in pairs]
    assert len(pairs) > 500
    assert np.mean(hits) > 0.99


@pytest.mark.parametrize("ending", ["", ", trending on artstation highly detailed sharp focus 8 k"])
def test_what_is_kept_has_no_near_duplicates(ending: str) -> None:
    """Next to none is left, and what was dropped resembles something that was kept before it."""
    texts = variations(2500, ending=ending)
    features = Features(texts)
    kept, cluster, complete = distinct(features, THRESHOLD)
    assert complete
    pairs = near_duplicates(texts, THRESHOLD)
    left = [pair for pair in pairs if kept[pair.first] and kept[pair.second]]
    assert len(left) <= 0.01 * len(pairs)
    dropped = {pair.second for pair in pairs if kept[pair.first]}
    assert set(np.flatnonzero(~kept)) <= dropped
    assert all(cluster[i] == cluster[j] for i, j, _ in pairs if kept[i] != kept[j])
    assert np.array_equal(distinct(features, THRESHOLD).kept, kept)


def test_texts_of_the_same_phrases_take_bounded_work() -> None:
    """Where everything resembles everything a little, part of it is not compared, and that is said."""
    slots = [[f"{letter}{number}" for number in range(30)] for letter in "abcdef"]
    draw = random.Random(0)
    texts = [
        "a {} painting of a {} {} in the {} of {} trending on artstation 4k {}".format(
            *map(draw.choice, slots)
        )
        for _ in range(4000)
    ]
    compared = 0
    real = deduplication.similarity

    def counting(features: Features, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(first)
        return real(features, first, second)

    with mock.patch.object(deduplication, "similarity", counting):
        assert not distinct(Features(texts), THRESHOLD).complete
    assert compared < (deduplication.VERIFIED + 2) * len(texts)


def test_similarity_of_many_pairs_is_that_of_each() -> None:
    """Compared in bulk, by hashes, as one by one."""
    texts = variations(50)
    draw = np.random.default_rng(0)
    first, second = draw.integers(len(texts), size=(2, 300))
    expected = [jaccard(texts[i], texts[j]) for i, j in zip(first, second, strict=True)]
    assert similarity(Features(texts), first, second).tolist() == expected


def test_components_are_numbered_as_they_appear() -> None:
    """Links may come in any order and direction."""
    assert components(6, [(5, 1), (3, 1), (2, 4)]).tolist() == [0, 1, 2, 1, 2, 1]
    assert components(3, []).tolist() == [0, 1, 2]
