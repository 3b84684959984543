from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batches import Batch, batches, gradients, random_batch, relative_error
from rankloss import RankConsistency, lists, ranking

OPTIONS = st.fixed_dictionaries(
    {
        "discount": st.sampled_from([None, "log"]),
        "top_k": st.sampled_from([None, 1, 3]),
        "diagonal": st.booleans(),
        "reduction": st.sampled_from(["mean", "sum"]),
    }
)


def without_a_look(patch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where a look at a value would wait: ties and float64 are taken care of anyway."""
    for module in (lists, ranking):
        patch.setattr(module, "may_look_at", lambda x: False)


@given(batch=batches(max_n=12), options=OPTIONS)
def test_without_a_look_at_any_value_the_loss_is_the_same(batch: Batch, options) -> None:
    results = []
    for looks in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not looks:
                without_a_look(patch)
            inputs = batch.leaves()
            value = RankConsistency(**options)(*inputs)
            results.append([value, *gradients(value, inputs, -0.8)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("s", [1 / 0.07, 100.0])
def test_without_a_look_float32_is_as_exact(s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(0, 64, 16, s, duplicates=5)
    results = []
    for _ in range(2):
        inputs = batch.leaves(torch.float32)
        value = RankConsistency()(*inputs)
        results.append([value, *gradients(value, inputs, 1.0)])
        without_a_look(monkeypatch)
    (looked, *looked_gradients), (value, *found) = results
    assert relative_error(value, looked) < 1e-5
    for a, b in zip(found, looked_gradients, strict=True):
        assert relative_error(a, b) < 1e-4
