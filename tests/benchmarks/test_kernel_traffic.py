"""The counted bytes against every load and store that the interpreter carries out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from devices import DEVICE
from interpreter import interpreted, needs_triton
from kernel_traffic import feature_bytes, traffic
from rankloss.options import RankOptions
from rankloss_triton import equal_rows, evaluate
from rankloss_triton.rows import Block

pytestmark = [needs_triton, pytest.mark.skipif(DEVICE.type != "cpu", reason="counted in the interpreter")]


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreted():
        yield


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """First address and number of bytes of everything that is loaded and stored."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: list[tuple[int, int]] = []

    def watch(name: str, mask_at: int, accesses: int) -> None:
        inner = getattr(InterpreterBuilder, name)

        def watched(self: Any, *arguments: Any, **keywords: Any) -> Any:
            pointers = next(a for a in arguments if hasattr(a, "get_element_ty"))
            size = pointers.get_element_ty().primitive_bitwidth // 8
            active = np.broadcast_to(arguments[mask_at].data, pointers.data.shape)
            seen.extend((int(address), accesses * size) for address in pointers.data[active])
            return inner(self, *arguments, **keywords)

        monkeypatch.setattr(InterpreterBuilder, name, watched)

    watch("create_masked_load", 1, 1)
    watch("create_masked_store", 2, 1)
    watch("create_atomic_rmw", 3, 2)
    return seen


@pytest.mark.parametrize("bins", [0, 32])
def test_bytes_are_those_of_the_loads_and_stores(bins: int, moved: list[tuple[int, int]]) -> None:
    n, N = 3, 150
    x, y = torch.rand(2, n, N, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"method": "bin", "bins": bins} if bins else {}
    one, own = torch.ones(1), torch.arange(N)
    block = Block(x[None], one[0], None, one, y[None], (own,), 0)
    gradient = evaluate(block, RankOptions(**options), with_gradient=True).gradient
    assert gradient is not None
    found: Counter[str] = Counter()
    ranges = {
        name: range(tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel())
        for name, tensor in {"cosines": x, "reference": y, "gradient": gradient}.items()
    }
    for address, size in moved:
        name = next((name for name, where in ranges.items() if address in where), "scratch")
        found[name] += size
    scalars = n * 4 + n * 4 + 2 * 4  # beta and NLL of every row, the scale once per program
    counted, with_index = (
        traffic(n, N, bins=bins, processors=0, mates=bucket_mates(y), index_bytes=size) for size in (0, 8)
    )
    assert found["cosines"] == counted.cosines
    assert found["reference"] == counted.reference
    assert found["gradient"] == counted.gradient
    of_index = with_index.reference - counted.reference
    # The mates are rounded per row.
    assert abs(found["scratch"] - scalars - of_index - counted.scratch) <= 2 * n


@pytest.mark.parametrize(("name", "arguments"), [("hash_rows", 1), ("confirm_equals", 2)])
def test_features_are_read_once_and_equal_ones_again(
    name: str, arguments: int, moved: list[tuple[int, int]]
) -> None:
    x, candidates = torch.randn(70, 300), torch.arange(70)
    x[[3, 69]] = x[[0, 0]]
    candidates[[3, 69]] = 0
    getattr(equal_rows, name)(*(x, candidates)[:arguments])
    assert sum(size for _, size in moved) == feature_bytes(name, x, others=2)


def bucket_mates(reference: torch.Tensor) -> float:
    """Depth of an item's bucket: N of them, one for the best, the others over the range of the rest."""
    n, N = reference.shape
    lowest, second = reference.amin(-1, keepdim=True), reference.topk(2).values[:, 1:]
    buckets = ((reference - lowest) / ((second - lowest) / (N - 1))).clamp(0, N - 2).long()
    buckets.scatter_(1, reference.argmax(-1, keepdim=True), N - 1)
    depths = torch.zeros(n, N).scatter_add_(1, buckets, torch.ones(n, N))
    return float(depths.square().sum() / (n * N))
