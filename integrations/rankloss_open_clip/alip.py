"""ALIP's loss as the trainer calls it: the histories in its log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import rankloss
from rankloss_open_clip.loss import TrainerLoss

if TYPE_CHECKING:
    from torch import Tensor


class AlipTrainerLoss(TrainerLoss):
    """ALIP's loss as open_clip's trainer calls it.

    Args:
        criterion: The loss.
    """

    criterion: rankloss.AlipLoss

    def __init__(self, criterion: rankloss.AlipLoss) -> None:
        super().__init__(criterion, unit="step", first_call="update_histories")

    def metrics(self, *_: Any) -> dict[str, Tensor]:
        """The moving averages of three cosines: of the two captions, and of the image with each."""
        names = ("alip_text_caption", "alip_image_text", "alip_image_caption")
        return dict(zip(names, self.criterion.histories.to(torch.float32, copy=True).unbind(), strict=True))
