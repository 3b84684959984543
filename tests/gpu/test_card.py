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
    return [unit(n, d, seed=seed, dtype=torch.float32).to(DEVICE).requires_grad_() for seed in (0, 1)]


def gradients(loss: Any, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The value, and the gradient by both features, one below the other."""
    value = loss(*inputs, torch.tensor(100.0, device=inputs[0].device))
    return value.detach(), torch.cat(torch.autograd.grad(value, inputs))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
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
    local = [x.detach()[:rows].clone().requires_grad_() for x in everyone]
    found = []
    for kernel in ("torch", "triton", "triton"):
        with one_of(items // rows, local, everyone):
            found.append(gradients(rankloss.RankConsistency(method=method, kernel=kernel), local))
    (value, gradient), first, second = found
    torch.testing.assert_close(first[0], value, rtol=1e-5, atol=0)
    assert relative_error(first[1], gradient) < 1e-3  # the products may put two items in another order
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_engine
@pytest.mark.parametrize("allowed", [False, True], ids=["float32", "TF32"])
def test_gradient_is_that_of_float64_within_what_the_products_and_bins_cost(
    engine: dict[str, Any], allowed: bool
) -> None:
    inputs = features(1024, 512)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    _, wanted = gradients(rankloss.RankConsistency(method=engine["method"]), exact)
    with tf32(allowed):
        _, found = gradients(rankloss.RankConsistency(**engine), inputs)
    assert relative_error(found, wanted) < (1e-2 if engine["method"] == "bin" else 5e-3 if allowed else 1e-3)


@every_engine
@pytest.mark.parametrize(
    "option",
    [{}, {"top_k": 2}, {"diagonal": False}, {"fixed_reference": "text"}, {"reduction": "sum"}],
    ids=str,
)
def test_step_does_not_wait_for_the_card(engine: dict[str, Any], option: dict[str, Any]) -> None:
    loss, inputs = rankloss.RankClipLoss(schedule="constant", **engine, **option), features(1024)
    scale = torch.tensor(100.0, device=DEVICE)
    loss(*inputs, scale).backward()  # the first call looks at the features
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(*inputs, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
