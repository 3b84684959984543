"""The gradient of ``method="bin"`` beside that of the exact order: as close as docs/performance.md says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import RankConsistency

N, D = 1024, 512
# The error in percent of the exact gradient's norm, by kind of features, scale, and number of bins.
AT_MOST = {
    ("independent", 1 / 0.07): {640: 0.55, 2048: 0.27},
    ("independent", 100.0): {640: 0.4, 2048: 0.17},
    ("agreeing", 1 / 0.07): {640: 0.75, 2048: 0.35},
    ("agreeing", 100.0): {640: 0.65, 2048: 0.32},
}


@pytest.mark.parametrize(("kind", "scale"), AT_MOST)
def test_bins_come_as_close_as_the_page_says_and_closer_with_more_of_them(kind: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    v, t = (F.normalize(torch.randn(N, D, generator=generator), dim=-1) for _ in range(2))
    if kind == "agreeing":  # texts at an angle of 45 degrees to their images
        t = F.normalize(v + t, dim=-1)
    inputs = v.requires_grad_(), t.requires_grad_()

    def gradient_of(criterion: RankConsistency) -> Tensor:
        """By images and texts, one below the other."""
        return torch.cat(torch.autograd.grad(criterion(*inputs, scale), inputs))

    exact = gradient_of(RankConsistency())

    def percent_off(bins: int) -> float:
        of_bins = gradient_of(RankConsistency(method="bin", bins=bins))
        return 100 * float((of_bins - exact).norm() / exact.norm())

    limits = AT_MOST[kind, scale]
    errors = {bins: percent_off(bins) for bins in limits}
    for bins, limit in limits.items():
        assert 0 < errors[bins] <= limit, errors  # not 0: the lists are ranked by bins
    assert errors[2048] < errors[640]
