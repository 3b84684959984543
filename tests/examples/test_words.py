"""Rows of the captions' words: TF-IDF and LSA."""

from __future__ import annotations

import re
from collections import Counter
from math import log

import numpy as np
import pytest
from studies.data.words import WordVectors

CAPTIONS = [
    "a red apple",
    "A green apple, green leaves!",
    "a red car 4",
    "a blue car 4 4 4",
    "a green leaf",
    "a tree with leaves",
    "a tree with a unique word",
]


def tf_idf(fitted: list[str], captions: list[str]) -> tuple[list[str], np.ndarray]:
    """Return the tokens, and unit rows by the class's formula."""
    words = [Counter(re.findall(r"\w+", caption.lower())) for caption in fitted]
    counts = Counter(word for of in words for word in of)
    tokens = sorted(word for word in counts if counts[word] > 1)
    rows = np.zeros((len(captions), len(tokens)))
    for row, caption in zip(rows, captions, strict=True):
        of = Counter(re.findall(r"\w+", caption.lower()))
        for place, token in enumerate(tokens):
            if of[token]:
                row[place] = (1 + log(of[token])) * log((1 + len(fitted)) / (1 + counts[token]))
    return tokens, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_tf_idf_is_its_formula() -> None:
    vectors = WordVectors(CAPTIONS, dimensions=None)
    new = ["red leaves 4 4, red", "the green car"]
    for of in (CAPTIONS, new):
        tokens, expected = tf_idf(CAPTIONS, of)
        assert vectors.tokens == tokens
        np.testing.assert_allclose(vectors.transform(of), expected, atol=1e-6)
    assert "unique" not in vectors.tokens


def test_lsa_is_the_projection_on_the_leading_singular_vectors() -> None:
    _, rows = tf_idf(CAPTIONS, CAPTIONS)
    reduced = rows @ np.linalg.svd(rows)[2][:3].T
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    found = WordVectors(CAPTIONS, dimensions=3).transform(CAPTIONS)
    assert found.shape == (len(CAPTIONS), 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found @ found.T, reduced @ reduced.T, atol=1e-4)


def test_fewer_words_than_dimensions_are_as_many_as_there_are() -> None:
    """LSA in all its directions has the products of TF-IDF itself."""
    tokens, rows = tf_idf(CAPTIONS, CAPTIONS)
    found = WordVectors(CAPTIONS, dimensions=256).transform(CAPTIONS)
    assert found.shape[1] == min(len(tokens), len(CAPTIONS))
    np.testing.assert_allclose(found @ found.T, rows @ rows.T, atol=1e-6)


@pytest.mark.parametrize("dimensions", [None, 8])
def test_a_caption_without_counted_words_resembles_its_equals_alone(dimensions: int | None) -> None:
    many = [f"w{i % 50} w{(i * 7 + i // 50) % 50}" for i in range(500)]
    vectors = WordVectors([*many, "", "unseen", "", "!"], dimensions=dimensions)
    rows = vectors.transform(["", "unseen", "", "!", "w1 w2"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(rows[0], rows[2])
    similarity = (rows @ rows.T)[[0, 0, 0, 1], [1, 3, 4, 3]]
    assert np.abs(similarity).max() < 0.999


@pytest.mark.parametrize("captions", [["one two", "three four"], ["the", "the ...", "the!"], ["", "?"]])
def test_captions_that_share_no_word_are_refused(captions: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^captions: no word .*{re.escape(repr(captions[0]))}"):
        WordVectors(captions, dimensions=None)
