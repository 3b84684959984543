from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batches import assert_close, gradients, unit_rows, upstream_for
from collectives import Collectives
from devices import DEVICE
from memory import LargestTensor, saved_bytes
from no_float64 import no_float64
from process_pool import Pools
from rankloss import ClipLoss, Gather, InputWarning, RankedLists, graded, plackett_luce_nll, reference

F64 = torch.float64


@dataclass(frozen=True)
class Lists:
    """N lists of K candidates among M items; float64."""

    queries: Tensor
    items: Tensor
    index: Tensor
    grades: Tensor
    scale: float
    mask: Tensor | None = None

    def leaves(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
        given = self.queries, self.items, torch.tensor(self.scale, dtype=F64)
        return tuple(x.detach().to(DEVICE, dtype).requires_grad_() for x in given)  # type: ignore[return-value]

    def loss(self, loss: RankedLists, q: Tensor, c: Tensor, s: Tensor, **more: Any) -> Tensor:
        given = {"candidate_index": self.index, "mask": self.mask, **more}
        found: Tensor = loss(q, c, fitting(self.grades, loss.model), s, **given)
        return found

    def differentiated(self, value_of: Callable[..., Tensor], upstream: Tensor | float = 1.3) -> list[Tensor]:
        """A value of queries, items and scale, and its gradients."""
        inputs = self.leaves()
        value = value_of(*inputs)
        return [value, *gradients(value, inputs, upstream)]

    def owed(self, q: Tensor, c: Tensor, s: Tensor, **options: Any) -> Tensor:
        grades = fitting(self.grades, options.get("model"))
        found: Tensor = literal(q, c, self.index, grades, s, self.mask, **options)
        return found


def literal(
    query_features: Any,
    items: Any,
    index: Any,
    grades: Any,
    logit_scale: Any,
    mask: Any = None,
    *,
    model: str = "plackett_luce",
    top_k: int | None = None,
    pair_weight: str | None = None,
    gain: str = "linear",
    in_batch_negatives: bool = False,
    reduction: str = "mean",
    frozen: Any = None,
) -> Any:
    """The loss item by item, differentiable: ``rankloss.reference`` has no lists of their own lengths.

    ``frozen`` has the reference's scores of all queries and items.
    """
    is_item = grades == grades if mask is None else mask
    rows = [[int(i) for i in places[kept]] for places, kept in zip(index, is_item, strict=True)]
    values, terms = [], []
    for n, own in enumerate(rows):
        g = [float(y) for y in grades[n][is_item[n]]]
        others = []
        if in_batch_negatives:
            listed = sorted({j for row in rows for j in row})
            others = [j for j in listed if not any((items[j] == items[i]).all() for i in own)]
        g += [-math.inf] * len(others)
        x = [logit_scale * (query_features[n] * items[j]).sum() for j in [*own, *others]]
        if frozen is not None:
            x = [score - float(frozen[n, j]) for score, j in zip(x, [*own, *others], strict=True)]
        if model == "lambda":
            weights = reference.lambda_weights([score.item() for score in x], g, gain=gain)
            pairs = np.argwhere(weights)
            value, count = sum(weights[p, q] * _log_sum([0 * x[p], x[q] - x[p]]) for p, q in pairs), 1
        else:
            value, count = _list_value(x, g, model, top_k, pair_weight)
        ranked = len(set(g)) > 1
        values.append(value if ranked else 0 * x[0])
        terms.append(count if ranked else 0)
    if reduction == "mean":
        kept = [value / count for value, count in zip(values, terms, strict=True) if count]
        return sum(kept) / len(kept) if kept else 0 * sum(values)
    return sum(values) if reduction == "sum" else torch.stack(values)


def _log_sum(x: list[Any]) -> Any:
    return torch.stack(x).logsumexp(0)


def _list_value(
    x: list[Any], g: list[float], model: str, top_k: int | None, pair_weight: str | None
) -> tuple[Any, int]:
    """The value of one list and the number of its terms."""

    graded = [p for p in range(len(g)) if g[p] > -math.inf]
    value, count = 0 * x[0], 0
    if model == "top_one":
        total = sum(math.exp(g[p] - max(g)) for p in graded)
        for p in graded:
            value = value + math.exp(g[p] - max(g)) / total * (_log_sum(x) - x[p])
        return value, 1
    for p in graded:
        worse = [q for q in range(len(g)) if g[q] < g[p]]
        if model == "pairwise":
            for q in worse:
                weight = g[p] - g[q] if pair_weight else 1.0
                value, count = value + weight * _log_sum([0 * x[p], x[q] - x[p]]), count + 1
        elif top_k is None or 1 + sum(y > g[p] for y in g) <= top_k:
            below = [x[q] for q in range(len(g)) if g[q] <= g[p]]
            value, count = value + _log_sum(below) - x[p], count + (len(below) > 1)
    return value, count


def fitting(grades: Tensor, model: str | None) -> Tensor:
    """Grades that the model takes: the lowest is 0 and not −∞ for ``"lambda"``."""
    return grades.clamp_min(0.0) if model == "lambda" else grades


def lists_of(
    seed: int, n: int, k: int, m: int, *, scale: float = 10.0, d: int = 5, masked: bool = True, equal: int = 0
) -> Lists:
    """Grades have ties and −∞; the last ``equal`` items repeat the first."""
    rng = np.random.default_rng(seed)
    items = unit_rows(rng, m, d)
    items[m - equal :] = items[:equal]
    index = np.stack([rng.permutation(m)[:k] if k <= m else rng.integers(0, m, k) for _ in range(n)])
    grades = rng.integers(0, 4, (n, k)).astype(float)
    grades[grades == 0] = rng.choice([0.0, -math.inf], (grades == 0).sum())
    mask = rng.random((n, k)) < 0.7
    mask[np.arange(n), rng.integers(0, k, n)] = True
    arrays = unit_rows(rng, n, d), items, index, grades
    return Lists(*map(torch.from_numpy, arrays), scale, torch.from_numpy(mask) if masked else None)


lists = st.builds(
    lambda seed, n, k, more, equal, scale, masked: lists_of(
        seed, n, k, k + more, equal=min(equal, (k + more) // 2), scale=scale, masked=masked
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 8),
    st.integers(0, 3),
    st.sampled_from([1.0, 10.0, 100.0]),
    st.booleans(),
)

MODELS: list[dict[str, Any]] = [
    {},
    {"top_k": 2},
    {"model": "top_one"},
    {"model": "pairwise"},
    {"model": "lambda"},
    {"model": "lambda", "gain": "exponential"},
    {"in_batch_negatives": True},
    {"in_batch_negatives": True, "top_k": 1},
    {"in_batch_negatives": True, "model": "top_one"},
    {"in_batch_negatives": True, "model": "pairwise"},
]
models = pytest.mark.parametrize("options", MODELS, ids=lambda o: "-".join(map(str, o.values())) or "default")


# --- values and gradients -----------------------------------------------------------------------------------


@models
@given(
    lists=lists,
    chunk_size=st.sampled_from([None, 1, 2]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_values_and_gradients_are_those_of_the_definition(
    options: dict[str, Any], lists: Lists, chunk_size: int | None, reduction: Any
) -> None:
    inputs = lists.leaves()
    value = lists.loss(RankedLists(**options, reduction=reduction, chunk_size=chunk_size), *inputs)
    owed = lists.owed(*inputs, **options, reduction=reduction)
    torch.testing.assert_close(value, owed, rtol=1e-11, atol=1e-11)
    found, expected = (gradients(x, inputs, upstream_for(value)) for x in (value, owed))
    assert_same(found, expected, 1e-9)


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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


@given(st.integers(0, 2**32 - 1), st.permutations(range(5)))
def test_of_a_whole_list_it_is_the_public_likelihood(seed: int, order: list[int]) -> None:
    lists = lists_of(seed, 4, 5, 9)
    q, c, s = lists.leaves()
    scores = s * (q[:, None] * c[lists.index]).sum(-1)
    grades = torch.tensor(order) // 2
    found = RankedLists(reduction="none", top_k=3)(q, c[lists.index], grades.expand(4, 5), s)
    assert_same([found], [plackett_luce_nll(scores, grades.expand(4, 5), top_k=3)])


@models
def test_options_act_when_they_are_set_later(options: dict[str, Any]) -> None:
    lists, later = lists_of(4, 5, 4, 9), RankedLists(model="pairwise", pair_weight="difference")
    defaults = {"model": "plackett_luce", "pair_weight": None, **options}
    for name, value in defaults.items():
        setattr(later, name, value)
    value_of = lambda loss: lists.differentiated(lambda *inputs: lists.loss(loss, *inputs))  # noqa: E731
    assert_same(value_of(later), value_of(RankedLists(**options)), 0.0)


@models
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

    def by_index(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
        pool = F.pad(c, (0, 0, 0, 1), value=math.nan)
        return loss(q, pool, fitting(grades, loss.model), s, candidate_index=index, mask=mask)

    def one_by_one(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
        pool = F.pad(c, (0, 0, 0, 1), value=math.nan)
        return loss(q, pool[index], fitting(grades, loss.model), s, mask=mask)

    def of_own_rows(q: Tensor, c: Tensor, s: Tensor) -> Tensor:  # a candidate of several lists is several
        own = torch.arange(n * k).view(n, k)
        return lists.loss(loss, q, c[lists.index].flatten(0, 1), s, candidate_index=own)

    expected = lists.differentiated(lambda *inputs: lists.loss(loss, *inputs))
    assert_same(lists.differentiated(by_index), expected)
    assert_same(lists.differentiated(one_by_one), lists.differentiated(of_own_rows))


def test_pairs_may_be_weighed_by_the_difference_of_their_grades() -> None:
    lists = lists_of(3, 4, 4, 9)
    lists = replace(lists, grades=lists.grades.clamp_min(0.0))
    options: dict[str, Any] = {"model": "pairwise", "pair_weight": "difference"}
    found = lists.differentiated(lambda *inputs: lists.loss(RankedLists(**options), *inputs))
    assert_same(found, lists.differentiated(lambda *inputs: lists.owed(*inputs, **options)))
    assert found[0] != lists.owed(*lists.leaves(), model="pairwise")


@models
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


@dataclass(frozen=True)
class Frozen:
    """A frozen model of another width, and its scores of all queries and items."""

    queries: Tensor
    items: Tensor
    scale: float = 7.0

    @classmethod
    def of(cls, lists: Lists, seed: int = 5) -> Frozen:
        rng = np.random.default_rng(seed)
        return cls(*(torch.from_numpy(unit_rows(rng, len(x), 3)) for x in (lists.queries, lists.items)))

    @property
    def scores(self) -> Tensor:
        return self.scale * self.queries @ self.items.T

    def as_features(self, rows: slice = slice(None), places: slice = slice(None)) -> dict[str, Any]:
        return {
            "reference_query_features": self.queries[rows],
            "reference_candidate_features": self.items[places],
            "reference_scale": self.scale,
        }


@models
@settings(max_examples=15)
@given(lists=lists, chunk_size=st.sampled_from([None, 1, 2]))
def test_a_frozen_models_scores_are_subtracted(
    options: dict[str, Any], lists: Lists, chunk_size: int | None
) -> None:
    frozen, loss = Frozen.of(lists), RankedLists(**options, chunk_size=chunk_size)
    owed = lists.differentiated(lambda *inputs: lists.owed(*inputs, **options, frozen=frozen.scores))
    given = [frozen.as_features()]
    if not loss.in_batch_negatives:
        scores = frozen.scores.gather(1, lists.index)
        padded = scores if lists.mask is None else scores.where(lists.mask, math.nan)
        given.append({"reference_scores": padded})
    for more in given:
        found = lists.differentiated(lambda *inputs: lists.loss(loss, *inputs, **more))  # noqa: B023
        assert_same(found, owed, 1e-9)


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


def test_a_frozen_model_has_no_gradient() -> None:
    lists = lists_of(6, 4, 5, 9, masked=False)
    features = {**Frozen.of(lists).as_features(), "reference_scale": torch.tensor(7.0, dtype=F64)}
    for options, frozen in (
        ({"in_batch_negatives": True}, features),
        ({}, {"reference_scores": torch.randn(4, 5, dtype=F64)}),
    ):
        leaves = {name: x.clone().requires_grad_() for name, x in frozen.items()}
        lists.loss(RankedLists(**options), *lists.leaves(), **leaves).backward()
        assert all(x.grad is None for x in leaves.values())


# --- NDCG-Loss2++ -------------------------------------------------------------------------------------------


def by_ranks(x: Tensor, grades: Tensor, gain: str) -> Tensor:
    """One list's value as allRank defines it: everything in the order of the scores, without ties."""
    order = x.argsort(descending=True)
    x, g = x[order], grades[order]
    places = torch.arange(1, len(x) + 1, dtype=F64)
    discounts = torch.log2(1 + places)
    gains = {"linear": lambda y: y, "exponential": lambda y: 2**y - 1}[gain]
    ideal = (gains(g.sort(descending=True).values) / discounts).sum()
    distances = (places[:, None] - places[None, :]).abs()
    deltas = (1 / torch.log2(1 + distances) - 1 / torch.log2(2 + distances)).abs().fill_diagonal_(0)
    swaps = (1 / discounts[:, None] - 1 / discounts[None, :]).abs()
    change = (gains(g)[:, None] - gains(g)[None, :]).abs() / ideal
    weights = (10 * deltas + swaps) * change
    is_pair = g[:, None] > g[None, :]
    return -(weights * F.logsigmoid(x[:, None] - x[None, :]))[is_pair].sum()


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.sampled_from(["linear", "exponential"]))
def test_lambda_is_allranks_definition_and_the_references(seed: int, k: int, gain: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(4, k, dtype=F64, generator=generator)
    grades = torch.randint(0, 5, (4, k), generator=generator).double()
    grades[:, 0] = 5.0
    found = []
    for value_of in (
        lambda x: graded.lambda_loss(x, grades, x, gain=gain)[0],
        lambda x: torch.stack([by_ranks(a, b, gain) for a, b in zip(x, grades, strict=True)]),
    ):
        leaf = x.clone().requires_grad_()
        value = value_of(leaf)
        found.append([value, *gradients(value, (leaf,), torch.linspace(-1, 2, 4, dtype=F64))])
    assert_close(found[0], found[1], 1e-12)
    of_reference = [reference.lambda_loss(a, b, gain=gain) for a, b in zip(x, grades, strict=True)]
    assert_close([found[0][0]], [of_reference], 1e-12)


def test_scores_that_tie_share_a_rank_wherever_they_stand() -> None:
    x, grades = (
        torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=F64),
        torch.tensor([[2.0, 0.0, 1.0, 1.0]], dtype=F64),
    )
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
    assert value.item() == pytest.approx(
        swapped.item(), rel=1e-14
    )  # all but the largest gain vanish beside it


def test_lists_without_a_gain_count_nothing() -> None:
    assert call(RankedLists(model="lambda"), grades=torch.zeros(3, 2)) == 0


# --- beyond one chunk, and in other surroundings ------------------------------------------------------------


@pytest.mark.parametrize("options", MODELS[2:], ids=str)
def test_memory_is_linear_in_the_candidates(options: dict[str, Any]) -> None:
    """The bytes kept do not grow with the queries, nor does the largest tensor, beside the features."""
    kept, largest = [], []
    for n in (16, 32, 64):
        lists = lists_of(0, n, 3, 64, masked=False)
        loss = RankedLists(**options, chunk_size=2)
        inputs = lists.leaves()
        kept.append(saved_bytes(lambda: lists.loss(loss, *inputs)))  # noqa: B023
        with LargestTensor() as tensors:
            lists.loss(loss, *inputs).backward()
        largest.append(tensors.elements)
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0])
    assert kept[2] < 64 * 64 * 8 + 8 * 64 * 3 * 8 * 5
    assert max(largest) <= max(64 * 3 * 5, 2 * 64 * 3)


@models
@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_a_device_without_float64_computes_in_float32(options: dict[str, Any], scale: float) -> None:
    lists = lists_of(2, 5, 6, 9, scale=scale, equal=2)
    owed = lists.differentiated(lambda *inputs: lists.owed(*inputs, **options))
    single, inputs = replace(lists, grades=lists.grades.float()), lists.leaves(torch.float32)
    with no_float64():
        value = single.loss(RankedLists(**options), *inputs)
        found = [value, *gradients(value, inputs, 1.3)]
    assert_close(found, owed, 1e-4)


def test_a_device_without_float64_refuses_integers_that_float32_rounds() -> None:
    grades = torch.tensor([[2**24 + 1, 2**24]])
    given = torch.eye(2)[:1], torch.eye(2)[None], grades
    assert RankedLists()(*given).isfinite()
    with no_float64(), pytest.raises(ValueError, match=r"grades must be at most 2²⁴, .*float32; row 0"):
        RankedLists()(*given)


def test_pairs_with_negatives_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor holds all pairs, and no more is kept for the backward pass than with Plackett–Luce."""
    lists = lists_of(0, 8, 16, 512, masked=False)
    loss = RankedLists(model="pairwise", in_batch_negatives=True)
    owed = lists.differentiated(lambda *inputs: lists.loss(loss, *inputs))
    monkeypatch.setattr(graded, "_PAIRS_AT_ONCE", {"cpu": 3 * 128})
    with LargestTensor() as tensors:
        assert_same(lists.differentiated(lambda *inputs: lists.loss(loss, *inputs)), owed, 1e-12)
    negatives = len(lists.index.unique())
    assert tensors.elements < 16 * negatives * 8 / 2
    loss.model, inputs = "plackett_luce", lists.leaves()
    kept = saved_bytes(lambda: lists.loss(loss, *inputs))
    loss.model = "pairwise"
    assert saved_bytes(lambda: lists.loss(loss, *inputs)) <= kept + 8 * (4 * 16 * 16 + 2 * 512) * 8


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_long_lists_are_summed_by_cells(dtype: torch.dtype, spread: float) -> None:
    """To rounding in value and gradients, also of the second order, and without a tensor of all pairs."""
    generator = torch.Generator().manual_seed(0)
    x, rest = (spread * torch.randn(3, n, dtype=F64, generator=generator).clamp(-3, 3) for n in (64, 8000))
    rest[0, 5:900] = rest[1] = -math.inf  # the second list has no rest
    upstream = torch.rand(3, 64, dtype=F64, generator=generator)
    found = []
    for sums, kind in ((graded._rest_sums, dtype), (graded._pair_sums, F64)):
        inputs = [z.to(dtype).to(kind).requires_grad_() for z in (x, rest)]
        with LargestTensor() as tensors:
            value = sums(*inputs)
            first = torch.autograd.grad(value, inputs, upstream.to(kind), retain_graph=True)
        again = torch.autograd.grad(value, inputs, upstream.to(kind), create_graph=True)
        second = torch.autograd.grad(sum((g * g.detach()).sum() for g in again), inputs)
        found.append([value, *first, *second])
        assert kind is F64 or tensors.elements < 3 * 64 * 8000
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= {F64: 1e-10, torch.float32: 2e-6}[dtype] * b.norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_long_lists_of_any_span_are_summed(bad: float) -> None:
    x, rest = torch.zeros(1, 64), torch.zeros(1, 8000)
    rest[0, 7] = bad
    owed = (torch.nn.functional.softplus(rest[:, None] - x[:, :, None])).sum(-1)
    torch.testing.assert_close(graded._rest_sums(x, rest), owed, equal_nan=True)


# --- several processes --------------------------------------------------------------------------------------

FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
SHARDED = [{**options, "reduction": reduction} for options in MODELS for reduction in ("mean", "sum")]
N, K, M = 3, 3, 7  # lists, candidates and rows of a process


def whole(world_size: int) -> Lists:
    """Every process's lists have candidates of its own rows; some rows are equal across processes."""
    shards = [lists_of(rank, N, K, M) for rank in range(world_size)]
    for shard in shards[1:]:
        shard.items[:2] = shards[0].items[:2]
    queries, items, grades, mask = (
        torch.cat([getattr(x, name) for x in shards]) for name in ("queries", "items", "grades", "mask")
    )
    index = torch.cat([x.index + rank * M for rank, x in enumerate(shards)])
    return Lists(queries, items, index, grades, 10.0, mask)


def of_this_rank(rank: int, world_size: int) -> dict[Any, list[Tensor]]:
    lists = whole(world_size)
    rows, places = slice(rank * N, (rank + 1) * N), slice(rank * M, (rank + 1) * M)
    own = Lists(
        lists.queries, lists.items, lists.index[rows] - rank * M, lists.grades[rows], 10.0, lists.mask[rows]
    )
    found = {}
    for case, flags in itertools.product(range(len(SHARDED)), [*FLAGS, None]):
        gather = None if flags is None else Gather(local_loss=flags[0], gather_with_grad=flags[1])
        options = SHARDED[case]
        loss = RankedLists(**options, gather=gather)
        found[case, flags] = own.differentiated(lambda q, c, s: own.loss(loss, q[rows], c[places], s))  # noqa: B023
        frozen = Frozen.of(lists).as_features(rows, places)
        value = lambda q, c, s: own.loss(loss, q[rows], c[places], s, **frozen)  # noqa: B023, E731
        found[case, flags, "frozen"] = own.differentiated(value)
        if options["reduction"] == "sum":
            loss.reduction, upstream = "none", torch.linspace(-1.7, 0.6, len(lists.grades), dtype=F64)[rows]
            value = lambda q, c, s: own.loss(loss, q[rows], c[places], s)  # noqa: B023, E731
            found[case, flags, "none"] = own.differentiated(value, upstream)
    bad = own.leaves()
    if rank == world_size - 1:
        bad[0].data[rows.start, 0] = math.nan
    found["nan"] = [own.loss(RankedLists(), bad[0][rows], bad[1][places], bad[2])]
    return found


@pytest.fixture(scope="module", params=[1, 2, 3])
def table(request: pytest.FixtureRequest, pools: Pools) -> list[dict[Any, list[Tensor]]]:
    return pools[request.param].run(of_this_rank)


@pytest.mark.parametrize("is_frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("case", range(len(SHARDED)), ids=lambda case: str(SHARDED[case]))
def test_values_and_gradients_of_several_processes_are_those_of_one(
    table: list[Any], case: int, is_frozen: bool
) -> None:
    world_size, options = len(table), SHARDED[case]
    lists = whole(world_size)
    more = {"frozen": Frozen.of(lists).scores} if is_frozen else {}
    value, *by = lists.differentiated(lambda *inputs: lists.owed(*inputs, **options, **more))
    for flags in [*FLAGS, None]:
        local_loss, gather_with_grad = flags or (True, True)
        key = (case, flags, "frozen") if is_frozen else (case, flags)
        averaged = [torch.stack(x).mean(0) for x in zip(*(of[key] for of in table), strict=True)]
        assert_same([averaged[0], averaged[3]], [value, by[2]])
        is_local = local_loss and not options.get("in_batch_negatives")  # nothing is gathered
        if gather_with_grad or is_local or world_size == 1:
            assert_same(averaged[1:3], by[:2])
        elif not local_loss:  # as in CLIP's loss
            assert_same(averaged[1:3], [x / world_size for x in by[:2]])
        else:
            assert_same(averaged[1:2], by[:1])  # the candidates lack the other processes' lists


@pytest.mark.parametrize(
    "case", [k for k, options in enumerate(SHARDED) if options["reduction"] == "sum"], ids=str
)
def test_values_per_query_are_those_of_the_processs_own_queries(table: list[Any], case: int) -> None:
    options = {**SHARDED[case], "reduction": "none"}
    lists = whole(len(table))
    upstream = torch.linspace(-1.7, 0.6, len(lists.grades), dtype=F64)
    value, *by = lists.differentiated(lambda *inputs: lists.owed(*inputs, **options), upstream)
    for flags in [*FLAGS, None]:
        values, *gradients_of = zip(*(of[case, flags, "none"] for of in table), strict=True)
        assert_same([torch.cat(values)], [value])
        assert_same([sum(gradients_of[0]), sum(gradients_of[2])], [by[0], by[2]])
        if flags in (None, (True, True), (False, True)) or not options.get("in_batch_negatives"):
            assert_same([sum(gradients_of[1])], [by[1]])


def test_nan_of_one_process_is_seen_by_all(table: list[Any]) -> None:
    assert all(of_rank["nan"][0].isnan() for of_rank in table)


def collectives(rank: int, world_size: int) -> list[dict[str, int]]:
    counts = []
    for options in ({}, {"in_batch_negatives": True}):
        lists, loss = lists_of(rank, N, K, M), RankedLists(**options)
        for _ in range(2):
            with Collectives() as calls:
                lists.loss(loss, *lists.leaves())
        counts.append(dict(calls.counts))
    return counts


def of_ids(rank: int, world_size: int) -> list[Tensor]:
    """Processes share candidates, whose features differ by a rounding."""
    lists = lists_of(0, 2 * N, K, M)
    rows = slice(rank * N, (rank + 1) * N) if world_size == 2 else slice(None)
    own = Lists(lists.queries, lists.items, lists.index[rows], lists.grades[rows], 10.0, lists.mask[rows])
    loss, ids = RankedLists(in_batch_negatives=True), torch.arange(M) - 3

    def value(q: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return own.loss(loss, q[rows], c * (1 + rank * 1e-14), s, candidate_ids=ids)

    return own.differentiated(value)


def test_a_candidate_is_one_by_its_id_on_all_processes(pools: Pools) -> None:
    (alone,), of_ranks = pools[1].run(of_ids), pools[2].run(of_ids)
    assert_same([torch.stack(x).mean(0) for x in zip(*of_ranks, strict=True)], alone)
    lists = lists_of(0, 2 * N, K, M)
    assert_same(alone, lists.differentiated(lambda *inputs: lists.owed(*inputs, in_batch_negatives=True)))


def test_without_negatives_only_the_number_of_lists_is_gathered(pools: Pools) -> None:
    assert pools[2].run(collectives) == [[{"allreduce": 1, "allgather": n} for n in (1, 4)]] * 2


def of_one_query(rank: int, world_size: int) -> str:
    lists = lists_of(rank, N, K, M)
    q, *inputs = lists.leaves()
    q.data[1] = lists_of(0, N, K, M).queries[0]
    with pytest.raises(ValueError, match="must not hold a query twice") as caught:
        lists.loss(RankedLists(in_batch_negatives=True), q, *inputs)
    return str(caught.value)


def test_a_query_of_two_processes_may_not_be_its_own_negative(pools: Pools) -> None:
    first, second = pools[2].run(of_one_query)
    assert first == second


# --- bad input ----------------------------------------------------------------------------------------------


def call(loss: RankedLists | None = None, **changed: Any) -> Tensor:
    rng = np.random.default_rng(0)
    given = {
        "query_features": torch.from_numpy(unit_rows(rng, 3, 4)),
        "candidate_features": torch.from_numpy(unit_rows(rng, 6, 4)).view(3, 2, 4),
        "grades": torch.tensor([[1.0, 0.0]] * 3),
        "logit_scale": 10.0,
    }
    given.update({k: v(given[k]) if callable(v) else v for k, v in changed.items()})
    return (loss or RankedLists())(**given)


def with_(place: tuple[int, int], value: Any) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[place] = value
        return x

    return changed


INDEX = torch.tensor([[0, 1], [2, 3], [4, 5]])
POOL = {"candidate_features": lambda x: x.flatten(0, 1), "candidate_index": INDEX}
MASK = torch.ones(3, 2, dtype=torch.bool)
FROZEN: dict[str, Any] = {
    "reference_query_features": torch.ones(3, 7),
    "reference_candidate_features": torch.ones(3, 2, 7),
    "reference_scale": 1.0,
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "infinity": ({"grades": with_((1, 0), math.inf)}, r"grades must be numbers.*; row 1 has \[inf\]"),
    "large integers": ({"grades": torch.full((3, 2), 2**53 + 1)}, "grades must be at most 2⁵³.*; row 0 has"),
    "the least integer": (
        {"grades": torch.full((3, 2), -(2**63))},
        "grades must be at most 2⁵³.*; row 0 has",
    ),
    "words": ({"grades": [["a", "b"]]}, r"grades must be a torch\.Tensor; got list"),
    "booleans": ({"grades": MASK}, r"grades must be of .*; got torch\.bool"),
    "one list": ({"grades": torch.zeros(2)}, r"grades must have shape \[N, K\].*; got \(2,\)"),
    "lists": ({"grades": torch.zeros(2, 2)}, r"grades must have shape .*N = 3.*; got \(2, 2\)"),
    "no candidates": ({"grades": torch.zeros(3, 0)}, r"K at least 1.*; got \(3, 0\)"),
    "pool alone": ({"candidate_features": torch.zeros(6, 4)}, r"\[M, D\] with candidate_index; got \(6, 4\)"),
    "width": ({"candidate_features": torch.zeros(3, 2, 5)}, r"\(3, 2, 4\).*; got \(3, 2, 5\)"),
    "integers": (
        {"candidate_features": lambda x: x.long()},
        "candidate_features must be floating point; got torch.int64",
    ),
    "mask": ({"mask": MASK.long()}, r"mask must be of torch\.bool; got torch\.int64"),
    "mask's shape": ({"mask": MASK[:2]}, r"mask must have shape .*; got \(2, 2\)"),
    "negative": (
        {**POOL, "candidate_index": INDEX - 1},
        r"candidate_index must be at least 0 and less than 6; row 0 has \[-1\]",
    ),
    "index's type": (
        {**POOL, "candidate_index": INDEX.float()},
        r"candidate_index must be of .*; got torch\.float32",
    ),
    "ids": (
        {**POOL, "candidate_ids": INDEX},
        r"candidate_ids must be integers of shape \(6,\); got .*\(3, 2\)",
    ),
    "reference's shape": (
        {"reference_scores": torch.zeros(3, 3)},
        r"reference_scores must have shape \[N, K\].*; got \(3, 3\)",
    ),
    "reference's type": ({"reference_scores": MASK}, r"reference_scores must be of .*; got torch\.bool"),
    "reference's value": (
        {"reference_scores": torch.tensor([[0.0, 0.0], [math.nan, 0.0], [0.0, math.inf]])},
        r"reference_scores must be finite; row 1 has \[nan\]",
    ),
    "two references": (
        {"reference_scores": torch.zeros(3, 2), "reference_scale": 1.0},
        "reference_scores and reference_scale are two references; give one",
    ),
    "half a reference": (
        {"reference_query_features": torch.zeros(3, 7)},
        "reference_scale go together; got reference_query_features alone",
    ),
    "reference queries": (
        {**FROZEN, "reference_query_features": torch.ones(2, 7)},
        r"reference_query_features must have one row per query, 3; got shape \(2, 7\)",
    ),
    "reference candidates": (
        {**FROZEN, "reference_candidate_features": torch.ones(3, 2, 4)},
        r"reference_candidate_features must have shape \[N, K, D\] = \(3, 2, 7\).*; got \(3, 2, 4\)",
    ),
    "infinite reference queries": (
        {**FROZEN, "reference_query_features": with_((2, 0), math.inf)(torch.ones(3, 7))},
        "reference_query_features must be finite; row 2 is not",
    ),
    "infinite reference candidates": (
        {**FROZEN, "reference_candidate_features": torch.full((3, 2, 7), math.nan)},
        "reference_candidate_features must be finite; row 0 is not",
    ),
    "reference's scale": ({**FROZEN, "reference_scale": -1.0}, "reference_scale must be positive.*; got -1"),
    "reference's device": (
        {"reference_scores": torch.zeros(3, 2, device="meta")},
        "reference_scores must be on the device of query_features, cpu; got meta",
    ),
    "device": (
        {"grades": lambda x: x.to("meta")},
        "grades must be on the device of query_features, cpu; got meta",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_with_the_argument_and_the_row(kind: str) -> None:
    changed, message = BAD[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        call(**changed)


def test_negatives_need_a_frozen_models_features() -> None:
    with pytest.raises(ValueError, match=r"reference_scores are of a query's own.*give reference_query_feat"):
        call(RankedLists(in_batch_negatives=True), reference_scores=torch.zeros(3, 2))


def test_a_query_may_not_be_its_own_negative() -> None:
    twice = lambda x: x[[0, 1, 0]]  # noqa: E731
    with pytest.raises(ValueError, match="row 2 equals row 0"):
        call(RankedLists(in_batch_negatives=True), query_features=twice)
    assert call(query_features=twice).isfinite()


@pytest.mark.parametrize("grade", [-1.0, -math.inf, math.inf, math.nan, 2.0**54])
def test_lambda_needs_grades_that_have_a_gain(grade: float) -> None:
    with pytest.raises(
        ValueError, match=r"grades must be numbers from 0 to 2⁵³ for model='lambda'; row 1 has \["
    ):
        call(RankedLists(model="lambda"), grades=with_((1, 1), grade))


def test_weights_by_difference_need_finite_grades() -> None:
    weighted = RankedLists(model="pairwise", pair_weight="difference")
    with pytest.raises(ValueError, match=r"grades must be finite.*; row 1 has \[-inf\]"):
        call(weighted, grades=with_((1, 1), -math.inf))


@pytest.mark.parametrize(
    "options",
    [
        {"model": "listnet"},
        {"top_k": 0},
        {"pair_weight": "difference"},
        {"pair_weight": "difference", "model": "pairwise", "in_batch_negatives": True},
        {"gain": "exponential"},
        {"gain": "log", "model": "lambda"},
        {"top_k": 2, "model": "lambda"},
        {"pair_weight": "difference", "model": "lambda"},
        {"model": "lambda", "in_batch_negatives": True},
        {"in_batch_negatives": 1},
        {"reduction": "batchmean"},
        {"chunk_size": 0},
        {"gather": True},
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RankedLists(**options)
    if "gather" not in options:
        loss = RankedLists()
        for name, value in options.items():
            setattr(loss, name, value)
        with pytest.raises(ValueError, match=next(iter(options))):
            call(loss)


def test_suspicious_features_are_warned_of_once_and_padding_is_not() -> None:
    loss = RankedLists()
    mask = with_((0, 0), False)(MASK)
    call(loss, candidate_features=lambda x: x * mask[..., None], mask=mask)
    with pytest.warns(InputWarning, match="candidate_features should be unit-norm"):
        call(candidate_features=lambda x: 2 * x)


def test_a_loss_may_be_asked_for_as_a_dict() -> None:
    assert call(output_dict=True).keys() == {"ranked_lists_loss"}
