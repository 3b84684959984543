"""ALIP on gloo processes, against one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from batches import assert_same, unit_rows
from collectives import Collectives
from process_pool import Pool
from rankloss import Gather, RankClipLoss
from rankloss_baselines.alip import AlipLoss
from test_distributed import averaged, differentiated, shards

N_PER_RANK, D, SCALE = 3, 5, 10.0


def leaves(world_size: int) -> tuple[Tensor, ...]:
    """Images, texts, captions and the scale of the whole batch."""
    rng = np.random.default_rng(world_size)
    rows = [torch.from_numpy(unit_rows(rng, N_PER_RANK * world_size, D)) for _ in range(3)]
    return tuple(x.requires_grad_() for x in (*rows, torch.tensor(SCALE, dtype=torch.float64)))


def histories(rank: int, world_size: int) -> list[Tensor]:
    *rows, s = leaves(world_size)
    (v, t, c), loss, seen = shards(rank, world_size, *rows), AlipLoss(), []
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
    (v, t, c), values = shards(rank, world_size, *rows), []
    for gather in (None, Gather(local_loss=False)):  # None finds the default group
        loss = RankClipLoss(AlipLoss(gather=gather), schedule="constant", gather=gather)
        values.append(loss(v, t, s, caption_features=c))
    return differentiated(sum(values) / 2, inputs)  # both are exact


def test_a_base_of_rank_terms_has_the_gradients_of_the_whole_batch(pool: Pool) -> None:
    v, t, c, s = inputs = leaves(pool.world_size)
    loss = RankClipLoss(AlipLoss(), schedule="constant")
    entries = loss(v, t, s, caption_features=c, output_dict=True)
    assert list(entries)[:2] == ["contrastive_loss", "caption_contrastive_loss"]
    assert len(entries) == 4
    assert list(loss.state_dict()) == ["base.histories"]
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


def collectives(rank: int, world_size: int) -> dict[str, int]:
    *rows, s = leaves(world_size)
    (v, t, c), loss = shards(rank, world_size, *rows), AlipLoss()
    loss(v, t, s, caption_features=c)  # processes may compare what they bring, once
    with Collectives() as calls:
        loss(v, t, s, caption_features=c)
    return dict(calls.counts)


def test_images_and_both_captions_are_gathered_once(pool: Pool) -> None:
    """The two captions in one call; the inputs and the second captions are checked."""
    assert pool.run(collectives) == [{"allreduce": 2, "allgather": 2}] * pool.world_size
