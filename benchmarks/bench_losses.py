"""Forward and backward of the losses, side by side: ``make bench``.

Rows are to be read as ratios to ``ClipLoss`` at the same N, within one run. ``extra_info`` holds what forward
keeps for backward, each storage counted once, and the plan that the batch size leads to.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from contenders import LOSSES, batch
from memory import saved_bytes
from naive import naive_rank_terms
from rankloss import RankClipLoss, RankConsistency


@pytest.mark.parametrize("n", [128, 512, 2048])
@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, n: int) -> None:
    loss, inputs = LOSSES[name](), batch(n)
    rank_terms = loss.consistency if isinstance(loss, RankClipLoss) else loss
    plan = rank_terms.plan(n) if isinstance(rank_terms, RankConsistency) else None
    benchmark.group = f"forward and backward, N = {n}"
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        saved_megabytes=saved_bytes(lambda: loss(*inputs)) / 2**20,
        plan=None if plan is None else plan.name,
    )

    def step() -> None:
        loss(*inputs).backward()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def test_the_naive_terms_are_ours_within_their_floor() -> None:
    v, t, s = batch(64)
    torch.testing.assert_close(naive_rank_terms(v, t, s), RankConsistency()(v, t, s), rtol=1e-3, atol=0)
