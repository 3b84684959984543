"""The progress that a loss in open_clip's trainer counts from its calls."""

from __future__ import annotations

import pytest
from open_clip_train.params import parse_args
from stand_ins import Base, features, ready

from rankloss_open_clip.trainer_loss import TrainerLoss
from rankloss_open_clip.training import build_loss


def loss_of_a_run() -> TrainerLoss:
    return build_loss(
        Base(), ready(parse_args(["--loss", "rankclip", "--device", "cpu"])), sums_every_value=True
    )


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_an_epoch_that_is_longer_than_announced_stays_at_its_last_step(accum_freq: int) -> None:
    """Data of open_clip's webdatasets may hold more batches than ``--train-num-samples`` announces."""
    loss, steps = loss_of_a_run(), []
    for epoch in range(2):
        loss.start_epoch(epoch, 2, 3, accum_freq)
        for _ in range(5 * accum_freq):
            loss(**features())
            steps.append(loss.step)
    expected = [0, 1, 2, 2, 2, 3, 4, 5, 5, 5]
    assert steps == [step for step in expected for _ in range(accum_freq)]
