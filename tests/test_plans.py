from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankloss.options import RankOptions
from rankloss.plans import make_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@given(
    n=st.integers(2, 100_000),
    share=st.integers(1, 8),
    chunk_size=st.none() | st.integers(1, 1000),
    device=st.sampled_from([CPU, CUDA]),
)
def test_a_plan_keeps_its_limits(n: int, share: int, chunk_size: int | None, device: torch.device) -> None:
    anchors = max(1, n // share)
    plan = make_plan(RankOptions(chunk_size=chunk_size), anchors, n, device, torch.float32)
    assert (plan.name, plan.kernel) == ("rows", "torch")
    product, lists = {"cpu": (2**20, 2**17), "cuda": (2**24, 2**23)}[device.type]
    # A few more rows than one would cost nothing: the gradients are read and written once a chunk.
    chosen = max(128, product // n) if chunk_size is None else chunk_size
    assert plan.chunk_size == min(chosen, anchors)
    assert plan.lists_at_once == max(64, lists // n)
    # What waits for its mirror image is 4·n² bytes at most, in blocks whose number is bounded.
    assert plan.is_mirrored == (anchors == n <= min(4096, 16 * plan.chunk_size))


@pytest.mark.parametrize(
    ("options", "is_dense"),
    [
        ({"method": "bin", "top_k": 3, "diagonal": False, "fixed_reference": "text"}, False),
        ({"model": "top_one", "reduction": "sum"}, False),
        ({"lists": "batch"}, True),
        ({"worth": "shifted"}, True),
        ({"ties": "random"}, True),
        ({"discount": "log"}, True),
        ({"reduction": "none"}, True),
    ],
)
def test_what_does_not_stream_has_one_chunk_of_everything(options, is_dense: bool) -> None:
    plan = make_plan(RankOptions(chunk_size=3, **options), 700, 1400, CPU, torch.float32)
    assert (plan.name, plan.chunk_size) == (("dense", 700) if is_dense else ("rows", 3))


def test_the_fused_kernel_is_refused_where_it_does_not_serve_or_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = RankOptions(kernel="triton")
    with pytest.raises(ValueError, match=r"kernel='triton' does not serve here: .*not on cpu"):
        make_plan(options, 4, 4, CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "rankloss_triton", None)
    with pytest.raises(ValueError, match=r"kernel='triton' .*rankloss_triton is not installed"):
        make_plan(options, 4, 4, CUDA, torch.float32)
