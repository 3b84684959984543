"""CLIP's own loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.checks import check_bias
from rankloss.distributed import Gather, Gathered, GatherOption
from rankloss.losses.gathering import StreamedLoss, gather_of_open_clip
from rankloss.precision import outside_graphs


class ClipLoss(StreamedLoss):
    r"""CLIP's symmetric InfoNCE: ``½[CE(s·V·Tᵀ) + CE(s·T·Vᵀ)]``, the target of row i being i.

    It takes the arguments of open_clip's ClipLoss. Where any of them is given, they all mean what they mean
    there, with open_clip's defaults: ``ClipLoss(local_loss=True)`` is a loss of one process. Where none is
    given, ``gather`` holds.

    Memory: up to its budget the loss is open_clip's formula, with the same bits. A batch whose logits
    take more is computed in chunks of rows, value and gradient together, in float32 at least; it differs from
    the formula by rounding, that of half precision where the formula's logits are half. O(N·D) is kept for
    the backward pass and O(chunk·N) is held during the forward pass. The dtype of the result is the same on
    both sides.

    Args:
        local_loss: compute only this process's rows; open_clip's argument, its default is False.
        gather_with_grad: pass gradients through the gathering; open_clip's argument, its default is False.
        cache_labels: accepted for open_clip's sake; labels are not cached.
        rank: this process's rank; open_clip's argument, its default is 0.
        world_size: the number of processes; open_clip's argument, its default is 1: nothing is gathered.
        use_horovod: must be false; open_clip's argument.
        gather: how features of other processes are gathered. None: from the default process group, if one of
            more than one process is initialised, exactly. False: not at all. Else a :class:`rankloss.Gather`.
        **options: ``chunk_size`` and ``memory_budget``, see :class:`rankloss.RankOptions`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; ``logit_scale``: the multiplier s
        itself, not its logarithm, a number or a tensor of one element. The result is a scalar in nats, in the
        dtype in which torch computes the cross-entropy of the logits, or with ``output_dict=True``
        ``{"contrastive_loss": …}``. A ``logit_bias``, one number, is added to all logits and changes nothing.

    Raises:
        ValueError: for open_clip's arguments beside ``gather``, or a negative budget; in ``forward`` for
            features that are not two floating-point matrices of one shape with at least one row, a scale that
            is not positive (not checked on an accelerator, where reading it would wait), or a bias that is
            not one number.

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
        **options: Any,
    ) -> None:
        if use_horovod:
            raise ValueError(f"use_horovod is not supported; got {use_horovod!r}")
        super().__init__(
            gather_of_open_clip(
                gather,
                _ONE_PROCESS,
                cache_labels,
                use_horovod,
                local_loss=local_loss,
                gather_with_grad=gather_with_grad,
                rank=rank,
                world_size=world_size,
            ),
            options,
        )

    @outside_graphs
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` a dict of it.

        Args:
            image_features: ``[N, D]``.
            text_features: ``[N, D]``.
            logit_scale: the multiplier s.
            logit_bias: added to all logits.
            output_dict: return a dict.
        """
        self.check_inputs(image_features, text_features, logit_scale)
        check_bias(logit_bias, image_features)
        pairs = len(image_features) * self.gather.place[1]
        rows = len(image_features) if self.gather.anchors_are_local else pairs
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        features = image_features.to(dtype), text_features.to(dtype)
        if self.fits(rows, pairs, *features):
            loss = _whole(self.gather, *features, self.whole_batch(*features), logit_scale, logit_bias)
        else:
            with torch.no_grad():  # probe the output dtype, which autocast decides, with one pair
                pair = features[0][:1], features[1][:1]
                dtype = _whole(_ONE_PROCESS, *pair, pair, logit_scale, logit_bias).dtype
            loss, *_ = self.weighted_terms((*features, logit_scale), self._options, (1.0, 0.0, 0.0))
            loss = with_idle_bias(loss, logit_bias).to(dtype)
        return {"contrastive_loss": loss} if output_dict else loss


def _whole(
    gather: Gather,
    image_features: Tensor,
    text_features: Tensor,
    gathered: Gathered,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
) -> Tensor:
    """The formula; the order of operations is open_clip's, so the bits are too."""
    images, texts = gathered
    if gather.anchors_are_local or gather.place[1] == 1:
        logits = logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T
    else:
        per_image = logit_scale * images @ texts.T
        logits = per_image, per_image.T
    if logit_bias is not None:
        logits = logits[0] + logit_bias, logits[1] + logit_bias
    rows = gather.first_row(len(image_features)) + torch.arange(len(logits[0]), device=images.device)
    return (F.cross_entropy(logits[0], rows) + F.cross_entropy(logits[1], rows)) / 2


def with_idle_bias(loss: Tensor, logit_bias: Tensor | float | None) -> Tensor:
    """The loss: a bias moves all logits alike. It stays in the graph, as DDP expects of a parameter."""
    return loss + 0 * logit_bias.sum() if isinstance(logit_bias, Tensor) else loss


_ONE_PROCESS = Gather.of(False)
