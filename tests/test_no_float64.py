"""The losses on a device without float64: values and gradients against float64's, and no move to the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import rankloss
from batches import assert_close, random_batch
from no_float64 import MPS, meta_is_mps, no_float64
from rankloss import engine
from rankloss.options import RankOptions
from rankloss_baselines import CyClipLoss

pytestmark = pytest.mark.filterwarnings("ignore:logit_bias is not given")

IMAGE, TEXT = "reference_image_features", "reference_text_features"

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "clip": rankloss.ClipLoss,
    "clip, streamed": lambda: rankloss.ClipLoss(memory_budget=0),
    "siglip": rankloss.SigLipLoss,
    "siglip, streamed": lambda: rankloss.SigLipLoss(memory_budget=0),
    "rank_clip": lambda: rankloss.RankClipLoss(schedule="constant"),
    "mimicry": rankloss.MimicryLoss,
    "cyclip": CyClipLoss,
    **{
        str(options): lambda options=options: rankloss.RankConsistency(**options)
        for options in (
            {"top_k": 5, "chunk_size": 7},
            {"method": "bin", "bins": 16},
            {"method": "bin", "bins": 16, "top_k": 3},
            {"model": "top_one"},
            {"diagonal": False, "reduction": "sum"},
            {"lists": "batch", "discount": "log"},
            {"worth": "shifted", "reduction": "none"},
        )
    },
}


def results(name: str, inputs: Sequence[Tensor], dtype: torch.dtype, again: bool) -> list[Tensor]:
    """Value, gradients, and if wanted gradients of a function of the gradients, in a dtype."""
    v, t, s = inputs = tuple(x.detach().to(dtype).requires_grad_() for x in inputs)
    teacher = {IMAGE: t.detach(), TEXT: v.detach()} if name == "mimicry" else {}
    value = LOSSES[name]()(v, t, s, **teacher)
    value = (value * torch.linspace(0.5, 1.5, value.numel(), dtype=dtype)).sum()
    found = torch.autograd.grad(value, inputs, create_graph=again, allow_unused=True, materialize_grads=True)
    if again:
        found = (*found, *torch.autograd.grad(sum(x.square().sum() for x in found[:2]), inputs[:2]))
    return [value, *found]


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_value_gradients_and_second_derivatives_are_float64s(name: str, scale: float) -> None:
    """Of a batch with equal items, in the order of the float32 products."""
    inputs = random_batch(3, 33, 8, scale, duplicates=4).leaves(torch.float32)
    again = name not in ("clip", "siglip", "cyclip") and scale == 1.0
    expected = results(name, inputs, torch.float64, again)
    with no_float64():
        found = results(name, inputs, torch.float32, again)
    assert_close(found[:1], expected[:1], 1e-5)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7 * scale


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


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_leaves_mps(name: str) -> None:
    """As far as tensors without values can show."""
    v, t, s = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((16, 8), (16, 8), ()))
    teacher = dict.fromkeys((IMAGE, TEXT), v.detach()) if name == "mimicry" else {}
    with meta_is_mps():
        value = LOSSES[name]()(v, t, s, **teacher)
        value.sum().backward()
        assert {value.device, v.grad.device, t.grad.device} == {MPS}


def test_a_tensor_of_float64_and_one_that_leaves_mps_would_be_seen() -> None:
    x = torch.empty(2, device="meta")
    with meta_is_mps(), pytest.raises(TypeError, match="float64"):
        x.double()
    with meta_is_mps(), pytest.raises(NotImplementedError, match="meta"):
        x.to("cpu")
    with no_float64(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()
