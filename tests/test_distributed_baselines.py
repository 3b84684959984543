"""CyCLIP and ALIP on gloo processes: every combination of the flags, against one process in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from batches import gradients, relative_error, unit_rows
from collectives import Collectives
from process_pool import Pool
from rankloss import AlipLoss, ClipLoss, CyClipLoss, Gather, RankClipLoss, reference

N_PER_RANK, D, SCALE = 3, 5, 10.0
FLAGS = [(False, False), (False, True), (True, False), (True, True)]
Features = tuple[Tensor, Tensor, Tensor]


def leaves(world_size: int) -> tuple[Tensor, ...]:
    """Images, texts, captions and the scale of the whole batch."""
    rng = np.random.default_rng(world_size)
    rows = [torch.from_numpy(unit_rows(rng, N_PER_RANK * world_size, D)) for _ in range(3)]
    return tuple(x.requires_grad_() for x in (*rows, torch.tensor(SCALE, dtype=torch.float64)))


# --- what W processes compute, in one -------------------------------------------------------------------


def cyclic(items: Features, anchors: Features, scale: Tensor, first: int) -> Tensor:
    (v, t, _), (a, b, _) = items, anchors
    cross = (a @ t.T - b @ v.T).square().sum() / len(a)
    in_ = (a @ v.T - b @ t.T).square().sum() / len(a)
    return 0.3 * cross + 0.7 * in_


def cyclip(items: Features, anchors: Features, scale: Tensor, first: int) -> Tensor:
    rows = first + torch.arange(len(anchors[0]))
    return cyclic(items, anchors, scale, first) + nll(items[:2], anchors[:2], scale, rows).mean()


def alip(items: Features, anchors: Features, scale: Tensor, first: int) -> Tensor:
    rows = first + torch.arange(len(anchors[0]))
    weights = reference.alip(*(x.detach().numpy() for x in items), histories=(0.2, 0.1, -0.1))["weights"]
    w_s, w_r, w_c = torch.from_numpy(weights)[:, rows]
    raw = nll((items[0], items[1]), (anchors[0], anchors[1]), scale, rows)
    caption = nll((items[0], items[2]), (anchors[0], anchors[2]), scale, rows)
    return (raw * w_s * w_r + caption * w_s * w_c).mean()


def nll(items: tuple[Tensor, ...], anchors: tuple[Tensor, ...], scale: Tensor, rows: Tensor) -> Tensor:
    logits = scale * anchors[0] @ items[1].T, scale * anchors[1] @ items[0].T
    return (
        F.cross_entropy(logits[0], rows, reduction="none")
        + F.cross_entropy(logits[1], rows, reduction="none")
    ) / 2


def simulated(
    loss: Callable[..., Tensor], world_size: int, local_loss: bool, gather_with_grad: bool
) -> list[Tensor]:
    """The mean of the processes' losses and of their gradients, by open_clip's rules for the flags."""
    inputs = leaves(world_size)
    results = []
    for rank in range(world_size):

        def seen(x: Tensor, rank: int = rank) -> Tensor:
            chunks = [chunk if gather_with_grad else chunk.detach() for chunk in x.chunk(world_size)]
            if not gather_with_grad and not local_loss:
                chunks[rank] = x.chunk(world_size)[rank]
            return torch.cat(chunks)

        items = tuple(seen(x) for x in inputs[:3])
        anchors = tuple(x.chunk(world_size)[rank] for x in inputs[:3]) if local_loss else items
        value = loss(items, anchors, inputs[3], rank * N_PER_RANK if local_loss else 0)
        results.append(
            [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]
        )
    return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]


# --- what they compute ----------------------------------------------------------------------------------


def nothing(**inputs: Any) -> Tensor:
    return 0 * inputs["logit_scale"]


def make(name: str, gather: Gather | None = None) -> torch.nn.Module:
    if name == "alip":
        loss = AlipLoss(gather=gather)
        loss.histories.copy_(torch.tensor([0.2, 0.1, -0.1], dtype=torch.float64))
        return loss
    return CyClipLoss(nothing if name == "cyclic" else None, lambda_cross=0.3, lambda_in=0.7, gather=gather)


def shard(rank: int, world_size: int, name: str, local_loss: bool, gather_with_grad: bool) -> list[Tensor]:
    inputs = leaves(world_size)
    v, t, c = (x.chunk(world_size)[rank] for x in inputs[:3])
    loss = make(name, Gather(local_loss=local_loss, gather_with_grad=gather_with_grad))
    given = {"caption_features": c} if name == "alip" else {}
    value = loss(v, t, inputs[3], **given)
    return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]


def averaged(results: list[list[Tensor]]) -> list[Tensor]:
    """What DDP makes of the ranks' gradients."""
    return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


SIMULATED = {"cyclic": cyclic, "cyclip": cyclip, "alip": alip}


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_every_combination_of_the_flags(
    pool: Pool, name: str, local_loss: bool, gather_with_grad: bool
) -> None:
    actual = averaged(pool.run(shard, name, local_loss, gather_with_grad))
    assert_same(actual, simulated(SIMULATED[name], pool.world_size, local_loss, gather_with_grad))


@pytest.mark.parametrize("name", SIMULATED)
def test_exact_combinations_are_the_single_process(pool: Pool, name: str) -> None:
    w = pool.world_size
    v, t, c, s = inputs = leaves(w)
    value = make(name)(v, t, s, **({"caption_features": c} if name == "alip" else {}))
    expected = [
        value.detach(),
        *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True),
    ]
    for local_loss in (False, True):
        assert_same(averaged(pool.run(shard, name, local_loss, True)), expected)
    # With neither flag the towers get 1/W, the scale and the value the whole.
    towers = [x / w for x in expected[1:4]]
    assert_same(averaged(pool.run(shard, name, False, False)), [expected[0], *towers, expected[4]])


def test_local_loss_alone_halves_the_cyclic_terms_and_turns_them_nowhere(pool: Pool) -> None:
    """Σ_ij e_ij² with e symmetric up to its sign: rows and columns have equal shares in the gradient."""
    exact = simulated(cyclic, pool.world_size, True, True)
    alone = averaged(pool.run(shard, "cyclic", True, False))
    assert_same(alone, [exact[0], *(x / 2 for x in exact[1:])])


def ratios(rank: int, world_size: int, local_loss: bool, gather_with_grad: bool) -> list[Tensor]:
    gather = Gather(local_loss=local_loss, gather_with_grad=gather_with_grad)
    inputs = leaves(world_size)
    v, t = (x.chunk(world_size)[rank] for x in inputs[:2])
    entries = CyClipLoss(ClipLoss(gather=gather), gather=gather)(v, t, inputs[3], output_dict=True)
    return [torch.autograd.grad(entry, inputs[0], retain_graph=True)[0] for entry in entries.values()]


def test_balance_of_terms_and_base_does_not_depend_on_the_launch(pool: Pool) -> None:
    v, t, _, s = leaves(pool.world_size)
    entries = CyClipLoss()(v, t, s, output_dict=True)
    single = [torch.autograd.grad(entry, v, retain_graph=True)[0].norm() for entry in entries.values()]
    for local_loss, gather_with_grad in FLAGS:
        if (local_loss, gather_with_grad) == (True, False):
            continue  # approximate, as ClipLoss is
        norms = [x.norm() for x in averaged(pool.run(ratios, local_loss, gather_with_grad))]
        for norm, wanted in zip(norms, single, strict=True):
            assert relative_error(norm / norms[0], wanted / single[0]) < 1e-9


def histories(rank: int, world_size: int, local_loss: bool, gather_with_grad: bool) -> list[Tensor]:
    v, t, c, s = leaves(world_size)
    loss = AlipLoss(gather=Gather(local_loss=local_loss, gather_with_grad=gather_with_grad))
    seen = []
    for update in (True, False, None):
        own = [x.chunk(world_size)[rank] for x in (v, t, c)]
        loss(own[0], own[1], s, caption_features=own[2], update_histories=update)
        seen.append(loss.histories.clone())
    return seen


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_histories_are_those_of_the_whole_batch_and_the_same_bits_everywhere(
    pool: Pool, local_loss: bool, gather_with_grad: bool
) -> None:
    results = pool.run(histories, local_loss, gather_with_grad)
    v, t, c, _ = (x.detach().numpy() for x in leaves(pool.world_size))
    once = reference.alip(v, t, c)["histories"]
    twice = reference.alip(v, t, c, histories=once)["histories"]
    for first, held, second in results:
        np.testing.assert_allclose(first, once, rtol=1e-12)
        assert torch.equal(held, first)
        np.testing.assert_allclose(second, twice, rtol=1e-12)
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][2])


def composed(rank: int, world_size: int) -> list[Tensor]:
    gather = {"gather": Gather()}
    inputs = leaves(world_size)
    v, t, c = (x.chunk(world_size)[rank] for x in inputs[:3])
    loss = RankClipLoss(CyClipLoss(AlipLoss(**gather), **gather), schedule="constant", **gather)
    value = loss(v, t, inputs[3], caption_features=c)
    return [value.detach(), *gradients(value, inputs, 1.0)]


def test_composition_is_exact_too(pool: Pool) -> None:
    v, t, c, s = inputs = leaves(pool.world_size)
    value = RankClipLoss(CyClipLoss(AlipLoss()), schedule="constant")(v, t, s, caption_features=c)
    assert_same(averaged(pool.run(composed)), [value.detach(), *gradients(value, inputs, 1.0)])


def collectives(rank: int, world_size: int, name: str) -> dict[str, int]:
    inputs = leaves(world_size)
    v, t, c = (x.chunk(world_size)[rank] for x in inputs[:3])
    loss = make(name)
    given = {"caption_features": c} if name == "alip" else {}
    loss(v, t, inputs[3], **given)  # the first compares what the processes bring
    with Collectives() as calls:
        loss(v, t, inputs[3], **given)
    return dict(calls.counts)


@pytest.mark.parametrize("name", ["cyclip", "alip"])
def test_features_are_gathered_once(pool: Pool, name: str) -> None:
    """Images, and texts: ALIP's two captions in one call, CyCLIP's for its terms and its base."""
    assert pool.run(collectives, name) == [{"allgather": 2}] * pool.world_size


def of_group(rank: int, world_size: int, name: str) -> list[Tensor]:
    """The batch is spread over the even, or over the odd, ranks; with three, one of them has it alone."""
    groups = [dist.new_group(list(range(parity, world_size, 2))) for parity in (0, 1)]
    group = groups[rank % 2]
    size, position = dist.get_world_size(group), dist.get_rank(group)
    inputs = leaves(size)
    v, t, c = (x.chunk(size)[position] for x in inputs[:3])
    loss = make(name, Gather(group=group))
    value = loss(v, t, inputs[3], **({"caption_features": c} if name == "alip" else {}))
    return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("name", SIMULATED)
def test_losses_take_a_group_and_look_no_further(pool: Pool, name: str) -> None:
    results = pool.run(of_group, name)
    for parity in (0, 1):
        group = results[parity::2]
        assert_same(averaged(group), simulated(SIMULATED[name], len(group), True, True))


def one_pair(rank: int, world_size: int, name: str) -> Tensor:
    v, t, c, s = leaves(world_size)
    own = slice(rank, rank + 1)
    loss = make(name)
    return loss(v[own], t[own], s, **({"caption_features": c[own]} if name == "alip" else {}))


@pytest.mark.parametrize("name", ["cyclip", "alip"])
def test_one_pair_per_process_is_enough(pool: Pool, name: str) -> None:
    v, t, c, s = (x[: pool.world_size] if x.dim() else x for x in leaves(pool.world_size))
    expected = make(name)(v, t, s, **({"caption_features": c} if name == "alip" else {}))
    torch.testing.assert_close(
        torch.stack(pool.run(one_pair, name)).mean(), expected.detach(), rtol=1e-9, atol=0
    )
