"""The oracle is itself checked: vectors of another implementation, values by hand, and its own properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batches import VECTORS, Batch, assert_slopes, batches, relative_error, teacher_of, vector_batch
from rankloss import reference

TERMS: dict[str, Callable[..., Any]] = {"cross_modal": reference.cross_modal, "in_modal": reference.in_modal}
every_term = pytest.mark.parametrize("term", TERMS)
UPSTREAM = 2.5
"""A gradient from above that is not 1."""

# --- vectors ----------------------------------------------------------------------------------------------


def arrays_of(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, float]:
    """Images, texts and the scale of a case of the vectors."""
    batch = vector_batch(case)
    return batch.image.numpy(), batch.text.numpy(), batch.scale


@pytest.mark.parametrize("key", VECTORS)
def test_reference_matches_the_vectors(key: str) -> None:
    """CLIP's loss, and both terms of lists that are rows of the batch, each as a mean."""
    case = VECTORS[key]
    inputs = arrays_of(case)
    expected = {"clip": case["clip"], **case["row_mean"]}
    for name, loss in {"clip": reference.clip, **TERMS}.items():
        assert relative_error(loss(*inputs), expected[name]) < 1e-10, name


@pytest.mark.parametrize("key", VECTORS)
def test_a_discount_matches_the_vectors(key: str) -> None:
    """Of each image's list of texts, ranked by the similarities of the text of the same row."""
    v, t, s = arrays_of(VECTORS[key])
    (expected,) = VECTORS[key]["plackett_luce_log_discount"].values()  # by the name of these lists
    logits = s * reference._cosines(v, t)
    value = reference.plackett_luce(logits, logits.T, discount="log")
    assert relative_error(value, expected) < 1e-10


OF_BATCH_LISTS = [key for key, case in VECTORS.items() if "batch_list_sum" in case]
# By the name in the vectors: the term, and the modality that ranks; without it both directions are averaged.
BATCH_LISTS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "cross_modal": (reference.cross_modal, {}),
    "in_modal I|X": (reference.in_modal, {"fixed_reference": "text"}),
    "in_modal X|I": (reference.in_modal, {"fixed_reference": "image"}),
}


@pytest.mark.parametrize("key", OF_BATCH_LISTS)
@pytest.mark.parametrize("name", BATCH_LISTS)
def test_lists_of_a_whole_batch_match_the_vectors(key: str, name: str) -> None:
    term, ranked_by = BATCH_LISTS[name]
    value = term(*arrays_of(VECTORS[key]), lists="batch", reduction="sum", **ranked_by)
    assert relative_error(value, VECTORS[key]["batch_list_sum"][name]) < 1e-10


@pytest.mark.parametrize("key", OF_BATCH_LISTS)
@pytest.mark.parametrize("name", ["cross_modal", "in_modal I|X"])
def test_lists_of_a_whole_batch_with_shifted_worth_match_the_vectors(key: str, name: str) -> None:
    term, ranked_by = BATCH_LISTS[name]
    value = term(*arrays_of(VECTORS[key]), lists="batch", reduction="sum", worth="shifted", **ranked_by)
    assert relative_error(value, VECTORS[key]["batch_list_sum_shifted_worth"][name]) < 1e-10


@pytest.mark.parametrize("key", VECTORS)
def test_gradients_of_tensors_match_the_vectors(key: str) -> None:
    """Of the sum of both terms. The vectors have norms and single entries, and for the scale s ∂/∂log s."""
    case = VECTORS[key]
    v, t, s = (x.detach().cpu().requires_grad_() for x in vector_batch(case).leaves())
    value = sum(term(v, t, s) for term in TERMS.values())
    gradients = torch.autograd.grad(UPSTREAM * value, (v, t, s))
    by_v, by_t, by_scale = (gradient / UPSTREAM for gradient in gradients)
    actual = {
        "value": value,
        "norm_V": by_v.norm(),
        "norm_T": by_t.norm(),
        "V00": by_v[0, 0],
        "T_last": by_t[-1, -1],
        "logit_scale": case["scale"] * by_scale,  # ∂/∂log s = s·∂/∂s
    }
    for name, number in actual.items():
        assert relative_error(number, case["row_mean_gradient"][name]) < 1e-10, name


OF_PUBLISHED_CODE = [key for key, case in VECTORS.items() if "official_code" in case and case["scale"] < 20]
"""At a larger scale the code's floor, 1e-10 inside the logarithm, exceeds the sums."""


@every_term
@pytest.mark.parametrize("key", OF_PUBLISHED_CODE)
def test_random_ties_give_the_published_code_but_for_its_floor(term: str, key: str) -> None:
    case = VECTORS[key]
    batch, n = vector_batch(case), case["N"]
    total = TERMS[term](batch.image, batch.text, batch.scale, ties="random", reduction="sum")
    sum_of_directions = 2 * total.item() / n  # of the total, which has their mean, by the n anchors
    by_published_constants = sum_of_directions / 32 / n  # the code's factor 1/32, and its mean over n items
    error_by_floor = 1e-3
    assert by_published_constants == pytest.approx(case["official_code"][term], rel=error_by_floor)


# --- one list ---------------------------------------------------------------------------------------------


def test_a_list_written_out_by_hand() -> None:
    """Best first, the scores are 2, 1, 0."""
    expected = math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert float(reference.plackett_luce_nll([2, 0, 1], [9, 1, 5])) == pytest.approx(expected, rel=1e-14)


def test_a_list_with_a_tie_written_out_by_hand() -> None:
    """The last two are tied: both have the denominator of two items."""
    expected = math.log(1 + math.exp(-1) + math.exp(-2)) + 2 * math.log(math.e + 1) - 1
    assert float(reference.plackett_luce_nll([2, 0, 1], [9, 1, 1])) == pytest.approx(expected, rel=1e-14)


WORTHS: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "shifted": lambda x: (1 + x) / 2,
    "identity": lambda x: x,
}


@st.composite
def scored_lists(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores that every worth takes, and a reference that is tied in places."""
    n = draw(st.integers(1, 8))
    x = draw(st.lists(st.floats(0.01, 0.99), min_size=n, max_size=n))
    y = draw(st.lists(st.integers(-n, n // 2), min_size=n, max_size=n))
    return np.array(x), np.array(y, dtype=draw(st.sampled_from([np.float64, np.float32, np.int64])))


@given(
    scored_lists(),
    st.sampled_from(list(WORTHS)),
    st.sampled_from([None, "log"]),
    st.none() | st.integers(1, 9),
)
def test_a_list_is_the_sum_over_its_items(lists: Any, worth: Any, discount: Any, top_k: int | None) -> None:
    """Σ μ(rank)·log(Σ worths of no better items / own worth), over the items that top_k leaves."""
    x, y = lists
    worths = np.array([WORTHS[worth](score) for score in x])
    expected = 0.0
    for p in range(len(x)):
        rank = 1 + sum(y > y[p])
        mu = 1.0 if discount is None else 1 / math.log(1 + rank)
        if top_k is None or rank <= top_k:
            of_no_better_items = math.fsum(worths[y <= y[p]])
            expected += mu * math.log(of_no_better_items / worths[p])
    value = reference.plackett_luce(x, y, worth=worth, discount=discount, top_k=top_k)
    assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(max_examples=20)
@given(
    scored_lists(),
    st.sampled_from(list(WORTHS)),
    st.sampled_from([None, "log"]),
    st.none() | st.integers(1, 9),
)
def test_derivatives_of_a_list_are_differences_of_the_values(
    lists: Any, worth: Any, discount: Any, top_k: int | None
) -> None:
    """First derivatives are differences of the value, second ones of the first."""
    scores, order = lists
    x = torch.tensor(0.1 + 0.8 * scores).requires_grad_()  # where no worth is near 0
    y = torch.tensor(order.astype(float))
    nll = partial(reference.plackett_luce, reference=y, worth=worth, discount=discount, top_k=top_k)
    for check_by_differences in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check_by_differences(nll, x, atol=1e-4, eps=1e-7)


@pytest.mark.parametrize("worth", WORTHS)
def test_what_ranks_a_list_gets_no_gradient(worth: Any) -> None:
    x, y = (torch.tensor([0.3, 0.2, 0.9], requires_grad=True) for _ in range(2))
    reference.plackett_luce(x, y, worth=worth).backward()
    assert x.grad is not None
    assert y.grad is None


TIED_SCORES = torch.tensor([0.3, -0.2, 1.1, 0.5], dtype=torch.float64)
TIED_ORDER = torch.tensor([2.0, 1.0, 1.0, 0.0])


def values_of_random_ties(count: int) -> list[float]:
    """The values of so many calls with the tied order, each with a shuffle of its own, from one seed."""
    torch.manual_seed(0)
    return [reference.plackett_luce(TIED_SCORES, TIED_ORDER, ties="random").item() for _ in range(count)]


def test_random_ties_are_each_of_the_orders() -> None:
    of_both_orders = [
        reference.plackett_luce(TIED_SCORES, torch.tensor(order)).item()
        for order in ([3.0, 2.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0])  # the second and third are tied
    ]
    assert sorted({*values_of_random_ties(40)}) == pytest.approx(sorted(of_both_orders))


def test_random_ties_follow_the_seed() -> None:
    assert values_of_random_ties(40) == values_of_random_ties(40)


def test_random_ties_are_one_shuffle_for_all_lists() -> None:
    """Thirty equal lists have one value; shuffled one by one, half of them would have the other order's."""
    scores, order = TIED_SCORES.expand(30, 4), TIED_ORDER.expand(30, 4)
    values = reference.plackett_luce(scores, order, ties="random")
    assert len(set(values.tolist())) == 1


def test_nan_in_one_of_many_lists_is_in_its_value_and_gradient_alone() -> None:
    """Leading dimensions are lists."""
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(30.0).view(2, 3, 5)
    y[0, 1, 2] = math.nan
    nll = reference.plackett_luce(x, y)
    nll.sum().backward()
    is_nan = torch.tensor([[False, True, False], [False, False, False]])
    assert torch.equal(nll.isnan(), is_nan)
    assert torch.equal(x.grad.isnan(), is_nan[..., None].expand(2, 3, 5))


def test_no_list_has_no_value() -> None:
    empty = torch.zeros(0, 3, 5)
    assert reference.plackett_luce(empty, empty).shape == (0, 3)


def test_nan_of_an_array_is_nan() -> None:
    assert np.isnan(reference.plackett_luce([math.nan, 1.0], [1.0, 2.0]))


def test_integer_scores_of_a_tensor_are_not_rounded_to_float32() -> None:
    scores = torch.tensor([2**24 + 1, 2**24])  # one number in float32
    assert reference.plackett_luce(scores, torch.tensor([1, 0])).item() == pytest.approx(
        math.log1p(math.exp(-1))
    )


def test_integers_that_are_one_number_in_float64_are_no_tie() -> None:
    """The second item is the better one, by its score and its order; a tie would cost more."""
    order = np.array([2**53, 2**53 + 1])
    assert reference.plackett_luce([0.0, 1.0], order) == pytest.approx(math.log1p(math.exp(-1)))


@pytest.mark.parametrize(("worth", "floor"), [("identity", 0.0), ("shifted", -1.0)])
@pytest.mark.parametrize("below", [0.0, 0.25])
def test_a_score_whose_worth_is_not_positive_is_an_error(worth: Any, floor: float, below: float) -> None:
    scores = torch.tensor([0.5, floor - below, 0.75])
    reason = rf"worth='{worth}' needs scores above {floor:g}.* {floor - below:g}$"
    with pytest.raises(ValueError, match=reason):
        reference.plackett_luce(scores, torch.arange(3), worth=worth)


@pytest.mark.parametrize(("worth", "floor"), [("identity", 0.0), ("shifted", -1.0)])
@pytest.mark.parametrize("below", [0.0, 0.25])
def test_a_score_whose_worth_is_not_positive_gives_nan_on_an_accelerator(
    worth: Any, floor: float, below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as on an accelerator, where values are not checked
    scores = torch.tensor([0.5, floor - below, 0.75], requires_grad=True)
    nll = reference.plackett_luce(scores, torch.arange(3), worth=worth)
    nll.backward()
    assert nll.isnan()
    assert scores.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_dtype_from_float32_on(dtype: torch.dtype) -> None:
    x = torch.rand(4, 3, dtype=torch.float64).to(dtype)
    values = reference.plackett_luce(x, x.flip(-1)), *(term(x, x, 2.0) for term in TERMS.values())
    assert {value.dtype for value in values} == {torch.promote_types(dtype, torch.float32)}


def test_tensors_keep_their_device() -> None:
    x = torch.rand(4, 3, device="meta")
    terms = [term(x, x, lists="batch", diagonal=False) for term in TERMS.values()]
    for value in (reference.plackett_luce(x, x, worth="shifted"), *terms):
        assert value.device == x.device


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "2"])
def test_a_top_k_that_is_no_count_is_refused(top_k: Any) -> None:
    for function in (reference.plackett_luce, *TERMS.values()):
        with pytest.raises(ValueError, match=f"top_k must be an integer of at least 1; got {top_k!r}"):
            function(np.eye(2), np.eye(2), top_k=top_k)


# --- the terms --------------------------------------------------------------------------------------------

variants = st.fixed_dictionaries(
    {},
    optional={
        "lists": st.sampled_from(["row", "batch"]),
        "worth": st.sampled_from(list(WORTHS)),
        "discount": st.just("log"),
        "top_k": st.integers(1, 12),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "diagonal": st.booleans(),
    },
)


def features_with_worth(batch: Batch, worth: str) -> tuple[Tensor, Tensor]:
    """Images and texts of the batch, changed so that log w of their cosines exists, and is not too steep.

    The worth ``"exp"`` takes any cosines. The others' features get norms of 0.7 to 0.9, which differ from row
    to row, but are the same for equal rows: squares of norms that are equal but for rounding would leave the
    order open.
    """
    if worth == "exp":
        return batch.image, batch.text

    def changed(x: Tensor) -> Tensor:
        # log w exists above −1 for "shifted", which norms below 1 keep away from, and above 0 for "identity".
        directions = x.abs() + 0.05 if worth == "identity" else x
        first_equal = (x[:, None] == x).all(-1).byte().argmax(-1)
        norms = torch.linspace(0.7, 0.9, len(x), dtype=x.dtype)[first_equal]
        return directions * norms[:, None]

    return changed(batch.image), changed(batch.text)


@every_term
@given(batch=batches(max_n=6), options=variants, has_teacher=st.booleans())
def test_gradients_of_a_term_are_differences_of_its_values(
    term: str, batch: Batch, options: dict[str, Any], has_teacher: bool
) -> None:
    """The gradients are of tensors, the differences of NumPy arrays.

    Without a teacher each modality is ranked by the other, which must not move with the inputs where values
    are compared: there the other modality's features stand as a teacher's.
    """
    v, t = features_with_worth(batch, options.get("worth", "exp"))
    scale = torch.tensor(batch.scale, dtype=torch.float64)
    inputs = v.requires_grad_(), t.requires_grad_(), scale.requires_grad_()
    if has_teacher:
        ranked_by = {name: x.cpu() for name, x in teacher_of(len(v), seed=len(v), duplicates=1).items()}
    else:
        ranked_by = {"reference_image_features": t.detach(), "reference_text_features": v.detach()}
    value = TERMS[term](*inputs, **options, **(ranked_by if has_teacher else {}))
    arrays_ranked_by = {name: x.numpy() for name, x in ranked_by.items()}
    assert_slopes(value, inputs, partial(TERMS[term], **options, **arrays_ranked_by))


@every_term
@given(batch=batches(max_n=7), options=variants, random=st.randoms(use_true_random=False))
def test_a_term_is_the_same_in_any_order_of_the_pairs(
    term: str, batch: Batch, options: dict[str, Any], random: Any
) -> None:
    """Of values by anchor, each goes with its anchor."""
    v, t = (x.numpy() for x in features_with_worth(batch, options.get("worth", "exp")))
    order = [*range(len(v))]
    random.shuffle(order)
    value = np.asarray(TERMS[term](v, t, batch.scale, **options))
    has_value_by_anchor = value.ndim == 1
    expected = value[order] if has_value_by_anchor else value
    shuffled = TERMS[term](v[order], t[order], batch.scale, **options)
    np.testing.assert_allclose(shuffled, expected, rtol=1e-10, atol=1e-10)


@every_term
@given(batch=batches(max_n=6), lists=st.sampled_from(["row", "batch"]), diagonal=st.booleans())
def test_reductions_are_of_the_same_summands(term: str, batch: Batch, lists: str, diagonal: bool) -> None:
    """Values by anchor add up to the sum, and the sum over the number of items of all lists is the mean."""
    n = len(batch.image)
    by_anchor, total, mean = (
        TERMS[term](batch.image, batch.text, batch.scale, lists=lists, diagonal=diagonal, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    assert by_anchor.shape == (n,)
    assert by_anchor.sum().item() == pytest.approx(total.item(), rel=1e-12, abs=1e-12)
    items = n if diagonal else n - 1
    assert mean.item() == pytest.approx(total.item() / (n * items), rel=1e-12, abs=1e-12)


# Of three orthogonal pairs at scale 2 each list has a winner of score 2 and two others, tied at 0:
# ranks 1, 2, 2. An item costs log(Σ exp of no better scores) − its own score.
OF_WINNER, OF_OTHERS = math.log(math.exp(2) + 2) - 2, math.log(2)


def test_the_mean_of_a_discounted_list_written_out_by_hand() -> None:
    of_winner, of_others = 1 / math.log(2), 1 / math.log(3)  # μ = 1/log(1 + rank)
    expected = (of_winner * OF_WINNER + 2 * of_others * OF_OTHERS) / (of_winner + 2 * of_others)
    value = reference.cross_modal(np.eye(3), np.eye(3), 2.0, discount="log")
    assert value == pytest.approx(expected, rel=1e-13)


def test_the_mean_of_a_list_with_top_k_counts_its_best_items_alone() -> None:
    assert reference.cross_modal(np.eye(3), np.eye(3), 2.0, top_k=1) == pytest.approx(OF_WINNER, rel=1e-14)


def test_lambda_weights_and_their_loss_written_out_by_hand() -> None:
    """Ranks 1, 2, 3 and grades 0, 2, 1: the ideal DCG of the linear gains is 2 + 1/log₂ 3."""
    scores, grades = [3.0, 2.0, 1.0], [0.0, 2.0, 1.0]
    first, second, third = 1.0, 1 / math.log2(3), 1 / 2  # discounts by rank
    ideal = 2 * first + 1 * second
    # A pair weighs the discounts' difference at its ranks, and μ times that at its distance in ranks: between
    # the first and the second discount at a distance of 1, between the second and the third at 2.
    mu = 10
    weights = np.zeros((3, 3))  # by a better item and a worse one
    weights[1, 0] = (first - second + mu * (first - second)) * 2 / ideal
    weights[1, 2] = (second - third + mu * (first - second)) * 1 / ideal
    weights[2, 0] = (first - third + mu * (second - third)) * 1 / ideal
    np.testing.assert_allclose(reference.lambda_weights(scores, grades), weights, rtol=1e-14)
    expected = sum(
        weights[better, worse] * math.log1p(math.exp(scores[worse] - scores[better]))
        for better, worse in ((1, 0), (1, 2), (2, 0))
    )
    assert reference.lambda_loss(scores, grades) == pytest.approx(expected, rel=1e-14)
