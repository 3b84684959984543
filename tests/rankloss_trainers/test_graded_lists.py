"""Lists of graded candidates: as data, by the rule of every trainer; and beside a loss of pairs."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from named_inputs import N, inputs_of
from PIL import Image

import rankloss
import rankloss_trainers
from rankloss_trainers.catalog import choose, load
from rankloss_trainers.graded.lists import check_list, decode_grades, encode_grades, pool_lists
from rankloss_trainers.graded.term import RankedListsTerm


@pytest.mark.parametrize(
    ("candidates", "grades", "named"),
    [
        *(
            (["a"], [no_grade], f"^grades .*{no_grade!r}")
            for no_grade in (math.nan, math.inf, None, "good", True)
        ),
        (["a", "b"], [1, math.nan], "^grades .*nan"),
        *(
            (["a"], [integer], f"must be at most 2⁵³ to stay distinct grades; got {integer}")
            for integer in (2**53 + 1, -(2**53) - 1)
        ),
        (["a", "b"], [1], "got 2 candidates and 1 grades"),
        ([], [], "got 0 candidates and 0 grades"),
        ("ab", [1, 2], "^candidates and grades must be lists; got others"),
        (["a"], None, "^candidates and grades must be lists; got others"),
        (["a", "b", "a"], [1, 2, 3], "^grades must be one of each candidate; 'a' is twice .*with 1 and 3"),
    ],
)
def test_candidates_and_grades_that_are_no_list_are_refused_with_their_place(
    candidates: Any, grades: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=named) as error:
        check_list(candidates, grades, "row 3")
    assert "in row 3" in str(error.value)


def test_a_list_is_of_candidates_and_a_grade_for_each() -> None:
    assert check_list(["a", "b"], [1, -math.inf], "row 3") == [("a", 1), ("b", -math.inf)]
    assert check_list(["a", "a"], [1, 1.0], "row 3") == [("a", 1), ("a", 1)]


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_pictures_of_equal_pixels_are_one_candidate(mode: str) -> None:
    colours = (Image.new("RGB", (2, 2), colour) for colour in ("red", "red", "blue"))
    red, again, blue = (x.convert(mode, palette=Image.Palette.ADAPTIVE) for x in colours)
    # With a palette, the bytes are indices: equal for pictures of one colour, whatever the colour.
    assert (red.tobytes() == blue.tobytes()) == (mode == "P")
    pool = pool_lists([[(red, 1.0), (blue, 0.0)], [(again, 2.0)]])
    assert pool.candidates == [red, blue]
    assert pool.index.tolist() == [[0, 1], [0, -1]]
    assert len(pool.ids.unique()) == 2


@pytest.mark.parametrize(
    ("candidate", "equal", "other"),
    [
        pytest.param(np.eye(2), np.eye(4)[::2, ::2].copy(), np.ones((2, 2)), id="arrays by their values"),
        pytest.param(
            np.eye(2),
            np.asfortranarray(np.eye(2)),
            np.eye(2, dtype=np.float32),
            id="arrays by their dtype, in any order in memory",
        ),
        pytest.param(
            torch.eye(2),
            torch.eye(2).mT,
            torch.eye(2).reshape(4),
            id="tensors by their shape, in any strides",
        ),
        pytest.param(
            torch.eye(2).bfloat16(), torch.eye(2).bfloat16(), torch.eye(2).half(), id="tensors by their dtype"
        ),
        pytest.param(
            {"array": np.eye(2), "rate": 8},
            {"rate": 8, "array": np.eye(2)},
            {"array": np.eye(2), "rate": 9},
            id="mappings by their values, in any order",
        ),
        pytest.param(["a", b"b"], ("a", b"b"), ["a", "b"], id="lists and tuples by the types of their items"),
    ],
)
def test_other_candidates_are_told_apart_by_their_content(candidate: Any, equal: Any, other: Any) -> None:
    pool = pool_lists([[(candidate, 1.0), (other, 0.0)], [(equal, 2.0)]])
    assert pool.index.tolist() == [[0, 1], [0, -1]]
    assert len(pool.ids.unique()) == 2


@pytest.mark.parametrize("wrong", [object(), np.array([object()]), {"a": object()}])
def test_candidates_without_a_content_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^candidates .*object"):
        pool_lists([[("a", 1.0), (wrong, 0.0)]])


def test_grades_that_float32_would_tie_are_pooled_unchanged() -> None:
    grades = [1_700_000_001.0, 1_700_000_000.0]
    assert pool_lists([list(zip("ab", grades, strict=True))]).grades.tolist() == [grades]


@pytest.mark.parametrize(("has_float64", "dtype"), [(True, torch.float64), (False, torch.float32)])
def test_grades_that_float32_holds_are_decoded_with_and_without_float64(
    has_float64: bool, dtype: torch.dtype
) -> None:
    """As a stand-in for a device without it, the function that tells is replaced."""
    grades = [[0.5, -math.inf, 2.0**24], [1.0, 1.0, 0.0]]
    bits = encode_grades(torch.tensor(grades, dtype=torch.float64))
    with mock.patch("rankloss_trainers.graded.lists.has_float64", return_value=has_float64):
        decoded = decode_grades(bits)
    assert decoded.dtype == dtype
    assert decoded.tolist() == grades


@pytest.mark.parametrize(
    "grades",
    [
        pytest.param([2.0**24 + 1, 2.0**24], id="tied"),
        pytest.param([1e300, 1.0], id="infinite"),
        pytest.param([1.0, -1e300], id="negative and infinite, which would be a candidate without a rank"),
    ],
)
def test_grades_that_float32_would_tie_or_lose_are_refused_there(
    grades: list[float],
) -> None:
    bits = encode_grades(torch.tensor([[1.0, 0.0], grades], dtype=torch.float64))
    with (
        mock.patch("rankloss_trainers.graded.lists.has_float64", return_value=False),
        pytest.raises(ValueError, match=r"^grades .*float32.*list 1 .*\["),
    ):
        decode_grades(bits)


# --- beside a loss of pairs -----------------------------------------------------------------------------

LISTS = inputs_of("ranked-lists")
V, T, SCALE = (LISTS.pop(key) for key in ("image_features", "text_features", "logit_scale"))


@pytest.mark.parametrize("base", [rankloss.ClipLoss(), rankloss.SigLipLoss()])
def test_entries_are_the_bases_and_the_weighted_lists(base: rankloss.ClipLoss | rankloss.SigLipLoss) -> None:
    bias = {"logit_bias": torch.tensor(-3.0)} if isinstance(base, rankloss.SigLipLoss) else {}
    lists = rankloss.RankedLists(in_batch_negatives=True)
    term = RankedListsTerm(lists, base, weight=0.5)
    pairs = {"image_features": V, "text_features": T, "logit_scale": SCALE, **bias}
    entries = term(**pairs, **LISTS, output_dict=True)
    assert entries.keys() == {"contrastive_loss", "ranked_lists_loss"}
    assert entries["contrastive_loss"] == base(**pairs)
    assert entries["ranked_lists_loss"] == 0.5 * lists(**LISTS, logit_scale=SCALE)
    torch.testing.assert_close(term(**pairs, **LISTS), sum(entries.values()))


def test_lists_alone_leave_the_pairs_out_and_a_bias_in_the_graph() -> None:
    term = RankedListsTerm(rankloss.RankedLists())
    bias = torch.tensor(-3.0, requires_grad=True)
    loss = term(logit_scale=SCALE, logit_bias=bias, image_features=V, text_features=T, **LISTS)
    assert loss == rankloss.RankedLists()(**LISTS, logit_scale=SCALE)
    loss.backward()
    assert bias.grad == 0  # DDP waits for the gradient of each parameter


def test_lists_alone_refuse_the_inputs_of_a_distillation() -> None:
    term = RankedListsTerm(rankloss.RankedLists())
    with pytest.raises(ValueError, match="dist_image_features"):
        term(logit_scale=SCALE, dist_image_features=V, **LISTS)


@pytest.mark.parametrize("base_loss", ["auto", "include"])
def test_a_base_is_trained_where_the_data_have_pairs(base_loss: str) -> None:
    term = rankloss_trainers.create("ranked-lists", base_loss=base_loss)
    entries = term(V, T, SCALE, **LISTS, output_dict=True)
    assert entries.keys() == {"contrastive_loss", "ranked_lists_loss"}


def test_without_pairs_no_base_is_trained_by_default() -> None:
    entries = rankloss_trainers.create("ranked-lists")(logit_scale=SCALE, **LISTS, output_dict=True)
    assert entries.keys() == {"ranked_lists_loss"}


def test_without_pairs_a_base_that_is_asked_for_is_an_error() -> None:
    term = rankloss_trainers.create("ranked-lists", base_loss="include")
    with pytest.raises(ValueError, match=r"base_loss.*include"):
        term(logit_scale=SCALE, **LISTS)


def test_a_created_loss_of_lists_takes_features_by_position_as_every_other_one() -> None:
    loss = rankloss_trainers.create("ranked-lists")
    by_position = loss(V, T, SCALE, output_dict=True, **LISTS)
    by_name = loss(image_features=V, text_features=T, logit_scale=SCALE, output_dict=True, **LISTS)
    assert by_position == by_name


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"image_features": V, "text_features": T, "logit_scale": SCALE},
            "missing are query_features, candidate_features, grades",
        ),
        (LISTS, "logit_scale must be given"),
        ({"image_features": V, "logit_scale": SCALE, **LISTS}, "got image_features alone"),
    ],
)
def test_inputs_that_a_loss_of_lists_lacks_are_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rankloss_trainers.create("ranked-lists")(**inputs)


QUERY_TWICE = torch.tensor([3, 1, 2, 1, 0, 5, 6, 7])  # rows 1 and 3


def test_a_query_twice_in_a_batch_is_refused_where_its_candidates_would_be_negatives() -> None:
    term = RankedListsTerm(rankloss.RankedLists(in_batch_negatives=True))
    with pytest.raises(ValueError, match=r"1 and 3 .*query"):
        term(logit_scale=SCALE, query_ids=QUERY_TWICE, **LISTS)


@pytest.mark.parametrize(("in_batch_negatives", "ids"), [(False, QUERY_TWICE), (True, torch.arange(N))])
def test_queries_that_share_no_negatives_or_are_distinct_are_taken(
    in_batch_negatives: bool, ids: torch.Tensor
) -> None:
    term = RankedListsTerm(rankloss.RankedLists(in_batch_negatives=in_batch_negatives))
    assert term(logit_scale=SCALE, query_ids=ids, **LISTS).isfinite()


def test_options_of_lists_reach_the_loss() -> None:
    create = functools.partial(rankloss_trainers.create, "ranked-lists")
    pairwise = create(model="pairwise", pair_weight="difference", chunk_size=7, base_loss="exclude")
    assert (pairwise.base, pairwise.lists.pair_weight, pairwise.lists.chunk_size) == (None, "difference", 7)
    assert create(model="lambda", gain="exponential").lists.gain == "exponential"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": "exponential"}, r"^ranked-lists\.gain: .* only applies to model='lambda'"),
        ({"base_loss": "x"}, r"^ranked-lists\.base_loss must be .*'x'"),
    ],
)
def test_options_of_lists_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rankloss_trainers.create("ranked-lists", **options)


def test_a_loss_of_lists_has_the_defaults_of_the_library() -> None:
    shared = load("ranked-lists").options.keys() & inspect.signature(rankloss.RankedLists).parameters
    assert shared
    created, expected = rankloss_trainers.create("ranked-lists").lists, rankloss.RankedLists()
    for name in shared:
        assert getattr(created, name) == getattr(expected, name), name


@pytest.mark.parametrize("given", [{"model": "lambda"}, {"model": "pairwise", "pair_weight": "difference"}])
def test_own_caption_on_top_is_refused_with_a_model_of_grades(given: Any) -> None:
    (loss,) = choose("ranked-lists", {"own_caption": "top", **given})
    with pytest.raises(ValueError, match=r"^ranked-lists\.own_caption: top is an order and no grade"):
        loss.build(rankloss.ClipLoss(), None)


def test_another_place_of_the_own_caption_is_refused() -> None:
    (loss,) = choose("ranked-lists", {"own_caption": "middle"})
    with pytest.raises(ValueError, match=r"^ranked-lists\.own_caption must be .*; got 'middle'"):
        loss.build(rankloss.ClipLoss(), None)


def test_own_caption_on_top_has_a_place_in_the_lists_of_a_model_of_orders() -> None:
    (loss,) = choose("ranked-lists", {"own_caption": "top"})
    assert loss.build(rankloss.ClipLoss(), None).lists.model == "plackett_luce"
    assert loss.columns.own_places == 1
