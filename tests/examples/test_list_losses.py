"""The study of graded lists: LambdaLoss by its definition, and what every loss has in common."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from studies.lists import losses
from torch.nn.functional import normalize


def _ndcg(order, grades):
    ideal = sum(g / math.log2(2 + i) for i, g in enumerate(sorted(grades, reverse=True)))
    return sum(grades[item] / math.log2(2 + i) for i, item in enumerate(order)) / ideal


@given(st.integers(0, 10**6), st.integers(2, 7))
def test_lambdaranks_weights_are_changes_of_ndcg(seed, k):
    rng = np.random.default_rng(seed)
    x, grades = rng.normal(size=k), rng.integers(0, 4, k) / 3
    grades[rng.integers(k)] = 1.0
    order = np.argsort(-x)
    padded = [torch.tensor(np.append(of, extra))[None] for of, extra in ((x, 9.0), (grades, 1.0))]
    mask = torch.tensor([[True] * k + [False]])
    found = losses.lambda_weights(*padded, mask, mu=0.0)[0]
    assert not found[k].any()
    assert not found[:, k].any()
    for p, q in itertools.product(range(k), repeat=2):
        swapped = [{p: q, q: p}.get(item, item) for item in order]
        change = abs(_ndcg(order, grades) - _ndcg(swapped, grades)) if grades[p] > grades[q] else 0.0
        assert found[p, q].item() == pytest.approx(change, abs=1e-6)


def test_ndcg_loss_2_adds_a_weight_by_the_distance_of_the_ranks():
    x, grades = torch.tensor([[5.0, 4.0, 3.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.5]])
    mask = torch.ones_like(grades, dtype=torch.bool)
    ideal = 1 + 0.5 / math.log2(3)
    added = (
        losses.lambda_weights(x, grades, mask, mu=10.0) - losses.lambda_weights(x, grades, mask, mu=0.0)
    )[0]
    expected = 10 * 0.5 / ideal * (1 / math.log2(4) - 1 / math.log2(5))  # ranks 4 and 1: distance 3
    assert added[3, 0].item() == pytest.approx(expected, rel=1e-5)
    assert added[1, 3].item() == pytest.approx(10 * 0.5 / ideal * (1 / math.log2(3) - 0.5), rel=1e-5)


def _batch():
    generator = torch.Generator().manual_seed(0)
    queries = normalize(torch.randn(3, 8, generator=generator), dim=-1)
    candidates = normalize(torch.randn(9, 8, generator=generator), dim=-1)
    index = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(3)])
    grades = torch.randint(0, 4, (3, 5), generator=generator) / 3
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return queries, candidates, grades, index, mask


def test_lambda_loss_is_the_weighted_sum_over_pairs():
    queries, candidates, grades, index, mask = _batch()
    loss = losses.LambdaLoss(losses.LAMBDARANK)
    found = loss(queries, candidates, grades, torch.tensor(9.0), candidate_index=index, mask=mask)
    x = 9 * (candidates[index] * queries[:, None]).sum(-1)
    weights = losses.lambda_weights(x, grades, mask, mu=0.0)
    pairs = weights * torch.log2(1 + (x[:, None] - x[:, :, None]).exp())
    assert found.item() == pytest.approx(pairs.sum((1, 2)).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "option"), [(model, option) for model, of in losses.OPTIONS.items() for option in of]
)
def test_padding_changes_no_loss_and_every_loss_has_a_gradient(model, option):
    queries, candidates, grades, index, mask = _batch()
    candidates.requires_grad_()
    loss = losses.build(model, option)
    first = loss(queries, candidates, grades, torch.tensor(9.0), candidate_index=index, mask=mask)
    first.backward()
    assert candidates.grad.abs().sum() > 0
    other = grades.where(mask, 0.7)
    second = loss(queries, candidates, other, torch.tensor(9.0), candidate_index=index, mask=mask)
    assert second.item() == pytest.approx(first.item())
    with pytest.raises(ValueError, match="option"):
        losses.build(model, "other")
