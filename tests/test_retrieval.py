"""Ranks of partners and recall: a NumPy oracle, open_clip's own numbers, ties, ids, blocks, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batches import random_batch, unit
from fake_devices import no_float64
from memory import TensorSizes
from rankloss import metrics, reference
from rankloss.metrics import retrieval


def as_floats(values: dict[str, Tensor]) -> dict[str, float]:
    """The metrics' tensors as numbers, which ``reference.recall`` has."""
    return {name: value.item() for name, value in values.items()}


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Any], list[Any]]:
    """Features on a coarse grid, so that many products are tied, and ids that all have a partner."""
    kinds = draw(st.integers(1, 4))
    are_texts = draw(st.booleans())

    def modality() -> tuple[Tensor, list[Any]]:
        """One row of each id at least, in any order."""
        further = draw(st.lists(st.integers(0, kinds - 1), max_size=5))
        ids = draw(st.permutations([*range(kinds), *further]))
        row = st.sampled_from([(1.0, 0.0), (0.6, 0.8), (0.0, 1.0), (-0.8, 0.6), (-1.0, 0.0)])
        features = torch.tensor([draw(row) for _ in ids], dtype=torch.float64)
        return features, [f"id {number}" for number in ids] if are_texts else ids

    (v, image_ids), (t, text_ids) = modality(), modality()
    return v, t, image_ids, text_ids


@given(grouped(), st.integers(1, 2**6))
def test_recall_by_ids_is_the_oracles_in_blocks_of_any_size(case: Any, block: int) -> None:
    v, t, image_ids, text_ids = case
    ks = range(1, 1 + min(len(v), len(t)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_BLOCK", block)
        values = metrics.recall(v, t, ks, image_ids=image_ids, text_ids=text_ids)
    owed = reference.recall(v, t, ks, image_ids=image_ids, text_ids=text_ids)
    assert as_floats(values) == pytest.approx(owed, abs=1e-12)
    assert all(value.dtype == torch.float64 for value in values.values())


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 3))
def test_recall_of_pairs_is_the_oracles(seed: int, n: int, duplicates: int) -> None:
    batch = random_batch(seed=seed, n=n, d=4, scale=1.0, duplicates=min(duplicates, n // 2))
    ks = range(1, n + 1)
    recall = as_floats(metrics.recall(batch.image, batch.text, ks))
    assert recall == pytest.approx(reference.recall(batch.image, batch.text, ks), abs=1e-12)


@pytest.mark.parametrize("n", [10, 57, 100])
def test_recall_and_median_rank_of_unique_captions_are_open_clips(n: int) -> None:
    train = pytest.importorskip("open_clip_train.train")
    v = unit(n, 8, seed=n, dtype=torch.float32)
    noise = unit(n, 8, seed=n + 1, dtype=torch.float32)
    t = torch.nn.functional.normalize(v + noise, dim=-1)
    ours = as_floats(metrics.recall(v, t))
    theirs = train.get_clip_metrics(v, t, torch.tensor(100.0))
    assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-12)
    assert len(ours) == 2 * 4  # of each direction R@1, R@5, R@10 and the median rank
    assert 0.1 < ours["image_to_text_R@1"] < 1  # neither trivial nor hopeless


@pytest.mark.parametrize("n", [2, 17, 65])
def test_a_model_that_maps_everything_to_one_point_ranks_every_partner_last(n: int) -> None:
    """All answers are tied, and a partner ranks behind those that tie with it."""
    point = unit(1, 5, seed=0, dtype=torch.float32).expand(n, 5)
    recall = as_floats(metrics.recall(point, point, (n - 1, n)))
    owed = {f"R@{n - 1}": 0, f"R@{n}": 1, "median_rank": n}
    for way in ("image_to_text", "text_to_image"):
        assert {name: recall[f"{way}_{name}"] for name in owed} == owed


@pytest.mark.parametrize("n", [7, 17, 65])
def test_equal_answers_are_tied_whatever_the_products_rounding(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last caption are equal, and each picture's own: both pictures see a tie."""
    v, t = (unit(n, 33, seed=seed, dtype=torch.float32) for seed in (n, n + 1))
    v[-1] = t[0] = t[-1] = v[0]

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        """The product with another rounding in each column, here the larger, the later it is."""
        return a @ b + 1e-12 * torch.arange(b.shape[1])

    monkeypatch.setattr(retrieval, "product", rounded)
    ranks = metrics.partner_ranks(v, t)
    behind_the_equal_answer = 2
    for way in ("image_to_text", "text_to_image"):
        assert ranks[way][[0, -1]].tolist() == [behind_the_equal_answer] * 2


def test_equal_titles_are_partners_by_their_id_alone() -> None:
    """Four products of four photographs with one title: by rows R@1 is 0, by ids 1."""
    centres = torch.eye(4)
    v, t = centres.repeat_interleave(4, 0), centres.repeat_interleave(4, 0)
    assert metrics.recall(v, t, 1)["image_to_text_R@1"] == 0
    ids = torch.arange(4, dtype=torch.int32).repeat_interleave(4)
    by_ids = as_floats(metrics.recall(v, t, 1, image_ids=ids, text_ids=ids.numpy()))
    for way in ("image_to_text", "text_to_image", "image_to_image", "text_to_text"):
        assert by_ids[f"{way}_R@1"] == 1


@pytest.fixture
def lone_picture() -> dict[str, Any]:
    """Three equal pictures, of which the last alone has its id, and two captions; all are tied."""
    v, t = torch.eye(3)[[0, 0, 0]], torch.eye(3)[[0, 0]]
    ids = {"image_ids": ["a", "a", "b"], "text_ids": ["a", "b"]}
    return {"image_features": v, "text_features": t, **ids}


def test_a_lone_picture_is_an_answer_and_no_query_among_pictures(lone_picture: dict[str, Any]) -> None:
    behind_the_lone_one = 2  # which ties
    first, second, lone = metrics.partner_ranks(**lone_picture)["image_to_image"].tolist()
    assert first == second == behind_the_lone_one
    assert math.isnan(lone)


def test_a_lone_picture_counts_in_no_recall_among_pictures(lone_picture: dict[str, Any]) -> None:
    recall = metrics.recall(**lone_picture, k=(1, 2))
    assert recall["image_to_image_R@1"] == 0
    assert recall["image_to_image_R@2"] == 1


def test_where_all_texts_are_lone_there_are_no_ranks_among_texts(lone_picture: dict[str, Any]) -> None:
    """Of the two captions each is the only one of its id."""
    assert {*metrics.partner_ranks(**lone_picture)} == {"image_to_text", "text_to_image", "image_to_image"}


def test_features_are_compared_in_float64_within_autocast() -> None:
    v, t = unit(20, 6, seed=1), unit(20, 6, seed=2)
    expected = as_floats(metrics.recall(v, t))
    with torch.autocast("cpu", torch.bfloat16):
        assert as_floats(metrics.recall(v, t)) == expected


def test_features_are_compared_in_float32_where_there_is_no_float64() -> None:
    v, t = unit(20, 6, seed=1), unit(20, 6, seed=2)
    expected, in_float32 = as_floats(metrics.recall(v, t)), (v.float(), t.float())
    with no_float64():
        recall = metrics.recall(*in_float32)
    assert as_floats(recall) == pytest.approx(expected, rel=1e-6)
    assert recall["image_to_text_R@1"].dtype == torch.float32


def test_no_matrix_of_all_similarities_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    n, block = 2000, 2**16
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    ids = (torch.arange(n) // 2).tolist()
    v, t = unit(n, 8, seed=1), unit(n, 8, seed=2)
    with TensorSizes() as sizes:
        metrics.recall(v, t, image_ids=ids, text_ids=ids)
    assert n < sizes.largest <= block < n * n  # a block has some whole rows


FOUR = torch.eye(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"k": 5}, "k must be at most the number of texts, 4; got 5", id="k beyond the texts"),
        pytest.param({"k": (1, 0)}, "k must be an integer of at least 1; got 0", id="one k is 0"),
        pytest.param({"k": 0.5}, "k must be an integer of at least 1; got 0.5", id="k is a fraction"),
        pytest.param(
            {"k": torch.tensor(1.5)},
            "k must be an integer of at least 1; got 1.5",
            id="k is a fraction in a tensor",
        ),
        pytest.param(
            {"k": torch.tensor([2, 0])},
            "k must be an integer of at least 1; got 0",
            id="one k of a tensor is 0",
        ),
        pytest.param(
            {"k": torch.ones(2, device="meta")},
            "k must have values; got a tensor on the meta device",
            id="k on the meta device",
        ),
        pytest.param(
            {"image_features": FOUR.to("meta"), "text_features": FOUR.to("meta")},
            "image_features must have values to be ranked; got a tensor on the meta device",
            id="features on the meta device",
        ),
        pytest.param(
            {"text_features": FOUR.to("meta")},
            "text_features must have values to be ranked; got a tensor",
            id="texts alone on the meta device",
        ),
        pytest.param(
            {"text_features": FOUR[:3], "image_ids": [0, 1, 2, 0], "text_ids": [0, 1, 2], "k": 4},
            "k must be at most the number of texts, 3; got 4",
            id="k beyond fewer texts than images",
        ),
        pytest.param(
            {"image_features": FOUR / 0},
            "image_features must be finite; row 0 has NaN or infinity",
            id="NaN",
        ),
        pytest.param(
            {"text_features": FOUR.index_fill(0, torch.tensor([2]), math.inf)},
            "text_features must be finite; row 2",
            id="infinity",
        ),
        pytest.param(
            {"text_features": FOUR[:, :3]},
            r"must have one width; got \(4, 4\) and \(4, 3\)",
            id="two widths",
        ),
        pytest.param(
            {"text_features": FOUR[:3]},
            r"one row per pair without image_ids.*\(4, 4\) and \(3, 4\)",
            id="a row without a partner",
        ),
        pytest.param(
            {"text_features": FOUR[:0]},
            r"text_features must have at least one row; got shape \(0, 4\)",
            id="no row",
        ),
        pytest.param(
            {"image_features": FOUR.long()},
            "image_features must be floating point; got torch.int64",
            id="integers as features",
        ),
        pytest.param(
            {"image_ids": [0, 1, 2, 3]},
            "image_ids and text_ids go together; got image_ids alone",
            id="ids of images alone",
        ),
        pytest.param(
            {"text_ids": [0, 1, 2, 3]},
            "image_ids and text_ids go together; got text_ids alone",
            id="ids of texts alone",
        ),
        pytest.param(
            {"image_ids": [0, 1], "text_ids": [0, 1, 2, 3]},
            "image_ids must be 4 ids, one for every row; got 2",
            id="too few ids",
        ),
        pytest.param(
            {"image_ids": [0, 1, 7, 8], "text_ids": [0, 1, 1, 0]},
            "image_ids: 2 of 4 images have no text of their id, the first is row 2 with id 7",
            id="images without a text",
        ),
        pytest.param(
            {"image_ids": ["a", "a", "b", "b"], "text_ids": ["a", "b", "c", "a"]},
            "text_ids: 1 of 4 texts have no image of their id, the first is row 2 with id 'c'",
            id="a text without an image",
        ),
        pytest.param(
            {"image_ids": [1, 2, 3, 4], "text_ids": ["1", "2", "3", "4"]},
            "4 of 4 images have no text.*id 1$",
            id="numbers and their digits",
        ),
        pytest.param(
            {"image_ids": [0.0, 1.0, 2.0, 3.0], "text_ids": [0, 1, 2, 3]},
            "texts or integers; row 0 has float 0.0",
            id="floats as ids",
        ),
        pytest.param(
            {"image_ids": FOUR[0], "text_ids": [0, 1, 2, 3]},
            r"image_ids must be integers \[N\]; got torch.float32",
            id="a tensor of floats as ids",
        ),
        pytest.param(
            {"image_ids": ["a", None, "b", "c"], "text_ids": ["a", "b", "c", "a"]},
            "row 1 has NoneType None",
            id="an id that is None",
        ),
    ],
)
def test_bad_input_of_recall_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"image_features": FOUR, "text_features": FOUR, "k": 1, **change}
    with pytest.raises(ValueError, match=message):
        metrics.recall(**arguments)


@pytest.mark.parametrize(
    "k",
    [torch.tensor([1, 2]), np.array([1, 2]), range(1, 3), [np.int64(1), 2]],
    ids=lambda k: type(k).__name__,
)
def test_numbers_of_answers_may_be_a_tensor_or_an_array(k: Any) -> None:
    assert metrics.recall(FOUR, FOUR, k) == metrics.recall(FOUR, FOUR, (1, 2))
    assert metrics.recall(FOUR, FOUR, k[1]) == metrics.recall(FOUR, FOUR, 2)


def test_features_that_are_not_unit_norm_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"image_features should be unit-norm.*norms are off by up to 1"):
        metrics.recall(2 * FOUR, FOUR, 1)


def test_the_rank_of_a_partner_counts_the_answers_that_are_as_near_at_least() -> None:
    v, t = unit(9, 3, seed=3), unit(9, 3, seed=4)
    scores = v @ t.T
    owed = (scores >= scores.diag()[:, None]).sum(1)
    assert metrics.partner_ranks(v, t)["image_to_text"].tolist() == owed.tolist()


@pytest.mark.parametrize("missing", ["", "  ", None, math.nan], ids=repr)
def test_missing_ids_are_refused_by_their_row(missing: Any) -> None:
    v = torch.eye(3)
    with pytest.raises(ValueError, match="image_ids must be texts or integers; row 1 has "):
        metrics.recall(v, v, image_ids=["a", missing, "b"], text_ids=["a", "a", "b"])


def test_one_text_is_no_list_of_ids() -> None:
    v = torch.eye(3)
    with pytest.raises(ValueError, match="image_ids must be several, one for each row; got 'aab'"):
        metrics.recall(v, v, image_ids="aab", text_ids="aab")
