"""The pass over chunks of rows against the definition on whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from batches import Batch as Drawn
from batches import assert_close, batches, random_batch, teacher_of
from devices import DEVICE
from memory import LargestTensor
from rankloss import dense
from rankloss.batch import Batch, Inputs
from rankloss.options import RankOptions
from rankloss.plans import Plan
from rankloss.streaming import stream

WEIGHTS = torch.tensor([0.8, 1.3, 0.6], dtype=torch.float64, device=DEVICE)
ALL = (True,) * 5
IMAGE, TEXT = "reference_image_features", "reference_text_features"

list_options = st.one_of(
    st.fixed_dictionaries({"top_k": st.none() | st.integers(1, 9)}),
    st.fixed_dictionaries({"method": st.just("bin"), "bins": st.integers(2, 12)}),
    st.just({"model": "top_one"}),
)
directions = st.fixed_dictionaries(
    {
        "diagonal": st.sampled_from([True, False]),
        "reduction": st.sampled_from(["mean", "sum"]),
        "fixed_reference": st.sampled_from([None, "image", "text"]),
    }
)


def features_of(drawn: Drawn, rows: slice | None, teacher: dict[str, Tensor]) -> Batch:
    """With leaves of its own for the anchors, which are these rows of the items; None is all of them."""
    image, text, scale = drawn.leaves()
    anchors = None
    if rows is not None:
        anchors = tuple(x.detach()[rows].clone().requires_grad_() for x in (image, text))
    return Batch.of(
        image,
        text,
        scale,
        anchors=anchors,  # type: ignore[arg-type]
        first_row=0 if rows is None else rows.start,
        reference_image=teacher.get(IMAGE),
        reference_text=teacher.get(TEXT),
    )


def plan_of(chunk_size: int, lists_at_once: int = 3, *, is_mirrored: bool = False) -> Plan:
    return Plan("rows", chunk_size, is_mirrored, lists_at_once, "torch")


def by_definition(batch: Batch, options: RankOptions, wanted: tuple[bool, ...], by: list[bool]) -> Any:
    terms = dense.terms(batch, options, WEIGHTS, wanted)
    inputs = [x for x, w in zip(batch.inputs, by, strict=True) if w and x is not None]
    if not inputs:
        return terms, []
    return terms, torch.autograd.grad(sum(terms), inputs, allow_unused=True, materialize_grads=True)


@settings(max_examples=120)
@given(
    drawn=batches(),
    options=list_options,
    choices=directions,
    given_teacher=st.sampled_from([(), (), (IMAGE, TEXT), (IMAGE,), (TEXT,)]),
    wanted=st.sampled_from(
        [(True,) * 3] * 3 + [(True, False, False), (False, True, False), (True, False, True)]
    ),
    by=st.sampled_from([ALL] * 3) | st.tuples(*[st.booleans()] * 5),
    layout=st.sampled_from(["plain", "mirrored", "mirrored", "share"]),
    chunk_size=st.integers(1, 12),
    data=st.data(),
)
def test_the_pass_is_the_definition_in_value_and_in_every_gradient(
    drawn: Drawn, options, choices, given_teacher, wanted, by, layout: str, chunk_size: int, data
) -> None:
    n = len(drawn.image)
    if given_teacher:
        choices = {**choices, "fixed_reference": None}
        wanted = (wanted[0], wanted[1] and len(given_teacher) == 2, True)
    rows = None
    if layout == "share":
        first = data.draw(st.integers(0, n - 1))
        rows = slice(first, data.draw(st.integers(first + 1, n)))
    teacher = {name: x for name, x in teacher_of(n, duplicates=1).items() if name in given_teacher}
    batch = features_of(drawn, rows, teacher)
    checked = RankOptions(**options, **choices)
    by = [w and x is not None for w, x in zip(by, batch.inputs, strict=True)]
    plan = plan_of(min(chunk_size, batch.anchors), is_mirrored=layout == "mirrored")
    with torch.no_grad():
        values, sums = stream(batch, checked, plan, WEIGHTS, wanted, by)
    names = [name for name, w in zip(Inputs._fields, by, strict=True) if w]
    found = [x if name == "scale" else x * batch.scale for name, x in zip(names, sums, strict=True)]
    terms, gradients = by_definition(batch, checked, wanted, by)
    assert_close([*values, *found], [*terms, *gradients], 1e-10)


@pytest.mark.parametrize("n", [7, 17, 65])
@pytest.mark.parametrize("chunk_size", [1, 2, 65])
@pytest.mark.parametrize("has_teacher", [False, True])
def test_equal_items_tie_exactly_whatever_the_products_rounding(n: int, chunk_size: int, has_teacher) -> None:
    # A matrix product rounds the columns of equal items differently where they fall on a kernel's edge.
    drawn = random_batch(n, n, 5, 10.0, duplicates=3)
    teacher = teacher_of(n, 13, duplicates=3) if has_teacher else {}
    v, t, s = (x.detach() for x in drawn.leaves(torch.float32))
    references = {"reference_image": teacher.get(IMAGE), "reference_text": teacher.get(TEXT)}
    batch = Batch.of(v, t, s, **references)
    plan = plan_of(min(chunk_size, n), 100)
    values, _ = stream(batch, RankOptions(), plan, WEIGHTS, (True,) * 3, (False,) * 5)
    exact = Batch.of(v.double(), t.double(), s, **references)
    assert_close(values, by_definition(exact, RankOptions(), (True,) * 3, [False] * 5)[0], 1e-6)


# --- what it costs ----------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products (torch's own counter passes over those in place)."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        factors = {aten.mm.default: args[:2], aten.mm.out: args[:2], aten.addmm_.default: args[1:3]}.get(func)
        if factors:
            self.count += factors[0].numel() * factors[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("chunk_size", "is_mirrored", "wanted", "by", "of_student", "of_teacher"),
    [
        (8, False, (True, True, True), (0, 1, 4), 12, 4),
        (8, False, (False, False, True), (0, 1, 4), 6, 2),
        (8, False, (True, True, True), (4,), 12, 4),  # the scale's gradient is made of both features'
        (8, False, (True, True, True), (0,), 10, 4),  # the image's items come below its anchors
        (8, False, (True, True, True), (), 4, 4),
        (32, True, (True, True, True), (0, 1, 4), 7, 3),
        (32, True, (True, True, False), (0, 1, 4), 3, 1),
        (32, True, (True, True, True), (4,), 7, 3),  # likewise
        # The blocks on the diagonals of I and X, a quarter here, are symmetric, but products give them whole.
        (8, True, (True, True, True), (0, 1, 4), 6.25, 2.25),
        (8, True, (False, False, True), (0, 1, 4), 3.25, 1.25),
    ],
)
@pytest.mark.parametrize("has_teacher", [False, True])
def test_the_pass_takes_as_many_products_as_it_says(
    chunk_size: int, is_mirrored, wanted, by, of_student: float, of_teacher: float, has_teacher: bool
) -> None:
    n = 32
    batch = features_of(random_batch(0, n, 8, 10.0), None, teacher_of(n, 8) if has_teacher else {})
    plan = plan_of(chunk_size, is_mirrored=is_mirrored)
    with torch.no_grad(), Products() as products:
        stream(batch, RankOptions(), plan, WEIGHTS, wanted, [k in by for k in range(5)])
    assert products.count == (of_student + of_teacher * has_teacher) * n * n * 8


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"model": "top_one"}, {"method": "bin", "bins": 16}, {"diagonal": False}]
)
@pytest.mark.parametrize("has_teacher", [False, True])
def test_no_tensor_as_large_as_n_by_n_is_ever_made(options, has_teacher: bool) -> None:
    n, d, chunk_size = 128, 8, 4
    batch = features_of(random_batch(0, n, d, 10.0), None, teacher_of(n, d) if has_teacher else {})
    checked, by, largest = RankOptions(**options), (True, True, False, False, True), []
    for plan in (plan_of(chunk_size), plan_of(n)):
        with torch.no_grad(), LargestTensor() as seen:
            stream(batch, checked, plan, WEIGHTS, (True,) * 3, by)
        largest.append(seen.elements)
    assert n * d <= largest[0] <= 4 * n * chunk_size < n * n  # of four matrices
    assert largest[1] >= n * n  # the measurement sees such a tensor where there is one
