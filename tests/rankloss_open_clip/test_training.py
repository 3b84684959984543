"""A loss in open_clip's trainer: the steps that it counts, its base; and losses of pairs under autocast."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from stand_ins import LossOfTrainer, begin_epoch, completed_args, random_features
from teacher_features import unit_rows
from torch.nn.functional import normalize

import rankloss
from rankloss_features.folder import NAMES
from rankloss_open_clip.trainer_loss import TrainerLoss
from rankloss_open_clip.training import build_loss, run_of
from stored_features import features_folder


def loss_of_a_run() -> TrainerLoss:
    """RankCLIP in the trainer, on a loss of the trainer that is a stand-in."""
    return build_loss(
        LossOfTrainer(),
        completed_args(parse_args(["--loss", "rankclip", "--device", "cpu"])),
        sums_every_value=True,
    )


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_an_epoch_that_is_longer_than_announced_stays_at_its_last_step(accum_freq: int) -> None:
    """Data of open_clip's webdatasets may hold more batches than ``--train-num-samples`` announces."""
    loss, step_of_each_call = loss_of_a_run(), []
    for epoch in range(2):
        loss.start_epoch(epoch, epochs=2, steps=3, accum_freq=accum_freq)
        for _ in range(5 * accum_freq):
            loss(**random_features())
            step_of_each_call.append(loss.step)
    expected_steps = [0, 1, 2, 2, 2, 3, 4, 5, 5, 5]  # three of each epoch's five steps were announced
    assert step_of_each_call == [step for step in expected_steps for _ in range(accum_freq)]


def test_an_epoch_of_fewer_batches_than_a_step_takes_has_one_step() -> None:
    args = completed_args(parse_args(["--loss", "rankclip", "--accum-freq", "8", "--device", "cpu"]))
    loss = build_loss(LossOfTrainer(), args, sums_every_value=True)
    begin_epoch(loss, 0, args)  # of four batches
    assert loss.place is not None
    assert loss.place.steps == 1


def test_a_loss_that_a_patched_factory_has_built_is_not_built_on_again() -> None:
    loss = loss_of_a_run()
    assert build_loss(loss, loss.args, sums_every_value=True) is loss


def test_a_teachers_features_reach_the_losses_on_a_base_that_is_not_open_clips(tmp_path: Path) -> None:
    """They may have been computed for the run before the trainer has built its loss."""
    folder = features_folder(tmp_path / "teacher", **{name: unit_rows(4, 3) for name in NAMES})
    words = ["--loss", "rankclip", "--loss-teacher", folder, "--device", "cpu"]
    args = completed_args(parse_args(words))
    loss = build_loss(LossOfTrainer(), args, sums_every_value=True)
    assert loss is not run_of(args)
    assert loss.teaching.features is run_of(args).teaching.features is not None


class Values(NamedTuple):
    """A loss of pairs at one batch: rankloss's, open_clip's, and open_clip's in float64."""

    ours: torch.Tensor
    theirs: torch.Tensor
    exact: float


def under_autocast(name: str, dtype: torch.dtype) -> Values:
    """The values of both losses of a batch whose features have the dtype of autocast."""
    scale, bias = torch.tensor(14.3), torch.tensor(-10.0)
    if name == "siglip":
        theirs, ours, numbers = open_clip.loss.SigLipLoss(), rankloss.SigLipLoss(), (scale, bias)
    else:
        theirs, ours, numbers = open_clip.ClipLoss(), rankloss.ClipLoss(), (scale,)
    rows = normalize(torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.autocast("cpu", dtype=dtype):
        images, texts = (normalize(x @ torch.eye(32), dim=-1) for x in rows)
        assert images.dtype == dtype
        value, of_open_clip = ours(images, texts, *numbers), theirs(images, texts, *numbers)
    exact = theirs(images.double(), texts.double(), *(x.double() for x in numbers))
    return Values(value, of_open_clip, exact.item())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_under_autocast_to_bfloat16_a_loss_of_pairs_is_open_clips(name: str) -> None:
    values = under_autocast(name, torch.bfloat16)
    assert torch.equal(values.ours, values.theirs)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_under_autocast_to_float16_a_loss_of_pairs_is_more_exact_than_open_clips(name: str) -> None:
    """As of --precision amp: on a CPU features are float16, and so are the logits of open_clip's formula."""
    values = under_autocast(name, torch.float16)
    assert values.ours.item() == pytest.approx(values.exact, rel=1e-6)
    assert abs(values.theirs.item() - values.exact) > 1e-5 * values.exact
