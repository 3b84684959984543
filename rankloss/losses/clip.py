"""CLIP's own loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.distributed import Gather, Gathered, GatherOption
from rankloss.losses.gathering import GatheringLoss

__all__ = ["ClipLoss", "pair_logits"]


class ClipLoss(GatheringLoss):
    r"""CLIP's symmetric InfoNCE: ``½[CE(s·V·Tᵀ) + CE(s·T·Vᵀ)]``, the target of row i being i.

    It takes the arguments of open_clip's ClipLoss and gives the same bits. Where any of them is given, they
    all mean what they mean there, with open_clip's defaults: ``ClipLoss(local_loss=True)`` is a loss of one
    process. Where none is given, ``gather`` holds.

    Args:
        local_loss: compute only this process's rows; open_clip's argument, its default is False.
        gather_with_grad: pass gradients through the gathering; open_clip's argument, its default is False.
        cache_labels: accepted for open_clip's sake; labels are not cached.
        rank: this process's rank; open_clip's argument, its default is 0.
        world_size: the number of processes; open_clip's argument, its default is 1: nothing is gathered.
        use_horovod: must be false; open_clip's argument.
        gather: how features of other processes are gathered. None: from the default process group, if one of
            more than one process is initialised, exactly. False: not at all. Else a :class:`rankloss.Gather`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; ``logit_scale``: the multiplier s
        itself, not its logarithm, a number or a tensor of one element. The result is a scalar in nats, in the
        dtype in which torch computes the cross-entropy of the logits, or with ``output_dict=True``
        ``{"contrastive_loss": …}``. A ``logit_bias`` is added to all logits and changes nothing.

    Raises:
        ValueError: for open_clip's arguments beside ``gather``; in ``forward`` for features that are not two
            floating-point matrices of one shape with at least two rows in the whole batch, or a scale that is
            not positive (not checked on an accelerator, where reading it would wait).

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
        local_loss: bool | None = None,
        gather_with_grad: bool | None = None,
        cache_labels: bool | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool | None = None,
        *,
        gather: GatherOption = None,
    ) -> None:
        given = {
            name: value
            for name, value in (
                ("local_loss", local_loss),
                ("gather_with_grad", gather_with_grad),
                ("cache_labels", cache_labels),
                ("rank", rank),
                ("world_size", world_size),
                ("use_horovod", use_horovod),
            )
            if value is not None
        }
        if given:
            if gather is not None:
                raise ValueError(f"gather stands for open_clip's arguments; got it beside {', '.join(given)}")
            if given.pop("use_horovod", False):
                raise ValueError("use_horovod is not supported; got True")
            given.pop("cache_labels", None)
            gather = Gather(**{**_OPEN_CLIPS_DEFAULTS, **given})  # type: ignore[arg-type]
        super().__init__(gather)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        gathered: Gathered | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` a dict of it.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            logit_bias: added to all logits.
            output_dict: return a dict.
            gathered: ``self.gather(image_features, text_features)``, from a caller that has it already.
        """
        self.check_inputs(image_features, text_features, logit_scale)
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
    logit_bias: Tensor | float | None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The logits of image → text and text → image, and each row's own column.

    The order of operations is open_clip's, so the bits are too.
    """
    images, texts = gathered
    if gather.anchors_are_local or gather.place[1] == 1:
        logits = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
    else:
        per_image = logit_scale * images @ texts.T
        logits = per_image, per_image.T
    if logit_bias is not None:
        logits = logits[0] + logit_bias, logits[1] + logit_bias
    rows = gather.first_row(len(image_features)) + torch.arange(len(logits[0]), device=images.device)
    return logits, rows


_OPEN_CLIPS_DEFAULTS = {"local_loss": False, "gather_with_grad": False, "rank": 0, "world_size": 1}
