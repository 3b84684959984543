"""A block of lists against the definition, written out list by list and differentiated by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from batches import assert_close
from devices import DEVICE
from rankloss.lists import LARGEST_SCORE, Block, evaluate, top_one_probabilities
from rankloss.options import RankOptions
from rankloss.ranking import quantize

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6}


def definition(block: Block, options: RankOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Every list's cross-entropy and C(x | y), and the gradient of their weighted sum, in float64."""
    n_matrices, n, n_items = block.cosines.shape
    x = (block.scale.double() * block.cosines.double()).cpu().requires_grad_()
    source = block.cosines.flip(0) if block.reference is None else block.reference
    y = torch.stack([m if e is None else m[:, e] for m, e in zip(source, block.first_equal, strict=True)])
    kept = torch.ones(n, n_items, dtype=torch.bool)
    if not options.diagonal:
        kept.diagonal(block.first_row).fill_(False)
    lists, y = (a[:, kept].view(n_matrices, n, -1) for a in (x, y.cpu()))
    if options.model == "top_one":
        factor = float(block.scale) if options.reference_scale is None else options.reference_scale
        terms, mu = oracle.top_one_terms(lists, factor * y.double())
    else:
        y = quantize(y, options.bins) if options.method == "bin" else y
        terms, mu = oracle.nll_terms(lists, y, top_k=options.top_k)
    nll = terms.sum(-1) / (mu.sum(-1) if options.reduction == "mean" else 1)
    cross_entropy = x.logsumexp(-1) - x.diagonal(block.first_row, 1, 2)
    zero = torch.zeros(n_matrices, dtype=torch.float64)
    alpha, beta = (zero if w is None else w.cpu() for w in (block.alpha, block.beta))
    total = (alpha[:, None] * cross_entropy + beta[:, None] * nll).sum()
    return cross_entropy, nll, torch.autograd.grad(total, x)[0]


rankings = st.one_of(
    st.fixed_dictionaries({"top_k": st.none() | st.integers(1, 10)}),
    st.fixed_dictionaries(
        {"method": st.just("bin"), "bins": st.integers(2, 12), "top_k": st.none() | st.integers(1, 10)}
    ),
    st.fixed_dictionaries({"model": st.just("top_one"), "reference_scale": st.sampled_from([None, 3.0])}),
)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """With scores of up to ±680 nats, ties, equal items, and weights of either term or both."""
    n_items = draw(st.integers(2, 9))
    n = draw(st.integers(1, n_items))
    n_matrices = draw(st.sampled_from([1, 2, 4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))

    def cosines() -> Tensor:
        drawn = 2 * torch.rand(n_matrices, n, n_items, generator=generator, dtype=torch.float64) - 1
        steps = draw(st.sampled_from([1, 2, 2**30]))  # few steps make many ties
        return ((drawn * steps).round() / steps).to(DEVICE, dtype)

    weights = [torch.randn(n_matrices, generator=generator, dtype=torch.float64) for _ in range(2)]
    alpha, beta = draw(st.sampled_from([weights, [None, weights[1]], [weights[0], None]]))
    equal = draw(st.sampled_from([None, torch.arange(n_items).div(2, rounding_mode="floor")]))
    scale = draw(st.sampled_from([1.0, 10.0, 100.0, LARGEST_SCORE]))
    return Block(
        cosines(),
        torch.tensor(scale, dtype=dtype, device=DEVICE),
        None if alpha is None else alpha.to(DEVICE),
        None if beta is None else beta.to(DEVICE),
        draw(st.sampled_from([None, cosines()])),
        tuple(None if k == 1 or equal is None else equal.to(DEVICE) for k in range(n_matrices)),
        draw(st.integers(0, n_items - n)),
    )


@settings(max_examples=250)
@given(
    block=blocks(),
    ranking=rankings,
    lists=st.fixed_dictionaries(
        {"diagonal": st.sampled_from([True, False]), "reduction": st.sampled_from(["mean", "sum"])}
    ),
    lists_at_once=st.sampled_from([1, 3, 100]),
    with_gradient=st.sampled_from([True, True, False]),
)
def test_a_block_is_its_lists_in_value_and_gradient(
    block: Block, ranking: dict[str, Any], lists, lists_at_once: int, with_gradient: bool
) -> None:
    options = RankOptions(**ranking, **lists)
    is_absent = (block.alpha is None, block.beta is None, not with_gradient)
    expected = [x for x, absent in zip(definition(block, options), is_absent, strict=True) if not absent]
    given_cosines = block.cosines.clone()
    found = evaluate(block, options, lists_at_once, with_gradient=with_gradient)
    assert found.gradient is block.cosines if with_gradient else torch.equal(block.cosines, given_cosines)
    assert tuple(x is None for x in found) == is_absent
    assert_close([x for x in found if x is not None], expected, TOLERANCE[block.cosines.dtype])


@pytest.mark.parametrize("scale", [7.0, 700.0])
def test_top_one_probabilities_are_the_softmax_and_keep_a_shared_rounding_out(scale: float) -> None:
    y = torch.tensor([[0.9, 0.8999, -0.3], [0.1, 0.1, 0.1]], requires_grad=True)
    p = top_one_probabilities(y, torch.tensor(scale, requires_grad=True), RankOptions(model="top_one"))
    assert not p.requires_grad
    assert_close([p], [(scale * y.detach().double()).softmax(-1)], 1e-6)
    own = RankOptions(model="top_one", reference_scale=2.0)
    assert_close([top_one_probabilities(y, torch.tensor(scale), own)], [(2 * y.double()).softmax(-1)], 1e-6)
