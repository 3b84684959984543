"""The engine's parts on a block of 256 lists of 4,096 items, values and gradient: ``make bench``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from contenders import SCALE, D
from naive import list_nll
from rankloss.likelihood import nll_terms
from rankloss.lists import Block, evaluate
from rankloss.options import RankOptions
from rankloss.ranking import ascending

LISTS, ITEMS, BINS = 256, 4096, 640
OPTIONS = {"sort": RankOptions(reduction="sum"), "bin": RankOptions(reduction="sum", method="bin", bins=BINS)}


def similarities() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def features(n: int) -> Tensor:
        return F.normalize(torch.randn(n, D, generator=generator), dim=-1)

    return features(LISTS) @ features(ITEMS).T, features(LISTS) @ features(ITEMS).T


def streamed(cosines: Tensor, reference: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """As the pass over the rows does it: a slice at a time that fits a core's cache."""
    plan = OPTIONS[method].plan(LISTS, ITEMS, cosines.device, cosines.dtype)
    block = Block(cosines, torch.tensor(SCALE), None, torch.ones(()), reference)
    _, value, gradient = evaluate(block, OPTIONS[method], plan, with_gradient=True)
    assert value is not None
    assert gradient is not None
    return value, gradient


def in_log_space(cosines: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    scores = (cosines * SCALE).requires_grad_()
    value = nll_terms(scores, reference, OPTIONS["sort"], None).sum(-1)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


def naive(cosines: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    scores = (cosines * SCALE).requires_grad_()
    value = list_nll(scores, reference)
    return value.detach(), torch.autograd.grad(value, scores)[0] * LISTS


METHODS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "sort": lambda c, r: streamed(c, r, "sort"),
    "bin": lambda c, r: streamed(c, r, "bin"),
    "log space": in_log_space,
    "naive": naive,
}
SORTS: dict[str, Callable[[Tensor], object]] = {
    "ranking.ascending": ascending,
    "torch.sort": lambda x: x.sort(-1),
}


@pytest.mark.benchmark(group=f"value and gradient of {LISTS} lists of {ITEMS}")
@pytest.mark.parametrize("method", METHODS)
def test_lists(benchmark: BenchmarkFixture, method: str) -> None:
    cosines, reference = similarities()
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(METHODS[method], (cosines, reference), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group=f"order of {LISTS} lists of {ITEMS}")
@pytest.mark.parametrize("sort", SORTS)
def test_order(benchmark: BenchmarkFixture, sort: str) -> None:
    _, reference = similarities()
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(SORTS[sort], (reference,), rounds=5, warmup_rounds=1)


def test_the_methods_compute_the_same() -> None:
    """Not a benchmark: what is compared has to be comparable."""
    cosines, reference = similarities()
    value, gradient = in_log_space(cosines.double(), reference.double())
    for method, tolerance in {"sort": 1e-4, "log space": 1e-4, "bin": 2e-2, "naive": 1e-2}.items():
        v, g = METHODS[method](cosines, reference)
        assert (v.double().mean() / value.mean() - 1).abs() < tolerance, method
        assert (g.double() - gradient).norm() < tolerance * gradient.norm(), method
