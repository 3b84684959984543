"""SigLIP's loss."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.checks import InputWarning, check_bias
from rankloss.distributed import Gather, GatherOption
from rankloss.losses.gathering import StreamedLoss, gather_of_open_clip
from rankloss.options import check_choice
from rankloss.precision import nan_unless_finite, outside_graphs
from rankloss.sigmoid import pair_sigmoid


class SigLipLoss(StreamedLoss):
    r"""SigLIP's loss: every pair of an image and a text is a decision of its own, whether they match.

        L = −(1/N)·Σ_ij log σ(z_ij·(s·v_i·t_j + b)),   z_ij = 1 where i = j, else −1

    It takes the arguments of open_clip's SigLipLoss. Where any of them is given, they all mean what they mean
    there, with open_clip's defaults: ``SigLipLoss(dist_impl="gather")`` is a loss of one process. Where none
    is given, ``gather`` holds.

    Memory: up to its budget the loss is open_clip's formula, with the same bits in one process. A
    batch whose logits take more is computed in chunks of images, value and gradient together, in float32 at
    least; it differs from the formula by rounding, that of half precision where the formula's logits are
    half. O(N·D) is kept for the backward pass and O(chunk·N) is held during the forward pass. The dtype of
    the result is the same on both sides.

    Several processes: open_clip's loss of a process is the sum over its own images and all texts, divided by
    the number of its own images. So is this one with both flags of ``gather``, and DDP's average is the loss,
    and its gradient that, of the whole batch. Only texts are gathered then. Without ``gather_with_grad`` the
    other processes' features are constants, the own ones never are.

    Args:
        cache_labels: accepted for open_clip's sake; there are no labels to cache.
        rank: this process's rank; open_clip's argument, its default is 0.
        world_size: the number of processes; open_clip's argument, its default is 1: nothing is gathered.
        dist_impl: ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``, open_clip's ways of exchanging
            texts. They give one value, up to rounding; here texts are gathered whichever is named.
        gather: how features of other processes are gathered. None: from the default process group, if one of
            more than one process is initialised, exactly. False: not at all. Else a :class:`rankloss.Gather`.
        **options: ``chunk_size`` and ``memory_budget``, see :class:`rankloss.RankOptions`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; ``logit_scale``: the multiplier s
        itself, not its logarithm; ``logit_bias``: b, None for 0. Both are a number or a tensor of one
        element. The result is a scalar in nats, in the dtype in which torch computes the formula from the
        features, or with ``output_dict=True`` ``{"contrastive_loss": …}``.

    Raises:
        ValueError: for open_clip's arguments beside ``gather``, an unknown ``dist_impl``, or a negative
            budget; in ``forward`` for features that are not two floating-point matrices of one shape with at
            least one row, a bias that is not one number, or a scale that is not one positive number (its
            sign is not checked on an accelerator, where reading it would wait).

    References:
        "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.

    Example:
        >>> v = torch.eye(2)
        >>> round(SigLipLoss()(v, v, logit_scale=1.0).item(), 4)  # log(1 + 1/e) + log 2
        1.0064
    """

    def __init__(
        self,
        cache_labels: bool | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
        *,
        gather: GatherOption = None,
        **options: Any,
    ) -> None:
        check_choice("dist_impl", dist_impl, (None, "bidir", "shift", "reduce", "gather"))
        super().__init__(
            gather_of_open_clip(
                gather,
                Gather(rank=0, world_size=1),
                cache_labels,
                dist_impl,
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
            logit_bias: b.
            output_dict: return a dict.
        """
        self.check_inputs(image_features, text_features, logit_scale)
        check_bias(logit_bias, image_features)
        self._warn_of_no_bias(logit_bias)
        gather = self.gather
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        image_features, text_features = image_features.to(dtype), text_features.to(dtype)
        # An image is a row, a text is not: its own gradient has to come through the gathering.
        images = image_features if gather.anchors_are_local else gather.items(image_features)
        texts = gather.items(text_features, are_anchors=False)
        first_row = gather.first_row(len(image_features))
        if self.fits(len(images), len(texts), images, texts):
            loss = _whole(images, texts, logit_scale, logit_bias, first_row)
        else:
            with torch.no_grad():  # probe the output dtype, which autocast decides, with one pair
                dtype = _whole(images[:1], texts[:1], logit_scale, logit_bias, 0).dtype
            bias = 0.0 if logit_bias is None else logit_bias
            chunk_size = self._options.chunk_size
            loss = pair_sigmoid(images, texts, logit_scale, bias, first_row, chunk_size).to(dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def _warn_of_no_bias(self, logit_bias: Tensor | float | None) -> None:
        if logit_bias is None and "logit_bias" not in self._looked_at:
            self._looked_at.add("logit_bias")
            warnings.warn(
                "logit_bias is not given, so it is 0. SigLIP starts from −10: without a bias the many pairs "
                "that do not match dominate; open_clip's models have one with --siglip or init_logit_bias",
                InputWarning,
                stacklevel=3,
            )


def _whole(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    first_row: int,
) -> Tensor:
    """The formula; the order of operations and the dtypes are open_clip's, so the bits are too.

    Only where a feature is infinite, or a product could be, another value is given, NaN: the sigmoid loss of
    it could be a number.
    """
    logits = logit_scale * images @ texts.T
    if logit_bias is not None:
        logits += logit_bias  # in place: a bias of shape [1] does not change the dtype
    own = first_row + torch.arange(len(images), device=images.device)
    labels = 2 * (own[:, None] == torch.arange(len(texts), device=images.device)).to(images.dtype) - 1
    loss = -F.logsigmoid(labels * logits).sum() / len(images)
    return nan_unless_finite(loss, images, texts).to(loss.dtype)
