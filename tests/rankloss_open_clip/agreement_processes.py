"""Run by each of several processes to measure the agreement of their batch; kept light to import."""

from __future__ import annotations

import itertools

from torch import Tensor

from rankloss import Gather, RankClipLoss
from rankloss_open_clip.training import TrainerLoss
from rankloss_trainers.clock import Position
from rankloss_trainers.logging import RankClipLog


def check_agreement(rank: int, world_size: int, whole: dict[str, Tensor], expected: dict[str, float]) -> None:
    """However the losses gather, every process must see the agreement of the whole batch."""
    inputs = {name: x.chunk(world_size)[rank] if x.dim() else x for name, x in whole.items()}
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        criterion = RankClipLoss(gather=Gather(local_loss=local_loss, gather_with_grad=gather_with_grad))
        loss = TrainerLoss(criterion, unit="epoch", evaluate=RankClipLog(agreement_every=2))
        loss.start_epoch(Position(epoch=0, epochs=2, steps=4, accum_freq=1))
        keys = set()
        for step in range(3):
            # Only the first and the third step measure, and only they may synchronise the processes.
            shown = loss(**{**inputs, "logit_scale": whole["logit_scale"] + step}, output_dict=True)
            keys.add(tuple(shown))
            for name, value in expected.items():
                assert abs(shown[name].item() - value) < 1e-6, (name, step)
        assert len(keys) == 1
