"""Checks of the losses that need a CUDA card: run by ``make test-gpu``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rankloss
from batches import relative_error, unit
from devices import DEVICE
from one_of import one_of

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA card")

ENGINES = [
    {"kernel": kernel, "method": method} for kernel in ("torch", "triton") for method in ("sort", "bin")
]
every_engine = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: "-".join(engine.values()))
"""Options that choose who computes the lists, and how they are ranked."""


def features_on_card(n: int, d: int = 64) -> list[Tensor]:
    """Images and texts, ``[n, d]`` each."""
    return [unit(n, d, seed=seed, dtype=torch.float32).to(DEVICE).requires_grad_() for seed in (0, 1)]


def value_and_gradient_of(loss: Any, features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The value at scale 100, and the gradient by images and texts, one below the other."""
    value = loss(*features, torch.tensor(100.0, device=features[0].device))
    return value.detach(), torch.cat(torch.autograd.grad(value, features))


@contextlib.contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Inside, torch may compute products in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# Lengths of lists on both sides of every choice of a kernel's launch; fewer rows, where a list is longer.
@pytest.mark.parametrize(
    ("rows", "items"), [(64, 1024), (64, 2048), (64, 4096), (32, 8192), (8, 65536), (4, 131072)]
)
@pytest.mark.parametrize("method", ["sort", "bin"])
def test_kernel_computes_what_torch_computes_to_the_same_bits_twice(
    method: str, rows: int, items: int
) -> None:
    """The lists are those of one of several processes: its rows, and the items of all."""
    everyone = features_on_card(items)
    of_this_process = [x.detach()[:rows].clone().requires_grad_() for x in everyone]

    def computed_by(kernel: str) -> tuple[Tensor, Tensor]:
        loss = rankloss.RankConsistency(method=method, kernel=kernel)
        with one_of(processes=items // rows, own=of_this_process, everyone=everyone):
            return value_and_gradient_of(loss, of_this_process)

    value, gradient = computed_by("torch")
    kernels_value, kernels_gradient = computed_by("triton")
    value_again, gradient_again = computed_by("triton")
    torch.testing.assert_close(kernels_value, value, rtol=1e-5, atol=0)
    # The products may put two items in another order.
    assert relative_error(kernels_gradient, gradient) < 1e-3
    assert torch.equal(value_again, kernels_value)
    assert torch.equal(gradient_again, kernels_gradient)


@every_engine
@pytest.mark.parametrize("allowed", [False, True], ids=["float32", "TF32"])
def test_gradient_is_that_of_float64_within_what_the_products_and_bins_cost(
    engine: dict[str, Any], allowed: bool
) -> None:
    features = features_on_card(1024, 512)
    in_float64 = [x.detach().cpu().double().requires_grad_() for x in features]
    _, exact_gradient = value_and_gradient_of(rankloss.RankConsistency(method=engine["method"]), in_float64)
    with tf32_products(allowed):
        _, gradient = value_and_gradient_of(rankloss.RankConsistency(**engine), features)
    of_products = 5e-3 if allowed else 1e-3
    of_bins = 1e-2  # where rounding moves an item over an edge, it has another bin
    tolerance = of_bins if engine["method"] == "bin" else of_products
    assert relative_error(gradient, exact_gradient) < tolerance


@every_engine
@pytest.mark.parametrize(
    "option",
    [{}, {"top_k": 2}, {"diagonal": False}, {"fixed_reference": "text"}, {"reduction": "sum"}],
    ids=str,
)
def test_step_does_not_wait_for_the_card(engine: dict[str, Any], option: dict[str, Any]) -> None:
    loss = rankloss.RankClipLoss(schedule="constant", **engine, **option)
    features = features_on_card(1024)
    scale = torch.tensor(100.0, device=DEVICE)
    loss(*features, scale).backward()  # the first call looks at the features
    torch.cuda.set_sync_debug_mode("error")  # from here on a wait is an error
    try:
        loss(*features, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
