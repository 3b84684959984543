"""The captions as a teacher: rows of TF-IDF and LSA; and ``--text-encoder captions``, in a folder."""

from __future__ import annotations

import logging
import re
import shutil
import signal
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_teacher as tiny
import torch
from tiny_teacher import ROWS, data_of, files, flip, in_process, table, teacher, watched, written

from rankloss_features import Features, text_encoders
from rankloss_features import captions as module
from rankloss_features.captions import CaptionVectors
from rankloss_features.folder import NAMES
from rankloss_features.teachers import Teacher
from rankloss_trainers.console import main

IMAGES, TEXTS = NAMES
CAPTIONS = [
    "a red apple",
    "A green apple, green leaves!",
    "a red car 4",
    "a blue car 4 4 4",
    "a green leaf",
    "a tree with leaves",
    "a tree with a unique word",
]
THINGS = ("りんご", "車", "犬", "猫", "家")
JAPANESE = [f"{colour}{thing}" for colour in ("赤い", "青い", "白い", "黒い") for thing in THINGS]


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


def test_fewer_tokens_than_dimensions_are_as_many_as_there_are() -> None:
    """LSA in all its directions has the products of TF-IDF itself."""
    tokens, rows = tf_idf(CAPTIONS, CAPTIONS)
    assert len(tokens) < len(CAPTIONS) + 5
    vectors = CaptionVectors.fit(CAPTIONS, dimensions=256)
    assert vectors.width == min(len(tokens), len(CAPTIONS))
    found = vectors.transform(CAPTIONS)
    np.testing.assert_allclose(found @ found.T, rows @ rows.T, atol=1e-6)


def test_characters_see_what_words_do_not() -> None:
    with pytest.raises(ValueError, match=r"^captions: .*'赤いりんご'.*characters=True"):
        CaptionVectors.fit(JAPANESE, dimensions=None)
    rows = CaptionVectors.fit(JAPANESE, dimensions=None, characters=True).transform(JAPANESE)
    similarity = rows @ rows.T
    blue_apple, red_car, blue_dog = len(THINGS), 1, len(THINGS) + 2
    assert similarity[0, blue_apple] > similarity[0, red_car] > similarity[0, blue_dog]


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


# --- as an encoder of the command ---------------------------------------------------------------------------


def of_captions(name: str, kill_at: int | None = None) -> Teacher:
    """Two encoders, of which that of images ends the process at a batch."""
    texts = text_encoders.load(name, 8, torch.device("cpu"))
    images = teacher(watched([], IMAGES, kill_at=kill_at)).encoders[IMAGES]
    return Teacher(texts.about, {IMAGES: images, **texts.encoders}, spaces="separate")


@pytest.fixture(scope="module", params=["csv", "webdataset"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Pairs of each kind, and their folder with an encoder of the captions beside one of images."""
    place = tmp_path_factory.mktemp("captions")
    data = data_of(request.param, place / "data")
    written(place / "whole", data, of_captions("captions:4"))
    return data, place / "whole"


def test_rows_are_those_of_the_stored_vectors(whole: tuple[Any, Path]) -> None:
    data, folder = whole
    captions = [caption for block, _ in data.pairs() for caption in block]
    stored = CaptionVectors.load(folder / "captions.npz")
    assert stored.tokens == CaptionVectors.fit(captions, dimensions=4).tokens
    features = Features(str(folder)).check()
    np.testing.assert_allclose(features.take(np.arange(ROWS))[TEXTS], stored.transform(captions), atol=1e-3)
    assert features.about["teacher"] == {"text_encoder": "captions", "dimensions": 4, "characters": False}


def test_a_killed_run_goes_on_with_the_stored_vectors(whole: tuple[Any, Path], tmp_path: Path) -> None:
    (data, folder), output = whole, tmp_path / "output"
    kill_at = 4 if data.is_stream else 1
    assert in_process(written, output, data, of_captions("captions:4", kill_at)) == -signal.SIGKILL
    written(output, data, of_captions("captions:4")).check()
    assert files(output) == files(folder)


def test_a_folder_that_was_begun_with_other_dimensions_is_refused(
    whole: tuple[Any, Path], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(whole[1], tmp_path / "output"))
    with pytest.raises(ValueError, match=r"begun with another teacher, .*'dimensions': 4.*'dimensions': 5"):
        written(output, whole[0], of_captions("captions:5"))
    assert files(output) == files(whole[1])


def test_damaged_vectors_are_refused_by_who_reads_and_who_writes(
    whole: tuple[Any, Path], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(whole[1], tmp_path / "output"))
    flip(output / "captions.npz")
    with pytest.raises(ValueError, match=r"output/captions\.npz"):
        Features(str(output)).check()
    with pytest.raises(ValueError, match=r"output/captions\.npz"):
        written(output, whole[0], of_captions("captions:4"))


def test_many_captions_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoders, "MOST_CAPTIONS", 20)
    written(tmp_path / "output", data_of("csv", tmp_path), of_captions("captions:2")).check()
    few = CaptionVectors.load(tmp_path / "output/captions.npz").tokens
    assert 2 <= len(few) < len({*" ".join(tiny.CAPTIONS).split()})


def command(folder: Path, captions: list[str], *options: str) -> int:
    data = ["--data", str(table(folder, captions)), "--workers", "0", "--output", str(folder / "x")]
    return main(["features", *data, *options])


def test_a_small_set_has_as_many_dimensions_as_shared_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a folder that is found whole, and begun again."""
    caplog.set_level(logging.INFO, "rankloss_features")
    captions = ["a dog", "a cat", "a dog and a cat", "one bird", "one dog"]
    for _ in range(2):
        assert command(tmp_path, captions, "--text-encoder", "captions") == 0
    features = Features(str(tmp_path / "x")).check()
    assert features.about["widths"] == {TEXTS: 4}
    expected = CaptionVectors.fit(captions, dimensions=4).transform(captions)
    np.testing.assert_allclose(features.take(np.arange(5))[TEXTS], expected, atol=1e-3)
    said = "captions: 4 dimensions, as 5 captions share 4 tokens; 256 were asked for"
    assert [x.getMessage() for x in caplog.records].count(said) == 1


def test_the_share_of_captions_that_share_a_counted_word_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = [f"word{i}" for i in range(38)] + ["two words"] * 2
    for name, captions, level, share in (
        ("many", tiny.CAPTIONS, logging.INFO, "100.0 %"),
        ("few", few, logging.WARNING, "5.0 %"),
    ):
        (tmp_path / name).mkdir()
        caplog.clear()
        assert command(tmp_path / name, captions, "--text-encoder", "captions:1") == 0
        assert [x.levelno for x in caplog.records if share in x.message] == [level]


def test_a_language_without_spaces_is_counted_by_characters(tmp_path: Path, capsys: Any) -> None:
    assert command(tmp_path, JAPANESE, "--text-encoder", "captions:4") == 1
    assert "captions:characters" in capsys.readouterr().err
    assert command(tmp_path, JAPANESE, "--text-encoder", "captions:8:characters") == 0
    rows = Features(str(tmp_path / "x")).check().take(np.arange(len(JAPANESE)))[TEXTS]
    expected = CaptionVectors.fit(JAPANESE, dimensions=8, characters=True).transform(JAPANESE)
    np.testing.assert_allclose(rows, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("captions", "encoder", "named"),
    [
        (["a dog"] * 5, "captions", "captions: all 5 are equal, 'a dog'"),
        (["a dog", "the cat", "one"], "captions", "captions: no token occurs in two captions.*'a dog'"),
        (tiny.CAPTIONS, "captions:0", "'captions:0'"),
        (tiny.CAPTIONS, "captions:characters:8", "'captions:characters:8'"),
    ],
)
def test_options_and_captions_that_cannot_teach_are_refused_before_the_first_row(
    tmp_path: Path, captions: list[str], encoder: str, named: str, capsys: Any
) -> None:
    assert command(tmp_path, captions, "--text-encoder", encoder) == 1
    said = capsys.readouterr().err
    assert re.match("rankloss features: (encoder|--text-encoder) captions", said)
    assert re.search(named, said), said
    assert not [*tmp_path.glob("x/[!.]*")]
