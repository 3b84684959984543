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
terms = pytest.mark.parametrize("term", TERMS)

# --- vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", VECTORS)
def test_reference_matches_the_vectors(key: str) -> None:
    case = VECTORS[key]
    batch = vector_batch(case)
    v, t, s = batch.image.numpy(), batch.text.numpy(), batch.scale
    found = {"clip": reference.clip(v, t, s)}
    found |= {name: term(v, t, s) for name, term in TERMS.items()}
    owed = {"clip": case["clip"], **{name: case["row_mean"][name] for name in TERMS}}
    (discounted,) = case["plackett_luce_log_discount"].values()
    logits = s * reference._cosines(v, t)
    found["discounted"] = reference.plackett_luce(logits, logits.T, discount="log")
    owed["discounted"] = discounted
    if "batch_list_sum" in case:
        options = {"lists": "batch", "reduction": "sum"}
        found["cross, batch"] = reference.cross_modal(v, t, s, **options)
        found["I|X"] = reference.in_modal(v, t, s, **options, fixed_reference="text")
        found["X|I"] = reference.in_modal(v, t, s, **options, fixed_reference="image")
        sums = case["batch_list_sum"]
        owed |= {"cross, batch": sums["cross_modal"]}
        owed |= {lists: sums[f"in_modal {lists}"] for lists in ("I|X", "X|I")}
        options["worth"] = "shifted"
        found["cross, shifted"] = reference.cross_modal(v, t, s, **options)
        found["in, shifted"] = reference.in_modal(v, t, s, **options, fixed_reference="text")
        sums = case["batch_list_sum_shifted_worth"]
        owed |= {"cross, shifted": sums["cross_modal"], "in, shifted": sums["in_modal I|X"]}
    assert found.keys() == owed.keys()
    for name, value in found.items():
        assert relative_error(value, owed[name]) < 1e-10, name


@pytest.mark.parametrize("key", VECTORS)
def test_gradients_of_tensors_match_the_vectors(key: str) -> None:
    case = VECTORS[key]
    v, t, s = (x.detach().cpu().requires_grad_() for x in vector_batch(case).leaves())
    value = sum(term(v, t, s) for term in TERMS.values())
    dv, dt, ds = (x / 2.5 for x in torch.autograd.grad(2.5 * value, (v, t, s)))
    found = {"value": value, "norm_V": dv.norm(), "norm_T": dt.norm(), "V00": dv[0, 0], "T_last": dt[-1, -1]}
    found["logit_scale"] = case["scale"] * ds  # by its logarithm
    for name, x in found.items():
        assert relative_error(x, case["row_mean_gradient"][name]) < 1e-10, name


OF_PUBLISHED_CODE = [key for key, case in VECTORS.items() if "official_code" in case and case["scale"] < 20]
"""At a larger scale the code's floor, 1e-10 inside the logarithm, exceeds the sums."""


@terms
@pytest.mark.parametrize("key", OF_PUBLISHED_CODE)
def test_random_ties_give_the_published_code_but_for_its_floor(term: str, key: str) -> None:
    case = VECTORS[key]
    batch = vector_batch(case)
    total = TERMS[term](batch.image, batch.text, batch.scale, ties="random", reduction="sum")
    # Its term is 1/32 of the sum of two directions, of the mean list, by N.
    assert total.item() / 16 / case["N"] ** 2 == pytest.approx(case["official_code"][term], rel=1e-3)


# --- one list ---------------------------------------------------------------------------------------------


def test_reference_of_a_list_written_out_by_hand() -> None:
    # Best first: scores 2, 1, 0.
    expected = math.log(1 + math.exp(-1) + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert float(reference.plackett_luce_nll([2, 0, 1], [9, 1, 5])) == pytest.approx(expected, rel=1e-14)
    # The last two tied: both have the denominator of two items.
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
    x, y = lists
    worths = [WORTHS[worth](score) for score in x]
    owed = 0.0
    for p in range(len(x)):
        rank = 1 + sum(y > y[p])
        mu = 1.0 if discount is None else 1 / math.log(1 + rank)
        if top_k is None or rank <= top_k:
            owed += mu * math.log(
                math.fsum(w for w, q in zip(worths, y, strict=True) if q <= y[p]) / worths[p]
            )
    found = reference.plackett_luce(x, y, worth=worth, discount=discount, top_k=top_k)
    assert found == pytest.approx(owed, rel=1e-12, abs=1e-12)


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
    """Of the first and the second order; none reaches the reference."""
    x, y = torch.tensor(0.1 + 0.8 * lists[0]).requires_grad_(), torch.tensor(lists[1].astype(float))
    y.requires_grad_()
    nll = partial(reference.plackett_luce, reference=y, worth=worth, discount=discount, top_k=top_k)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(nll, x, atol=1e-4, eps=1e-7)
    nll(x).backward()
    assert y.grad is None


def test_random_ties_pick_one_of_the_orders_and_follow_the_seed() -> None:
    x = torch.tensor([0.3, -0.2, 1.1, 0.5], dtype=torch.float64)
    y = torch.tensor([2.0, 1.0, 1.0, 0.0])
    torch.manual_seed(0)
    values = [reference.plackett_luce(x, y, ties="random").item() for _ in range(40)]
    assert {round(v, 8) for v in values} == {3.95713832, 3.32283642}
    torch.manual_seed(0)
    assert [reference.plackett_luce(x, y, ties="random").item() for _ in range(40)] == values
    both = reference.plackett_luce(x.expand(2, 4), y.expand(2, 4), ties="random")  # one shuffle for all lists
    assert both[0] == both[1]


def test_leading_dimensions_are_lists_and_nan_is_that_of_its_list() -> None:
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.arange(30.0).view(2, 3, 5).where(torch.arange(30).view(2, 3, 5) != 7, math.nan)
    nll = reference.plackett_luce(x, y)
    nll.sum().backward()
    expected = torch.tensor([[False, True, False], [False] * 3])
    assert torch.equal(nll.isnan(), expected)
    assert torch.equal(x.grad.isnan().all(-1), expected)
    assert torch.equal(x.grad.isnan().any(-1), expected)
    assert reference.plackett_luce(x[:0], y[:0]).shape == (0, 3)
    assert np.isnan(reference.plackett_luce([math.nan, 1.0], [1.0, 2.0]))
    order = np.array([2**53, 2**53 + 1])  # one number in float64
    assert reference.plackett_luce([0.0, 1.0], order) == pytest.approx(math.log1p(math.exp(-1)))


@pytest.mark.parametrize(("worth", "floor"), [("identity", 0.0), ("shifted", -1.0)])
@pytest.mark.parametrize("below", [0.0, 0.25])
def test_a_score_whose_worth_is_not_positive_is_an_error_or_nan(
    worth: Any, floor: float, below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.tensor([0.5, floor - below, 0.75], requires_grad=True)
    with pytest.raises(
        ValueError, match=rf"worth='{worth}' needs scores above {floor:g}.* {floor - below:g}$"
    ):
        reference.plackett_luce(x, torch.arange(3), worth=worth)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # as on an accelerator
    nll = reference.plackett_luce(x, torch.arange(3), worth=worth)
    nll.backward()
    assert nll.isnan()
    assert x.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_dtype_from_float32_on_and_their_device(dtype: torch.dtype) -> None:
    x = torch.rand(4, 3, dtype=torch.float64).to(dtype)
    expected = torch.promote_types(dtype, torch.float32)
    for value in (reference.plackett_luce(x, x.flip(-1)), *(term(x, x, 2.0) for term in TERMS.values())):
        assert value.dtype == expected
    on_meta = x.to("meta")
    assert reference.plackett_luce(on_meta, on_meta, worth="shifted").device.type == "meta"
    for term in TERMS.values():
        assert term(on_meta, on_meta, lists="batch", diagonal=False).device.type == "meta"


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


def with_worth(batch: Batch, worth: str = "exp") -> tuple[Tensor, Tensor]:
    """Features whose cosines have this worth, equal or well separated.

    Norms of different rows differ: squares that are equal but for rounding would leave the order open.
    """
    features = batch.image, batch.text
    if worth == "exp":
        return features
    scaled = []
    for x in features:
        # Near the least cosine that has a worth its logarithm is too steep for differences.
        far = x.abs() + 0.05 if worth == "identity" else x
        first_equal = (x[:, None] == x).all(-1).byte().argmax(-1)
        scaled.append(far * torch.linspace(0.7, 0.9, len(x), dtype=x.dtype)[first_equal, None])
    return scaled[0], scaled[1]


@terms
@given(batch=batches(max_n=6), options=variants, has_teacher=st.booleans())
def test_gradients_of_a_term_are_differences_of_its_values(
    term: str, batch: Batch, options: dict[str, Any], has_teacher: bool
) -> None:
    """Of tensors and of arrays."""
    v, t = with_worth(batch, options.get("worth", "exp"))
    inputs = (v.requires_grad_(), t.requires_grad_(), torch.tensor(batch.scale).double().requires_grad_())
    teacher = {name: x.cpu() for name, x in teacher_of(len(v), seed=len(v), duplicates=1).items()}
    value = TERMS[term](*inputs, **options, **(teacher if has_teacher else {}))
    if not has_teacher:  # the order is that of the other modality, which has no gradient
        teacher = dict(zip(teacher, (t.detach(), v.detach()), strict=True))
    arrays = {name: x.numpy() for name, x in teacher.items()}
    assert_slopes(value, inputs, partial(TERMS[term], **options, **arrays))


@terms
@given(batch=batches(max_n=7), options=variants, random=st.randoms(use_true_random=False))
def test_a_term_is_the_same_in_any_order_of_the_pairs(
    term: str, batch: Batch, options: dict[str, Any], random: Any
) -> None:
    v, t = (x.numpy() for x in with_worth(batch, options.get("worth", "exp")))
    order = [*range(len(v))]
    random.shuffle(order)
    value = np.asarray(TERMS[term](v, t, batch.scale, **options))
    shuffled = TERMS[term](v[order], t[order], batch.scale, **options)
    np.testing.assert_allclose(shuffled, value[order] if value.ndim else value, rtol=1e-10, atol=1e-10)


@terms
@given(batch=batches(max_n=6), lists=st.sampled_from(["row", "batch"]), diagonal=st.booleans())
def test_reductions_are_of_the_same_summands(term: str, batch: Batch, lists: str, diagonal: bool) -> None:
    n = len(batch.image)
    by_anchor, total, mean = (
        TERMS[term](batch.image, batch.text, batch.scale, lists=lists, diagonal=diagonal, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    assert by_anchor.shape == (n,)
    assert by_anchor.sum().item() == pytest.approx(total.item(), rel=1e-12, abs=1e-12)
    items = n if diagonal else n - 1
    assert mean.item() == pytest.approx(total.item() / (n * items), rel=1e-12, abs=1e-12)


def test_mean_of_a_list_written_out_by_hand() -> None:
    # Of three orthogonal pairs each list has one winner and two tied others: ranks 1, 2, 2.
    mu = [1 / math.log(2), 1 / math.log(3), 1 / math.log(3)]
    terms = [math.log(math.exp(2) + 2) - 2, math.log(2), math.log(2)]
    expected = sum(m * x for m, x in zip(mu, terms, strict=True)) / sum(mu)
    actual = reference.cross_modal(np.eye(3), np.eye(3), 2.0, discount="log")
    assert actual == pytest.approx(expected, rel=1e-13)
    assert reference.cross_modal(np.eye(3), np.eye(3), 2.0, top_k=1) == pytest.approx(terms[0], rel=1e-14)


def test_lambda_weights_written_out_by_hand() -> None:
    # Ranks 1, 2, 3; grades 0, 2, 1: the ideal DCG of the linear gains is 2 + 1/log₂ 3.
    ideal, second = 2 + 1 / math.log2(3), 1 / math.log2(3)
    owed = np.zeros((3, 3))
    owed[1, 0] = (1 - second + 10 * (1 - second)) * 2 / ideal
    owed[1, 2] = (second - 1 / 2 + 10 * (1 - second)) * 1 / ideal
    owed[2, 0] = (1 - 1 / 2 + 10 * (second - 1 / 2)) * 1 / ideal
    found = reference.lambda_weights([3.0, 2.0, 1.0], [0.0, 2.0, 1.0])
    np.testing.assert_allclose(found, owed, rtol=1e-14)
    value = 0.0
    for p, q, difference in ((1, 0, 1.0), (1, 2, -1.0), (2, 0, 2.0)):  # x_q − x_p
        value += owed[p, q] * math.log1p(math.exp(difference))
    assert reference.lambda_loss([3.0, 2.0, 1.0], [0.0, 2.0, 1.0]) == pytest.approx(value, rel=1e-14)
