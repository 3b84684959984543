from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batches import gradients, random_batch, relative_error
from rankloss import RankClipLoss, RankConsistency, products
from rankloss.products import factors_for_tf32

MM = torch.mm


def in_tf32(x: Tensor, *, nearest: bool) -> Tensor:
    """Ten bits of mantissa, to the nearest or cut off: hardware may do either."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 2**12 if nearest else bits) & -(2**13)).view(torch.float32)


def take_products_in_tf32(patch: pytest.MonkeyPatch, *, nearest: bool = True) -> None:
    """The similarities, as on a GPU where torch is allowed TF32; sums are float32's."""

    def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        return MM(in_tf32(a, nearest=nearest), in_tf32(b, nearest=nearest), out=out)

    patch.setattr(torch, "mm", mm)
    patch.setattr(products, "may_round", lambda features: features.dtype == torch.float32)


@pytest.mark.parametrize("nearest", [True, False])
def test_the_factors_products_in_tf32_are_those_of_float32(nearest: bool) -> None:
    batch = random_batch(0, 300, 64, 1.0)
    v, t = batch.image.float(), batch.text.float()
    exact = v.double() @ t.double().T
    a, b = (in_tf32(x, nearest=nearest) for x in factors_for_tf32(v, t))
    plain, ours, tf32 = v @ t.T, a @ b.T, in_tf32(v, nearest=nearest) @ in_tf32(t, nearest=nearest).T
    error, of_plain, of_tf32 = ((x - exact).abs().max() for x in (ours, plain, tf32))
    assert error < 3 * of_plain
    assert of_tf32 > 100 * of_plain


def exchanged(cosines: Tensor, exact: Tensor) -> float:
    """The part of all neighbours in the exact order that are in the opposite one."""
    return float((cosines.gather(-1, exact.argsort(-1)).diff() < 0).float().mean())


def test_float32s_order_is_kept_under_tf32_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(0, 512, 64, 1.0)
    v, t = batch.image.float(), batch.text.float()
    exact = v.double() @ t.double().T
    take_products_in_tf32(monkeypatch)
    matrices = tuple(products.Matrix(name, x, y, None) for name, x, y in (("S", v, t), ("R", t, v)))
    for kind in (products.Products, products.MirroredProducts):
        (kept, _), (changed, _) = (
            kind(matrices, precision=p).take(slice(0, 512)) for p in ("exact-order", "default")
        )
        assert exchanged(kept, exact) < 1e-3
        assert exchanged(changed, exact) > 1e-2


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(
    "reduction", ["mean", "none"]
)  # in the backward pass the rows are gone through again
def test_the_gradient_is_that_of_float32_products(
    budget: int | None, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_batch(0, 64, 16, 100.0).leaves(torch.float32)

    def found(**options) -> list[Tensor]:
        loss = RankConsistency(chunk_size=16, memory_budget=budget, reduction=reduction, **options)
        value = loss(*inputs)
        return [value.detach(), *gradients(value.sum(), inputs, 1.5)]

    wanted = found()
    take_products_in_tf32(monkeypatch)
    for a, b in zip(found(precision="exact-order"), wanted, strict=True):
        assert relative_error(a, b) < 1e-4
    assert max(relative_error(a, b) for a, b in zip(found(), wanted, strict=True)) > 1e-3


def test_a_teachers_order_is_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, teacher = (random_batch(k, 64, 16, 100.0).leaves(torch.float32) for k in (0, 1))

    def found(precision: str) -> Tensor:
        loss = RankClipLoss(schedule="constant", precision=precision)
        of_teacher = {"reference_image_features": teacher[0], "reference_text_features": teacher[1]}
        value = loss(*inputs, **of_teacher)
        return gradients(value, inputs, 1.0)[0]

    wanted = found("default")
    take_products_in_tf32(monkeypatch)
    assert relative_error(found("exact-order"), wanted) < 1e-4
    assert relative_error(found("default"), wanted) > 3e-4


def test_on_a_cpu_and_in_float64_nothing_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "factors_for_tf32", None)
    for dtype in (torch.float32, torch.float64):
        RankConsistency(precision="exact-order")(*random_batch(0, 4, 3, 10.0).leaves(dtype))


def test_batch_lists_take_the_default_alone() -> None:
    with pytest.raises(ValueError, match="precision='exact-order' serves row lists; lists='batch'"):
        RankConsistency(lists="batch", precision="exact-order")
