"""Forward and backward of the losses, side by side: ``make bench``.

Rows are to be read as ratios to ``ClipLoss`` at the same N, within one run. ``extra_info`` holds what forward
keeps for backward, each storage counted once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OpenClipLoss
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from memory import saved_bytes
from naive import naive_rank_terms
from rankloss import RankClipLoss, RankConsistency

D, SCALE = 512, 1 / 0.07


def rank_clip() -> Callable[..., Tensor]:
    return RankClipLoss(OpenClipLoss(), schedule="constant")


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "ClipLoss": OpenClipLoss,
    "naive rank terms": lambda: naive_rank_terms,
    "RankConsistency": RankConsistency,
    "RankClipLoss": rank_clip,
}


def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    v, t = (F.normalize(torch.randn(n, D, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    return v, t, torch.tensor(SCALE, requires_grad=True)


@pytest.mark.parametrize("n", [128, 512, 2048])
@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str, n: int) -> None:
    loss, inputs = LOSSES[name](), batch(n)
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        saved_megabytes=saved_bytes(lambda: loss(*inputs)) / 2**20,
    )

    def step() -> None:
        loss(*inputs).backward()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def test_the_naive_terms_are_ours_within_their_floor() -> None:
    v, t, s = batch(64)
    torch.testing.assert_close(naive_rank_terms(v, t, s), RankConsistency()(v, t, s), rtol=1e-3, atol=0)
