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

OPTIONS_OF_REFERENCE = inspect.signature(reference._term).parameters
all_options = drawn_options.options(lambda options: options.method == "sort")
"""All but bins, in which the lists are another problem than the reference's."""


# --- oracles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", VECTORS)
def test_the_value_of_each_term_is_the_vectors(key: str) -> None:
    inputs = vector_batch(VECTORS[key]).leaves()
    for name, (term, _) in TERMS.items():
        assert relative_error(term(*inputs), VECTORS[key]["row_mean"][name]) < 1e-10


@pytest.mark.parametrize("key", VECTORS)
def test_value_and_gradients_of_the_terms_sum_are_the_vectors(key: str) -> None:
    """The scale's gradient is by its logarithm."""
    case = VECTORS[key]
    v, t, _ = vector_batch(case).leaves()
    log_scale = torch.tensor(math.log(case["scale"]), dtype=torch.float64, requires_grad=True)
    total = cross_modal(v, t, log_scale.exp()) + in_modal(v, t, log_scale.exp())
    upstream = 2.5  # which the gradients have as a factor
    by_v, by_t, by_scale = (x / upstream for x in gradients(total, (v, t, log_scale), upstream))
    found = {
        "value": total,
        "V": by_v,
        "T": by_t,
        "norm_V": by_v.norm(),
        "norm_T": by_t.norm(),
        "V00": by_v[0, 0],
        "T_last": by_t[-1, -1],
        "logit_scale": by_scale,
    }
    owed = {name: number for name, number in case["row_mean_gradient"].items() if name != "note"}
    assert (
        {"value", "norm_V", "norm_T", "logit_scale"} <= owed.keys() <= found.keys()
    )  # the matrices of some cases
    for name, number in owed.items():
        assert relative_error(found[name], number) < 1e-10, name


class Case:
    """Inputs and options of a term, and the same term of ``rankloss.reference``.

    Args:
        term: A name in ``TERMS``.
        batch: The features and the scale.
        options: Those of ``RankOptions``.
        teacher: Which modalities' features a teacher has, by their arguments' names.
        norms: The least and the largest norm of the images; None for features of unit norm.
    """

    def __init__(
        self, term: str, batch: Batch, options: dict[str, Any], teacher: tuple[str, ...], norms: Any = None
    ) -> None:
        self.term, reference_term = TERMS[term]
        self.batch = batch if norms is None else with_norms(batch, *norms)
        if term == "cross_modal" and len(teacher) == 1:
            teacher = (IMAGE, TEXT)  # its lists need a teacher of both
        n = len(batch.image)
        of_both_modalities = teacher_of(n, seed=n, duplicates=1)
        self.teacher = {name: of_both_modalities[name] for name in teacher}
        excluded_option = "fixed_reference" if teacher else "reference_scale"
        self.options = {**options, excluded_option: None}
        # The reference has the options that change a value, and not those of how it is computed.
        of_value = {name: value for name, value in self.options.items() if name in OPTIONS_OF_REFERENCE}
        self.reference = partial(reference_term, **of_value)
        self.arrays = {name: x.numpy() for name, x in self.teacher.items()}

    def value(self, *inputs: Any, **teacher: Tensor) -> Tensor:
        """The library's value."""
        return self.term(*inputs, **teacher, **self.options)

    @property
    def expected(self) -> Any:
        """The reference's value of the batch."""
        v, t = self.batch.image.numpy(), self.batch.text.numpy()
        return self.reference(v, t, self.batch.scale, **self.arrays)


def with_norms(batch: Batch, least: float, largest: float) -> Batch:
    """The batch with images of these norms, and with texts of others.

    No two of their products are equal but for rounding, which would leave the order open.
    """
    n = len(batch.image)
    of_images = torch.linspace(least, largest, n, dtype=torch.float64)
    of_texts = torch.linspace(0.53, 2.11, n, dtype=torch.float64)
    return Batch(batch.image * of_images[:, None], batch.text * of_texts[:, None], batch.scale)


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
    # A fixed reference does not apply beside the orders that the test passes on as a teacher's.
    options=all_options.filter(lambda options: options.get("fixed_reference") is None),
    teacher=teachers,
    norms=norms_of,
)
def test_every_options_gradients_are_the_slopes_of_the_reference(
    term, batch: Batch, options, teacher, norms
) -> None:
    case = Case(term, batch, options, teacher, norms)
    inputs = case.batch.leaves()
    # What ranks the lists has no gradient, and is held while the reference's inputs move: the teacher's
    # features, or else the other modality's, and the scale by which they are multiplied.
    orders = case.arrays or {IMAGE: case.batch.text.numpy(), TEXT: case.batch.image.numpy()}
    scale = {"reference_scale": batch.scale} if case.options.get("reference_scale") is None else {}
    value = case.value(*inputs, **case.teacher)
    assert_slopes(value, inputs, partial(case.reference, **orders, **scale))


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
    expected = case.expected  # of the pairs in their first order
    if per_anchor:
        expected = np.asarray(expected)[order]
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)


# --- invariants -------------------------------------------------------------------------------------------


def test_logit_scale_may_be_a_number_or_a_tensor_of_one_element() -> None:
    v, t, s = random_batch(seed=0, n=4, d=3, scale=10.0).leaves()
    for term, _ in TERMS.values():
        for scale in (s.reshape(1), s.item()):
            assert torch.equal(term(v, t, scale), term(v, t, s))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    ("fixed_reference", "place_among_inputs"), [("image", 0), ("text", 1)], ids=["images", "texts"]
)
def test_a_modality_that_only_ranks_has_a_gradient_of_zero(
    fixed_reference: Any, place_among_inputs: int, create_graph: bool
) -> None:
    """It has a gradient, since autograd.grad refuses an input without one; all others are not zero."""
    inputs = random_batch(seed=0, n=6, d=4, scale=10.0).leaves()
    value = in_modal(*inputs, fixed_reference=fixed_reference)
    slopes = torch.autograd.grad(value, inputs, create_graph=create_graph)
    is_zero = [bool((slope == 0).all()) for slope in slopes]  # by images, texts and the scale
    assert is_zero == [k == place_among_inputs for k in range(3)]


def test_the_in_modal_term_takes_encoders_of_two_widths() -> None:
    v, t, s = random_batch(seed=0, n=6, d=4, scale=10.0).leaves()
    wide = torch.cat([t, t], 1) / 2**0.5  # twice the width, the same cosines
    assert_close([in_modal(v, wide, s)], [in_modal(v, t, s)], tolerance=1e-12)


def test_the_in_modal_term_takes_a_teacher_of_two_widths() -> None:
    v, t, s = random_batch(seed=0, n=6, d=4, scale=10.0).leaves()
    narrow = teacher_of(n=6)
    wide = {**narrow, TEXT: torch.cat([narrow[TEXT]] * 2, 1) / 2**0.5}  # the same cosines
    assert_close([in_modal(v, t, s, **wide)], [in_modal(v, t, s, **narrow)], tolerance=1e-12)


# --- bad input --------------------------------------------------------------------------------------------


TEACHER_OF_TWO_WIDTHS = {**teacher_of(n=6), TEXT: teacher_of(n=6, d=9)[TEXT]}
IMAGES_OF_TEACHER, TEXTS_OF_TEACHER = ({name: teacher_of(n=6)[name]} for name in (IMAGE, TEXT))


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (IMAGES_OF_TEACHER, f"cross-modal term needs {IMAGE} and {TEXT}.* got {IMAGE} alone"),
        (TEXTS_OF_TEACHER, f"cross-modal term needs {IMAGE} and {TEXT}.* got {TEXT} alone"),
        (TEACHER_OF_TWO_WIDTHS, rf"{IMAGE} and {TEXT} must have one shape.*6, 5.*6, 9"),
    ],
    ids=["images alone", "texts alone", "two widths"],
)
def test_a_teacher_without_similarities_across_modalities_has_no_cross_modal_term(
    teacher: dict[str, Tensor], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        cross_modal(*random_batch(seed=0, n=6, d=4, scale=10.0).leaves(), **teacher)


@pytest.mark.parametrize(
    ("term", "teacher", "fixed", "named"),
    [
        (in_modal, IMAGES_OF_TEACHER, "text", IMAGE),
        (in_modal, TEXTS_OF_TEACHER, "text", TEXT),
        (cross_modal, teacher_of(n=6), "image", IMAGE),
    ],
    ids=["images alone", "texts alone", "both"],
)
def test_a_fixed_reference_does_not_apply_beside_a_teacher(
    term: Any, teacher: dict[str, Tensor], fixed: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=f"fixed_reference='{fixed}' .*not apply beside {named}"):
        term(*random_batch(seed=0, n=6, d=4, scale=10.0).leaves(), **teacher, fixed_reference=fixed)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"model": "top_one", "reference_scale": 2.0},
            f"reference_scale=2.0 multiplies a teacher's similarities.* needs {IMAGE} or {TEXT}",
        ),
        (
            {"kernel": "triton", "reduction": "none"},
            "kernel='triton' does not serve here.*reduction='none' is computed from whole matrices",
        ),
    ],
    ids=["a teacher's scale", "a kernel"],
)
def test_options_that_do_not_apply_without_a_teacher_or_by_a_kernel_are_named(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        in_modal(*random_batch(seed=0, n=6, d=4, scale=10.0).leaves(), **options)


@pytest.mark.parametrize("term", [cross_modal, in_modal])
def test_a_value_that_cannot_be_hashed_is_refused_by_name(term: Any) -> None:
    with pytest.raises(ValueError, match=r"top_k must be an integer of at least 1; got \[1\]"):
        term(*random_batch(seed=0, n=6, d=4, scale=10.0).leaves(), top_k=[1])


@pytest.mark.parametrize("term", [cross_modal, in_modal])
@pytest.mark.parametrize("fixed", [{"gather": False}, {"cross_modal": 2.0}, {"in_modal": 2.0}], ids=str)
def test_arguments_of_the_class_that_a_term_fixes_are_no_options(term: Any, fixed: dict[str, Any]) -> None:
    """They are one term, with the weight 1, of this process's pairs."""
    (name,) = fixed
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        term(*random_batch(seed=0, n=6, d=4, scale=10.0).leaves(), **fixed)
