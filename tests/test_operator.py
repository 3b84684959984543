from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from batches import Batch as Drawn
from batches import assert_close, batches, gradients, random_batch, teacher_of
from devices import DEVICE
from fake_cuda import fake_cuda
from memory import saved_bytes
from rankloss import dense, operator
from rankloss.batch import Batch
from rankloss.functional import cross_modal, in_modal
from rankloss.operator import weighted_terms
from rankloss.operators import IMPLEMENTATIONS
from rankloss.options import RankOptions

WEIGHTS = torch.tensor([0.8, 1.3, 0.6], dtype=torch.float64, device=DEVICE)


def teacher_for(n: int) -> dict[str, Tensor]:
    return dict(zip(("reference_image", "reference_text"), teacher_of(n, duplicates=1).values(), strict=True))


def batch_of(inputs: Sequence[Any], n_teacher: int = 0, **layout: Any) -> Batch:
    v, t, s = inputs
    return Batch.of(v, t, s, **(teacher_for(n_teacher) if n_teacher else {}), **layout)


def weighted(terms: Sequence[Tensor], upstream: Sequence[float | None]) -> Tensor:
    """The sum of the terms that are used, each with an upstream value of its own."""
    used = [u * x for u, x in zip(upstream, terms, strict=True) if u is not None]
    return torch.stack(used).sum()


UPSTREAMS: list[tuple[float | None, ...]] = [
    (2.5, 2.5, 2.5),
    (1.0, -2.0, 0.5),
    (0.0, 1.5, 0.0),
    (-1.7, None, 0.3),
]
UPSTREAMS += [(None, 1.7, 1.7), (None, None, -0.4), (0.9, None, None)]
LISTS: list[dict[str, Any]] = [
    {},
    {"top_k": 3, "reduction": "sum"},
    {"method": "bin", "bins": 5, "diagonal": False},
    {"model": "top_one", "fixed_reference": "text"},
]


# --- derivatives ------------------------------------------------------------------------------------------


@given(
    drawn=batches(),
    options=st.sampled_from(LISTS),
    chunk_size=st.none() | st.integers(1, 9),
    upstream=st.sampled_from(UPSTREAMS),
)
def test_terms_and_gradients_are_those_of_the_definition(drawn: Drawn, options, chunk_size, upstream) -> None:
    inputs = drawn.leaves()
    checked = RankOptions(chunk_size=chunk_size, **options)
    terms = weighted_terms(batch_of(inputs), checked, WEIGHTS, (True,) * 3)
    expected = dense.terms(batch_of(inputs), checked, WEIGHTS, (True,) * 3)
    assert_close(terms, expected, 1e-10)
    found, wanted = (
        torch.autograd.grad(weighted(x, upstream), inputs, allow_unused=True, materialize_grads=True)
        for x in (terms, expected)
    )
    assert_close(found, wanted, 1e-9)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_unequal_upstream_values_cost_no_look_where_none_is_free(
    upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "may_look_at", lambda x: False)  # as on an accelerator
    inputs = random_batch(3, 9, 5, 20.0, duplicates=2).leaves()
    terms, expected = (
        f(batch_of(inputs), RankOptions(), WEIGHTS, (True,) * 3) for f in (weighted_terms, dense.terms)
    )
    found, owed = (gradients(weighted(x, upstream), inputs, 1.7) for x in (terms, expected))
    assert_close(found, owed, 1e-9)


@pytest.mark.parametrize(
    ("options", "has_teacher"),
    [
        ({}, False),
        ({"diagonal": False, "fixed_reference": "text", "top_k": 2}, False),
        ({"reduction": "sum", "lists": "batch"}, False),
        ({"worth": "shifted", "discount": "log", "reduction": "none"}, False),
        # Finite differences would move a reference that is the batch's own, and the scale of the scores.
        ({"model": "top_one", "reference_scale": 2.0}, True),
    ],
)
def test_first_and_second_derivatives_are_right(options, has_teacher: bool) -> None:
    checked = RankOptions(chunk_size=2, **options)
    inputs = random_batch(1, 5, 3, 2.0).leaves()
    inputs = inputs[:2] if "worth" in options else inputs  # which alone depends on the scale

    def f(*inputs: Tensor) -> Tensor:
        v, t, *s = inputs
        batch = batch_of((v, t, *(s or [1.0])), 5 * has_teacher)
        terms = weighted_terms(batch, checked, WEIGHTS, (not options, True, True))
        return torch.stack(terms[bool(options) :])

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_an_input_computed_of_another_is_differentiated_twice_along_its_own_path(upstream) -> None:
    """As gathered features are, of which the local ones are a part."""
    inputs = v, t, _ = random_batch(1, 6, 3, 5.0, duplicates=1).leaves()
    results = []
    for f in (weighted_terms, dense.terms):
        batch = batch_of(inputs, anchors=(v[1:4], t[1:4]), first_row=1)
        value = weighted(f(batch, RankOptions(), WEIGHTS, (True,) * 3), upstream)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(x.square().sum() for x in first), inputs)])
    assert_close(*results, 1e-9)


@pytest.mark.parametrize("name", ["image", "text"])
def test_a_fixed_reference_alone_has_no_gradient_and_can_be_differentiated_again(name: str) -> None:
    """What flows to it are its similarities as scores, and those may be absent."""
    v, t, s = (x.detach() for x in random_batch(0, 6, 4, 10.0).leaves())
    only = (t if name == "text" else v).requires_grad_()
    for term in (cross_modal, in_modal):
        value = term(v, t, s, fixed_reference=name)
        first, second = (
            torch.autograd.grad(1.7 * value, only, create_graph=again, retain_graph=True, allow_unused=True)[
                0
            ]
            for again in (False, True)
        )
        assert_close([second], [first], 1e-10)
        assert bool(first.any()) == (term is cross_modal)


@pytest.mark.parametrize("s", [600.0, 700.0, 3000.0])
@pytest.mark.parametrize("options", [*LISTS, {"diagonal": False}])
@pytest.mark.parametrize("upstream", [(2.0, 2.0, 2.0), (1.0, -2.0, 0.5)])
def test_scores_too_large_for_float64_sums_are_summed_by_the_definition(s: float, options, upstream) -> None:
    inputs = random_batch(1, 12, 3, s, duplicates=2).leaves()
    checked = RankOptions(**options)
    terms, expected = (
        f(batch_of(inputs), checked, WEIGHTS, (True,) * 3) for f in (weighted_terms, dense.terms)
    )
    assert_close(terms, expected, 1e-10)
    found, owed = (gradients(weighted(x, upstream), inputs, 1.0) for x in (terms, expected))
    assert_close(found, owed, 1e-8)
    assert not any(x.requires_grad for x in found)


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"model": "top_one"}])
def test_what_forward_keeps_for_backward_grows_linearly_in_n(options) -> None:
    def kept(n: int) -> int:
        inputs = random_batch(0, n, 8, 10.0).leaves(torch.float32)
        checked = RankOptions(chunk_size=8, **options)
        return saved_bytes(lambda: weighted_terms(batch_of(inputs, n), checked, WEIGHTS, (True,) * 3))

    assert 0 < kept(256) <= 4.05 * kept(64)
    assert kept(256) < 256 * 256 * 4  # less than one N×N matrix


# --- the contract of an operator --------------------------------------------------------------------------


@pytest.mark.parametrize("has_teacher", [False, True])
def test_the_operators_keep_the_contract_of_torch_library(has_teacher: bool) -> None:
    v, t, s = (x.detach() for x in random_batch(0, 5, 3, 10.0).leaves())
    teacher = list(teacher_of(5).values()) if has_teacher else [None, None]
    by = [True, True, False, False, True]
    arguments = (v, t, None, None, s, WEIGHTS, *teacher, 0, [True] * 3, by, RankOptions().encoded)
    found = torch.ops.rankloss.row_lists(*arguments)
    upstream = [x.clone() for x in found[:3]]
    tests = ("test_schema", "test_faketensor")  # what differentiates is around them
    torch.library.opcheck(torch.ops.rankloss.row_lists.default, arguments, test_utils=tests)
    torch.library.opcheck(
        torch.ops.rankloss.row_lists_backward.default, (upstream, found[3:], *arguments), test_utils=tests
    )


# --- on an accelerator ------------------------------------------------------------------------------------

RANKED: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_k": 40, "reduction": "sum"},
    {"method": "bin", "bins": 8},
    {"method": "bin", "bins": 100},
    {"method": "bin", "bins": 8, "top_k": 3},
    {"model": "top_one"},
    {"diagonal": False},
    {"fixed_reference": "text"},
]
TEACHERS = [{}, {"top_k": 3, "diagonal": False}, {"method": "bin", "bins": 8}]
TEACHERS += [{"model": "top_one", "reference_scale": 3.0}]
STEPS = [(options, False, k % 2 == 0, k % 3 == 0) for k, options in enumerate(RANKED)]
STEPS += [(options, True, k % 2 == 1, k % 3 == 1) for k, options in enumerate(TEACHERS)]


def on_cuda(has_teacher: bool, n: int = 32, **arguments: Any) -> tuple[Batch, Tensor]:
    v, t, f, g = (torch.empty(n, d, device="cuda") for d in (8, 8, 5, 5))
    if has_teacher:
        arguments |= {"reference_image": f, "reference_text": g}
    if arguments.pop("is_share", False):
        arguments |= {"anchors": (v[:16], t[:16]), "first_row": 4}
    scale = torch.empty((), device="cuda") if has_teacher else 10.0
    return Batch.of(v, t, scale, **arguments), torch.empty(3, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize(("options", "has_teacher", "is_share", "is_chunked"), STEPS)
def test_a_step_on_an_accelerator_never_waits_for_it_nor_copies_to_it(
    options, has_teacher: bool, is_share: bool, is_chunked: bool
) -> None:
    checked = RankOptions(chunk_size=8 if is_chunked else None, **options)
    with fake_cuda() as copies:
        batch, weights = on_cuda(has_teacher, is_share=is_share)
        terms = weighted_terms(batch, checked, weights, (True,) * 3)
        assert all((x.device, x.shape) == (batch.image.device, ()) for x in terms)
        # In a fake mode an operator runs its shape function: what it does itself is called by hand.
        tensors = (*batch.inputs, weights, batch.reference_image, batch.reference_text)
        by = [True, True, is_share, is_share, True]
        arguments = (*tensors, batch.first_row, [True] * 3, by, checked.encoded)
        found = IMPLEMENTATIONS["row_lists"](*arguments)
        of_inputs = [256, 256, *[128, 128] * is_share, 1]
        assert [x.numel() for x in found] == [1, 1, 1, *of_inputs]
        again = IMPLEMENTATIONS["row_lists_backward"]([x.clone() for x in found[:3]], found[3:], *arguments)
        assert [x.numel() for x in again] == of_inputs
        assert copies.found == []


@pytest.mark.parametrize(
    ("options", "has_teacher"),
    [
        ({"lists": "batch"}, False),
        ({"lists": "batch"}, True),
        ({"lists": "batch", "model": "top_one"}, True),
        ({"lists": "batch", "diagonal": False, "worth": "shifted"}, False),
        ({"worth": "identity", "top_k": 2}, True),
        ({"ties": "random"}, False),
        ({"discount": "log", "diagonal": False}, False),
        ({"reduction": "none"}, True),
    ],
)
def test_what_does_not_stream_never_waits_nor_copies_either(options, has_teacher: bool) -> None:
    with fake_cuda() as copies:
        batch, weights = on_cuda(has_teacher, n=8)
        contrastive = options.get("worth", "exp") == "exp"
        terms = weighted_terms(batch, RankOptions(**options), weights, (contrastive, True, True))
        shape = (8,) if options.get("reduction") == "none" else ()
        assert all((x.device, x.shape) == (batch.image.device, shape) for x in terms)
        assert copies.found == []


def test_a_wait_and_a_copy_would_be_seen() -> None:
    with fake_cuda() as copies:
        x = torch.empty(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            bool(x[0] > 0)
        torch.ops.aten._to_copy.default(torch.empty(3), device=torch.device("cuda"))
        assert copies.found == ["aten._to_copy.default"]
