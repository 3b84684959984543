"""A loss as open_clip's trainers call it: its terms and its metrics in one dict."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss_trainers.driven_loss import DrivenLoss, Entries, LoggedTerms


class TrainerLoss(DrivenLoss):
    """A loss of the catalogue as open_clip's trainers call it.

    Args:
        criterion: The loss, see :class:`rankloss_trainers.catalog.LossEntry`.
        sums_every_value: Whether the trainer adds up all values of the returned dict, whatever their keys.
        uses_teacher: Whether the loss is given the features of the trainer's teacher under its own names.
        keeps_distillation: Whether the base is given them, under the trainer's names (``dist_image_features``
            and so on), where the trainer has a teacher, and MobileCLIP's features of synthetic captions.
        **driven: ``unit`` and ``evaluate`` of :class:`rankloss_trainers.driven_loss.DrivenLoss`.
    """

    def __init__(
        self,
        criterion: nn.Module,
        *,
        sums_every_value: bool = True,
        uses_teacher: bool = False,
        keeps_distillation: bool = True,
        **driven: Any,
    ) -> None:
        super().__init__(criterion, **driven)
        self.sums_every_value = sums_every_value
        self.uses_teacher = uses_teacher
        self.keeps_distillation = keeps_distillation

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        output_dict: bool = False,
        **base_inputs: Any,
    ) -> Tensor | dict[str, Tensor]:
        """The sum of the terms, or with ``output_dict`` the terms and the metrics by name.

        The keys never change.
        """
        if self.uses_teacher:
            for name in ("image_features", "text_features"):
                # Several teachers side by side, as MobileCLIP's data have them, have another norm together.
                base_inputs[f"reference_{name}"] = F.normalize(base_inputs[f"dist_{name}"].float(), dim=-1)
        if not self.keeps_distillation:
            base_inputs = {
                name: x for name, x in base_inputs.items() if not name.startswith(("dist_", "syn_"))
            }
        entries: Entries = super().forward(image_features, text_features, logit_scale, **base_inputs)
        if not output_dict:
            return entries.total
        if self.sums_every_value:
            return LoggedTerms(entries.terms, entries.metrics)
        return {**entries.terms, **entries.metrics}
