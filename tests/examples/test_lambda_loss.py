"""The library's LambdaLoss against the lists study's own."""

from __future__ import annotations

import math

import torch
from studies.lists import losses
from torch.nn.functional import normalize

import rankloss


def test_the_librarys_lambda_loss_is_the_studys() -> None:
    """The study takes log₂ and averages over all lists, the library sums natural logarithms."""
    generator = torch.Generator().manual_seed(0)
    queries, pool = (normalize(torch.randn(n, 8, generator=generator).double(), dim=-1) for n in (6, 20))
    index = torch.stack([torch.randperm(20, generator=generator)[:7] for _ in range(6)])
    grades = torch.randint(0, 4, (6, 7), generator=generator).double() / 3
    mask = torch.rand(6, 7, generator=generator) < 0.8
    study = losses.LambdaLoss(losses.NDCG_LOSS_2PP)
    library = rankloss.RankedLists(model="lambda", reduction="sum")
    found = []
    for loss, factor in ((study, 1.0), (library, 1 / (6 * math.log(2)))):
        inputs = [x.clone().requires_grad_() for x in (queries, pool)]
        scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
        value = factor * loss(*inputs, grades, scale, candidate_index=index, mask=mask)
        found.append([value, *torch.autograd.grad(value, [*inputs, scale])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the study's discounts are float32
