"""The two rank terms as users call them: against the literal reference, and what must not change them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import drawn_options
from batches import (
    VECTORS,
    Batch,
    assert_close,
    assert_slopes,
    batches,
    gradients,
    random_batch,
    relative_error,
    teacher_of,
    vector_batch,
)
from rankloss import reference
from rankloss.functional import cross_modal, in_modal

pytestmark = pytest.mark.filterwarnings("ignore:.* should be unit-norm:rankloss.InputWarning")
TERMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "cross_modal": (cross_modal, reference.cross_modal),
    "in_modal": (in_modal, reference.in_modal),
}
terms = pytest.mark.parametrize("term", TERMS)
IMAGE, TEXT = "reference_image_features", "reference_text_features"

OF_REFERENCE = inspect.signature(reference._term).parameters
all_options = drawn_options.options(lambda x: x.method == "sort")


# --- oracles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", VECTORS)
def test_row_lists_match_the_vectors_in_value_and_gradient(key: str) -> None:
    case = VECTORS[key]
    v, t, _ = vector_batch(case).leaves()
    log_scale = torch.tensor(math.log(case["scale"]), dtype=torch.float64, requires_grad=True)
    values = {term: ours(v, t, log_scale.exp()) for term, (ours, _) in TERMS.items()}
    for term, value in values.items():
        assert relative_error(value, case["row_mean"][term]) < 1e-10
    expected, total = case["row_mean_gradient"], sum(values.values())
    assert relative_error(total, expected["value"]) < 1e-10
    dv, dt, ds = (g / 2.5 for g in gradients(total, (v, t, log_scale), 2.5))
    found = {"norm_V": dv.norm(), "norm_T": dt.norm(), "logit_scale": ds, "V00": dv[0, 0], "V": dv, "T": dt}
    for name, gradient in ({"T_last": dt[-1, -1]} | found).items():
        if name in expected:
            assert relative_error(gradient, expected[name]) < 1e-10, name


class Case:
    """Inputs and options of a term, and the same term of the reference."""

    def __init__(
        self, term: str, batch: Batch, options: dict[str, Any], teacher: tuple[str, ...], norms: Any = None
    ) -> None:
        self.term, reference_term = TERMS[term]
        n, v, t = len(batch.image), batch.image, batch.text
        if norms is not None:
            # No two of their products are equal but for rounding, which would leave the order open.
            v = v * torch.linspace(*norms, n, dtype=torch.float64)[:, None]
            t = t * torch.linspace(0.53, 2.11, n, dtype=torch.float64)[:, None]
        self.batch = Batch(v, t, batch.scale)
        features = teacher_of(n, seed=n, duplicates=1)
        if term == "cross_modal" and len(teacher) == 1:
            teacher = (IMAGE, TEXT)  # which it needs both of
        self.teacher = {name: features[name] for name in teacher}
        self.options = {**options, "fixed_reference" if self.teacher else "reference_scale": None}
        known = {name: value for name, value in self.options.items() if name in OF_REFERENCE}
        self.reference = partial(reference_term, **known)
        self.arrays = {name: x.numpy() for name, x in self.teacher.items()}

    def value(self, *inputs: Any, **teacher: Tensor) -> Tensor:
        return self.term(*inputs, **teacher, **self.options)

    @property
    def expected(self) -> Any:
        v, t = self.batch.image.numpy(), self.batch.text.numpy()
        return self.reference(v, t, self.batch.scale, **self.arrays)


teachers = st.sampled_from([(), (), (IMAGE, TEXT), (IMAGE,), (TEXT,)])
norms_of = st.sampled_from([None, None, (0.3, 1.7)])


@terms
@given(batch=batches(max_n=7), options=all_options, teacher=teachers, norms=norms_of)
def test_every_option_has_the_references_value_for_features_of_any_norm(
    term, batch: Batch, options, teacher, norms
) -> None:
    case = Case(term, batch, options, teacher, norms)
    value = case.value(*case.batch.leaves(), **case.teacher)
    np.testing.assert_allclose(value.detach(), case.expected, rtol=1e-9, atol=1e-9)


@terms
@given(
    batch=batches(max_n=7),
    # Without a teacher the order is that of the other modality, which has no gradient.
    options=all_options.filter(lambda options: options.get("fixed_reference") is None),
    teacher=teachers,
    norms=norms_of,
)
def test_every_options_gradients_are_the_slopes_of_the_reference(
    term, batch: Batch, options, teacher, norms
) -> None:
    case = Case(term, batch, options, teacher, norms)
    inputs = case.batch.leaves()
    orders = case.arrays or {IMAGE: case.batch.text.numpy(), TEXT: case.batch.image.numpy()}
    fixed = {"reference_scale": batch.scale} if case.options.get("reference_scale") is None else {}
    value = case.value(*inputs, **case.teacher)
    assert_slopes(value, inputs, partial(case.reference, **orders, **fixed))


@terms
@given(
    batch=batches(max_n=7),
    options=all_options,
    teacher=teachers,
    norms=norms_of,
    random=st.randoms(use_true_random=False),
)
def test_every_option_has_the_references_value_in_any_order_of_the_pairs(
    term, batch: Batch, options, teacher, norms, random
) -> None:
    case = Case(term, batch, options, teacher, norms)
    order = list(range(len(batch.image)))
    random.shuffle(order)
    shuffled = {name: x[order] for name, x in case.teacher.items()}
    value = case.value(case.batch.image[order], case.batch.text[order], batch.scale, **shuffled)
    per_anchor = options.get("reduction") == "none"
    expected = np.asarray(case.expected)[order] if per_anchor else case.expected
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)


# --- invariants -------------------------------------------------------------------------------------------


def test_logit_scale_may_be_a_tensor_of_one_element() -> None:
    v, t, s = random_batch(0, 4, 3, 10.0).leaves()
    for term, _ in TERMS.values():
        for scale in (s.reshape(1), s.item()):
            assert torch.equal(term(v, t, scale), term(v, t, s))


# --- bad input --------------------------------------------------------------------------------------------


def test_the_in_modal_term_takes_encoders_of_two_widths() -> None:
    v, t, s = random_batch(0, 6, 4, 10.0).leaves()
    wide = torch.cat([t, t], 1) / 2**0.5  # the same cosines
    assert_close([in_modal(v, wide, s)], [in_modal(v, t, s)], 1e-12)


@pytest.mark.parametrize(
    ("loss", "names", "options", "named"),
    [
        (cross_modal, [IMAGE], {}, f"cross-modal term needs {IMAGE} and {TEXT}.* got {IMAGE} alone"),
        (cross_modal, [TEXT], {}, f"cross-modal term needs {IMAGE} and {TEXT}.* got {TEXT} alone"),
        (cross_modal, [IMAGE, TEXT, "wide"], {}, rf"{IMAGE} and {TEXT} must have one shape.*6, 5.*6, 9"),
        *(
            (
                term,
                names,
                {"fixed_reference": fixed},
                f"fixed_reference='{fixed}' .*not apply beside {names[0]}",
            )
            for term, names, fixed in (
                (in_modal, [IMAGE], "text"),
                (cross_modal, [IMAGE, TEXT], "image"),
                (in_modal, [TEXT], "text"),
            )
        ),
        (
            in_modal,
            [],
            {"model": "top_one", "reference_scale": 2.0},
            f"reference_scale=2.0 multiplies a teacher's similarities.* needs {IMAGE} or {TEXT}",
        ),
        (
            in_modal,
            [],
            {"kernel": "triton", "reduction": "none"},
            "kernel='triton' does not serve here.*reduction='none' is computed from whole matrices",
        ),
    ],
)
def test_options_that_do_not_fit_the_teacher_or_the_engine_are_named(
    loss, names, options, named: str
) -> None:
    teacher = {name: x for name, x in teacher_of(6).items() if name in names}
    if "wide" in names:
        teacher[TEXT] = teacher_of(6, 9)[TEXT]
        assert in_modal(*random_batch(0, 6, 4, 10.0).leaves(), **teacher).isfinite()
    with pytest.raises(ValueError, match=named):
        loss(*random_batch(0, 6, 4, 10.0).leaves(), **teacher, **options)
