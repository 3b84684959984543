"""A training loop of the user's own: linear towers under DistributedDataParallel, and no open_clip."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import one_process
from batches import relative_error
from collectives import Collectives
from process_pool import Pool, Pools
from rankloss import ClipLoss, Gather, RankClipLoss, RankConsistency

N, D_IN, D = 12, 5, 4  # the pairs of a step, whatever the number of processes
FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
EXACT = [(False, True), (True, True)]
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


def share(x: Tensor, rank: int, world_size: int) -> Tensor:
    return x.chunk(world_size)[rank]


def gradients_of(model: nn.Module) -> Results:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def one_step(
    rank: int,
    world_size: int,
    options: dict[str, bool],
    micro_batches: int = 1,
    *,
    group: Any = None,
    seed: int = 0,
) -> Results:
    """What DDP leaves in the parameters' gradients: of CLIP's loss, and of the rank terms."""
    gather = Gather(group=group, **options)
    results = {}
    for name, criterion in (("base", ClipLoss(gather=gather)), ("rank", RankConsistency(gather=gather))):
        model: nn.Module = Towers()
        if dist.is_initialized():
            model = DistributedDataParallel(model, process_group=group)
        images, texts = (share(x, rank, world_size) for x in data(seed))
        if micro_batches == 1:
            loss = criterion(*model(images, texts))
            loss.backward()
        else:
            accumulate(model, criterion, images, texts, micro_batches)
        results.update({f"{name} {key}": value for key, value in gradients_of(model).items()})
    return results


def accumulate(model: nn.Module, criterion: nn.Module, images: Tensor, texts: Tensor, count: int) -> None:
    """Micro-batches one after another, each among the features of all, as open_clip's trainer does it."""
    chunks = list(zip(images.chunk(count), texts.chunk(count), strict=True))
    with torch.no_grad():
        features = [model(*chunk)[:2] for chunk in chunks]
    for j, chunk in enumerate(chunks):
        *own, scale = model(*chunk)
        mixed = [torch.cat([own[i] if k == j else f[i] for k, f in enumerate(features)]) for i in (0, 1)]
        criterion(*mixed, scale).backward()


def assert_equal(actual: Results, expected: Results, tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert relative_error(actual[name], expected[name]) < tolerance, name


def flags(local_loss: bool, gather_with_grad: bool) -> dict[str, bool]:
    return {"local_loss": local_loss, "gather_with_grad": gather_with_grad}


def in_one_process(world_size: int, local_loss: bool, gather_with_grad: bool, seed: int = 0) -> Results:
    """The same by the flags' rules, without processes and without the losses' own code."""
    results = {}
    for name, loss in (("base", one_process.clip), ("rank", one_process.rank_terms)):
        model = Towers()
        one_process.mean_loss(loss, model(*data(seed)), world_size, local_loss, gather_with_grad).backward()
        results.update({f"{name} {key}": value for key, value in gradients_of(model).items()})
    return results


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_averaged_gradients_follow_the_flags_rules(
    pool: Pool, local_loss: bool, gather_with_grad: bool
) -> None:
    results = pool.run(one_step, flags(local_loss, gather_with_grad))
    for of_rank in results:
        assert_equal(of_rank, in_one_process(pool.world_size, local_loss, gather_with_grad))


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_averaged_gradients_against_the_single_process_ones(
    pool: Pool, local_loss: bool, gather_with_grad: bool
) -> None:
    actual = pool.run(one_step, flags(local_loss, gather_with_grad))[0]
    expected = one_step(0, 1, {})
    for name in expected:
        if gather_with_grad or name.endswith("logit_scale"):
            assert relative_error(actual[name], expected[name]) < 1e-10
        elif not local_loss:
            assert relative_error(actual[name], expected[name] / pool.world_size) < 1e-10
        else:  # another direction, for the rank terms as for CLIP's
            cosine = F.cosine_similarity(actual[name].flatten(), expected[name].flatten(), dim=0)
            assert 0 < cosine < 0.9999


def one_step_of_a_users_loop(rank: int, world_size: int) -> Results:
    """A loop that says nothing of processes."""
    results = {}
    for name, criterion in (("base", ClipLoss()), ("rank", RankConsistency())):
        model: nn.Module = Towers()
        if world_size > 1:
            model = DistributedDataParallel(model)
        images, texts = (share(x, rank, world_size) for x in data())
        criterion(*model(images, texts)).backward()
        results.update({f"{name} {key}": value for key, value in gradients_of(model).items()})
    return results


def test_a_loop_that_says_nothing_of_processes_trains_as_one_process_does(pool: Pool) -> None:
    expected = one_step_of_a_users_loop(0, 1)
    for of_rank in pool.run(one_step_of_a_users_loop):
        assert_equal(of_rank, expected)


def one_step_of_half_the_ranks(rank: int, world_size: int, options: dict[str, bool]) -> Results:
    """The even and the odd ranks train a model each, on data of their own."""
    groups = [dist.new_group(list(range(parity, world_size, 2))) for parity in (0, 1)]
    group, seed = groups[rank % 2], rank % 2
    return one_step(dist.get_rank(group), dist.get_world_size(group), options, group=group, seed=seed)


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_group_other_than_the_default_trains_on_its_own(
    pool: Pool, local_loss: bool, gather_with_grad: bool
) -> None:
    results = pool.run(one_step_of_half_the_ranks, flags(local_loss, gather_with_grad))
    for rank, of_rank in enumerate(results):
        size = len(results[rank % 2 :: 2])
        assert_equal(of_rank, in_one_process(size, local_loss, gather_with_grad, seed=rank % 2))


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_one_process_under_ddp_is_one_without_a_group(
    pools: Pools, local_loss: bool, gather_with_grad: bool
) -> None:
    (under_ddp,) = pools[1].run(one_step, flags(local_loss, gather_with_grad))
    assert_equal(under_ddp, one_step(0, 1, {}))


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), [(False, False), *EXACT])
def test_rank_to_base_ratio_is_the_same_for_every_world_size(
    pools: Pools, local_loss: bool, gather_with_grad: bool
) -> None:
    def ratios(results: Results) -> list[float]:
        return [
            float(results[f"rank {name}"].norm() / results[f"base {name}"].norm())
            for name in ("image.weight", "text.weight", "logit_scale")
        ]

    expected = ratios(one_step(0, 1, {}))
    for world_size in (2, 3, 4):
        results = pools[world_size].run(one_step, flags(local_loss, gather_with_grad))[0]
        assert ratios(results) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_accumulation_gives_towers_the_big_batch_and_the_scale_k_times(
    pools: Pools, local_loss: bool, gather_with_grad: bool
) -> None:
    for world_size, micro_batches in ((1, 2), (1, 4), (2, 2), (2, 3), (3, 2)):
        options = flags(local_loss, gather_with_grad)
        if world_size == 1:
            whole, accumulated = one_step(0, 1, options), one_step(0, 1, options, micro_batches)
        else:
            whole = pools[world_size].run(one_step, options)[0]
            accumulated = pools[world_size].run(one_step, options, micro_batches)[0]
        expected = {
            name: (micro_batches if name.endswith("logit_scale") else 1) * gradient
            for name, gradient in whole.items()
        }
        assert_equal(accumulated, expected)


def train(rank: int, world_size: int, options: dict[str, bool]) -> Results:
    """A few steps of SGD with the ranking loss; the weights at the end."""
    model: nn.Module = Towers()
    if world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = RankClipLoss(normalizer=1.0, gather=Gather(**options))
    for step in range(STEPS):
        criterion.set_progress(step + 1, STEPS)
        images, texts = (share(x, rank, world_size) for x in data(step))
        optimizer.zero_grad()
        criterion(*model(images, texts)).backward()
        optimizer.step()
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), EXACT)
def test_training_ends_at_the_single_process_weights(
    pool: Pool, local_loss: bool, gather_with_grad: bool
) -> None:
    expected = train(0, 1, {})
    for weights in pool.run(train, flags(local_loss, gather_with_grad)):
        assert_equal(weights, expected)
    assert_moved(expected)


def assert_moved(weights: Results) -> None:
    for name, start in Towers().named_parameters():
        assert relative_error(weights[name], start) > 1e-3, name


def calls_of_a_step(rank: int, world_size: int) -> dict[str, Any]:
    model = DistributedDataParallel(Towers())
    criterion = RankConsistency(gather=Gather(**flags(True, True)))
    images, texts = (share(x, rank, world_size) for x in data())
    criterion(*model(images, texts)).backward()  # DDP settles its buckets in the first step
    with Collectives() as calls:
        criterion(*model(images, texts)).backward()
    return dict(calls.counts)


def test_step_gathers_twice_forward_and_reduces_twice_besides_ddp(pools: Pools) -> None:
    for calls in pools[2].run(calls_of_a_step):
        assert calls["allgather"] == 2
        assert calls["allreduce"] == 2 + 1  # the three parameters fit one of DDP's buckets
