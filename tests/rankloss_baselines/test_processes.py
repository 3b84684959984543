"""CyCLIP and ALIP on gloo processes, against one process; test_distributed has the flags of gathering."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from batches import assert_same, unit_rows
from collectives import Collectives
from process_pool import Pool
from rankloss import Gather, RankClipLoss
from rankloss_baselines import AlipLoss, CyClipLoss
from test_distributed import averaged, differentiated, own

N_PER_RANK, D, SCALE = 3, 5, 10.0


def leaves(world_size: int) -> tuple[Tensor, ...]:
    """Images, texts, captions and the scale of the whole batch."""
    rng = np.random.default_rng(world_size)
    rows = [torch.from_numpy(unit_rows(rng, N_PER_RANK * world_size, D)) for _ in range(3)]
    return tuple(x.requires_grad_() for x in (*rows, torch.tensor(SCALE, dtype=torch.float64)))


# --- what they compute ----------------------------------------------------------------------------------


def histories(rank: int, world_size: int) -> list[Tensor]:
    *rows, s = leaves(world_size)
    (v, t, c), loss, seen = own(rank, world_size, *rows), AlipLoss(), []
    for step in (1, 1, 2):
        if len(seen) != 1:
            loss.set_progress(step, 2)
        loss(v, t, s, caption_features=c)
        seen.append(loss.histories.clone())
    return seen


def test_histories_are_those_of_the_whole_batch_and_the_same_bits_everywhere(pool: Pool) -> None:
    results = pool.run(histories)
    v, t, c, s = leaves(pool.world_size)
    loss, owed = AlipLoss(), []
    for _ in range(2):
        loss(v, t, s, caption_features=c)
        owed.append(loss.histories.clone())
    for first, accumulated, second in results:
        torch.testing.assert_close([first, second], owed, rtol=1e-12, atol=0)
        assert torch.equal(accumulated, first)
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][2])


def composed(rank: int, world_size: int) -> list[Tensor]:
    *rows, s = inputs = leaves(world_size)
    (v, t, c), values = own(rank, world_size, *rows), []
    for gather in (None, Gather(local_loss=False)):  # None finds the default group
        base = CyClipLoss(AlipLoss(gather=gather), gather=gather)
        loss = RankClipLoss(base, schedule="constant", gather=gather)
        values.append(loss(v, t, s, caption_features=c))
    return differentiated(sum(values) / 2, inputs)  # both are exact


def test_composition_is_exact_too(pool: Pool) -> None:
    v, t, c, s = inputs = leaves(pool.world_size)
    loss = RankClipLoss(CyClipLoss(AlipLoss()), schedule="constant")
    entries = loss(v, t, s, caption_features=c, output_dict=True)
    assert list(entries)[:2] == ["contrastive_loss", "caption_contrastive_loss"]
    assert len(entries) == 6
    assert list(loss.state_dict()) == ["base.base.histories"]
    assert_same(averaged(pool.run(composed)), differentiated(sum(entries.values()), inputs), 1e-9)


def bad_captions(rank: int, world_size: int) -> str:
    """The error of a batch whose second captions are too narrow on the last process."""
    v, t, s = torch.eye(4, D), torch.eye(4, D).flip(0), 10.0
    width = D - 1 if rank == world_size - 1 else D
    with pytest.raises(ValueError, match="caption_features must be like text_features") as caught:
        AlipLoss()(v, t, s, caption_features=torch.eye(4, width))
    return str(caught.value)


def test_bad_captions_of_one_process_are_the_error_of_all(pool: Pool) -> None:
    first, *others = pool.run(bad_captions)
    assert f"on rank {pool.world_size - 1} of {pool.world_size}" in first
    assert others == [first] * (pool.world_size - 1)


def collectives(rank: int, world_size: int, name: str) -> dict[str, int]:
    *rows, s = leaves(world_size)
    v, t, c = own(rank, world_size, *rows)
    loss, given = (AlipLoss(), {"caption_features": c}) if name == "alip" else (CyClipLoss(), {})
    loss(v, t, s, **given)  # processes may compare what they bring, once
    with Collectives() as calls:
        loss(v, t, s, **given)
    return dict(calls.counts)


@pytest.mark.parametrize("name", ["cyclip", "alip"])
def test_features_are_gathered_once(pool: Pool, name: str) -> None:
    """Images, and texts: ALIP's two captions in one call, CyCLIP's for its terms and its base."""
    checks = 2  # of CyCLIP and its base; of ALIP's inputs and its second captions
    assert pool.run(collectives, name) == [{"allreduce": checks, "allgather": 2}] * pool.world_size
