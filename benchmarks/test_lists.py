"""Losses of graded lists beside a cross-entropy of the same products, whose target is the first candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss import Gather, RankedLists
from turns import Step

N, K, D, SCALE = 512, 64, 512, 1 / 0.07  # lists, candidates of each, dimensions
CLIP = "cross-entropy"


def contenders(negatives: bool) -> list[str]:
    """Names, the cross-entropy's first; what this revision of rankloss lacks is left out."""
    models = ["plackett_luce", "top_one", "pairwise"]
    if not negatives:  # lambda takes none
        models.append("lambda")
    return [CLIP, *filter(_is_known, models)]


def _is_known(model: Any) -> bool:
    """True if this revision of rankloss has a model of graded lists."""
    try:
        RankedLists(model=model)
    except ValueError:
        return False
    return True


def step(name: str, queries: Tensor, candidates: Tensor, *, negatives: bool) -> Step:
    """Forward and backward of a contender, of queries ``[n, D]`` and candidates ``[n, k, D]``.

    With negatives the candidates of the other lists are in each list as well. The grades are 0 to 4.
    """
    n, k, _ = candidates.shape
    scale = torch.tensor(SCALE, requires_grad=True)
    if name == CLIP:
        # The column of each list's first candidate, among those of all lists or of its own.
        first = torch.arange(0, n * k, k) if negatives else torch.zeros(n, dtype=torch.long)

        def cross_entropy() -> None:
            if negatives:
                cosines = scale * queries @ candidates.flatten(0, 1).T
            else:
                cosines = scale * torch.einsum("nd,nkd->nk", queries, candidates)
            F.cross_entropy(cosines, first).backward()

        return cross_entropy
    model: Any = name
    loss = RankedLists(model=model, in_batch_negatives=negatives, gather=Gather(rank=0, world_size=1))
    grades = torch.randint(0, 5, (n, k), generator=torch.Generator().manual_seed(1))
    return lambda: loss(queries, candidates, grades, scale).backward()


@pytest.mark.parametrize(
    ("negatives", "contender"),
    [
        *((False, name) for name in contenders(negatives=False)),
        *((True, name) for name in contenders(negatives=True)),
    ],
)
def test_lists(
    negatives: bool, contender: str, compare: Callable[..., None], size: Callable[[int], int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    n, k, d = size(N), size(K), size(D)
    queries = F.normalize(torch.randn(n, d, generator=generator), dim=-1).requires_grad_()
    candidates = F.normalize(torch.randn(n, k, d, generator=generator), dim=-1).requires_grad_()
    group = f"lists: {N} of {K} candidates"
    if negatives:
        group += ", with negatives"
    rounds = 10 if negatives else 40  # with negatives a round takes longer
    compare(group, contender, lambda name: step(name, queries, candidates, negatives=negatives), rounds)
