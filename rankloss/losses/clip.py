"""CLIP's own loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloss.losses.gathering import Number, StreamedLoss


class ClipLoss(StreamedLoss):
    r"""CLIP's symmetric InfoNCE: ``½[CE(s·V·Tᵀ) + CE(s·T·Vᵀ)]``, with target i for row i.

    Memory: within the budget the loss is open_clip's formula, bit for bit. A batch with more logits is
    computed in chunks of rows, value and gradient together, in float32 at least. It differs from the formula
    by rounding; if the formula's logits are half precision, by their rounding. The backward pass keeps
    O(N·D), the forward pass holds O(chunk·N). Features in float16, where the formula's sum over a large batch
    overflows, are always computed in chunks.

    Args:
        gather: gathering of other processes' features. None: exact, from the default process group, if one of
            several processes is initialised. False: none. Otherwise a :class:`rankloss.Gather`.
        chunk_size: see :class:`rankloss.RankOptions`.
        memory_budget: see :class:`rankloss.RankOptions`.

    Shapes:
        ``image_features`` and ``text_features``: ``[N, D]``, unit-norm; ``logit_scale``: the multiplier s
        itself, not its logarithm, a number or a tensor of one element. The result is a scalar in nats (within
        the budget in the dtype of torch's cross-entropy of the logits), or with ``output_dict=True``
        ``{"contrastive_loss": …}``. A ``logit_bias``, one number, is added to all logits and changes nothing.

    Raises:
        ValueError: for a negative budget; in ``forward`` for features that are not two floating-point
            matrices of one shape with at least one row, a scale that is not positive (not checked on an
            accelerator, where reading it would wait), or a bias that is not one number.

    References:
        "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
        fig. 3.

    Example:
        >>> v = torch.eye(2)
        >>> round(ClipLoss()(v, v, logit_scale=1.0).item(), 4)  # log(1 + 1/e)
        0.3133
    """

    def _whole(self, images: Tensor, texts: Tensor, scale: Number, bias: Number | None) -> Tensor:
        all_images, all_texts = self.gather(images, texts)
        if all_images is images or self.gather.anchors_are_local:
            logits = scale * images @ all_texts.T, scale * texts @ all_images.T
        else:
            per_image = scale * all_images @ all_texts.T
            logits = per_image, per_image.T
        if bias is not None:
            logits = logits[0] + bias, logits[1] + bias
        own = torch.arange(len(logits[0]), device=images.device) + self.gather.first_row(len(images))
        return (F.cross_entropy(logits[0], own) + F.cross_entropy(logits[1], own)) / 2

    def _streamed(self, images: Tensor, texts: Tensor, scale: Number, bias: Number | None) -> Tensor:
        return self.weighted_terms((images, texts, scale, bias), self._options, (1.0, 0.0, 0.0))[0]
