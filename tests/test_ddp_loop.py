"""A training loop of the user's own: linear towers under DistributedDataParallel, and no open_clip."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import one_process
from batches import relative_error
from collectives import Collectives
from process_pool import Pools
from rankloss import ClipLoss, Gather, RankClipLoss, RankConsistency

N, D_IN, D = 12, 5, 4  # the pairs of a step, whatever the number of processes
FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
STEPS = 3

Results = dict[str, Tensor]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.text = (nn.Linear(D_IN, D, bias=False, dtype=torch.float64) for _ in range(2))
        for tower in (self.image, self.text):
            nn.init.normal_(tower.weight, generator=generator)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image_features, text_features = F.normalize(self.image(images)), F.normalize(self.text(texts))
        return image_features, text_features, self.logit_scale.exp()


def data(step: int = 0) -> Tensor:
    """Images and texts of a step: ``[2, N, D_IN]``."""
    return torch.randn(2, N, D_IN, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def share(x: Tensor, rank: int, world_size: int) -> list[Tensor]:
    return [modality.chunk(world_size)[rank] for modality in x]


def towers(world_size: int) -> nn.Module:
    model = Towers()
    return DistributedDataParallel(model) if world_size > 1 else model


def gradients_of(model: nn.Module, term: str) -> Results:
    return {f"{term} {k.removeprefix('module.')}": p.grad.clone() for k, p in model.named_parameters()}


def one_step(rank: int, world_size: int, flags: tuple[bool, bool] | None) -> tuple[Results, dict[str, int]]:
    """What DDP leaves in the parameters' gradients, of CLIP's loss and of the rank terms; None: the default.

    And the collectives of a second step of the rank terms, when DDP has settled its buckets.
    """
    gather = None if flags is None else Gather(local_loss=flags[0], gather_with_grad=flags[1])
    results = {}
    for term, criterion in (("base", ClipLoss(gather=gather)), ("rank", RankConsistency(gather=gather))):
        model = towers(world_size)
        criterion(*model(*share(data(), rank, world_size))).backward()
        results.update(gradients_of(model, term))
    with Collectives() as calls:
        criterion(*model(*share(data(), rank, world_size))).backward()
    return results, dict(calls.counts)


def in_one_process(world_size: int, local_loss: bool, gather_with_grad: bool) -> Results:
    """The same by the flags' rules, without processes and without the losses' own code."""
    results = {}
    for term, loss in (("base", one_process.clip), ("rank", one_process.rank_terms)):
        model = Towers()
        one_process.mean_loss(loss, model(*data()), world_size, local_loss, gather_with_grad).backward()
        results.update(gradients_of(model, term))
    return results


def assert_equal(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert relative_error(actual[name], expected[name]) < 1e-10, name


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("flags", [*FLAGS, None])
def test_averaged_gradients_follow_the_flags_rules(pools: Pools, world_size: int, flags: Any) -> None:
    local_loss, gather_with_grad = (True, True) if flags is None else flags
    whole = in_one_process(1, True, True)
    for actual, calls in pools[world_size].run(one_step, flags):
        assert_equal(actual, in_one_process(world_size, local_loss, gather_with_grad))
        if gather_with_grad:
            assert_equal(actual, whole)
        if not local_loss or gather_with_grad:  # the balance of the terms does not depend on the launch
            for name in ("image.weight", "text.weight", "logit_scale"):
                ratios = [x[f"rank {name}"].norm() / x[f"base {name}"].norm() for x in (actual, whole)]
                assert relative_error(*ratios) < 1e-10
        assert calls["allgather"] == 2
        assert calls["allreduce"] == 1 + 2 * gather_with_grad  # all parameters fit one of DDP's buckets


def train(rank: int, world_size: int, options: dict[str, Any]) -> Results:
    """A few steps of SGD with the ranking loss; the weights at the end."""
    model = towers(world_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = RankClipLoss(normalizer=1.0, **options)
    for step in range(STEPS):
        criterion.set_progress(step + 1, STEPS)
        optimizer.zero_grad()
        criterion(*model(*share(data(step), rank, world_size))).backward()
        optimizer.step()
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options", [{}, {"gather": Gather(local_loss=False)}], ids=["default", "global loss"]
)
def test_training_ends_at_the_single_process_weights(pools: Pools, options: dict[str, Any]) -> None:
    expected = train(0, 1, {})
    for weights in pools[3].run(train, options):
        assert_equal(weights, expected)
    for name, start in Towers().named_parameters():
        assert relative_error(expected[name], start) > 1e-3, name
