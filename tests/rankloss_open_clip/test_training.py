"""The progress that a loss in open_clip's trainer counts from its calls."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip_train.params import parse_args
from stand_ins import Base, features, ready
from torch.nn.functional import normalize

import rankloss
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


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_a_loss_of_pairs_is_open_clips_or_more_exact_where_that_rounds_to_float16(
    name: str, dtype: torch.dtype
) -> None:
    """As of --precision amp: on a CPU features are float16, and so are the logits of open_clip's formula."""
    siglip = name == "siglip"
    own = open_clip.loss.SigLipLoss() if siglip else open_clip.ClipLoss()
    ours = rankloss.SigLipLoss() if siglip else rankloss.ClipLoss()
    rows = normalize(torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    numbers = (torch.tensor(14.3), torch.tensor(-10.0)) if siglip else (torch.tensor(14.3),)
    with torch.autocast("cpu", dtype=dtype):
        images, texts = (normalize(x @ torch.eye(32), dim=-1) for x in rows)
        assert images.dtype == dtype
        theirs, value = own(images, texts, *numbers), ours(images, texts, *numbers)
    if dtype == torch.bfloat16:
        assert torch.equal(value, theirs)
        return
    exact = own(images.double(), texts.double(), *(x.double() for x in numbers)).item()
    assert value.item() == pytest.approx(exact, rel=1e-6)
    assert abs(theirs.item() - exact) > 1e-5 * exact
