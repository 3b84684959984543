"""The captions as a teacher: rows of TF-IDF and LSA, and refusals of captions that cannot teach."""

from __future__ import annotations

import re
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankloss_features import captions as module
from rankloss_features.captions import CaptionVectors

CAPTIONS = [
    "a red apple",
    "A green apple, green leaves!",
    "a red car 4",
    "a blue car 4 4 4",
    "a green leaf",
    "a tree with leaves",
    "a tree with a unique word",
]
JAPANESE = ["赤いりんご", "青いりんご", "赤い車", "青い車", "白い犬", "白い猫"]


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
    vectors = CaptionVectors.fit(CAPTIONS, dimensions=None)
    new = ["red leaves 4 4, red", "the green car"]
    for of in (CAPTIONS, new):
        tokens, expected = tf_idf(CAPTIONS, of)
        assert vectors.tokens == tokens
        np.testing.assert_allclose(vectors.transform(of), expected, atol=1e-6)
    assert vectors.width == len(vectors.tokens)
    assert "unique" not in vectors.tokens


def test_lsa_is_the_projection_on_the_leading_singular_vectors() -> None:
    _, rows = tf_idf(CAPTIONS, CAPTIONS)
    reduced = rows @ np.linalg.svd(rows)[2][:3].T
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    found = CaptionVectors.fit(CAPTIONS, dimensions=3).transform(CAPTIONS)
    assert found.shape == (len(CAPTIONS), 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found @ found.T, reduced @ reduced.T, atol=1e-4)


@pytest.mark.parametrize("dimensions", [None, 4])
@pytest.mark.parametrize("characters", [False, True])
def test_saved_vectors_give_equal_rows_and_batches_do_not_matter(
    tmp_path: Path, dimensions: int | None, characters: bool
) -> None:
    of = JAPANESE if characters else CAPTIONS
    vectors = CaptionVectors.fit(iter(of), dimensions=dimensions, characters=characters)
    vectors.save(tmp_path / "captions.npz")
    loaded = CaptionVectors.load(tmp_path / "captions.npz")
    expected = vectors.transform([*of, "?"])
    np.testing.assert_array_equal(loaded.transform([*of, "?"]), expected)
    assert (loaded.tokens, loaded.width) == (vectors.tokens, vectors.width)
    one_by_one = np.concatenate([loaded.transform([caption]) for caption in [*of, "?"]])
    np.testing.assert_allclose(one_by_one, expected, atol=1e-6)
    again = CaptionVectors.fit(of, dimensions=dimensions, characters=characters)
    np.testing.assert_array_equal(again.transform([*of, "?"]), expected)


def test_characters_see_what_words_do_not() -> None:
    with pytest.raises(ValueError, match=r"^captions: .*'赤いりんご'.*characters=True"):
        CaptionVectors.fit(JAPANESE, dimensions=None)
    rows = CaptionVectors.fit(JAPANESE, dimensions=None, characters=True).transform(JAPANESE)
    similarity = rows @ rows.T
    red_apple, blue_apple, red_car, _, dog, _ = range(6)
    assert similarity[red_apple, blue_apple] > similarity[red_apple, red_car] > similarity[red_apple, dog]


@pytest.mark.parametrize("dimensions", [None, 8])
def test_a_caption_without_counted_words_resembles_its_equals_alone(dimensions: int | None) -> None:
    many = [f"w{i % 50} w{(i * 7 + i // 50) % 50}" for i in range(500)]
    vectors = CaptionVectors.fit([*many, "", "unseen", "", "!"], dimensions=dimensions)
    rows = vectors.transform(["", "unseen", "", "!", "w1 w2"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(rows[0], rows[2])
    assert vectors.count(["", "unseen", "w1 w2", "w1 w1"]).tolist() == [0, 0, 2, 1]
    similarity = (rows @ rows.T)[[0, 0, 0, 1], [1, 3, 4, 3]]
    assert np.abs(similarity).max() < 0.999


def test_a_sample_bounds_what_is_fitted_on() -> None:
    used = module.sample(map(str, range(20_000)), 500)
    assert used == module.sample(map(str, range(20_000)), 500)
    assert len(set(used)) == 500
    assert abs(np.mean([int(one) for one in used]) - 10_000) < 1_000  # four standard errors
    many = (f"a{i % 5} b{i % 3}" for i in range(1_000))
    vectors = CaptionVectors.fit(many, dimensions=None, most_captions=50)
    assert vectors.tokens == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    fewer = CaptionVectors.fit(["b c", "b c", "b a", "a x", "b y"], dimensions=None, most_tokens=1)
    assert fewer.tokens == ["b"]


@pytest.mark.parametrize(
    ("captions", "options", "argument", "value"),
    [
        (["", "?", "!"], {}, "captions", "''"),
        (["a dog"] * 3, {}, "captions", "'a dog'"),
        (["one two", "three four"], {"dimensions": None}, "captions", "'one two'"),
        (["the", "the ...", "the!"], {"dimensions": None}, "captions", "'the'"),
        (CAPTIONS, {"dimensions": 300}, "dimensions", "300"),
        (CAPTIONS, {"dimensions": 0}, "dimensions", "0"),
        (["a dog"], {}, "captions", r"\['a dog'\]"),
        ([], {}, "captions", r"\[\]"),
        (["a dog", None], {}, "captions", "None"),
    ],
)
def test_captions_that_cannot_teach_are_refused(
    captions: list[Any], options: dict[str, Any], argument: str, value: str
) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: .*{value}"):
        CaptionVectors.fit(captions, **options)
