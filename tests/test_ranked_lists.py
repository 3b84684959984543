"""`RankedLists` in one process: values, gradients, memory and surroundings."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from functools import partial
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
from fake_devices import no_float64
from lists_item_by_item import F64, MODELS, Frozen, Lists, fitting, lists, lists_of, models
from memory import TensorSizes, saved_bytes
from rankloss import ClipLoss, RankedLists, graded, pair_sums, precision, reference

# --- values and gradients -----------------------------------------------------------------------------------


@models
@settings(max_examples=settings.default.max_examples * 3 // 2)
@given(
    lists=lists,
    chunk_size=st.sampled_from([None, 1, 2]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    frozen_by=st.sampled_from([None, "features", "scores"]),
)
def test_values_and_gradients_are_those_of_the_definition(
    options: dict[str, Any], lists: Lists, chunk_size: int | None, reduction: Any, frozen_by: str | None
) -> None:
    """Also of scores beyond those of a frozen model, which has no gradient."""
    loss = RankedLists(**options, reduction=reduction, chunk_size=chunk_size)
    frozen = Frozen.of(lists)
    frozen_inputs: dict[str, Any] = {}
    if frozen_by == "scores" and not loss.in_batch_negatives:  # in-batch negatives take features alone
        scores = frozen.scores.gather(1, lists.index)
        if lists.mask is not None:
            scores = scores.where(lists.mask, math.nan)  # padding is not read
        frozen_inputs = {"reference_scores": scores}
    elif frozen_by:
        frozen_inputs = frozen.as_features()
    # They ask for a gradient, to see that they get none.
    frozen_inputs = {
        name: torch.as_tensor(x, dtype=F64).clone().requires_grad_() for name, x in frozen_inputs.items()
    }
    inputs = lists.leaves()
    value = lists.loss(loss, *inputs, **frozen_inputs)
    frozen_scores = frozen.scores if frozen_inputs else None
    owed = lists.owed(*inputs, **options, reduction=reduction, frozen=frozen_scores)
    torch.testing.assert_close(value, owed, rtol=1e-11, atol=1e-11)
    upstream = upstream_for(value)
    by_all = torch.autograd.grad(value, [*inputs, *frozen_inputs.values()], upstream, allow_unused=True)
    by_inputs, by_frozen = by_all[: len(inputs)], by_all[len(inputs) :]
    assert_same(by_inputs, gradients(owed, inputs, upstream), 1e-9)
    assert by_frozen == (None,) * len(frozen_inputs)


@given(st.integers(0, 1000), st.integers(2, 12), st.sampled_from([1.0, 10.0, 100.0]))
def test_with_one_candidate_it_is_one_direction_of_clips_loss_to_the_last_bit(
    seed: int, n: int, scale: float
) -> None:
    v, t = (torch.from_numpy(x) for x in np.split(unit_rows(np.random.default_rng(seed), 2 * n, 7), 2))
    for model in ("plackett_luce", "top_one"):
        loss = RankedLists(model=model, in_batch_negatives=True)
        directions = [loss(a, b[:, None], torch.zeros(n, 1), scale) for a, b in ((v, t), (t, v))]
        assert torch.equal(directions[0], F.cross_entropy(scale * v @ t.T, torch.arange(n)))
        assert torch.equal(sum(directions) / 2, ClipLoss()(v, t, scale))


@models
@pytest.mark.parametrize("id_of", [lambda row: 2**63 - 1 - row, lambda row: row - 2**63, lambda row: -row])
def test_every_integer_is_an_id_of_a_candidate(options: dict[str, Any], id_of: Any) -> None:
    """Also where an item of no list, here the first two, comes before the candidate, or has its id."""
    lists = lists_of(0, 4, 3, 9)
    lists = replace(lists, index=lists.index % 7 + 2)
    ids = torch.tensor([id_of(max(row - 2, 0)) for row in range(9)])
    found = lists.differentiated(
        lambda *inputs: lists.loss(RankedLists(**options), *inputs, candidate_ids=ids)
    )
    assert_same(found, lists.differentiated(lambda *inputs: lists.owed(*inputs, **options)))


@models
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_an_excluded_candidate_is_no_negative_of_its_query(
    options: dict[str, Any], chunk_size: int | None
) -> None:
    """Such as a query's own caption in another query's list; without negatives nothing changes."""
    lists = lists_of(0, 5, 3, 9)
    excluded = lists.index.roll(1, 0)[:, 0]  # in the list of the query before
    ids = torch.arange(9) + 100
    loss = RankedLists(**options, chunk_size=chunk_size)
    found = lists.differentiated(
        lambda *inputs: lists.loss(loss, *inputs, candidate_ids=ids, excluded_ids=ids[excluded])
    )
    owed = lists.differentiated(
        lambda *inputs: lists.owed(*inputs, **options, excluded=[int(row) for row in excluded])
    )
    assert_same(found, owed)


def test_excluded_ids_need_ids_of_candidates() -> None:
    lists = lists_of(0, 4, 3, 9)
    loss = RankedLists(in_batch_negatives=True)
    with pytest.raises(ValueError, match="excluded_ids are ids of candidates, and need candidate_ids"):
        lists.loss(loss, *lists.leaves(), excluded_ids=torch.arange(4))
    with pytest.raises(ValueError, match=r"excluded_ids must be 4 integers, one for every pair; got .*\[3\]"):
        lists.loss(loss, *lists.leaves(), candidate_ids=torch.arange(9), excluded_ids=torch.arange(3))


LAMBDA = {"model": "lambda"}
DIFFERENCES = {"model": "pairwise", "pair_weight": "difference"}


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
    """At padding any grade is none."""
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, grade]], dtype=F64)
    q, items = torch.eye(6, dtype=F64)[:2], torch.eye(6, dtype=F64).view(2, 3, 6)
    with pytest.raises(ValueError, match=re.escape(f"grades must be {needed}; row 1 has [{grade}]")):
        RankedLists(**options)(q, items, grades)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert RankedLists(**options)(q, items, grades, mask=mask).isfinite()


@pytest.mark.parametrize("by", ["index", "ids", "index and ids"])
def test_a_candidate_with_two_grades_in_a_list_is_refused(by: str) -> None:
    """Twice with one grade it is two tied items; at padding it is none."""
    index = torch.tensor([[3, 4, 5], [0, 1, 0]])
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, True], [True, True, True]])
    q, items = torch.eye(6)[:2], torch.eye(6)
    inputs: dict[str, Any] = {"candidate_index": index}
    if by == "ids":
        items, inputs = items[index], {"candidate_ids": index}
    elif by == "index and ids":
        inputs = {"candidate_index": torch.tensor([[3, 4, 5], [0, 1, 2]])}
        inputs["candidate_ids"] = torch.tensor([7, 8, 7, 9, 10, 11])
    with pytest.raises(ValueError, match=r"grades must be one of each candidate; row 1 .*\[1\.0, 3\.0\]"):
        RankedLists()(q, items, grades, **inputs)
    RankedLists()(q, items, grades.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0)), **inputs)
    mask[1, 2] = False
    RankedLists()(q, items, grades, mask=mask, **inputs)


@models
def test_options_act_when_they_are_set_later(options: dict[str, Any]) -> None:
    lists, later = lists_of(4, 5, 4, 9), RankedLists(model="pairwise", pair_weight="difference")
    defaults = {"model": "plackett_luce", "pair_weight": None, **options}
    for name, value in defaults.items():
        setattr(later, name, value)
    value_of = lambda loss: lists.differentiated(lambda *inputs: lists.loss(loss, *inputs))  # noqa: E731
    assert_same(value_of(later), value_of(RankedLists(**options)), 0.0)


@models
@settings(max_examples=settings.default.max_examples // 2)
@given(lists=lists, data=st.data())
def test_order_and_padding_change_nothing(options: dict[str, Any], lists: Lists, data: st.DataObject) -> None:
    loss = RankedLists(**options)
    n, k = lists.grades.shape
    order = data.draw(st.permutations(range(k + 2)))
    mask = torch.ones(n, k, dtype=torch.bool) if lists.mask is None else lists.mask
    mask, index, grades = (
        F.pad(x, (0, 2), value=value)[:, order]
        for x, value in ((mask, False), (lists.index, -1), (lists.grades, math.nan))
    )
    fitted = fitting(grades, loss.model, loss.pair_weight)

    def padded(q: Tensor, c: Tensor, s: Tensor, by_index: bool = True) -> Tensor:
        pool, given = F.pad(c, (0, 0, 0, 1), value=math.nan), {"candidate_index": index} if by_index else {}
        return loss(q, pool if by_index else pool[index], fitted, s, mask=mask, **given)

    def of_own_rows(q: Tensor, c: Tensor, s: Tensor) -> Tensor:  # a candidate of several lists is several
        own = torch.arange(n * k).view(n, k)
        return lists.loss(loss, q, c[lists.index].flatten(0, 1), s, candidate_index=own)

    expected = lists.differentiated(lambda *inputs: lists.loss(loss, *inputs))
    assert_same(lists.differentiated(padded), expected)
    one_by_one = partial(padded, by_index=False)
    assert_same(lists.differentiated(one_by_one), lists.differentiated(of_own_rows))


@models
@pytest.mark.filterwarnings("ignore:logit_scale is 5000")
@pytest.mark.parametrize("scale", [356.0, 680.0, 5000.0])
def test_lists_of_any_span_are_exact(options: dict[str, Any], scale: float) -> None:
    """The candidates' scores are s, 0 and −s."""
    lists = lists_of(0, 6, 3, 3, d=2, masked=False, scale=scale)
    axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=F64)
    grades = torch.tensor(list(itertools.permutations([0.0, 1.0, 2.0])), dtype=F64)
    near = F.normalize(torch.tensor([[1.0, 1e-3 * k] for k in range(6)], dtype=F64), dim=-1)
    lists = replace(lists, queries=near, items=axis, index=torch.arange(3).expand(6, 3), grades=grades)
    found = lists.differentiated(lambda *inputs: lists.loss(RankedLists(**options), *inputs))
    assert_close(found, lists.differentiated(lambda *inputs: lists.owed(*inputs, **options)), 1e-11)


@models
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_derivative_is_nan(options: dict[str, Any]) -> None:
    """With a list of one candidate, a list without items below it, and ungraded candidates."""
    lists = lists_of(1, 3, 3, 3, masked=False)
    mask = torch.tensor([[True, True, True], [True, True, True], [True, False, False]])
    grades = torch.tensor([[2.0, 1.0, 0.0], [1.0, -math.inf, -math.inf], [1.0, 0.0, 0.0]], dtype=F64)
    lists, by = replace(lists, grades=grades, mask=mask), []
    for value_of in (lambda *x: lists.loss(RankedLists(**options), *x), lambda *x: lists.owed(*x, **options)):
        inputs = lists.leaves()
        with torch.autograd.detect_anomaly(check_nan=True):
            first = torch.autograd.grad(value_of(*inputs), inputs, create_graph=True)
            along = sum((g * torch.linspace(-1, 2, g.numel(), dtype=F64).view_as(g)).sum() for g in first)
            by.append([*first, *torch.autograd.grad(along, inputs)])
    assert_same(by[0], by[1], 1e-9)


# --- a frozen model's scores --------------------------------------------------------------------------------


def test_a_frozen_copy_leaves_equal_scores() -> None:
    """Exactly, so that a training begins at the loss of a list without an order."""
    lists = lists_of(6, 4, 5, 9, masked=False)
    q, c, s = lists.leaves(torch.float32)
    frozen = Frozen(lists.queries.float(), lists.items.float(), lists.scale).as_features()
    loss = RankedLists(model="pairwise")
    assert lists.loss(loss, q, c, s, **frozen).item() == pytest.approx(math.log(2), rel=1e-7)


@pytest.mark.filterwarnings("ignore:candidate_features should be unit-norm")
def test_the_pairwise_model_of_two_grades_is_dpo() -> None:
    """−log σ(β·[(log π − log π_ref)(better) − (…)(worse)]), with log π as a model of texts has it."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, 2, dtype=F64, generator=generator, requires_grad=True)
    frozen = torch.randn(5, 2, dtype=F64, generator=generator)
    beta, better = 0.3, torch.tensor([0, 1, 1, 0, 1])
    log_ratios = policy.log_softmax(-1) - frozen.log_softmax(-1)
    worse, rows = 1 - better, torch.arange(5)
    dpo = -F.logsigmoid(beta * (log_ratios[rows, better] - log_ratios[rows, worse])).mean()
    grades = F.one_hot(better)
    queries = torch.ones(5, 1, dtype=F64)
    found = RankedLists(model="pairwise")(
        queries, policy[:, :, None], grades, beta, reference_scores=beta * frozen
    )
    assert_same([found], [dpo], 1e-14)
    assert_same(gradients(found, (policy,), 1.3), gradients(dpo, (policy,), 1.3), 1e-14)


# --- NDCG-Loss2++ -------------------------------------------------------------------------------------------


def test_scores_that_tie_share_a_rank_wherever_they_stand() -> None:
    x, grades = torch.tensor([[[1.0, 1.0, 0.0, 1.0]], [[2.0, 0.0, 1.0, 1.0]]], dtype=F64)
    owed = reference.lambda_loss(x[0], grades[0])
    for order in itertools.permutations(range(4)):
        value, terms = graded.lambda_loss(x[:, order], grades[:, order], x[:, order])
        assert value.item() == pytest.approx(owed, rel=1e-14)
        assert terms.tolist() == [1]


def test_exponential_gains_of_any_grade_are_finite() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0]], dtype=F64)
    grades = torch.tensor([[2.0**53, 0.0, 2000.0]], dtype=F64)
    value, _ = graded.lambda_loss(x, grades, x, gain="exponential")
    swapped, _ = graded.lambda_loss(x, (grades > 2000).double(), x, gain="exponential")
    # All but the largest gain vanish beside it.
    assert value.item() == pytest.approx(swapped.item(), rel=1e-14)


def test_lists_without_a_gain_count_nothing() -> None:
    lists = replace(lists_of(0, 3, 2, 4), grades=torch.zeros(3, 2))
    assert lists.loss(RankedLists(model="lambda"), *lists.leaves()) == 0


# --- beyond one chunk, and in other surroundings ------------------------------------------------------------


@pytest.mark.parametrize("options", MODELS[2:], ids=str)
def test_memory_is_linear_in_the_candidates(options: dict[str, Any]) -> None:
    """The bytes kept do not grow with the queries, nor does the largest tensor, beside the features."""
    kept, largest = [], []
    for n in (8, 16, 32):
        lists = lists_of(0, n, 3, 64, masked=False)
        loss = RankedLists(**options, chunk_size=2)
        inputs = lists.leaves()
        kept.append(saved_bytes(lambda: lists.loss(loss, *inputs)))  # noqa: B023
        with TensorSizes() as sizes:
            lists.loss(loss, *inputs).backward()
        largest.append(sizes.largest)
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0])
    assert kept[2] < 32 * 64 * 8 + 8 * 64 * 3 * 8 * 5
    assert max(largest) <= max(32 * 3 * 5, 2 * 64 * 3)


def test_padding_is_not_looked_at_nor_are_equal_queries_without_negatives() -> None:
    v, t = (torch.from_numpy(unit_rows(np.random.default_rng(0), 4, 3)) for _ in range(2))
    mask = torch.tensor([[True, False], [True, True]])
    given = {"grades": torch.eye(2), "mask": mask, "candidate_features": t.view(2, 2, 3) * mask[..., None]}
    entries = RankedLists()(v[[0, 0]], logit_scale=10.0, output_dict=True, **given)  # a warning is an error
    assert entries["ranked_lists_loss"].isfinite()


def test_a_device_without_float64_refuses_integers_that_float32_rounds() -> None:
    grades = torch.tensor([[2**24 + 1, 2**24]])
    given = torch.eye(2)[:1], torch.eye(2)[None], grades
    assert RankedLists()(*given).isfinite()
    with (
        no_float64(),
        pytest.raises(
            ValueError, match=r"grades must be at most 2²⁴, to stay distinct.*float32.* row 0 .*16777217"
        ),
    ):
        RankedLists()(*given)


def test_pairs_with_negatives_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor holds all pairs, and no more is kept for the backward pass than with Plackett–Luce."""
    lists = lists_of(0, 8, 12, 512, masked=False)
    loss = RankedLists(model="pairwise", in_batch_negatives=True)
    owed = lists.differentiated(lambda *inputs: lists.loss(loss, *inputs))
    monkeypatch.setattr(pair_sums, "_PAIRS_AT_ONCE", {"cpu": 3 * 128})
    with TensorSizes() as sizes:
        assert_same(lists.differentiated(lambda *inputs: lists.loss(loss, *inputs)), owed, 1e-12)
    negatives = len(lists.index.unique())
    assert sizes.largest < 12 * negatives * 8 / 2
    loss.model, inputs = "plackett_luce", lists.leaves()
    kept = saved_bytes(lambda: lists.loss(loss, *inputs))
    loss.model = "pairwise"
    assert saved_bytes(lambda: lists.loss(loss, *inputs)) <= kept + 8 * (4 * 12 * 12 + 2 * 512) * 8


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_long_lists_are_summed_by_cells(
    dtype: torch.dtype, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding in value and gradients, also of the second order, and without a tensor of all pairs."""
    generator = torch.Generator().manual_seed(0)
    x, rest = (spread * torch.randn(3, n, dtype=F64, generator=generator).clamp(-3, 3) for n in (64, 8000))
    rest[0, 5:900] = rest[1] = -math.inf  # the second list has no rest
    upstream = torch.rand(3, 64, dtype=F64, generator=generator)
    found, by_pair = [], pair_sums.pair_sums
    monkeypatch.delattr(pair_sums, "pair_sums")
    for sums, kind in ((pair_sums.rest_sums, dtype), (by_pair, F64)):
        inputs = [z.to(dtype).to(kind).requires_grad_() for z in (x, rest)]
        with TensorSizes() as sizes:
            value = sums(*inputs)
            first = torch.autograd.grad(value, inputs, upstream.to(kind), retain_graph=True)
        again = torch.autograd.grad(value, inputs, upstream.to(kind), create_graph=True)
        second = torch.autograd.grad(sum((g * g.detach()).sum() for g in again), inputs)
        found.append([value, *first, *second])
        assert kind is F64 or sizes.largest < 3 * 64 * 8000
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= {F64: 1e-13, torch.float32: 1e-6}[dtype] * b.norm()


@pytest.mark.parametrize("near", [False, True], ids=["drawn", "with a near duplicate"])
def test_pairs_of_long_lists_take_few_times_plackett_luces_work(near: bool) -> None:
    """Counted by the elements of all results, 18 times as many if all pairs are computed; up to 120 nats."""
    generator = torch.Generator().manual_seed(0)
    q, c = (F.normalize(torch.randn(*n, 64, generator=generator), dim=-1) for n in ((128,), (128, 64)))
    if near:
        c[1, 0] = F.normalize(q[0] + 0.5 * c[1, 0], dim=-1)
    grades = torch.randint(0, 5, (128, 64), generator=generator)
    work = []
    for model in ("plackett_luce", "pairwise"):
        inputs = [x.clone().requires_grad_() for x in (q, c)]
        with TensorSizes() as sizes:
            RankedLists(model=model, in_batch_negatives=True)(*inputs, grades, 100.0).backward()
        work.append(sizes.total)
    assert work[1] < 8 * work[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_long_lists_of_any_span_are_summed(bad: float) -> None:
    x, rest = torch.zeros(1, 64), torch.zeros(1, 8000)
    rest[0, 7] = bad
    owed = (torch.nn.functional.softplus(rest[:, None] - x[:, :, None])).sum(-1)
    torch.testing.assert_close(pair_sums.rest_sums(x, rest), owed, equal_nan=True)


def test_equal_candidates_share_a_rank_though_products_round_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights of the lambda model depend on ranks, and other devices' products on the place of a row."""
    query = unit(1, 4, seed=0)
    first, second = unit(2, 4, seed=1)
    inputs = query, torch.stack([first, second, first])[None], torch.tensor([[2.0, 0.0, 1.0]]), 10.0
    loss = RankedLists(model="lambda")
    owed = loss(*inputs)
    exact_product = precision.product

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        exact = exact_product(a, b)
        return exact + 1e-9 * torch.arange(exact.numel()).view_as(exact)

    monkeypatch.setattr(precision, "product", rounded)
    torch.testing.assert_close(loss(*inputs), owed, rtol=1e-6, atol=0)


def test_lists_of_one_chunk_are_not_computed_again_in_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpointed: list[int] = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        checkpointed.append(1)
        return checkpoint(function, *args, **options)

    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", counted)
    query, candidates = unit(4, 6, seed=0).requires_grad_(), unit(4, 3, 6, seed=1)
    grades = torch.tensor([2.0, 1.0, 0.0]).expand(4, 3)
    for chunk_size, chunks in ((None, 0), (4, 0), (3, 2), (1, 4)):
        checkpointed.clear()
        RankedLists(chunk_size=chunk_size)(query, candidates, grades, 10.0).backward()
        assert len(checkpointed) == chunks
