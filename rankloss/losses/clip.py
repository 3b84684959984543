"""CLIP's own loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloss.batch import check_features
from rankloss.distributed import Gather, Gathered

__all__ = ["ClipLoss", "pair_logits"]


class ClipLoss(nn.Module):
    r"""CLIP's symmetric InfoNCE: ``½[CE(s·V·Tᵀ) + CE(s·T·Vᵀ)]``, the target of row i being i.

    Args:
        local_loss: compute only this process's rows, as in open_clip's ClipLoss.
        gather_with_grad: let gradients through the gathering of features, as in open_clip's ClipLoss.
        rank: this process's rank.
        world_size: number of processes; with more than one, features are gathered from all.
        group: the process group that the batch is spread over, where it is not the default one; ``rank`` and
            ``world_size`` are this process's rank in it and its size.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``; the result is a scalar in nats, or with
        ``output_dict=True`` ``{"contrastive_loss": …}``. A ``logit_bias`` is added to all logits, to no
        effect.

    Raises:
        ValueError: for features that are not two floating-point matrices of one shape with at least two rows
            in the whole batch.

    References:
        "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
        fig. 3.

    Example:
        >>> v = torch.eye(2)
        >>> round(ClipLoss()(v, v, logit_scale=1.0).item(), 4)  # log(1 + 1/e)
        0.3133
    """

    def __init__(
        self,
        *,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.gather = Gather(local_loss, gather_with_grad, rank, world_size, group)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        gathered: Gathered | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` a dict of it.

        ``gathered`` is ``self.gather(image_features, text_features)``, from a caller that has it already.
        """
        check_features(image_features, text_features, min_pairs=self.gather.min_pairs)
        if gathered is None:
            gathered = self.gather(image_features, text_features)
        logits, rows = pair_logits(
            self.gather, image_features, text_features, gathered, logit_scale, logit_bias
        )
        loss = (F.cross_entropy(logits[0], rows) + F.cross_entropy(logits[1], rows)) / 2
        return {"contrastive_loss": loss} if output_dict else loss


def pair_logits(
    gather: Gather,
    image_features: Tensor,
    text_features: Tensor,
    gathered: Gathered,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The logits of image → text and text → image, and every row's own column.

    In open_clip's own order of operations, which gives its own bits.
    """
    images, texts = gathered
    if gather.anchors_are_local or gather.world_size == 1:
        logits = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
    else:
        per_image = logit_scale * images @ texts.T
        logits = per_image, per_image.T
    if logit_bias is not None:
        logits = logits[0] + logit_bias, logits[1] + logit_bias
    rows = gather.first_row(len(image_features)) + torch.arange(len(logits[0]), device=images.device)
    return logits, rows
