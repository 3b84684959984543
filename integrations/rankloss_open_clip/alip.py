"""ALIP's loss as the trainer calls it: the histories in its log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import rankloss
from rankloss_open_clip.loss import TrainerLoss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class AlipTrainerLoss(TrainerLoss):
    """ALIP's loss as open_clip's trainer calls it.

    Args:
        criterion: The loss.
    """

    criterion: rankloss.AlipLoss

    def __init__(self, criterion: rankloss.AlipLoss) -> None:
        super().__init__(criterion, unit="step", first_call="update_histories")

    def entries(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """The terms, and the moving averages of three cosines: of the captions, of the image with each."""
        terms = super().entries(*args, **kwargs)
        names = ("alip_text_caption", "alip_image_text", "alip_image_caption")
        histories = self.criterion.histories.to(torch.float32, copy=True).unbind()
        return {**terms, **dict(zip(names, histories, strict=True))}
