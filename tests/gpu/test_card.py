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


def features(n: int, d: int = 64) -> list[Tensor]:
    """Images and texts on the card."""
    return [unit(n, d, seed=seed, dtype=torch.float32).to(DEVICE).requires_grad_() for seed in (0, 1)]


def gradients(loss: Any, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The value, and the gradient by both features, one below the other."""
    value = loss(*inputs, torch.tensor(100.0, device=inputs[0].device))
    return value.detach(), torch.cat(torch.autograd.grad(value, inputs))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, torch may compute products in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# On both sides of every choice of a kernel's launch.
@pytest.mark.parametrize(
    ("rows", "items"), [(64, 1024), (64, 2048), (64, 4096), (32, 8192), (8, 65536), (4, 131072)]
)
@pytest.mark.parametrize("method", ["sort", "bin"])
def test_kernel_computes_what_torch_computes_to_the_same_bits_twice(
    method: str, rows: int, items: int
) -> None:
    everyone = features(items)
    of_this_process = [x.detach()[:rows].clone().requires_grad_() for x in everyone]

    def value_and_gradient(kernel: str) -> tuple[Tensor, Tensor]:
        loss = rankloss.RankConsistency(method=method, kernel=kernel)
        with one_of(items // rows, of_this_process, everyone):
            return gradients(loss, of_this_process)

    of_torch, of_kernel, again = map(value_and_gradient, ("torch", "triton", "triton"))
    (value, gradient), (kernels_value, kernels_gradient) = of_torch, of_kernel
    torch.testing.assert_close(kernels_value, value, rtol=1e-5, atol=0)
    # The products may put two items in another order.
    assert relative_error(kernels_gradient, gradient) < 1e-3
    assert all(map(torch.equal, again, of_kernel))


@every_engine
@pytest.mark.parametrize("allowed", [False, True], ids=["float32", "TF32"])
def test_gradient_is_that_of_float64_within_what_the_products_and_bins_cost(
    engine: dict[str, Any], allowed: bool
) -> None:
    inputs = features(1024, 512)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    _, exact_gradient = gradients(rankloss.RankConsistency(method=engine["method"]), exact)
    with tf32(allowed):
        _, gradient = gradients(rankloss.RankConsistency(**engine), inputs)
    tolerance = 5e-3 if allowed else 1e-3
    if engine["method"] == "bin":
        tolerance = 1e-2
    assert relative_error(gradient, exact_gradient) < tolerance


@every_engine
@pytest.mark.parametrize(
    "option",
    [{}, {"top_k": 2}, {"diagonal": False}, {"fixed_reference": "text"}, {"reduction": "sum"}],
    ids=str,
)
def test_step_does_not_wait_for_the_card(engine: dict[str, Any], option: dict[str, Any]) -> None:
    loss = rankloss.RankClipLoss(schedule="constant", **engine, **option)
    inputs = features(1024)
    scale = torch.tensor(100.0, device=DEVICE)
    loss(*inputs, scale).backward()  # the first call looks at the features
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(*inputs, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
