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
from test_distributed import mean_of_ranks, shards, value_and_gradients

PAIRS_OF_A_RANK, DIMENSIONS, SCALE = 3, 5, 10.0


def leaves(world_size: int) -> tuple[Tensor, ...]:
    """Images, texts, captions and the scale of the whole batch."""
    rng = np.random.default_rng(world_size)
    rows = [torch.from_numpy(unit_rows(rng, PAIRS_OF_A_RANK * world_size, DIMENSIONS)) for _ in range(3)]
    return tuple(x.requires_grad_() for x in (*rows, torch.tensor(SCALE, dtype=torch.float64)))


def histories(rank: int, world_size: int) -> list[Tensor]:
    """The histories after the first call of step 1, after another call of it, and after one of step 2."""
    *rows, s = leaves(world_size)
    v, t, c = shards(rank, world_size, *rows)
    loss = AlipLoss()

    def after_a_call() -> Tensor:
        loss(v, t, s, caption_features=c)
        return loss.histories.clone()

    loss.set_progress(1, total_steps=2)
    first, accumulated = after_a_call(), after_a_call()
    loss.set_progress(2, total_steps=2)
    return [first, accumulated, after_a_call()]


def test_histories_are_those_of_the_whole_batch_and_the_same_bits_everywhere(pool: Pool) -> None:
    v, t, c, s = leaves(pool.world_size)
    loss, of_one_process = AlipLoss(), []
    for _step in range(2):
        loss(v, t, s, caption_features=c)
        of_one_process.append(loss.histories.clone())
    of_first_rank, *of_others = pool.run(histories)
    first, accumulated, second = of_first_rank
    torch.testing.assert_close([first, second], of_one_process, rtol=1e-12, atol=0)
    assert torch.equal(accumulated, first)  # a second batch of a step moves no history
    for of_other in of_others:
        assert all(map(torch.equal, of_other, of_first_rank))


both_gatherings = pytest.mark.parametrize(
    "gather", [None, Gather(local_loss=False)], ids=["default", "global loss"]
)


def on_share(rank: int, world_size: int, gather: Gather | None) -> list[Tensor]:
    """The value and gradients of rank terms on ALIP, of this rank's share of the batch.

    The gathering None finds the default process group.
    """
    *rows, s = inputs = leaves(world_size)
    v, t, c = shards(rank, world_size, *rows)
    loss = RankClipLoss(AlipLoss(gather=gather), schedule="constant", gather=gather)
    return value_and_gradients(loss(v, t, s, caption_features=c), inputs)


@both_gatherings
def test_rank_terms_on_alip_are_those_of_the_whole_batch(pool: Pool, gather: Gather | None) -> None:
    v, t, c, s = inputs = leaves(pool.world_size)
    value = RankClipLoss(AlipLoss(), schedule="constant")(v, t, s, caption_features=c)
    assert_same(mean_of_ranks(pool.run(on_share, gather)), value_and_gradients(value, inputs), tolerance=1e-9)


def test_rank_terms_on_alip_have_its_entries_before_their_own_and_its_state() -> None:
    v, t, c, s = leaves(1)
    loss = RankClipLoss(AlipLoss(), schedule="constant")
    entries = loss(v, t, s, caption_features=c, output_dict=True)
    of_ranks = ["cross_modal_loss", "in_modal_loss"]
    assert list(entries) == ["contrastive_loss", "caption_contrastive_loss", *of_ranks]
    assert list(loss.state_dict()) == ["base.histories"]


def bad_captions(rank: int, world_size: int) -> str:
    """The error of a batch whose second captions are too narrow on the last process."""
    v, t = torch.eye(4, DIMENSIONS), torch.eye(4, DIMENSIONS).flip(0)
    is_last = rank == world_size - 1
    width = DIMENSIONS - 1 if is_last else DIMENSIONS
    with pytest.raises(ValueError, match="caption_features must be like text_features") as caught:
        AlipLoss()(v, t, SCALE, caption_features=torch.eye(4, width))
    return str(caught.value)


def test_bad_captions_of_one_process_are_the_error_of_all(pool: Pool) -> None:
    first, *others = pool.run(bad_captions)
    assert f"on rank {pool.world_size - 1} of {pool.world_size}" in first
    assert others == [first] * (pool.world_size - 1)


def collectives_of_a_call(rank: int, world_size: int) -> dict[str, int]:
    """The number of each kind of collective call that the second call of the loss makes."""
    *rows, s = leaves(world_size)
    v, t, c = shards(rank, world_size, *rows)
    loss = AlipLoss()
    loss(v, t, s, caption_features=c)  # processes may compare what they bring, once
    with Collectives() as calls:
        loss(v, t, s, caption_features=c)
    return dict(calls.counts)


def test_images_and_both_captions_are_gathered_once(pool: Pool) -> None:
    """By two gathers, of the images and of both captions together.

    Two sums compare what the processes bring: the pairs, and the second captions.
    """
    assert pool.run(collectives_of_a_call) == [{"allreduce": 2, "allgather": 2}] * pool.world_size
