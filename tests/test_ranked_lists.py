"""`RankedLists` in one process: values, gradients, memory and surroundings."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batches import assert_close, assert_same, gradients, unit, unit_rows, upstream_for
from counting import count_calls
from fake_devices import no_float64
from lists_item_by_item import F64, Frozen, Lists, any_lists, every_model, grades_for_model, random_lists
from memory import TensorSizes, saved_bytes
from rankloss import ClipLoss, RankedLists, graded, pair_sums, precision, reference

F32 = torch.float32

# --- values and gradients -----------------------------------------------------------------------------------


@every_model
@settings(max_examples=settings.default.max_examples * 3 // 2)
@given(
    lists=any_lists(),
    chunk_size=st.sampled_from([None, 1, 2]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    frozen_by=st.sampled_from([None, "features", "scores"]),
)
def test_values_and_gradients_are_those_of_the_definition(
    options: dict[str, Any], lists: Lists, chunk_size: int | None, reduction: Any, frozen_by: str | None
) -> None:
    """The definition is written item by item; a frozen model's scores are subtracted, and get no gradient."""
    loss = RankedLists(**options, reduction=reduction, chunk_size=chunk_size)
    frozen = Frozen.of(lists)
    frozen_inputs: dict[str, Any] = {}
    if frozen_by == "scores" and not loss.in_batch_negatives:  # in-batch negatives take features alone
        frozen_inputs = {"reference_scores": scores_of_lists(frozen, lists)}
    elif frozen_by:
        frozen_inputs = frozen.as_features()
    # They could take a gradient, to see that they get none.
    frozen_inputs = {
        name: torch.as_tensor(x, dtype=F64).clone().requires_grad_() for name, x in frozen_inputs.items()
    }
    inputs = lists.leaves()
    value = lists.value_of(loss, *inputs, **frozen_inputs)
    frozen_scores = frozen.scores if frozen_inputs else None
    owed = lists.loss_item_by_item(*inputs, **options, reduction=reduction, frozen=frozen_scores)
    torch.testing.assert_close(value, owed, rtol=1e-11, atol=1e-11)
    upstream = upstream_for(value)
    by_queries, by_items, by_scale, *by_frozen = torch.autograd.grad(
        value, [*inputs, *frozen_inputs.values()], upstream, allow_unused=True
    )
    assert_same([by_queries, by_items, by_scale], gradients(owed, inputs, upstream), tolerance=1e-9)
    assert by_frozen == [None] * len(frozen_inputs)


def scores_of_lists(frozen: Frozen, lists: Lists) -> Tensor:
    """A frozen model's scores of each list's candidates, NaN at padding, which is not to be read."""
    scores = frozen.scores.gather(1, lists.index)
    return scores if lists.mask is None else scores.where(lists.mask, math.nan)


@pytest.mark.parametrize("model", ["plackett_luce", "top_one"])
@given(st.integers(0, 1000), st.integers(2, 12), st.sampled_from([1.0, 10.0, 100.0]))
def test_with_one_candidate_it_is_one_direction_of_clips_loss_to_the_last_bit(
    model: Any, seed: int, n: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    v, t = (torch.from_numpy(unit_rows(rng, n, d=7)) for _ in range(2))
    loss = RankedLists(model=model, in_batch_negatives=True)
    grades = torch.zeros(n, 1)
    of_images, of_texts = loss(v, t[:, None], grades, scale), loss(t, v[:, None], grades, scale)
    assert torch.equal(of_images, F.cross_entropy(scale * v @ t.T, torch.arange(n)))
    mean_of_directions = (of_images + of_texts) / 2
    assert torch.equal(mean_of_directions, ClipLoss()(v, t, scale))


@every_model
@pytest.mark.parametrize(
    "id_of",
    [
        pytest.param(lambda number: 2**63 - 1 - number, id="down from the largest integer"),
        pytest.param(lambda number: number - 2**63, id="up from the smallest integer"),
        pytest.param(lambda number: -number, id="zero and below"),
    ],
)
def test_every_integer_is_an_id_of_a_candidate(options: dict[str, Any], id_of: Callable[[int], int]) -> None:
    """Also where items of no list, here the first two, stand before a candidate and have its id."""
    n_items, n_unlisted = 9, 2
    lists = random_lists(seed=0, n=4, k=3, m=n_items)
    listed_index = n_unlisted + lists.index % (n_items - n_unlisted)
    lists = replace(lists, index=listed_index)
    id_numbers = [max(item - n_unlisted, 0) for item in range(n_items)]  # 0, 0, 0, 1, 2, …
    ids = torch.tensor([id_of(number) for number in id_numbers])
    by_ids = lists.differentiated(
        lambda *inputs: lists.value_of(RankedLists(**options), *inputs, candidate_ids=ids)
    )
    owed = lists.differentiated(lambda *inputs: lists.loss_item_by_item(*inputs, **options))
    assert_same(by_ids, owed)


@every_model
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_an_excluded_candidate_is_no_negative_of_its_query(
    options: dict[str, Any], chunk_size: int | None
) -> None:
    """Such as a query's own caption in another query's list; without negatives nothing changes."""
    lists = random_lists(seed=0, n=5, k=3, m=9)
    first_candidates = lists.index[:, 0]
    excluded = first_candidates.roll(1)  # the first candidate of the query before
    ids = torch.arange(9) + 100
    loss = RankedLists(**options, chunk_size=chunk_size)
    by_ids = lists.differentiated(
        lambda *inputs: lists.value_of(loss, *inputs, candidate_ids=ids, excluded_ids=ids[excluded])
    )
    owed = lists.differentiated(
        lambda *inputs: lists.loss_item_by_item(*inputs, **options, excluded=excluded.tolist())
    )
    assert_same(by_ids, owed)


def test_excluded_ids_need_ids_of_candidates_and_are_one_for_each_query() -> None:
    lists = random_lists(seed=0, n=4, k=3, m=9)
    loss = RankedLists(in_batch_negatives=True)
    with pytest.raises(ValueError, match="excluded_ids are ids of candidates, and need candidate_ids"):
        lists.value_of(loss, *lists.leaves(), excluded_ids=torch.arange(4))
    with pytest.raises(ValueError, match=r"excluded_ids must be 4 integers, one for every pair; got .*\[3\]"):
        lists.value_of(loss, *lists.leaves(), candidate_ids=torch.arange(9), excluded_ids=torch.arange(3))


LAMBDA = {"model": "lambda"}
DIFFERENCES = {"model": "pairwise", "pair_weight": "difference"}


def two_lists_of_three() -> tuple[Tensor, Tensor]:
    """Queries ``[2, 6]`` and their candidates ``[2, 3, 6]``, which are all orthogonal or equal."""
    rows = torch.eye(6, dtype=F64)
    return rows[:2], rows.view(2, 3, 6)


def test_an_infinite_feature_of_a_frozen_model_is_named_by_its_list_and_place() -> None:
    queries, candidates = torch.eye(2), torch.eye(2).expand(2, 2, 2)
    frozen = candidates.clone()
    frozen[0, 1] = math.nan  # at padding
    frozen[1, 1] = math.inf
    mask = torch.tensor([[True, False], [True, True]])
    features = {"reference_query_features": queries, "reference_candidate_features": frozen}
    with pytest.raises(ValueError, match="must be finite; candidate 1 of row 1 is not"):
        RankedLists()(queries, candidates, torch.zeros(2, 2), 1.0, mask=mask, reference_scale=1.0, **features)


def test_an_infinite_feature_of_a_frozen_model_beside_an_index_is_named_by_its_row() -> None:
    queries, candidates = torch.eye(2), torch.eye(2).repeat(3, 1)
    frozen = candidates.clone()
    frozen[4] = math.nan  # in no list
    frozen[5] = math.nan
    index = torch.tensor([[0, 1], [2, 5]])
    features = {"reference_query_features": queries, "reference_candidate_features": frozen}
    with pytest.raises(ValueError, match="must be finite; row 5 is not"):
        RankedLists()(
            queries,
            candidates,
            torch.zeros(2, 2),
            1.0,
            candidate_index=index,
            reference_scale=1.0,
            **features,
        )


@pytest.mark.parametrize("candidates", [torch.tensor(1.0), torch.eye(6)[0]], ids=["a number", "a row"])
def test_candidates_that_are_no_matrix_beside_an_index_are_named(candidates: Tensor) -> None:
    queries, _ = two_lists_of_three()
    index = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"candidate_features must have shape .*, or \[M, D\] with"):
        RankedLists()(queries, candidates, torch.ones(2, 3), candidate_index=index)


@pytest.mark.parametrize(
    ("options", "grade", "needed"),
    [
        ({}, math.inf, "numbers or −infinity"),
        ({}, math.nan, "numbers or −infinity"),
        (LAMBDA, -1.0, "numbers from 0 to 2⁵³ for model='lambda'"),
        (LAMBDA, 2.0**54, "numbers from 0 to 2⁵³ for model='lambda'"),
        (DIFFERENCES, math.inf, "finite for pair_weight='difference'"),
        (DIFFERENCES, -math.inf, "finite for pair_weight='difference'"),
    ],
    ids=str,
)
def test_grades_that_the_model_does_not_take_are_refused(
    options: dict[str, Any], grade: float, needed: str
) -> None:
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, grade]], dtype=F64)
    with pytest.raises(ValueError, match=re.escape(f"grades must be {needed}; row 1 has [{grade}]")):
        RankedLists(**options)(*two_lists_of_three(), grades)


@pytest.mark.parametrize("options", [{}, LAMBDA, DIFFERENCES], ids=str)
@pytest.mark.parametrize("grade", [math.inf, -math.inf, math.nan, -1.0, 2.0**54])
def test_padding_may_have_any_grade(options: dict[str, Any], grade: float) -> None:
    """Also one that the test above sees refused."""
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, grade]], dtype=F64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert RankedLists(**options)(*two_lists_of_three(), grades, mask=mask).isfinite()


def with_a_candidate_twice(by: str) -> dict[str, Any]:
    """Two queries and their lists of three; the first and the last candidate of the second list are one.

    They are one row of the items, one id of the lists' own features, or two rows of the items with one id.
    """
    queries, items = torch.eye(6)[:2], torch.eye(6)
    with_item_0_twice = torch.tensor([[3, 4, 5], [0, 1, 0]])
    of_different_items = torch.tensor([[3, 4, 5], [0, 1, 2]])
    ids_with_7_at_items_0_and_2 = torch.tensor([7, 8, 7, 9, 10, 11])
    candidates: dict[str, dict[str, Any]] = {
        "index": {"candidate_features": items, "candidate_index": with_item_0_twice},
        "ids": {"candidate_features": items[with_item_0_twice], "candidate_ids": with_item_0_twice},
        "index and ids": {
            "candidate_features": items,
            "candidate_index": of_different_items,
            "candidate_ids": ids_with_7_at_items_0_and_2,
        },
    }
    return {"query_features": queries, **candidates[by]}


twice_in_a_list = pytest.mark.parametrize("by", ["index", "ids", "index and ids"])


@twice_in_a_list
def test_a_candidate_with_two_grades_in_a_list_is_refused(by: str) -> None:
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"grades must be one of each candidate; row 1 .*\[1\.0, 3\.0\]"):
        RankedLists()(grades=grades, **with_a_candidate_twice(by))


@twice_in_a_list
def test_a_candidate_that_is_twice_in_a_list_with_one_grade_is_two_tied_items(by: str) -> None:
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0]])
    _, value_of_second_list = RankedLists(reduction="none")(grades=grades, **with_a_candidate_twice(by))
    scores_of_second_list = torch.tensor([0.0, 1.0, 0.0])  # its query is its second candidate
    owed = reference.plackett_luce(scores_of_second_list, grades[1])
    torch.testing.assert_close(value_of_second_list, owed)


@twice_in_a_list
def test_a_candidate_may_have_another_grade_at_padding(by: str) -> None:
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert RankedLists()(grades=grades, mask=mask, **with_a_candidate_twice(by)).isfinite()


@every_model
def test_uses_grade_values_tells_if_other_grades_of_the_same_order_change_the_loss(
    options: dict[str, Any],
) -> None:
    """Trainers refuse ranks, which are an order alone, for such a loss."""
    loss = RankedLists(**options)
    queries = candidates = torch.eye(3, dtype=F64)
    every_candidate_by_every_query = torch.arange(3).expand(3, 3)
    grades = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]], dtype=F64)
    value, value_by_squares = (
        loss(queries, candidates, values, 10.0, candidate_index=every_candidate_by_every_query).item()
        for values in (grades, grades.square())
    )
    assert loss.uses_grade_values is (value != value_by_squares)


@every_model
def test_options_act_when_they_are_set_later(options: dict[str, Any]) -> None:
    lists = random_lists(seed=4, n=5, k=4, m=9)
    built, changed = RankedLists(**options), RankedLists(model="pairwise", pair_weight="difference")
    defaults_of_other_options = {"model": "plackett_luce", "pair_weight": None}
    for name, value in {**defaults_of_other_options, **options}.items():
        setattr(changed, name, value)
    of_changed = lists.differentiated(lambda *inputs: lists.value_of(changed, *inputs))
    of_built = lists.differentiated(lambda *inputs: lists.value_of(built, *inputs))
    assert_same(of_changed, of_built, tolerance=0.0)


@every_model
@settings(max_examples=settings.default.max_examples // 2)
@given(lists=any_lists(), data=st.data())
def test_order_and_padding_change_nothing(options: dict[str, Any], lists: Lists, data: st.DataObject) -> None:
    loss = RankedLists(**options)
    padded = Padded.of(lists, data.draw(st.permutations(range(lists.grades.shape[1] + 2))))

    def of_padded(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
        grades = grades_for_model(padded.grades, loss.model, loss.pair_weight)
        return loss(q, with_nan_row(c), grades, s, mask=padded.mask, candidate_index=padded.index)

    expected = lists.differentiated(lambda *inputs: lists.value_of(loss, *inputs))
    assert_same(lists.differentiated(of_padded), expected)


@every_model
@settings(max_examples=settings.default.max_examples // 2)
@given(lists=any_lists(), data=st.data())
def test_order_and_padding_change_nothing_of_features_of_each_list(
    options: dict[str, Any], lists: Lists, data: st.DataObject
) -> None:
    """Where a candidate of several lists is several."""
    loss = RankedLists(**options)
    n, k = lists.grades.shape
    padded = Padded.of(lists, data.draw(st.permutations(range(k + 2))))

    def of_padded(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
        grades = grades_for_model(padded.grades, loss.model, loss.pair_weight)
        return loss(q, with_nan_row(c)[padded.index], grades, s, mask=padded.mask)

    def with_rows_of_their_own(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
        index = torch.arange(n * k).view(n, k)
        return lists.value_of(loss, q, c[lists.index].flatten(0, 1), s, candidate_index=index)

    assert_same(lists.differentiated(of_padded), lists.differentiated(with_rows_of_their_own))


@dataclass(frozen=True)
class Padded:
    """Lists in another order, with two places of padding: the last item of all, and a grade that is NaN."""

    index: Tensor
    grades: Tensor
    mask: Tensor

    @classmethod
    def of(cls, lists: Lists, order: list[int]) -> Padded:
        mask = torch.ones_like(lists.grades, dtype=torch.bool) if lists.mask is None else lists.mask
        return cls(
            index=F.pad(lists.index, (0, 2), value=-1)[:, order],
            grades=F.pad(lists.grades, (0, 2), value=math.nan)[:, order],
            mask=F.pad(mask, (0, 2), value=False)[:, order],
        )


def with_nan_row(items: Tensor) -> Tensor:
    """The items, and one more at which nobody is to look."""
    return F.pad(items, (0, 0, 0, 1), value=math.nan)


@every_model
@pytest.mark.filterwarnings("ignore:logit_scale is 5000")
@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(356.0, id="e^2s is infinite"),
        pytest.param(680.0, id="e^-2s is 0"),
        pytest.param(5000.0, id="e^s is infinite"),
    ],
)
def test_lists_of_any_span_are_exact(options: dict[str, Any], scale: float) -> None:
    """Six queries beside the first of three candidates, whose scores are about s, −s and 0, in all orders."""
    lists = Lists(
        queries=F.normalize(torch.tensor([[1.0, 1e-3 * k] for k in range(6)], dtype=F64), dim=-1),
        items=torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=F64),
        index=torch.arange(3).expand(6, 3),
        grades=torch.tensor(list(itertools.permutations([0.0, 1.0, 2.0])), dtype=F64),
        scale=scale,
    )
    of_loss = lists.differentiated(lambda *inputs: lists.value_of(RankedLists(**options), *inputs))
    owed = lists.differentiated(lambda *inputs: lists.loss_item_by_item(*inputs, **options))
    assert_close(of_loss, owed, tolerance=1e-11)


@every_model
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_derivative_is_nan(options: dict[str, Any]) -> None:
    """With a list of one candidate, a list without items below it, and ungraded candidates."""
    mask = torch.tensor([[True, True, True], [True, True, True], [True, False, False]])
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, -math.inf, -math.inf], [1.0, 0.0, 0.0]], dtype=F64)
    lists = replace(random_lists(seed=1, n=3, k=3, m=3, masked=False), grades=grades, mask=mask)

    def derivatives(value_of: Callable[..., Tensor]) -> list[Tensor]:
        """Of the first order, and of the second along a direction; a NaN on the way is an error."""
        inputs = lists.leaves()
        with torch.autograd.detect_anomaly(check_nan=True):
            first = torch.autograd.grad(value_of(*inputs), inputs, create_graph=True)
            directions = [torch.linspace(-1, 2, x.numel(), dtype=F64).view_as(x) for x in first]
            along = sum((x * direction).sum() for x, direction in zip(first, directions, strict=True))
            return [*first, *torch.autograd.grad(along, inputs)]

    of_loss = derivatives(lambda *inputs: lists.value_of(RankedLists(**options), *inputs))
    owed = derivatives(lambda *inputs: lists.loss_item_by_item(*inputs, **options))
    assert_same(of_loss, owed, tolerance=1e-9)


# --- a frozen model's scores --------------------------------------------------------------------------------


def test_a_frozen_copy_leaves_equal_scores() -> None:
    """So that a training begins where each pair costs −log σ(0) = log 2."""
    lists = random_lists(seed=6, n=4, k=5, m=9, masked=False)
    q, c, s = lists.leaves(torch.float32)
    frozen = Frozen(lists.queries.float(), lists.items.float(), lists.scale).as_features()
    loss = RankedLists(model="pairwise")
    assert lists.value_of(loss, q, c, s, **frozen).item() == pytest.approx(math.log(2), rel=1e-7)


@pytest.mark.filterwarnings("ignore:candidate_features should be unit-norm")
def test_the_pairwise_model_of_two_grades_is_dpo() -> None:
    """−log σ(β·[(log π − log π_ref)(better) − (…)(worse)]), with log π as a model of texts has it."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, 2, dtype=F64, generator=generator, requires_grad=True)
    frozen = torch.randn(5, 2, dtype=F64, generator=generator)
    beta, better = 0.3, torch.tensor([0, 1, 1, 0, 1])  # the column of each row's better text
    log_ratios = policy.log_softmax(-1) - frozen.log_softmax(-1)
    worse, rows = 1 - better, torch.arange(5)
    dpo = -F.logsigmoid(beta * (log_ratios[rows, better] - log_ratios[rows, worse])).mean()
    # Features of one dimension, so that a score is β times the policy's logit.
    queries, candidates = torch.ones(5, 1, dtype=F64), policy[:, :, None]
    grades = F.one_hot(better)
    value = RankedLists(model="pairwise")(queries, candidates, grades, beta, reference_scores=beta * frozen)
    assert_same([value], [dpo], tolerance=1e-14)
    slopes, owed_slopes = (gradients(x, (policy,), upstream=1.3) for x in (value, dpo))
    assert_same(slopes, owed_slopes, tolerance=1e-14)


# --- NDCG-Loss2++ -------------------------------------------------------------------------------------------


def test_scores_that_tie_share_a_rank_wherever_they_stand() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=F64)
    grades = torch.tensor([[2.0, 0.0, 1.0, 1.0]], dtype=F64)
    owed = reference.lambda_loss(scores[0], grades[0])
    for order in itertools.permutations(range(4)):
        reordered = scores[:, order]
        value, terms = graded.lambda_loss(reordered, grades[:, order], ranked_by=reordered)
        assert value.item() == pytest.approx(owed, rel=1e-14)
        assert terms.tolist() == [1]  # the list counts once in a mean


def test_exponential_gains_of_any_grade_are_finite() -> None:
    """All but the largest gain vanish beside it: the value is that of one item with a gain."""
    scores = torch.tensor([[0.0, 1.0, 2.0]], dtype=F64)
    large_grades = torch.tensor([[2.0**53, 0.0, 2000.0]], dtype=F64)
    only_the_first_gains = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)
    value, of_one_gain = (
        graded.lambda_loss(scores, grades, ranked_by=scores, gain="exponential")[0]
        for grades in (large_grades, only_the_first_gains)
    )
    assert value.item() == pytest.approx(of_one_gain.item(), rel=1e-14)


def test_lists_without_a_gain_count_nothing() -> None:
    lists = replace(random_lists(seed=0, n=3, k=2, m=4), grades=torch.zeros(3, 2))
    assert lists.value_of(RankedLists(model="lambda"), *lists.leaves()) == 0


# --- beyond one chunk, and in other surroundings ------------------------------------------------------------


@every_model
def test_memory_is_linear_in_the_lists(options: dict[str, Any]) -> None:
    """The backward pass keeps no more bytes than the inputs have; no tensor is of all queries and items."""
    k, m, d, chunk = 3, 64, 5, 2
    bytes_of_a_number = F64.itemsize

    def memory_of(n: int) -> tuple[int, int]:
        """The bytes that n lists keep for the backward pass, and the elements of the largest tensor."""
        lists = random_lists(seed=0, n=n, k=k, m=m, masked=False)
        loss = RankedLists(**options, chunk_size=chunk)
        inputs = lists.leaves()
        kept = saved_bytes(lambda: lists.value_of(loss, *inputs))
        with TensorSizes() as sizes:
            lists.value_of(loss, *inputs).backward()
        return kept, sizes.largest

    (kept_of_8, _), (kept_of_16, _), (kept_of_32, largest) = map(memory_of, (8, 16, 32))
    assert kept_of_32 - kept_of_16 == 2 * (kept_of_16 - kept_of_8)
    features_and_grades = 32 * (d + k) + m * d
    assert features_and_grades < 32 * m
    assert kept_of_32 <= bytes_of_a_number * features_and_grades
    of_listed_candidates, of_a_chunk = 32 * k * d, chunk * m * k
    assert max(of_listed_candidates, of_a_chunk) < 32 * m
    assert largest <= max(of_listed_candidates, of_a_chunk)


def test_padding_is_not_looked_at_nor_are_equal_queries_without_negatives() -> None:
    """A warning of zeros at padding, or of a query that is twice there, would be an error."""
    query, *candidates = unit(5, 3, seed=0)
    mask = torch.tensor([[True, False], [True, True]])
    with_zeros_at_padding = torch.stack(candidates).view(2, 2, 3) * mask[..., None]
    value = RankedLists()(query.expand(2, 3), with_zeros_at_padding, torch.eye(2), 10.0, mask=mask)
    assert value.isfinite()


def test_a_device_without_float64_refuses_integers_that_float32_rounds() -> None:
    query, candidates, grades = torch.eye(2)[:1], torch.eye(2)[None], torch.tensor([[2**24 + 1, 2**24]])
    assert RankedLists()(query, candidates, grades).isfinite()
    reason = r"grades must be at most 2²⁴, to stay distinct.*float32.* row 0 .*16777217"
    with no_float64(), pytest.raises(ValueError, match=reason):
        RankedLists()(query, candidates, grades)


def test_pairs_with_negatives_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no tensor holds all pairs of a listed candidate and a negative."""
    n, k, m = 8, 12, 512
    lists = random_lists(seed=0, n=n, k=k, m=m, masked=False)
    loss = RankedLists(model="pairwise", in_batch_negatives=True)
    owed = lists.differentiated(lambda *inputs: lists.value_of(loss, *inputs))
    monkeypatch.setattr(pair_sums, "_PAIRS_AT_ONCE", {"cpu": 3 * 128})  # far fewer than there are
    with TensorSizes() as sizes:
        in_blocks = lists.differentiated(lambda *inputs: lists.value_of(loss, *inputs))
    assert_same(in_blocks, owed, tolerance=1e-12)
    listed_items = len(lists.index.unique())  # each a negative of the lists without it
    assert sizes.largest < n * k * listed_items / 2


def test_pairs_with_negatives_keep_at_most_the_pairs_within_the_lists_more_than_plackett_luce(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They do not keep the pairs with negatives, which are more."""
    monkeypatch.setattr(pair_sums, "_PAIRS_AT_ONCE", {"cpu": 3 * 128})  # far fewer than there are
    n, k, m = 8, 12, 512
    lists = random_lists(seed=0, n=n, k=k, m=m, masked=False)
    inputs = lists.leaves()

    def kept_by(model: Any) -> int:
        """Bytes for the backward pass."""
        loss = RankedLists(model=model, in_batch_negatives=True)
        return saved_bytes(lambda: lists.value_of(loss, *inputs))

    pairs_within_lists, pairs_with_negatives = n * k * k, n * k * (len(lists.index.unique()) - k)
    assert pairs_within_lists < pairs_with_negatives / 2
    assert kept_by("pairwise") <= kept_by("plackett_luce") + F64.itemsize * pairs_within_lists


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_long_lists_are_summed_by_cells(
    dtype: torch.dtype, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σ log(1 + e^(rest − score)) of each score, with two orders of derivatives, to rounding.

    ``rest_sums`` cuts the range of ``rest`` into cells, and has a polynomial of each; ``pair_sums`` adds up
    all pairs.
    """
    generator = torch.Generator().manual_seed(0)
    n_lists, n_scores, n_rest = 3, 64, 8000
    scores, rest = (
        spread * torch.randn(n_lists, n, dtype=F64, generator=generator).clamp(-3, 3)
        for n in (n_scores, n_rest)
    )
    rest[0, 5:900] = -math.inf  # as places that are no negatives
    rest[1] = -math.inf  # a list without negatives
    rounded = scores.to(dtype), rest.to(dtype)
    upstream = torch.rand(n_lists, n_scores, dtype=F64, generator=generator)

    def value_and_derivatives(sums: Callable[..., Tensor], of_dtype: torch.dtype) -> list[Tensor]:
        """The sums, their gradients, and second derivatives in the gradients' own direction."""
        inputs = [x.to(of_dtype).requires_grad_() for x in rounded]
        value = sums(*inputs)
        first = torch.autograd.grad(value, inputs, upstream.to(of_dtype), create_graph=True)
        along = sum((x * x.detach()).sum() for x in first)
        return [value, *first, *torch.autograd.grad(along, inputs)]

    owed = value_and_derivatives(pair_sums.pair_sums, F64)
    monkeypatch.delattr(pair_sums, "pair_sums")  # the cells do not fall back on all pairs
    by_cells = value_and_derivatives(pair_sums.rest_sums, dtype)
    tolerance = {F64: 1e-13, torch.float32: 1e-6}[dtype]
    for result, exact in zip(by_cells, owed, strict=True):
        assert (result - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_sums_by_cells_make_no_tensor_of_all_pairs(dtype: torch.dtype) -> None:
    n_lists, n_scores, n_rest = 3, 64, 8000
    scores, rest = (
        torch.linspace(-9, 9, n_lists * n, dtype=dtype).view(n_lists, n) for n in (n_scores, n_rest)
    )
    with TensorSizes() as sizes:
        pair_sums.rest_sums(scores.requires_grad_(), rest.requires_grad_()).sum().backward()
    assert sizes.largest == n_lists * n_rest  # the inputs' own entries


@pytest.mark.parametrize("has_near_duplicate", [False, True], ids=["drawn", "with a near duplicate"])
def test_pairs_of_long_lists_take_few_times_plackett_luces_work(has_near_duplicate: bool) -> None:
    """Work is the number of elements of all operations' results.

    Counted: 5.4 and 5.6 times Plackett–Luce's; it would be 18 times if all pairs were computed.
    """
    n, k, d = 128, 64, 64
    most_times = 6
    queries, candidates = unit(n, d, seed=0, dtype=F32), unit(n, k, d, seed=1, dtype=F32)
    if has_near_duplicate:  # a negative whose score is far above all others of the first query
        candidates[1, 0] = F.normalize(queries[0] + 0.5 * candidates[1, 0], dim=-1)
    grades = torch.randint(0, 5, (n, k), generator=torch.Generator().manual_seed(0))

    def work_of(model: Any) -> int:
        loss = RankedLists(model=model, in_batch_negatives=True)
        inputs = queries.clone().requires_grad_(), candidates.clone().requires_grad_()
        with TensorSizes() as sizes:
            loss(*inputs, grades, 100.0).backward()
        return sizes.total

    assert work_of("pairwise") < most_times * work_of("plackett_luce")


@pytest.mark.parametrize("outlier", [math.nan, math.inf, 1e30])
def test_long_lists_of_any_span_are_summed(outlier: float) -> None:
    """No table of cells spans them: the sums are those of all pairs."""
    scores, rest = torch.zeros(1, 64), torch.zeros(1, 8000)
    rest[0, 7] = outlier
    of_all_pairs = F.softplus(rest[:, None] - scores[:, :, None]).sum(-1)
    torch.testing.assert_close(pair_sums.rest_sums(scores, rest), of_all_pairs, equal_nan=True)


def test_equal_candidates_share_a_rank_though_products_round_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights of the lambda model depend on ranks, and other devices' products on the place of a row."""
    query = unit(1, 4, seed=0)
    first, second = unit(2, 4, seed=1)
    candidates = torch.stack([first, second, first])[None]
    inputs = query, candidates, torch.tensor([[2.0, 0.0, 1.0]]), 10.0
    loss = RankedLists(model="lambda")
    owed = loss(*inputs)
    exact_product = precision.product

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        """The product with another rounding at each place."""
        exact = exact_product(a, b)
        return exact + 1e-9 * torch.arange(exact.numel()).view_as(exact)

    monkeypatch.setattr(precision, "product", rounded)
    torch.testing.assert_close(loss(*inputs), owed, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("chunk_size", "checkpointed_chunks"), [(None, 0), (4, 0), (3, 2), (1, 4)])
def test_lists_of_one_chunk_are_not_computed_again_in_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch, chunk_size: int | None, checkpointed_chunks: int
) -> None:
    calls = count_calls(monkeypatch, checkpoint="torch.utils.checkpoint.checkpoint")
    queries, candidates = unit(4, 6, seed=0).requires_grad_(), unit(4, 3, 6, seed=1)
    grades = torch.tensor([2.0, 1.0, 0.0]).expand(4, 3)
    RankedLists(chunk_size=chunk_size)(queries, candidates, grades, 10.0).backward()
    assert calls["checkpoint"] == checkpointed_chunks
