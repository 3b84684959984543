"""Whatever the features are: their dtype, ties among them, zeros, NaN, their layout, their order."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from subjects import (
    KINDS,
    SUBJECTS,
    Inputs,
    Result,
    Subject,
    assert_right,
    data,
    expected,
    leaves,
    right_or_refused,
    run,
    tolerances,
    upstream_of,
)
from torch import Tensor

# Zero rows are not unit-norm, and of that a loss may warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*norm")

every = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
differentiable = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.differentiates], ids=str)
modules = pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.is_module], ids=str)
kinds = pytest.mark.parametrize("kind", KINDS)
full_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@full_precision
@kinds
@every
def test_value_and_gradients_are_right(subject: Subject, kind: str, dtype: torch.dtype) -> None:
    inputs = subject.pick(data(kind), dtype)
    if subject.has_no_value(kind):
        with pytest.raises(ValueError, match=subject.refuses):
            run(subject, inputs)
        return
    assert_right(run(subject, inputs), expected(subject, inputs), tolerances(subject, dtype))


@half_precision
@pytest.mark.parametrize("kind", ["plain", "sign codes"])
@every
def test_half_precision_features_are_right(subject: Subject, kind: str, dtype: torch.dtype) -> None:
    inputs = subject.pick(data(kind), dtype)
    assert_right(run(subject, inputs), expected(subject, inputs), tolerances(subject, dtype))


@pytest.mark.parametrize("position", range(2))
@every
def test_inputs_of_two_dtypes_are_right_or_refused(subject: Subject, position: int) -> None:
    name = subject.inputs[position % len(subject.inputs)]
    inputs = {k: x.to(torch.float64 if k == name else torch.float32) for k, x in subject.pick(data()).items()}
    with right_or_refused("dtype"):
        assert_right(run(subject, inputs), expected(subject, inputs), tolerances(subject, torch.float32))


@pytest.mark.parametrize(
    "scale", [100, 100.0, torch.tensor([100.0]), torch.tensor(100.0, dtype=torch.float64)]
)
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if "logit_scale" in s.inputs], ids=str)
def test_the_scale_is_any_number(subject: Subject, scale: Tensor | float) -> None:
    inputs = subject.pick(data(), torch.float32)
    wanted = tuple(name for name in subject.differentiable if name != "logit_scale")
    found = run(subject, {**inputs, "logit_scale": torch.as_tensor(scale)}, wanted=wanted)
    taken = leaves(inputs, wanted)
    plain = subject.started()(**{**taken, "logit_scale": scale})
    assert_right(
        Result(plain, {}), Result(expected(subject, inputs).value, {}), tolerances(subject, torch.float32)
    )
    assert_right(found, expected(subject, inputs, wanted), tolerances(subject, torch.float32))


@kinds
@full_precision
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.equivariant], ids=str)
def test_the_order_of_the_pairs_does_not_matter(subject: Subject, dtype: torch.dtype, kind: str) -> None:
    if subject.has_no_value(kind):
        pytest.skip("refused, whatever the order")
    inputs = subject.pick(data(kind), dtype)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    plain = run(subject, inputs)
    per_pair = plain.value.shape[:1] == order.shape
    upstream = upstream_of(plain.value)
    moved = run(
        subject,
        {k: permuted(x, order) for k, x in inputs.items()},
        upstream=upstream[order] if per_pair else upstream,
    )
    owed = {k: permuted(g, order) for k, g in plain.gradients.items()}
    value = plain.value[order] if per_pair else plain.value
    assert_right(moved, Result(value, owed), tolerances(subject, dtype))


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """Pairs in another order; of lists, the lists."""
    return x if x.dim() == 0 else x[order]


@full_precision
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if "scores" in s.inputs or "y" in s.inputs], ids=str)
def test_the_order_of_the_items_of_a_list_does_not_matter(subject: Subject, dtype: torch.dtype) -> None:
    inputs = subject.pick(data("equal rows"), dtype)
    plain = run(subject, inputs)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    moved = run(subject, {k: x[:, order] for k, x in inputs.items()})
    owed = {k: g[:, order] for k, g in plain.gradients.items()}
    assert_right(moved, Result(plain.value, owed), tolerances(subject, dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every
def test_a_feature_that_is_not_finite_makes_the_value_nan(
    subject: Subject, dtype: torch.dtype, bad: float
) -> None:
    if math.isinf(bad) and "image_features" not in subject.inputs:
        pytest.skip("of a list, infinity is an item like others")
    for name in subject.inputs:
        if name in ("logit_scale", "logit_bias") and (math.isinf(bad) or name not in subject.differentiable):
            continue  # the promise is about features; and only worth exp depends on the scale
        inputs = subject.pick(data(), dtype)
        inputs[name][(2,) * inputs[name].dim()] = bad
        if name.startswith("reference_"):
            with pytest.raises(ValueError, match=f"{name} must be finite"):  # a defect of the data
                run(subject, inputs)
            continue
        value = run(subject, inputs).value
        if not subject.differentiates:
            assert not value.isfinite().all(), f"{bad} in {name} gives {value}"
        elif value.dim():  # the other lists are none of its business
            assert value[2].isnan().any(), f"{bad} in {name} gives {value}"
        else:
            assert value.isnan(), f"{bad} in {name} gives {value}"


@pytest.mark.parametrize("factor", [1e20, 1e30])
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.differentiates], ids=str)
def test_products_that_overflow_give_no_plausible_number(subject: Subject, factor: float) -> None:
    for name in subject.inputs:
        if name not in ("logit_scale", "logit_bias"):
            inputs = subject.pick(data(), torch.float32)
            inputs[name] = inputs[name] * factor
            value = run(subject, inputs).value
            if value.isfinite().all():
                assert_right(Result(value, {}), expected(subject, inputs, ()), (1e-4, 0))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T if x.dim() == 2 else x,
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2] if x.dim() else x,
    "columns of a wider matrix": lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[-1]] if x.dim() else x,
    "stacked": lambda x: torch.stack([x, -x], -1)[..., 0],
    "not at the start of its storage": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@full_precision
@every
def test_strides_do_not_matter(subject: Subject, dtype: torch.dtype, layout: str) -> None:
    inputs = subject.pick(data("equal rows"), dtype)
    strided = {k: LAYOUTS[layout](x) for k, x in inputs.items()}
    assert all(torch.equal(strided[k], x) for k, x in inputs.items())
    assert_right(run(subject, strided), expected(subject, inputs), tolerances(subject, dtype))


@full_precision
@differentiable
def test_expanded_features_are_right(subject: Subject, dtype: torch.dtype) -> None:
    name = subject.inputs[0]
    inputs = subject.pick(data(), dtype)
    inputs[name] = inputs[name][:1].expand_as(inputs[name])
    assert_right(run(subject, inputs), expected(subject, inputs), tolerances(subject, dtype))


@full_precision
@differentiable
def test_an_input_may_be_the_only_one_with_a_gradient(subject: Subject, dtype: torch.dtype) -> None:
    inputs = subject.pick(data("equal rows"), dtype)
    owed = expected(subject, inputs)
    for name in subject.differentiable:
        alone = run(subject, inputs, wanted=(name,))
        assert_right(alone, Result(owed.value, {name: owed.gradients[name]}), tolerances(subject, dtype))


@differentiable
def test_one_tensor_may_be_both_sides(subject: Subject) -> None:
    """The gradients of both roles add up. Codes have exact products; a scale of 1 leaves a gradient."""
    inputs = subject.pick({**data("sign codes"), "logit_scale": torch.tensor(1.0)})
    first, second, *_ = (*subject.inputs, None)
    if second is None:
        pytest.skip("takes one tensor")
    inputs[second] = inputs[first]
    owed = expected(subject, inputs)
    x = inputs[first].detach().clone().requires_grad_()
    value = subject.started()(**{**inputs, first: x, second: x})
    (gradient,) = torch.autograd.grad(value, x, upstream_of(value))
    total = owed.gradients[first] + owed.gradients.get(second, 0.0)
    assert_right(Result(value, {first: gradient}), Result(owed.value, {first: total}), (1e-10, 1e-9))


@modules
@kinds
def test_the_inputs_are_left_as_they_are(subject: Subject, kind: str) -> None:
    if subject.has_no_value(kind):
        pytest.skip("refused")
    inputs = subject.pick(data(kind))
    run(subject, inputs)
    assert_unchanged(inputs, subject.pick(data(kind)))


def assert_unchanged(inputs: Inputs, before: Inputs) -> None:
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name
