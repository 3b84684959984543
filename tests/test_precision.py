"""Devices with and without float64, and long running sums; ``conditions`` has the losses on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from batches import unit
from fake_devices import CUDA, MPS, meta_is, no_float64
from rankloss import engine, precision
from rankloss.options import RankOptions


@pytest.mark.parametrize("method", ["sort", "bin"])
@pytest.mark.parametrize("modalities_agree", [False, True])
def test_a_block_of_16384_items_has_float64s_values_and_gradients_without_it(
    method: str, modalities_agree: bool
) -> None:
    """The running sums over a list's items are then of logarithms in float32, and lose no more digits."""
    n_lists, n_items, d = 2, 2**14, 512  # two lists for each direction
    v, t = (unit(n_items, d, seed=seed, dtype=torch.float32) for seed in (0, 1))
    if modalities_agree:  # each image is then nearest to its own text
        v = torch.nn.functional.normalize(t + 4.0 * v)
    cosines = torch.stack([v[:n_lists] @ t.T, t[:n_lists] @ v.T])  # of both directions

    def evaluated(dtype: torch.dtype) -> engine.Evaluated:
        """A block of the lists, whose weights have the dtype of its sums."""
        weights = torch.ones(2, dtype=dtype)  # one for each direction
        block = engine.Block(
            cosines.clone(),
            scale=torch.tensor(100.0),
            alpha=weights,
            beta=weights,
            reference=None,  # each direction ranks the other
            first_equal=(None, None),
            first_row=0,
        )
        return engine.evaluate(block, RankOptions(method=method), with_gradient=True)

    in_float64 = evaluated(torch.float64)
    with no_float64():
        in_float32 = evaluated(torch.float32)
    tolerances = (1e-5, 1e-6, 1e-5)  # of cross-entropies, likelihoods and gradients, relative to their norms
    for actual, expected, tolerance in zip(in_float32, in_float64, tolerances, strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()


# Operations whose result depends on a tensor's values, for which a CPU would wait for an accelerator.
LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "a list": Tensor.tolist,
    "places": Tensor.nonzero,
    "distinct values": Tensor.unique,
    "a copy": Tensor.cpu,
    "a condition": lambda x: bool(x[0] > 0),
    "a selection": lambda x: x[x > 0],
    "a comparison": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_an_accelerators_values_would_be_seen(name: str) -> None:
    """A meta tensor stands for one on the accelerator: it has no values, so that reading them is an error."""
    with meta_is(CUDA), pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        LOOKS[name](torch.empty(2, device=CUDA))


@pytest.mark.parametrize(
    ("copy_beside", "operation"),
    [
        (lambda there: torch.tensor([1.0, 2.0], device=CUDA), "aten._to_copy.default"),
        (lambda there: torch.zeros(2).to(CUDA), "aten._to_copy.default"),
        (lambda there: there + torch.zeros(()), "aten.add.Tensor"),
    ],
    ids=["a tensor of numbers", "a tensor of the CPU", "a number of the CPU"],
)
def test_a_copy_to_an_accelerator_would_be_seen(
    copy_beside: Callable[[Tensor], Tensor], operation: str
) -> None:
    """The list that ``meta_is`` gives has each operation that copies from the CPU."""
    with meta_is(CUDA) as copies:
        there = torch.empty(2, device=CUDA)
        assert copies == []
        copy_beside(there)
        assert copies == [operation]


def test_a_tensor_of_float64_on_a_device_without_it_would_be_seen() -> None:
    """On Apple's device, and where every device is made to lack it."""
    with meta_is(MPS), pytest.raises(TypeError, match="float64"):
        torch.empty(2, device=MPS).double()
    with no_float64(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()


def test_a_tensor_of_float64_on_an_accelerator_that_has_it_is_neither_an_error_nor_a_copy() -> None:
    with meta_is(CUDA) as copies:
        assert torch.empty(2, device=CUDA).double().dtype == torch.float64
    assert copies == []


@pytest.mark.parametrize("has_it", [True, False])
def test_an_xpu_device_is_asked_for_float64(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("xpu", 1)
    capabilities = {device: {"has_fp64": has_it, "has_fp16": True}}
    monkeypatch.setattr(torch.xpu, "get_device_capability", capabilities.__getitem__)
    assert precision.has_float64(device) is has_it


def test_other_devices_have_float64_except_mps() -> None:
    kinds = {kind: precision.has_float64(torch.device(kind)) for kind in ("cpu", "cuda", "meta", "mps")}
    assert kinds == {"cpu": True, "cuda": True, "meta": True, "mps": False}
