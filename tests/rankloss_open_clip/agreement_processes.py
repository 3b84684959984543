"""One of several processes that measure the agreement of their batch; a light module, for each imports it."""

from __future__ import annotations

import itertools

from torch import Tensor

from rankloss import Gather, RankClipLoss
from rankloss_open_clip.loss import Position
from rankloss_open_clip.rank_clip import RankClipTrainerLoss


def check_agreement(rank: int, world_size: int, whole: dict[str, Tensor], expected: dict[str, float]) -> None:
    """However the losses gather, every process must see the agreement of the whole batch."""
    inputs = {name: x.chunk(world_size)[rank] if x.dim() else x for name, x in whole.items()}
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        criterion = RankClipLoss(gather=Gather(local_loss=local_loss, gather_with_grad=gather_with_grad))
        loss = RankClipTrainerLoss(criterion, unit="epoch", sums_every_value=True, agreement_every=2)
        loss.start_epoch(Position(epoch=0, epochs=2, steps=4, accum_freq=1))
        keys = set()
        for step in range(3):
            # Only the first and the third step measure; the processes must not wait for each other elsewhere.
            shown = loss(**{**inputs, "logit_scale": whole["logit_scale"] + step}, output_dict=True)
            keys.add(tuple(shown))
            for name, value in expected.items():
                assert abs(shown[name].item() - value) < 1e-6, (name, step)
        assert len(keys) == 1
