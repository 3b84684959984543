from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rankloss.ordering import _sort_rows, ascending

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)  # zeros of both signs and subnormals too


@given(rows=hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite))
def test_values_are_sorted_and_indices_say_where_they_came_from(rows) -> None:
    x = torch.from_numpy(rows)
    values, indices = ascending(x)
    assert torch.equal(values, x.sort(dim=-1).values)
    assert torch.equal(x.gather(-1, indices), values)
    assert torch.equal(indices.sort(dim=-1).values, torch.arange(x.shape[-1]).expand(x.shape))


@pytest.mark.parametrize("threads", [1, 3])
def test_large_blocks_are_sorted_by_as_many_threads_as_torch_has(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(128, 3001)
        values, indices = ascending(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values, x.sort(dim=-1).values)
    assert torch.equal(x.gather(-1, indices), values)


def test_float64_keeps_all_its_bits() -> None:
    x = torch.tensor([[1.0 + 2**-40, 1.0, 1.0 + 2**-41]], dtype=torch.float64)
    assert ascending(x)[1].tolist() == [[1, 2, 0]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_sorts_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    keys = np.random.default_rng(0).standard_normal((64, 4096))
    _sort_rows(keys.copy())  # the parent's pool exists now, and its threads do not survive a fork
    child = os.fork()
    if child == 0:
        _sort_rows(keys)
        os._exit(0 if (np.diff(keys) >= 0).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
