"""CyCLIP and ALIP on gloo processes: every combination of the flags, against one process in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
from batches import unit_rows
from collectives import Collectives
from process_pool import Pool
from rankloss import Gather, RankClipLoss
from rankloss_baselines import AlipLoss, CyClipLoss

N_PER_RANK, D, SCALE = 3, 5, 10.0
HISTORIES = (0.2, 0.1, -0.1)
FLAGS = [(False, False), (False, True), (True, False), (True, True)]
LOSSES = ("cyclic", "cyclip", "alip")
Features = tuple[Tensor, ...]


def leaves(world_size: int) -> tuple[Tensor, ...]:
    """Images, texts, captions and the scale of the whole batch."""
    rng = np.random.default_rng(world_size)
    rows = [torch.from_numpy(unit_rows(rng, N_PER_RANK * world_size, D)) for _ in range(3)]
    return tuple(x.requires_grad_() for x in (*rows, torch.tensor(SCALE, dtype=torch.float64)))


# --- what W processes compute, in one -------------------------------------------------------------------


def formula(name: str, items: Features, anchors: Features, scale: Tensor, first: int) -> Tensor:
    """A loss of some anchors against all items; the anchors' own items begin at ``first``."""
    (v, t, c), (a, b, d) = items, anchors
    rows = first + torch.arange(len(a))

    def nll(i: Tensor, u: Tensor, own_i: Tensor, own_u: Tensor) -> Tensor:
        pairs = scale * own_i @ u.T, scale * own_u @ i.T
        return sum(F.cross_entropy(x, rows, reduction="none") for x in pairs) / 2  # type: ignore[return-value]

    if name == "alip":
        w_s, w_r, w_c = oracle.alip(*items, scale, histories=HISTORIES)["weights"][:, rows]
        return (nll(v, t, a, b) * w_s * w_r + nll(v, c, a, d) * w_s * w_c).mean()
    cross, in_ = a @ t.T - b @ v.T, a @ v.T - b @ t.T
    terms = (0.3 * cross.square().sum() + 0.7 * in_.square().sum()) / len(a)
    return terms if name == "cyclic" else terms + nll(v, t, a, b).mean()


def simulated(
    name: str, inputs: Features, world_size: int, local_loss: bool, with_grad: bool
) -> list[Tensor]:
    """The mean of the processes' losses and of their gradients, by open_clip's rules for the flags."""
    results = []
    for rank in range(world_size):

        def seen(x: Tensor, rank: int = rank) -> Tensor:
            chunks = [chunk if with_grad else chunk.detach() for chunk in x.chunk(world_size)]
            if not with_grad and not local_loss:
                chunks[rank] = x.chunk(world_size)[rank]
            return torch.cat(chunks)

        items = tuple(seen(x) for x in inputs[:3])
        anchors = tuple(x.chunk(world_size)[rank] for x in inputs[:3]) if local_loss else items
        value = formula(name, items, anchors, inputs[3], rank * N_PER_RANK if local_loss else 0)
        results.append(with_gradients(value, inputs))
    return averaged(results)


def with_gradients(value: Tensor, inputs: Features) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]


def averaged(results: list[list[Tensor]]) -> list[Tensor]:
    """The processes' gradients as DDP averages them."""
    return [torch.stack(x).mean(0) for x in zip(*results, strict=True)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --- what they compute ----------------------------------------------------------------------------------


def make(name: str, gather: Gather | None = None) -> torch.nn.Module:
    if name == "alip":
        loss = AlipLoss(gather=gather)
        loss.histories.copy_(torch.tensor(HISTORIES, dtype=torch.float64))
        return loss
    base = (lambda **inputs: 0 * inputs["logit_scale"]) if name == "cyclic" else None
    return CyClipLoss(base, lambda_cross=0.3, lambda_in=0.7, gather=gather)


def called(name: str, inputs: Features, gather: Gather | None = None, own: Any = slice(None)) -> Tensor:
    v, t, c = (x[own] for x in inputs[:3])
    given = {"caption_features": c} if name == "alip" else {}
    value: Tensor = make(name, gather)(v, t, inputs[3], **given)
    return value


def rows_of(rank: int) -> slice:
    return slice(rank * N_PER_RANK, (rank + 1) * N_PER_RANK)


def shard(rank: int, world_size: int, name: str, local_loss: bool, with_grad: bool) -> list[Tensor]:
    inputs = leaves(world_size)
    gather = Gather(local_loss=local_loss, gather_with_grad=with_grad)
    return with_gradients(called(name, inputs, gather, rows_of(rank)), inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_every_combination_of_the_flags(pool: Pool, name: str) -> None:
    """The two exact ones are the single process; the others follow open_clip's rules."""
    w = pool.world_size
    inputs = leaves(w)
    single = with_gradients(called(name, inputs), inputs)
    for local_loss, with_grad in FLAGS:
        actual = averaged(pool.run(shard, name, local_loss, with_grad))
        assert_same(actual, simulated(name, inputs, w, local_loss, with_grad))
        if with_grad:
            assert_same(actual, single)


def histories(rank: int, world_size: int, local_loss: bool, with_grad: bool) -> list[Tensor]:
    v, t, c, s = leaves(world_size)
    loss = AlipLoss(gather=Gather(local_loss=local_loss, gather_with_grad=with_grad))
    own, seen = rows_of(rank), []
    for step in (1, 1, 2):
        if len(seen) != 1:
            loss.set_progress(step, 2)
        loss(v[own], t[own], s, caption_features=c[own])
        seen.append(loss.histories.clone())
    return seen


@pytest.mark.parametrize(("local_loss", "with_grad"), FLAGS)
def test_histories_are_those_of_the_whole_batch_and_the_same_bits_everywhere(
    pool: Pool, local_loss: bool, with_grad: bool
) -> None:
    results = pool.run(histories, local_loss, with_grad)
    inputs = leaves(pool.world_size)
    once = oracle.alip(*inputs)["histories"]
    twice = oracle.alip(*inputs, histories=once)["histories"]
    for first, accumulated, second in results:
        np.testing.assert_allclose(first, once, rtol=1e-12)
        np.testing.assert_allclose(second, twice, rtol=1e-12)
        assert torch.equal(accumulated, first)
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][2])


def composed(rank: int, world_size: int) -> list[Tensor]:
    v, t, c, s = inputs = leaves(world_size)
    own = rows_of(rank)
    loss = RankClipLoss(CyClipLoss(AlipLoss()), schedule="constant")  # gather=None finds the default group
    return with_gradients(loss(v[own], t[own], s, caption_features=c[own]), inputs)


def test_composition_is_exact_too(pool: Pool) -> None:
    v, t, c, s = inputs = leaves(pool.world_size)
    loss = RankClipLoss(CyClipLoss(AlipLoss()), schedule="constant")
    entries = loss(v, t, s, caption_features=c, output_dict=True)
    assert list(entries)[:2] == ["contrastive_loss", "caption_contrastive_loss"]
    assert len(entries) == 6
    assert list(loss.state_dict()) == ["base.base.histories"]
    assert_same(averaged(pool.run(composed)), with_gradients(sum(entries.values()), inputs))


def with_a_bad_caption(rank: int, world_size: int) -> str:
    v, t, c, s = (x[rows_of(rank)] if x.dim() else x for x in leaves(world_size))
    try:
        AlipLoss()(v, t, s, caption_features=c[:, :-1] if rank == 1 else c)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_bad_caption_of_one_process_is_an_error_of_all(pool: Pool) -> None:
    for error in pool.run(with_a_bad_caption):
        assert error.startswith("caption_features must be like text_features")
        assert error.endswith(f"(on rank 1 of {pool.world_size})")


def collectives(rank: int, world_size: int, name: str) -> dict[str, int]:
    v, t, c, s = (x[rows_of(rank)] if x.dim() else x for x in leaves(world_size))
    loss, given = make(name), {"caption_features": c} if name == "alip" else {}
    loss(v, t, s, **given)  # processes may compare what they bring, once
    with Collectives() as calls:
        loss(v, t, s, **given)
    return dict(calls.counts)


@pytest.mark.parametrize("name", ["cyclip", "alip"])
def test_features_are_gathered_once(pool: Pool, name: str) -> None:
    """Images, and texts: ALIP's two captions in one call, CyCLIP's for its terms and its base."""
    checks = 2  # of CyCLIP and its base; of ALIP's inputs and its second captions
    assert pool.run(collectives, name) == [{"allreduce": checks, "allgather": 2}] * pool.world_size
