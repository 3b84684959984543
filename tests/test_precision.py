"""Devices with and without float64, and long running sums; ``conditions`` has the losses on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_devices import CUDA, MPS, meta_is, no_float64
from rankloss import engine, precision
from rankloss.options import RankOptions


@pytest.mark.parametrize("method", ["sort", "bin"])
@pytest.mark.parametrize("agrees", [False, True])
def test_running_sums_over_16384_items_are_float64s(method: str, agrees: bool) -> None:
    n, n_items, d = 2, 2**14, 512
    generator = torch.Generator().manual_seed(0)
    v, t = (torch.nn.functional.normalize(torch.randn(n_items, d, generator=generator)) for _ in "vt")
    if agrees:
        v = torch.nn.functional.normalize(t + 4.0 * v)
    cosines = torch.stack([v[:n] @ t.T, t[:n] @ v.T])
    scale, ones = torch.tensor(100.0), torch.ones(2)

    def evaluated(dtype: torch.dtype) -> Sequence[Tensor]:
        block = engine.Block(cosines.clone(), scale, ones.to(dtype), ones.to(dtype), None, (None, None), 0)
        found = engine.evaluate(block, RankOptions(method=method), with_gradient=True)
        return [x for x in found if x is not None]

    expected = evaluated(torch.float64)
    with no_float64():
        found = evaluated(torch.float32)
    for (a, b), tolerance in zip(zip(found, expected, strict=True), (1e-5, 1e-6, 1e-5), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


LOOKS: list[Callable[[Tensor], Any]] = [Tensor.tolist, Tensor.nonzero, Tensor.unique, Tensor.cpu]
LOOKS += [lambda x: bool(x[0] > 0), lambda x: x[x > 0], lambda x: torch.equal(x, x + 1)]


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_at_an_accelerators_values_would_be_seen(look: Callable[[Tensor], Any]) -> None:
    with meta_is(CUDA), pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        look(torch.empty(2, device=CUDA))


def test_a_copy_to_an_accelerator_and_a_tensor_of_float64_would_be_seen() -> None:
    with meta_is(CUDA) as copies:
        there = torch.tensor([1.0, 2.0], device=CUDA)
        there.double() + torch.zeros(2).to(CUDA)
        assert copies == ["aten._to_copy.default"] * 2
        there + torch.zeros(())
        assert copies[2:] == ["aten.add.Tensor"]
    with meta_is(MPS), pytest.raises(TypeError, match="float64"):
        torch.empty(2, device=MPS).double()
    with no_float64(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()


@pytest.mark.parametrize("has_it", [True, False])
def test_an_xpu_device_is_asked_for_float64(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("xpu", 1)
    capabilities = {device: {"has_fp64": has_it, "has_fp16": True}}
    monkeypatch.setattr(torch.xpu, "get_device_capability", capabilities.__getitem__)
    assert precision.has_float64(device) is has_it


def test_other_devices_have_float64_except_mps() -> None:
    kinds = {kind: precision.has_float64(torch.device(kind)) for kind in ("cpu", "cuda", "meta", "mps")}
    assert kinds == {"cpu": True, "cuda": True, "meta": True, "mps": False}
