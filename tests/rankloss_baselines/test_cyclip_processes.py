"""CyCLIP on gloo processes, against one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from batches import assert_same, unit_rows
from collectives import Collectives
from process_pool import Pool
from rankloss import Gather, RankClipLoss
from rankloss_baselines.cyclip import CyClipLoss
from test_distributed import mean_of_ranks, shards, value_and_gradients

PAIRS_OF_A_RANK, DIMENSIONS, SCALE = 3, 5, 10.0


def leaves(world_size: int) -> tuple[Tensor, ...]:
    """Images, texts and the scale of the whole batch."""
    rng = np.random.default_rng(world_size)
    rows = [torch.from_numpy(unit_rows(rng, PAIRS_OF_A_RANK * world_size, DIMENSIONS)) for _ in range(2)]
    return tuple(x.requires_grad_() for x in (*rows, torch.tensor(SCALE, dtype=torch.float64)))


both_gatherings = pytest.mark.parametrize(
    "gather", [None, Gather(local_loss=False)], ids=["default", "global loss"]
)


def on_share(rank: int, world_size: int, gather: Gather | None) -> list[Tensor]:
    """The value and gradients of rank terms on CyCLIP, of this rank's share of the batch.

    The gathering None finds the default process group.
    """
    *rows, s = inputs = leaves(world_size)
    v, t = shards(rank, world_size, *rows)
    loss = RankClipLoss(CyClipLoss(gather=gather), schedule="constant", gather=gather)
    return value_and_gradients(loss(v, t, s), inputs)


@both_gatherings
def test_rank_terms_on_cyclip_are_those_of_the_whole_batch(pool: Pool, gather: Gather | None) -> None:
    v, t, s = inputs = leaves(pool.world_size)
    value = RankClipLoss(CyClipLoss(), schedule="constant")(v, t, s)
    assert_same(mean_of_ranks(pool.run(on_share, gather)), value_and_gradients(value, inputs), tolerance=1e-9)


def test_rank_terms_on_cyclip_have_its_entries_before_their_own() -> None:
    entries = RankClipLoss(CyClipLoss(), schedule="constant")(*leaves(1), output_dict=True)
    of_cyclip = ["contrastive_loss", "cyclic_cross_modal_loss", "cyclic_in_modal_loss"]
    assert list(entries) == [*of_cyclip, "cross_modal_loss", "in_modal_loss"]


def collectives_of_a_call(rank: int, world_size: int) -> dict[str, int]:
    """The number of each kind of collective call that the second call of the loss makes."""
    *rows, s = leaves(world_size)
    pair, loss = shards(rank, world_size, *rows), CyClipLoss()
    loss(*pair, s)  # processes may compare what they bring, once
    with Collectives() as calls:
        loss(*pair, s)
    return dict(calls.counts)


def test_features_are_gathered_once_for_the_terms_and_the_base(pool: Pool) -> None:
    """By two gathers, of images and of texts.

    Two sums compare what the processes bring: to the terms, and to the base.
    """
    assert pool.run(collectives_of_a_call) == [{"allreduce": 2, "allgather": 2}] * pool.world_size
