"""CyCLIP on gloo processes, against one process."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batches import assert_same, unit_rows
from collectives import Collectives
from process_pool import Pool
from rankloss import Gather, RankClipLoss
from rankloss_baselines.cyclip import CyClipLoss
from test_distributed import averaged, differentiated, shards

N_PER_RANK, D, SCALE = 3, 5, 10.0


def leaves(world_size: int) -> tuple[Tensor, ...]:
    """Images, texts and the scale of the whole batch."""
    rng = np.random.default_rng(world_size)
    rows = [torch.from_numpy(unit_rows(rng, N_PER_RANK * world_size, D)) for _ in range(2)]
    return tuple(x.requires_grad_() for x in (*rows, torch.tensor(SCALE, dtype=torch.float64)))


def composed(rank: int, world_size: int) -> list[Tensor]:
    *rows, s = inputs = leaves(world_size)
    pair, values = shards(rank, world_size, *rows), []
    for gather in (None, Gather(local_loss=False)):  # None finds the default group
        loss = RankClipLoss(CyClipLoss(gather=gather), schedule="constant", gather=gather)
        values.append(loss(*pair, s))
    return differentiated(sum(values) / 2, inputs)  # both are exact


def test_a_base_of_rank_terms_has_the_gradients_of_the_whole_batch(pool: Pool) -> None:
    v, t, s = inputs = leaves(pool.world_size)
    entries = RankClipLoss(CyClipLoss(), schedule="constant")(v, t, s, output_dict=True)
    assert len(entries) == 5
    assert_same(averaged(pool.run(composed)), differentiated(sum(entries.values()), inputs), 1e-9)


def collectives(rank: int, world_size: int) -> dict[str, int]:
    *rows, s = leaves(world_size)
    pair, loss = shards(rank, world_size, *rows), CyClipLoss()
    loss(*pair, s)  # processes may compare what they bring, once
    with Collectives() as calls:
        loss(*pair, s)
    return dict(calls.counts)


def test_features_are_gathered_once_for_the_terms_and_the_base(pool: Pool) -> None:
    """Whose inputs are both checked."""
    assert pool.run(collectives) == [{"allreduce": 2, "allgather": 2}] * pool.world_size
